"""bench_compare.py: engines with known times, real ones of a tiny model, stored results, and the gate."""

from __future__ import annotations

import csv
import io
import json

import pytest

from lora_kit import bench_compare, isolate
from lora_kit.errors import DataError, InternalError
from tests import tiny_run
from tests.test_bench import FakeTokenizer
from tests.test_latency import Clock


class FakeEngine:
    """Takes its seconds of a clock for each call: the prefill, and twice that to decode."""

    num_tokens, tokenizer = 100, FakeTokenizer()

    def __init__(self, name, clock, seconds, order, generated=None):
        self.name, self.clock, self.seconds, self.order = name, clock, iter(seconds), order
        self.prompts, self.generated = [], generated

    def time_once(self, prompts, new_tokens):
        spent = next(self.seconds)
        self.clock.now += 3 * spent
        self.order.append(self.name)
        self.prompts += prompts
        return {"prefill_seconds": spent, "first_token_seconds": spent, "decode_seconds": 2 * spent,
                "tokens_generated": self.generated or len(prompts) * new_tokens}


def take_turns(seconds_a, seconds_b, **options):
    clock, order = Clock(), []
    engines = [FakeEngine("a", clock, seconds_a, order), FakeEngine("b", clock, seconds_b, order)]
    times, warm_ups = bench_compare.take_turns(engines, prompt_tokens=8, new_tokens=3, batch_size=2, seed=0,
                                               clock=clock, **options)
    return times, warm_ups, order, engines


def test_pairs_come_in_turns_with_new_prompts_after_a_stable_warm_up():
    # Warm-up: 3, 2, 1, 1 (stable), then 1 s a call of A and 2 s of B, of which 0.333 and 0.667 are reading.
    times, warm_ups, order, engines = take_turns([1, 2 / 3, 1 / 3] + [1 / 3] * 50, [2, 4 / 3, 2 / 3] + [2 / 3] * 50,
                                                 seconds=30)
    assert warm_ups[0] == pytest.approx([3, 2, 1, 1]) and warm_ups[1] == pytest.approx([6, 4, 2, 2])
    assert len(times[0]) == len(times[1]) == 10  # 30 s over 3 s a pair
    assert order[8:12] == ["a", "b", "b", "a"]
    prompts = [tuple(prompt) for prompt in engines[0].prompts]
    assert len(set(prompts)) == len(prompts) == 2 * 14 and engines[0].prompts == engines[1].prompts
    found = bench_compare.ratios(*times)
    assert found["prefill"].ratio == pytest.approx(0.5) and found["decode"].verdict == "slower"


def test_a_warm_up_that_never_settles_ends_and_pairs_are_never_too_few():
    times, warm_ups, _, _ = take_turns([5, 1] * 20, [1, 5] * 20, seconds=1)
    assert len(warm_ups[0]) == bench_compare.MOST_WARM_UPS and len(times[0]) == 8


def test_other_than_the_tokens_asked_for_is_an_error():
    clock = Clock()
    engines = [FakeEngine("a", clock, [1] * 9, [], generated=5), FakeEngine("b", clock, [1] * 9, [])]
    with pytest.raises(InternalError, match="generated 5 tokens where 6"):
        bench_compare.take_turns(engines, prompt_tokens=8, new_tokens=3, batch_size=2, seed=0, seconds=1, clock=clock)


def test_a_model_against_itself(tiny_model, monkeypatch):
    monkeypatch.setattr(isolate, "call", tiny_run.call_here)
    from lora_kit.types import Artifact

    one = Artifact(name="tiny", path=str(tiny_model), kind="hf", size_bytes=1)
    measured = bench_compare.compare(one, one, prompt_tokens=8, new_tokens=4, batch_size=1, seconds=1, threads=1)
    assert len(measured["a"]["times"]) == len(measured["b"]["times"]) >= 8 and measured["threads"] == 1
    found = bench_compare.ratios(measured["a"]["times"], measured["b"]["times"])
    assert 0.5 < found["decode"].ratio < 2
    table, *lines = bench_compare.parts(measured, found)
    assert [row[0] for row in table[2]] == ["prefill tokens/s", "decode tokens/s"] and "taken in turns" in lines[0]


