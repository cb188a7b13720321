"""bench.py: exact figures from a fake engine with known timings, and one real process on a tiny model."""

import csv
import dataclasses
import io
import json
import sys
import types as python_types

import pytest

from lora_kit import bench, bench_files, events, isolate
from lora_kit.errors import InternalError, MachineError, RecipeError
from lora_kit.recipe import BenchSection, Recipe
from lora_kit.types import Artifact, BenchPoint
from tests import tiny_run

SHAPE = {"prompt_tokens": 16, "new_tokens": 5, "batch_size": 2, "repeats": 3}


class FakeTokenizer:
    all_special_ids = [0, 7]

    def __len__(self):
        return 120


class FakeEngine:
    """Takes 0.1, 0.2, 0.3, 0.4 s for its calls' prefill, in that order."""

    name, device, num_tokens, tokenizer = "fake", "cpu", 100, FakeTokenizer()

    def __init__(self, tokens_generated=None):
        self.batches, self.closed, self.tokens_generated = [], False, tokens_generated
        self.alone, self.tokens_alone = [], None

    def time_once(self, prompts, new_tokens):
        self.batches.append(prompts)
        spent = 0.1 * len(self.batches)
        return {"prefill_seconds": spent, "first_token_seconds": spent + 0.01, "decode_seconds": 2 * spent,
                "tokens_generated": self.tokens_generated or len(prompts) * new_tokens}

    def tokens_after(self, prompt, max_new_tokens):
        self.alone.append(tuple(prompt))
        yield from range(self.tokens_alone or max_new_tokens)

    def close(self):
        self.closed = True


@pytest.fixture
def engine(monkeypatch):
    fake = FakeEngine()
    module = python_types.ModuleType("lora_kit.engines")
    module.open_engine = lambda artifact, threads=None: fake
    monkeypatch.setitem(sys.modules, "lora_kit.engines", module)
    monkeypatch.setattr(bench.hardware, "measure_matrix_gflops", lambda: 100.0)
    return fake


def artifact(name="base", **more):
    return Artifact(name=name, path="nowhere", kind=more.pop("kind", "hf"), size_bytes=1000, **more)


def test_warm_up_is_not_counted_and_every_prompt_is_new(engine):
    value = bench.measure_artifact(artifact().as_dict(), threads=1, seed=3, **SHAPE)
    # Calls that take ever longer are never stable: the warm-up ends after four of them.
    assert value["warm_ups"] == pytest.approx([0.31, 0.61, 0.91, 1.21])
    assert [one["prefill_seconds"] for one in value["repeats"]] == pytest.approx([0.5, 0.6, 0.7])
    prompts = [tuple(prompt) for batch in engine.batches for prompt in batch]
    assert len(engine.batches) == 7 and {len(batch) for batch in engine.batches} == {2}
    assert {len(prompt) for prompt in prompts} == {16}
    assert len({prompt[0] for prompt in prompts + engine.alone}) == 14 + 3  # no prefix cache can have a hit
    assert value["latency"]["requests"] == 3 and len(value["latency"]["gaps"]) == 3 * 4
    assert not {0, 7} & {token for prompt in prompts for token in prompt}
    assert max(token for prompt in prompts for token in prompt) < FakeEngine.num_tokens
    assert engine.closed


def test_sweeps_and_limits_reach_the_measurement(engine):
    value = bench.measure_artifact(artifact().as_dict(), threads=1, seed=3, **SHAPE, batch_sizes=[1, 3], depths=[8],
                                   goodput=["e2el:60s"])
    assert [each["batch_size"] for each in value["sweeps"]["batch_size"]] == [1, 3]
    (deep,) = value["sweeps"]["depth"]
    assert (deep["batch_size"], deep["prompt_tokens"]) == (2, 24) and deep["goodput"] == deep["requests_per_second"]
    assert value["latency"]["goodput"] == pytest.approx(value["latency"]["requests_per_second"])
    first = value["sweeps"]["batch_size"][0]["first_token_seconds"]
    assert first == pytest.approx(1.31)  # its 12th to 14th call of all, after 7 and four to get warm: 1.2 to 1.4 s


def test_how_sure_it_is_and_the_energy_are_told():
    point = BenchPoint(artifact="a", engine="e", batch_size=1, prompt_tokens=8, new_tokens=4, repeats=9, load_seconds=1,
                       time_to_first_token_seconds=1, prefill_tokens_per_second=1, decode_tokens_per_second=40.0,
                       peak_memory_bytes=1, size_bytes=10**9, threads=1, device="cpu")
    evidence = {"half_width": 0.034, "joules_per_token": 1.25}
    assert bench.remarks([(point, evidence)], BenchSection(seconds=30)) == [
        "half of the 95 % interval of an answer's time (2% is narrow, in at most 30 s): a 3.4%",
        "energy of a generated token, with its share of the prompt and all that ran beside: a 1.25 J"]
    assert bench.remarks([(point, {"half_width": 0.034, "joules_per_token": None})], BenchSection()) == []


