"""outlook.py: every figure against the same arithmetic done by hand."""

import pytest

from lora_kit import devices, memory, outlook
from lora_kit.outlook import Rates, Request
from lora_kit.recipe import CostSection, LoraSection

SHAPE = memory.shape_of({"model_type": "llama", "vocab_size": 1000, "hidden_size": 100, "intermediate_size": 300,
                         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                         "head_dim": 25, "tie_word_embeddings": True})
LINEAR = 2 * (100 * 100 * 2 + 2 * 50 * 100 + 3 * 300 * 100)
RATES = Rates(train_flops_per_second=1e9, read_flops_per_second=1e9, write_bytes_per_second=1e8, source="a test")


def test_reading_is_bound_by_operations_and_writing_by_bytes():
    found = outlook.request_seconds(SHAPE, RATES, Request(input_tokens=100, output_tokens=20), weight_bytes=1e6)
    per_token = 2 * (LINEAR + 1000 * 100) + 4 * 2 * 4 * 25 * 50
    assert found.reading == pytest.approx(100 * per_token / 1e9)
    cache = 2 * 2 * 2 * 25 * 2 * 110
    assert found.writing == pytest.approx(20 * (1e6 + cache) / 1e8) and found.total == found.reading + found.writing


def test_a_prefix_cache_saves_reading_alone():
    plain = outlook.request_seconds(SHAPE, RATES, Request(input_tokens=100, output_tokens=20), weight_bytes=1e6)
    cached = outlook.request_seconds(SHAPE, RATES, Request(input_tokens=100, output_tokens=20, cached_tokens=60),
                                     weight_bytes=1e6)
    assert cached.writing == plain.writing and 0.4 < cached.reading / plain.reading < 0.5


def test_speculative_decoding_by_the_papers_formula():
    assert outlook.tokens_per_pass(0.0) == 1 and outlook.tokens_per_pass(1.0) == 5
    assert outlook.tokens_per_pass(0.5, 2) == pytest.approx(1 + 0.5 + 0.25)
    once = outlook.request_seconds(SHAPE, RATES, Request(input_tokens=10, output_tokens=20), weight_bytes=1e6)
    twice = outlook.request_seconds(SHAPE, RATES, Request(input_tokens=10, output_tokens=20), weight_bytes=1e6,
                                    tokens_per_pass=2.0, draft_share=0.1)
    assert twice.writing == pytest.approx(once.writing / 2 * 1.1) and twice.reading == once.reading


def test_training_takes_its_operations_over_the_rate():
    lora = LoraSection(rank=2)
    flops = memory.training_flops_per_token(SHAPE, lora, context=20, trained_share=0.25)
    found = outlook.train_seconds(SHAPE, lora, RATES, num_tokens=8000, num_trained=2000, mean_length=40)
    assert found == pytest.approx(8000 * flops / 1e9)
    again = outlook.train_seconds(SHAPE, lora, RATES, num_tokens=8000, num_trained=2000, mean_length=40,
                                  checkpointing=True)
    assert again > 1.2 * found


@pytest.mark.parametrize(("text", "seconds"), [("12h", 43200), ("7d", 604800), ("2w", 1209600)])
def test_periods(text, seconds):
    assert outlook.period_seconds(text) == seconds
    for wrong in ("7", "0d", "7m", "d7"):
        with pytest.raises(ValueError, match="such as 7d"):
            outlook.period_seconds(wrong)


def test_break_even_in_requests_and_days():
    cost = CostSection(price_per_hour=3.6, requests_per_day=100, retrain_every="7d")
    found = outlook.break_even(3600, 2, cost)
    assert (found.requests, found.days, found.within_period) == (1800, 18, False)
    assert outlook.break_even(100, 2, cost).within_period
    once = CostSection(price_per_hour=3.6, requests_per_day=100)
    assert outlook.break_even(3600, 2, once).within_period is None
    assert outlook.break_even(3600, 2, None).days is None
    assert outlook.price(1000, cost) == pytest.approx(1.0)
    training, inference = outlook.price_per_year(3600, 2, cost)
    assert training == pytest.approx(3.6 * 365 / 7) and inference == pytest.approx(365 * 100 * 2 / 3600 * 3.6)
    assert outlook.price_per_year(3600, 2, once)[0] == pytest.approx(3.6)


def test_rates_of_the_table_are_shares_and_say_so():
    found = outlook.rates_of(devices.named("h100"), 4)
    assert found.train_flops_per_second == pytest.approx(989e12 * 0.35 * 4)
    assert found.read_flops_per_second == pytest.approx(989e12 * 0.5)
    assert found.write_bytes_per_second == pytest.approx(3350e9 * 0.65) and "assumed" in found.source
    assert outlook.rates_of(devices.named("m3-max-36gb")) is None
