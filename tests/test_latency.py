"""latency.py: every figure exact, with a clock and an engine whose times are known."""

import numpy as np
import pytest

from lora_kit import latency
from lora_kit.errors import RecipeError
from lora_kit.latency import Limits, Trace


class Clock:
    """Stands still but when it is told to go on."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def tokens_with(clock, first, gaps):
    def tokens():
        clock.now += first
        yield 1
        for gap in gaps:
            clock.now += gap
            yield 2

    return tokens


def traced(first, gaps, clock=None):
    clock = clock or Clock()
    return latency.trace(tokens_with(clock, first, gaps), prompt_tokens=7, new_tokens=1 + len(gaps), clock=clock)


def test_one_request():
    found = traced(0.5, [0.1, 0.2, 0.3])
    assert found.first_token == pytest.approx(0.5) and found.gaps == pytest.approx((0.1, 0.2, 0.3))
    assert found.per_token == pytest.approx(0.2) and found.end_to_end == pytest.approx(1.1)


def test_a_single_token_has_no_gap():
    found = traced(0.5, [])
    assert found.gaps == () and found.per_token is None and found.end_to_end == pytest.approx(0.5)
    assert latency.figures([found])["gap_p50"] is None and latency.figures([found])["per_token_mean"] is None


def test_figures_of_many():
    clock, generator = Clock(), np.random.default_rng(0)
    firsts, gaps = generator.uniform(0.1, 1, 40), generator.uniform(0.01, 0.1, (40, 5))
    traces = [traced(first, list(each), clock) for first, each in zip(firsts, gaps, strict=True)]
    found = latency.figures(traces, Limits(first_token=0.5, per_token=0.06))
    for percentile in (50, 90, 99):
        assert found[f"first_token_p{percentile}"] == pytest.approx(np.percentile(firsts, percentile))
        assert found[f"gap_p{percentile}"] == pytest.approx(np.percentile(gaps, percentile))
        assert found[f"end_to_end_p{percentile}"] == pytest.approx(np.percentile(firsts + gaps.sum(1), percentile))
    assert found["per_token_mean"] == pytest.approx(gaps.mean())
    spent = firsts.sum() + gaps.sum()
    assert found["requests_per_second"] == pytest.approx(40 / spent)
    assert found["output_tokens_per_second"] == pytest.approx(240 / spent)
    assert found["input_tokens_per_second"] == pytest.approx(280 / spent)
    good = ((firsts <= 0.5) & (gaps.mean(1) <= 0.06)).sum()
    assert 0 < good < 40 and found["goodput"] == pytest.approx(good / spent)
    assert latency.figures(traces)["goodput"] is None


def test_requests_that_overlap_are_counted_over_the_whole():
    traces = [Trace(started=0.0, token_times=(1.0, 4.0), prompt_tokens=2),
              Trace(started=0.5, token_times=(1.5, 2.0), prompt_tokens=2)]
    assert latency.figures(traces)["requests_per_second"] == pytest.approx(2 / 4)


@pytest.mark.parametrize("number", [2, 4])
def test_other_than_the_tokens_asked_for_is_an_error(number):
    clock = Clock()
    with pytest.raises(ValueError, match=f"{number} tokens came where 3"):
        latency.trace(tokens_with(clock, 0.1, [0.1] * (number - 1)), prompt_tokens=1, new_tokens=3, clock=clock)


def test_limits():
    trace = traced(0.5, [0.1, 0.3])
    assert Limits().keeps(trace) and Limits(first_token=0.5001).keeps(trace)
    assert not Limits(first_token=0.4).keeps(trace)
    assert not Limits(per_token=0.1).keeps(trace) and Limits(per_token=0.21).keeps(trace)


def test_pieces_of_several_tokens_count_by_their_tokens():
    found = Trace(started=0.0, token_times=(1.0, 2.0, 3.0), prompt_tokens=2, num_tokens=9)
    assert found.per_token == pytest.approx(2 / 8) and found.output_tokens == 9
    assert latency.figures([found])["output_tokens_per_second"] == pytest.approx(3)
    assert Trace(started=0.0, token_times=(1.0,), prompt_tokens=2, num_tokens=9).per_token is None


def test_limits_in_words():
    limits = latency.parse_limits(["ttft:500ms", "tpot:0.05s", "e2el:2000"])
    assert limits == Limits(first_token=0.5, per_token=0.05, end_to_end=2.0)
    assert limits.text() == "ttft 500 ms, tpot 50 ms, e2el 2 s" and latency.parse_limits([]) is None
    assert not Limits(end_to_end=0.8).keeps(traced(0.5, [0.1, 0.3])) and Limits(end_to_end=1).keeps(traced(0.5, [0.1]))
    for wrong in ("ttft", "itl:5ms", "ttft:-1", "ttft:0ms", "ttft:5h", "ttft=5"):
        with pytest.raises(RecipeError, match="is no limit; write ttft, tpot, e2el"):
            latency.parse_limits([wrong])
    with pytest.raises(RecipeError, match="is a second limit on ttft"):
        latency.parse_limits(["ttft:5", "ttft:6"])
