"""bench_sweep.py: warm-up, repeats and the figures of each shape, exact by an engine whose times are known."""

from __future__ import annotations

import itertools

import pytest

from lora_kit import bench_sweep
from lora_kit.errors import InternalError, MachineError
from lora_kit.latency import Limits
from tests.test_latency import Clock


class FakeEngine:
    """Reads a token of a batch in 1 ms and writes one for each row in 10 ms, times ``factors`` in turn."""

    name = "fake"

    def __init__(self, factors=None, most_rows=99):
        self.clock, self.factors = Clock(), iter(factors or itertools.repeat(1.0))
        self.most_rows, self.batches = most_rows, []

    def time_once(self, prompts, new_tokens):
        if len(prompts) > self.most_rows:
            raise MachineError("engine fake", f"takes at most {self.most_rows} prompts at once")
        factor = next(self.factors)
        prefill, decode = factor * 0.001 * sum(map(len, prompts)), factor * 0.01 * (new_tokens - 1)
        self.clock.now += prefill + 0.002 + decode
        self.batches.append(prompts)
        return {"prefill_seconds": prefill, "first_token_seconds": prefill + 0.002, "decode_seconds": decode,
                "tokens_generated": len(prompts) * new_tokens}


def draw(*, num, length, seed):
    return [[seed + number] * length for number in range(num)]


def batches(number, size=1, length=10):
    return [draw(num=size, length=length, seed=100 * each) for each in range(number)]


def test_repeats_begin_when_two_calls_are_alike():
    engine = FakeEngine([3, 2, 1, 1, 1, 2, 3, 9])
    timed = bench_sweep.time_shape(engine, batches(9), 6, least=3, clock=engine.clock)
    assert timed["warm_ups"] == pytest.approx([3 * 0.06 + 0.002, 2 * 0.06 + 0.002, 0.062, 0.062])
    assert [each["decode_seconds"] for each in timed["times"]] == pytest.approx([0.05, 0.1, 0.15])
    assert engine.batches == batches(7)


def test_seconds_are_used_until_it_is_narrow_or_they_are_spent():
    even = FakeEngine()
    assert len(bench_sweep.time_shape(even, batches(99), 6, least=3, seconds=60, clock=even.clock)["times"]) == 3
    wild = FakeEngine(itertools.cycle([1, 3]))
    timed = bench_sweep.time_shape(wild, batches(99), 6, least=3, seconds=2, clock=wild.clock)
    assert len(timed["warm_ups"]) == bench_sweep.MOST_WARM_UPS and timed["half_width"] > 0.02
    assert sum(map(bench_sweep.whole, timed["times"])) == pytest.approx(2, abs=0.19)
    few = FakeEngine(itertools.cycle([1, 3]))  # whose prompts come to an end before
    assert len(bench_sweep.time_shape(few, batches(9), 6, least=3, seconds=60, clock=few.clock)["times"]) == 5


def test_how_many_prompts_are_drawn():
    assert bench_sweep.most_repeats(3, None, batch_size=8, prompt_tokens=10**6) == 3
    assert bench_sweep.most_repeats(3, 9.0, batch_size=1, prompt_tokens=128) == bench_sweep.MOST_REPEATS
    assert bench_sweep.most_repeats(3, 9.0, batch_size=8, prompt_tokens=5000) == 50
    assert bench_sweep.most_repeats(3, 9.0, batch_size=8, prompt_tokens=10**6) == 3


def test_other_than_the_tokens_asked_for_is_an_error():
    engine = FakeEngine()
    engine.time_once = lambda prompts, new_tokens: {"tokens_generated": 5}
    with pytest.raises(InternalError, match="generated 5 tokens where 6 were asked for"):
        bench_sweep.time_shape(engine, batches(9), 6, least=3)


def sweep(engine, **options):
    options = {"batch_size": 2, "prompt_tokens": 10, "new_tokens": 6, "batch_sizes": [1, 4], "depths": [0, 90],
               "least": 3, "seconds": None, "limits": None, "seed": 1, **options}
    return bench_sweep.sweep(engine, draw, clock=engine.clock, **options)