def test_figures_are_medians_by_their_formulas():
    timed = [{"prefill_seconds": s, "first_token_seconds": s + 0.01, "decode_seconds": 2 * s} for s in (0.2, 0.4, 0.3)]
    figures = bench.rates(timed, BenchSection(**SHAPE))
    assert figures["prefill_tokens_per_second"] == pytest.approx(2 * 16 / 0.3)
    assert figures["decode_tokens_per_second"] == pytest.approx(2 * 4 / 0.6)
    assert figures["time_to_first_token_seconds"] == pytest.approx(0.31)


def test_an_engine_that_stops_early_is_not_believed(engine):
    engine.tokens_generated = 9
    with pytest.raises(InternalError, match="generated 9 tokens where 10"):
        bench.measure_artifact(artifact().as_dict(), threads=1, seed=0, **SHAPE)
    assert engine.closed


def test_an_answer_of_its_own_that_is_short_is_not_believed(engine):
    engine.tokens_alone = 4
    with pytest.raises(InternalError, match="4 tokens came where 5"):
        bench.measure_artifact(artifact().as_dict(), threads=1, seed=0, **SHAPE)


def test_the_share_of_the_bandwidth():
    point = BenchPoint(artifact="a", engine="e", batch_size=4, prompt_tokens=8, new_tokens=4, repeats=1, load_seconds=1,
                       time_to_first_token_seconds=1, prefill_tokens_per_second=1, decode_tokens_per_second=40.0,
                       peak_memory_bytes=1, size_bytes=10**9, threads=1, device="cpu")
    assert bench.bandwidth_share(point, 20e9) == pytest.approx(0.5)
    for nothing in ({"decode_tokens_per_second": None}, {"size_bytes": None}, {"device": "cuda:0"}):
        assert bench.bandwidth_share(dataclasses.replace(point, **nothing), 20e9) is None


def test_prompts_depend_on_the_seed_alone():
    def draw(seed):
        return bench.random_prompts(FakeTokenizer(), 100, num=4, length=8, seed=seed)

    assert draw(1) == draw(1) != draw(2)


class FakeRun:
    def __init__(self, path, artifacts):
        self.path, self.found = path, {one.name: one for one in artifacts}

    def work(self, stage):
        return self.path

    def artifacts(self):
        return self.found

    def artifact(self, name):
        if name not in self.found:
            raise RecipeError("run", f"has no artifact '{name}'")
        return self.found[name]


def recipe(**section):
    return Recipe.model_validate({"name": "r", "model": {"base": "b"}, "data": {"train": [{"source": "d.jsonl"}]},
                                  "bench": {**SHAPE, "threads": 1, **section}})


def answer(calibration):
    return isolate.Isolated(seconds=1.0, peak_memory_bytes=5000, value={
        "engine": "fake", "device": "cpu", "load_seconds": 0.5, "peak_device_bytes": None,
        "warm_ups": [0.3], "half_width": None, "joules": {"cpu": 2.5, "gpu": None}, "sweeps": {},
        "calibration_gflops": [calibration, calibration], "latency": {"requests": 1, "gaps": [0.1]},
        "repeats": [{"prefill_seconds": 0.1, "first_token_seconds": 0.11, "decode_seconds": 0.2,
                     "tokens_generated": 10}]})