def write_stored(folder, name, seconds, *, machine="cpu x", shape=(1, 8, 4, 1)):
    folder.mkdir(exist_ok=True)
    batch_size, prompt_tokens, new_tokens, threads = shape
    (folder / f"{name}.json").write_text(json.dumps({
        "point": {"artifact": name, "engine": "e", "batch_size": batch_size, "prompt_tokens": prompt_tokens,
                  "new_tokens": new_tokens, "threads": threads, "why_not": "" if seconds else "not installed"},
        "repeats": [{"prefill_seconds": each, "decode_seconds": 3 * each} for each in seconds]}))
    (folder / "bench.json").write_text(json.dumps({"machine": {"cpu": machine, "cores": 2, "gpus": []}}))
    return folder / f"{name}.json"


def test_stored_results_of_one_machine_are_compared_and_others_are_not(tmp_path):
    a = write_stored(tmp_path / "a", "base", [1.0] * 9)
    b = write_stored(tmp_path / "b", "merged", [1.25] * 9)
    measured = bench_compare.of_stored(a, b)
    found = bench_compare.ratios(measured["a"]["times"], measured["b"]["times"])
    assert found["decode"].ratio == pytest.approx(0.8)
    table, line = bench_compare.parts(measured, found)
    assert table[2][1][1:4] == ("1", "0.8", "0.800 times") and "stored" in line
    for wrong, why in ((write_stored(tmp_path / "c", "x", [1.0] * 9, machine="cpu y"), "of one machine"),
                       (write_stored(tmp_path / "d", "x", [1.0] * 9, shape=(2, 8, 4, 1)), "other shapes"),
                       (write_stored(tmp_path / "e", "x", []), "holds no times: not installed"),
                       (tmp_path / "nothing.json", "is no stored result")):
        with pytest.raises(DataError, match=why):
            bench_compare.of_stored(a, wrong)
    with pytest.raises(DataError, match="3 pairs tell nothing"):
        bench_compare.ratios(measured["a"]["times"][:3], measured["b"]["times"])


def test_the_gate_of_the_command_line(tmp_path):
    a, b = write_stored(tmp_path / "a", "base", [1.0] * 9), write_stored(tmp_path / "b", "merged", [1.25] * 9)
    noisy = write_stored(tmp_path / "c", "merged", [0.8, 1.6] * 6)
    options = ("bench", "compare", "--fail-on", "slower:5%")
    slower = tiny_run.lora_kit(*options, a, b, cwd=tmp_path)
    assert slower.returncode == 1 and "0.800 times as fast as A" in slower.stderr, slower.stderr
    assert tiny_run.lora_kit(*options, b, a, cwd=tmp_path).returncode == 0
    unsure = tiny_run.lora_kit(*options, write_stored(tmp_path / "d", "base", [1.0] * 12), noisy, cwd=tmp_path)
    assert unsure.returncode == 3 and "cannot tell whether B is over 5.0% slower" in unsure.stderr
    mixed = tiny_run.lora_kit("bench", "compare", a, "model", cwd=tmp_path)
    assert mixed.returncode == 2 and "two stored results or two artifacts" in mixed.stderr
    told = tiny_run.lora_kit("bench", "compare", a, b, "--json", "-", cwd=tmp_path)
    assert json.loads(told.stdout)["ratios"]["decode"]["verdict"] == "slower"
    tiny_run.lora_kit("bench", "compare", a, b, "--csv", "b.csv", "--markdown", "b.md", cwd=tmp_path)
    prefill, decode = csv.DictReader(io.StringIO((tmp_path / "b.csv").read_text()))
    assert (decode["part"], decode["a"], decode["b"], decode["verdict"]) == ("decode", "base", "merged", "slower")
    assert float(decode["ratio"]) == pytest.approx(0.8) and float(decode["a_tokens_per_second"]) == pytest.approx(1)
    assert "| decode tokens/s | 1 | 0.8 | 0.800 times |" in (tmp_path / "b.md").read_text()