def test_every_figure_of_a_shape():
    found = sweep(FakeEngine())
    assert [(each["batch_size"], each["depth"], each["prompt_tokens"]) for name in ("batch_size", "depth")
            for each in found[name]] == [(1, 0, 10), (4, 0, 10), (2, 0, 10), (2, 90, 100)]
    for each in found["batch_size"] + found["depth"]:
        rows, read = each["batch_size"], each["batch_size"] * each["prompt_tokens"]
        whole = 0.001 * read + 0.002 + 0.05
        assert each["first_token_seconds"] == pytest.approx(0.001 * read + 0.002)
        assert each["per_token_seconds"] == pytest.approx(0.01) and each["whole_seconds"] == pytest.approx(whole)
        assert each["prefill_tokens_per_second"] == pytest.approx(1000)
        assert each["decode_tokens_per_second"] == pytest.approx(100 * rows)
        assert each["requests_per_second"] == pytest.approx(rows / whole) and each["goodput"] is None
        assert each["repeats"] == 3 and each["half_width"] == pytest.approx(0, abs=1e-9)
    assert sweep(FakeEngine(), batch_sizes=[]).keys() == {"depth"} and sweep(
        FakeEngine(), batch_sizes=[], depths=[]) == {}


def test_no_shape_asks_what_one_before_it_asked():
    engine = FakeEngine()
    seeds = []
    sweep_draw = lambda **asked: seeds.append(asked["seed"]) or draw(**asked)  # noqa: E731
    bench_sweep.sweep(engine, sweep_draw, batch_size=2, prompt_tokens=10, new_tokens=6, batch_sizes=[1, 4],
                      depths=[0, 90], least=3, seconds=None, limits=None, seed=5, clock=engine.clock)
    assert seeds == [5, 6, 7, 8]


def test_goodput_counts_batches_that_keep_the_limits():
    # After two alike to get warm: 62 ms, 62 ms and 122 ms, of which the last is over the limit.
    engine = FakeEngine(itertools.chain([1, 1], [1, 1, 2]))
    found = sweep(engine, batch_sizes=[1], depths=[], limits=Limits(end_to_end=0.1))["batch_size"][0]
    assert found["requests_per_second"] == pytest.approx(3 / 0.246)
    assert found["goodput"] == pytest.approx(2 / 0.246)
    engine = FakeEngine(itertools.chain([1, 1], [1, 1, 2]))
    per_token = sweep(engine, batch_sizes=[1], depths=[], limits=Limits(per_token=0.005))["batch_size"][0]
    assert per_token["goodput"] == 0


def test_a_shape_that_cannot_be_measured_leaves_the_others():
    found = sweep(FakeEngine(most_rows=2), depths=[])["batch_size"]
    assert found[0]["repeats"] == 3 and found[1]["repeats"] == 0 and found[1]["decode_tokens_per_second"] is None
    ((title, columns, rows),) = bench_sweep.tables({"base": {"batch_size": found}}, None)
    assert rows[1][:4] == ["base", "4", "0", "–"] and rows[1][-1] == "engine fake: takes at most 2 prompts at once"
    assert title == "More prompts at once, 10 + 6 tokens" and columns[-1] == "requests/s"


def test_tables():
    limits = Limits(first_token=0.5)
    found = {"base": sweep(FakeEngine(), limits=limits), "merged": sweep(FakeEngine(), limits=limits, depths=[])}
    batch, depth = bench_sweep.tables(found, limits)
    assert batch[0] == "More prompts at once, 10 + 6 tokens; good: ttft 500 ms" and "depth" not in batch[1]
    assert [row[:2] for row in batch[2]] == [["base", "1"], ["base", "4"], ["merged", "1"], ["merged", "4"]]
    assert depth[1][:3] == ("artifact", "batch", "depth") and depth[1][-1] == "good/s"
    assert [row[2] for row in depth[2]] == ["0", "90"]
    assert all(len(row) == len(columns) for _, columns, rows in (batch, depth) for row in rows)
    assert list(bench_sweep.tables({}, None)) == []