def test_what_cannot_be_measured_has_no_figures_and_says_why(monkeypatch, tmp_path):
    def call(function, arguments, threads, fresh):
        assert function == "lora_kit.bench:measure_artifact" and threads == 1
        assert fresh, "load time is from nothing to ready"
        if arguments["artifact"]["kind"] == "gguf":
            raise MachineError("engine llamacpp", "is not installed", "pip install llama-cpp-python")
        return answer(100.0)

    monkeypatch.setattr(bench.isolate, "call", call)
    monkeypatch.setattr(bench.hardware, "measure_read_bandwidth", lambda threads: 4e5)
    run = FakeRun(tmp_path, [artifact(), artifact("adapter", kind="adapter"), artifact("gguf-q8_0", kind="gguf")])
    heard = []
    with events.listening(heard.append):
        result = bench.stage(recipe(), run)
    assert "base 40" in result.summary and "not measured: gguf-q8_0" in result.summary
    saved = json.loads((tmp_path / "gguf-q8_0.json").read_text())
    assert saved["point"]["decode_tokens_per_second"] is None and saved["point"]["peak_memory_bytes"] is None
    assert "pip install llama-cpp-python" in saved["point"]["why_not"]
    assert any(isinstance(event, events.Caution) and "gguf-q8_0" in event.text for event in heard)
    whole = json.loads((tmp_path / "bench.json").read_text())
    files = bench_files.Files(csv=tmp_path / "b.csv", markdown=tmp_path / "b.md", json=tmp_path / "b.json")
    bench.write_files(tmp_path, recipe().bench, files, pytest.fail)
    assert json.loads((tmp_path / "b.json").read_text()) == whole and "| base |" in (tmp_path / "b.md").read_text()
    written = csv.DictReader(io.StringIO((tmp_path / "b.csv").read_text()))
    assert [line["artifact"] for line in written] == ["base", "gguf-q8_0"]
    assert [point["artifact"] for point in whole["points"]] == ["base", "gguf-q8_0"]  # an adapter only when named
    assert whole["threads"] == 1 and whole["machine"]["cores"] >= 1 and "torch" in whole["versions"]
    assert whole["points"][0]["peak_memory_bytes"] == 5000 and whole["caution"] == ""
    assert whole["read_bandwidth_bytes_per_second"] == 4e5
    base = json.loads((tmp_path / "base.json").read_text())
    # 8 tokens in 0.2 s, of a batch of 2: 20 steps a second, each reading 1000 bytes.
    assert base["bandwidth_share"] == pytest.approx(20 * 1000 / 4e5) and base["latency"]["gaps"] == [0.1]
    assert base["joules_per_token"] == pytest.approx(0.25) and base["point"]["repeats"] == 1
    assert whole["joules_per_token"] == {"base": pytest.approx(0.25), "gguf-q8_0": None} and whole["sweeps"] == {}
    assert saved["latency"] is None and saved["bandwidth_share"] is None
    assert any(isinstance(event, events.Note) and "base 5%" in event.text for event in heard)


def test_a_machine_that_was_not_equally_fast_is_told(monkeypatch, tmp_path):
    speeds = iter([100.0, 60.0])
    monkeypatch.setattr(bench.isolate, "call", lambda *args, **more: answer(next(speeds)))
    heard = []
    with events.listening(heard.append):
        bench.stage(recipe(), FakeRun(tmp_path, [artifact(), artifact("merged")]))
    assert any(isinstance(event, events.Caution) and "not equally fast" in event.text for event in heard)
    assert "merged" in json.loads((tmp_path / "bench.json").read_text())["caution"]
    assert bench.uneven_machine({"a": 100.0, "b": 80.0}) == "" == bench.uneven_machine({})


def test_a_name_that_the_run_does_not_have_is_an_error(tmp_path):
    with pytest.raises(RecipeError, match="nothing"):
        bench.stage(recipe(artifacts=["nothing"]), FakeRun(tmp_path, [artifact()]))


def test_a_real_model_in_a_fresh_process(tiny_model):
    one = Artifact(name="tiny", path=str(tiny_model), kind="hf", size_bytes=1)
    point = bench.bench_artifact(one, BenchSection(prompt_tokens=8, new_tokens=4, batch_size=2, repeats=2, threads=1))
    assert point.why_not == "" and point.engine.startswith("transformers") and point.device == "cpu"
    assert point.decode_tokens_per_second > 0 and point.prefill_tokens_per_second > 0
    assert 0 < point.time_to_first_token_seconds and 0 < point.load_seconds
    assert point.peak_memory_bytes > 50 * 10**6  # torch alone is more than that


def test_an_artifact_of_the_command_line_at_several_shapes(tiny_model, tmp_path):
    done = tiny_run.lora_kit("bench", tiny_model, "--prompt-tokens", "8", "--new-tokens", "4", "--batch-size", "1,3",
                             "--depth", "0,16", "--goodput", "e2el:60s", "--threads", "1", "--csv", "-", "--json",
                             tmp_path / "all.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [(line["sweep"], line["batch_size"], line["depth"], line["prompt_tokens"]) for line in lines] == [
        ("", "1", "0", "8"), ("batch_size", "1", "0", "8"), ("batch_size", "3", "0", "8"), ("depth", "1", "0", "8"),
        ("depth", "1", "16", "24")]
    assert all(float(line["decode_tokens_per_second"]) > 0 and line["new_tokens"] == "4" for line in lines)
    assert all(line["goodput"] == line["requests_per_second"] for line in lines)
    everything = json.loads((tmp_path / "all.json").read_text())
    assert everything["point"]["threads"] == 1 and len(everything["sweeps"]["depth"]) == 2
