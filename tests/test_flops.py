"""flops.py: counts beside torch's own counter and the formulas of memory.py, and a ceiling that can be one."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lora_kit import adapter, flops, hardware, memory, model
from lora_kit.loss import loss_sum
from lora_kit.packing import packed_batch_of, use_packing
from lora_kit.recipe import LoraSection
from lora_kit.types import Example
from tests import tiny

LORA = LoraSection(rank=4, alpha=8)
LENGTHS, NUM_TRAINED = (11, 7, 5), 12


def adapted(folder, lora: LoraSection = LORA):
    return adapter.add_adapter(model.load_base(folder, dtype="fp32"), lora, 0)


def batch():
    import numpy

    rng = numpy.random.default_rng(0)
    return packed_batch_of([Example(
        tokens_T=rng.integers(3, 300, length).astype(numpy.int32), origin="row",
        loss_mask_T=numpy.array([0] * (length - 4) + [1] * 4, numpy.uint8)) for length in LENGTHS], "cpu")


@pytest.mark.parametrize("tied", [True, False])
def test_products_are_those_that_torch_counts(tmp_path, tied):
    net = adapted(tiny.save_model(tmp_path, tie_word_embeddings=tied)[0])
    use_packing(net.get_base_model())
    with FlopCounterMode(display=False) as counter:
        loss_sum(net, batch()).backward()
    done = counter.get_flop_counts()["Global"]
    products = sum(count for name, count in done.items() if str(name) in ("aten.mm", "aten.addmm"))
    cost = flops.count(net)
    needed = dataclasses.replace(cost, per_pair=0.0).of_rows(LENGTHS, NUM_TRAINED)
    # Nothing asks for the gradient of what goes into the first block.
    first = net.get_base_model().model.layers[0].self_attn
    into_first = sum(2 * parameter.numel() for layer in (first.q_proj, first.k_proj, first.v_proj)
                     for name, parameter in layer.named_parameters() if "lora_B" not in name)
    assert products == needed - sum(LENGTHS) * into_first


def test_all_of_it_is_what_memory_py_derives_from_the_config(tmp_path):
    net = adapted(tiny.save_model(tmp_path)[0])
    shape = memory.shape_of(json.loads((tmp_path / "config.json").read_text()))
    for length, trained in ((16, 5), (300, 299)):
        derived = length * memory.training_flops_per_token(
            shape, LORA, context=(length + 1) / 2, trained_share=trained / length)
        assert flops.count(net).of_rows([length], trained) == pytest.approx(derived)


def test_pairs_by_hand():
    for length in (1, 4, 9):
        for window in (None, 1, 3, 20):
            seen = sum(1 for query in range(length) for key in range(query + 1)
                       if window is None or query - key < window)
            assert flops.num_pairs(length, window) == seen, (length, window)


def test_windows_count_by_layer(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    net = Gemma2ForCausalLM(Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, sliding_window=4))
    cost = flops.count(net)
    assert dict(cost.layers) == {None: 1, 4: 2}
    plain = dataclasses.replace(cost, layers=((None, 3),))
    assert cost.of_rows([3], 1) == plain.of_rows([3], 1)
    fewer = 2 * (flops.num_pairs(10) - flops.num_pairs(10, 4)) * 12 * 4 * 8
    assert plain.of_rows([10], 1) - cost.of_rows([10], 1) == fewer


def test_whole_modules_and_rows_of_the_embedding(tmp_path):
    folder = tiny.save_model(tmp_path, tie_word_embeddings=False)[0]
    plain = flops.count(adapted(folder))
    saved = flops.count(adapted(folder, LORA.model_copy(update={"modules_to_save": ("lm_head",)})))
    assert plain.per_trained_token == 4 * 320 * 64 and saved.per_trained_token == 6 * 320 * 64
    assert saved.per_token == plain.per_token
    embedded = flops.count(adapted(folder, LORA.model_copy(update={"targets": ("q_proj", "embed_tokens")})))
    only_q = flops.count(adapted(folder, LORA.model_copy(update={"targets": ("q_proj",)})))
    assert embedded.per_token - only_q.per_token == 6 * 4 * 64  # the factor that multiplies; the other is looked up


def test_a_4_bit_weight_counts_for_what_it_stands_for():
    class Packed:
        quant_state = type("State", (), {"shape": (64, 32)})
        shape = (1024, 1)

    assert flops._shape(Packed()) == (64, 32)


def test_what_cannot_be_counted_is_not(tmp_path):
    net = adapted(tiny.save_model(tmp_path)[0])
    net.config.num_experts = 8
    assert flops.count(net) is None
    del net.config.num_experts
    net.get_base_model().model.conv = torch.nn.Conv1d(2, 2, 3)
    assert flops.count(net) is None
    del net.get_base_model().model.conv
    assert flops.count(net) is not None
    net.config.layer_types = ["linear_attention", "full_attention"]
    assert flops.count(net) is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ceiling_is_near_what_numpy_reaches_and_draws_nothing(precision):
    before = torch.get_rng_state()
    rate = flops.measure_ceiling("cpu", precision, seconds=0.1)
    assert (torch.get_rng_state() == before).all()
    numpys = hardware.measure_matrix_gflops(seconds=0.1) * 1e9
    assert numpys / 20 < rate < numpys * 40
