"""The pipeline: what is done, what is skipped, what a change reopens, and what a run leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_kit import evaluation, events, isolate, pipeline, quantize, rundir
from lora_kit.errors import GateFailed, GateInconclusive, MachineError, ModelError, RecipeError, RefusedError
from lora_kit.events import StageFinished, StageSkipped, StageStarted
from tests import tiny, tiny_run

STAGES = ["data", "train", "merge", "quantize", "bench", "eval", "report"]


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A finished run over all stages; nothing may change in it."""
    return tiny_run.finished(tiny_model, tmp_path_factory)


@pytest.fixture
def world(finished, tmp_path, monkeypatch):
    """A copy of the finished run and what it was made of."""
    monkeypatch.setattr(isolate, "call", tiny_run.call_here)
    return tiny_run.copy(finished, tmp_path).use(monkeypatch)


def started(function) -> list[str]:
    """Names of the stages that ``function`` starts."""
    heard = []
    with events.listening(heard.append):
        function()
    return [event.stage for event in heard if isinstance(event, StageStarted)]


def go(world, *overrides: str, **options) -> list[str]:
    return started(lambda: pipeline.run_recipe(tiny_run.read(world.recipe, *overrides), runs_dir=world.runs, **options))


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and size of every file but the lock, which each run takes anew."""
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_size)
            for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


# ---- a finished run --------------------------------------------------------------------


def test_every_stage_is_sealed_and_its_seal_is_the_last_that_was_written(finished):
    run = rundir.open_run(finished.run)
    for stage in STAGES:
        seal, folder = run.seal(stage), run.stage_dir(stage)
        files = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*")
                 if path.is_file() and "checkpoints" not in path.parts and path.name != "stage.json"}
        assert seal["files"] == {name: stat.st_size for name, stat in files.items()}, stage
        assert max(stat.st_mtime_ns for stat in files.values()) <= (folder / "stage.json").stat().st_mtime_ns, stage
        assert seal["seconds"] > 0 and seal["summary"]
    assert not [path.name for path in run.path.glob(".*")]
    usual = (run.path / "recipe.yaml").stat().st_mode
    assert {path.stat().st_mode for path in run.path.rglob("*.safetensors")} == {usual}
    assert list(run.artifacts()) == ["base", "adapter", "merged", "bitsandbytes-int8", "bitsandbytes-nf4", "gguf-q8_0"]
    assert all(Path(artifact.path).exists() for artifact in run.artifacts().values())
    assert {verdict["outcome"] for verdict in run.seal("merge")["verdicts"]} == {"PASS"}
    page = (run.stage_dir("report") / "index.html").read_text()
    assert "gguf-q8_0" in page and "not measured" not in page.partition("<body")[2].partition("Artifacts")[0]


def test_lock_json_says_what_was_resolved(finished):
    run = rundir.open_run(finished.run)
    assert (run.path / "recipe.yaml").read_text() == finished.recipe.read_text()
    lock = run.resolved
    assert lock["base"]["reference"] == "./model" and len(lock["base"]["sha256"]) == 64
    assert len(lock["sources"]["train"][0]["sha256"]) == 64 and lock["seed"] == 0
    assert set(lock["versions"]) == set(pipeline.VERSIONS) and lock["versions"]["torch"] and lock["machine"]["cpu"]
    assert lock["resolved_recipe"]["lora"]["rank"] == 4


def test_a_second_run_does_nothing(world):
    before = state_of(world.runs)
    run = rundir.open_run(world.run)
    assert pipeline.owed(run) == []
    heard = []
    with events.listening(heard.append):
        again = pipeline.run_recipe(tiny_run.read(world.recipe), runs_dir=world.runs)
    assert again.path == run.path
    assert [event.stage for event in heard if isinstance(event, StageSkipped)] == STAGES
    assert not [event for event in heard if isinstance(event, (StageStarted, StageFinished))]
    assert state_of(world.runs) == before


# ---- what a change reopens -------------------------------------------------------------


Q8_ONLY = 'quantize=[{"method": "gguf", "type": "q8_0"}]'


@pytest.mark.parametrize(("override", "again"), [
    ("bench.artifacts=[gguf-q8_0]", ["bench", "report"]),
    ("eval.limit=4", ["eval", "report"]),
    ("cost={price_per_hour: 1.5}", ["report"]),
    ("description=Other words.", ["report"]),
    (Q8_ONLY, ["quantize", "bench", "eval", "report"]),
])
def test_a_change_of_a_later_section_republishes_from_there(world, override, again):
    train = state_of(world.run / "train")
    path = world.run
    assert go(world, override) == again
    assert world.run == path and state_of(path / "train") == train
    assert rundir.open_run(path).resolved["overrides"] == [override]
    assert go(world, override) == []
    if override == Q8_ONLY:
        assert sorted(child.name for child in (path / "quantize").iterdir()) == ["gguf-q8_0", "stage.json"]
        assert not (path / "bench" / "bitsandbytes-nf4.json").exists()
        assert "bitsandbytes-nf4" not in (path / "report" / "report.md").read_text()


@pytest.mark.parametrize("override", ["train.learning_rate=0.01", "lora.rank=2", "data.held_out_rows=4", "seed=1"])
def test_a_change_of_what_a_run_is_opens_a_new_one(world, override):
    first = world.run
    second = pipeline.open_for(tiny_run.read(world.recipe, override), world.runs)
    assert second.path != first and second.path.parent == first.parent and pipeline.owed(second) == STAGES
    assert pipeline.open_for(tiny_run.read(world.recipe), world.runs).path == first  # the newest that is the same


def test_rows_and_models_are_known_by_their_content(world):
    first = world.run
    tiny.save_model(world.folder / "model", seed=1)
    with_other_model = pipeline.open_for(tiny_run.read(world.recipe), world.runs).path
    assert with_other_model != first
    tiny_run.write_rows(world.folder / "rows.jsonl", 23)
    assert pipeline.open_for(tiny_run.read(world.recipe), world.runs).path not in (first, with_other_model)


def test_an_adapter_to_go_on_from_is_known_by_its_content(world):
    adapter = world.folder / "adapter"
    shutil.copytree(world.run / "train" / "adapter", adapter)
    tiny_run.write_recipe(world.folder, "./model", lora=None, train={**tiny_run.SECTIONS["train"],
                                                                     "from_adapter": "./adapter"})
    first = pipeline.open_for(tiny_run.read(world.recipe), world.runs).path
    assert pipeline.open_for(tiny_run.read(world.recipe), world.runs).path == first
    with open(adapter / "adapter_model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    assert pipeline.open_for(tiny_run.read(world.recipe), world.runs).path != first
    shutil.rmtree(adapter)
    with pytest.raises(ModelError, match="train.from_adapter: ./adapter: no such folder"):
        pipeline.open_for(tiny_run.read(world.recipe), world.runs)


def test_fresh_is_a_new_run_beside_the_old_one(world):
    first = world.run
    second = pipeline.run_recipe(tiny_run.read(world.recipe), runs_dir=world.runs, until="data", fresh=True)
    assert second.path != first and pipeline.owed(second) == STAGES[1:]
    assert pipeline.owed(rundir.open_run(first)) == []


@pytest.mark.parametrize(("file", "stage"), [
    ("data/train.tokens.npy", "data"), ("train/adapter/adapter_model.safetensors", "train"),
    ("merge/model/model.safetensors", "merge"), ("quantize/gguf-q8_0/model/model.gguf", "quantize"),
    ("bench/merged.json", "bench"), ("eval/scores.json", "eval"), ("report/report.md", "report"),
])
def test_a_file_that_is_gone_or_cut_makes_its_stage_owed(world, file, stage):
    path, run = world.run / file, rundir.open_run(world.run)
    whole = path.read_bytes()
    path.unlink()
    assert pipeline.owed(run) == [stage]
    path.write_bytes(whole[:-1])
    assert pipeline.owed(run) == [stage]
    path.write_bytes(whole)
    assert pipeline.owed(run) == []


def test_an_owed_stage_is_done_again_and_says_why(world):
    lost = world.run / "merge" / "model" / "model.safetensors"
    weights = lost.read_bytes()
    lost.unlink()
    heard = []
    with events.listening(heard.append):
        pipeline.continue_run(rundir.open_run(world.run), until="merge")
    assert [(event.stage, event.why) for event in heard if isinstance(event, StageStarted)] == [
        ("merge", "model/model.safetensors is gone")]
    assert lost.read_bytes() == weights


@pytest.fixture
def making(monkeypatch):
    """``names`` of the forms that are made from here on, and ``stop_before``, one at which the machine is gone."""
    found, make = SimpleNamespace(names=[], stop_before=None), quantize._make

    def counted(form, *args):
        if form.name == found.stop_before:
            raise MachineError("the machine", "is gone")
        found.names.append(form.name)
        return make(form, *args)

    monkeypatch.setattr(quantize, "_make", counted)
    return found


def test_a_form_that_is_whole_is_not_made_again(world, making):
    """Neither after a failed try, nor for another bound, nor for another list; but where it is damaged or asked for."""
    forms = [{"method": "gguf", "type": "q8_0"}, {"method": "bitsandbytes", "type": "int8"},
             {"method": "bitsandbytes", "type": "nf4"}]
    before = (world.run / "quantize" / "gguf-q8_0" / "model" / "model.gguf").read_bytes()

    def quantized(*names, redo=False, **bounds):
        making.names = []
        wanted = [{**form, **bounds} for form in forms if f"{form['method']}-{form['type']}" in names]
        run = pipeline.open_for(tiny_run.read(world.recipe, f"quantize={json.dumps(wanted)}"), world.runs)
        pipeline.continue_run(run, until="quantize", redo=redo)
        assert sorted(child.name for child in run.stage_dir("quantize").iterdir()) == [*sorted(names), "stage.json"]
        return making.names, {verdict["claim"].partition(":")[0] for verdict in run.seal("quantize")["verdicts"]}

    both = ("bitsandbytes-int8", "gguf-q8_0")
    assert quantized(*both) == ([], set())
    assert quantized(*both, max_kl=9.0) == ([], set(both))
    assert quantized("gguf-q8_0") == ([], set())
    weights = world.run / "quantize" / "gguf-q8_0" / "model" / "model.gguf"
    assert weights.read_bytes() == before
    with open(weights, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([before[-1] ^ 1]))
    assert quantized("gguf-q8_0", max_kl=9.0) == (["gguf-q8_0"], {"gguf-q8_0"}) and weights.read_bytes() == before
    assert quantized("gguf-q8_0", max_kl=9.0, redo=True)[0] == ["gguf-q8_0"]

    making.stop_before = "bitsandbytes-nf4"
    run = pipeline.open_for(tiny_run.read(world.recipe, f"quantize={json.dumps(forms)}"), world.runs)
    with pytest.raises(MachineError):
        pipeline.continue_run(run, until="quantize")
    making.stop_before = None
    assert quantized("bitsandbytes-int8", "bitsandbytes-nf4", "gguf-q8_0")[0] == ["bitsandbytes-nf4"]


def test_a_lost_adapter_comes_back_from_the_checkpoint(world):
    adapter = world.run / "train" / "adapter" / "adapter_model.safetensors"
    weights = adapter.read_bytes()
    adapter.unlink()
    heard = []
    with events.listening(heard.append):
        pipeline.continue_run(rundir.open_run(world.run), until="train")
    assert adapter.read_bytes() == weights
    assert any("going on from step-000030" in getattr(event, "text", "") for event in heard)


def test_no_deps_makes_an_owed_stage_an_error_that_names_it(world):
    shutil.rmtree(world.run / "merge")
    before = state_of(world.run)
    with pytest.raises(RecipeError, match=r"stage merge is owed \(not done yet\) before bench") as error:
        pipeline.continue_run(rundir.open_run(world.run), until="bench", no_deps=True)
    assert error.value.exit_code == 2 and state_of(world.run) == before
    run = rundir.open_run(world.run)
    assert started(lambda: pipeline.continue_run(run, until="merge", no_deps=True)) == ["merge"]


def test_a_stage_can_be_asked_for_again(world):
    run = rundir.open_run(world.run)
    assert started(lambda: pipeline.continue_run(run, until="report", redo=True)) == ["report"]


def test_a_stage_that_fails_leaves_what_was_published(world, monkeypatch):
    before = state_of(world.run / "eval")
    stage = evaluation.stage

    def fail(recipe, run):
        (run.work("eval") / "half").write_text("written before it failed")
        raise MachineError("disk", "is full")

    monkeypatch.setattr(evaluation, "stage", fail)
    with pytest.raises(MachineError, match="is full"):
        go(world, "eval.limit=4")
    assert state_of(world.run / "eval") == before
    assert go(world, "eval.limit=4", until="bench") == []
    monkeypatch.setattr(evaluation, "stage", stage)
    assert go(world, "eval.limit=4") == ["eval", "report"]
    assert not list((world.run / "eval").glob("**/half"))


# ---- gates -----------------------------------------------------------------------------


def test_gates_end_the_run_after_the_report(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(isolate, "call", tiny_run.call_here)
    world = tiny_run.World(folder=tmp_path).use(monkeypatch)
    recipe = tiny_run.write_recipe(
        tmp_path, tiny_model, bench={**tiny_run.SECTIONS["bench"], "artifacts": ["merged"]},
        eval={**tiny_run.SECTIONS["eval"], "suite": "mine/suites/mine.yaml"})
    suite = tmp_path / "mine" / "suites" / "mine.yaml"
    suite.parent.mkdir(parents=True)

    def gate(line: str) -> None:
        suite.write_text(f"tasks: [held_out_loss]\ngates:\n  - {{task: held_out_loss, {line}}}\n")

    gate("artifact: base, better_than: merged")  # the trained model is better: this cannot hold
    heard = []
    with events.listening(heard.append), pytest.raises(GateFailed, match="base better than merged: FAIL") as failed:
        pipeline.run_recipe(tiny_run.read(recipe), runs_dir=world.runs)
    assert failed.value.exit_code == 1
    assert [event.stage for event in heard if isinstance(event, StageFinished)] == STAGES
    page = world.run / "report" / "report.md"
    assert "FAIL" in page.read_text()
    with pytest.raises(GateFailed):  # done is not the same as passed
        pipeline.continue_run(rundir.open_run(world.run))

    gate("artifact: merged, better_than: base")  # the suite's file alone has changed
    assert go(world) == ["eval", "report"]
    assert "FAIL" not in page.read_text() and "PASS" in page.read_text()
    assert pipeline.owed(rundir.open_run(world.run)) == []

    with pytest.raises(GateInconclusive, match="INCONCLUSIVE: .*1 items") as cannot_tell:
        go(world, "eval.limit=1")
    assert cannot_tell.value.exit_code == 3 and "INCONCLUSIVE" in page.read_text()


def test_a_baseline_counts_by_its_content_and_an_assumption_of_the_dry_run_not_at_all(world):
    assert go(world, "eval.discordance=0.2", until="eval") == []
    run = rundir.open_run(world.run)
    said = pipeline.write_baseline(run, world.folder / "one.lock")
    assert said.startswith(f"{world.folder / 'one.lock'}: base, merged") and " on held_out_loss, " in said
    shutil.copy(world.folder / "one.lock", world.folder / "two.lock")
    compared = pipeline.compare_with(run, world.folder / "one.lock")
    assert pipeline.owed(compared) == ["eval"]
    assert compared.recipe.eval.baseline == str(world.folder / "one.lock")
    fingerprint = pipeline._fingerprint(pipeline._stage("eval"), compared)
    again = pipeline.compare_with(rundir.open_run(world.run), world.folder / "two.lock")
    assert pipeline._fingerprint(pipeline._stage("eval"), again) == fingerprint
    assert [text for text in again.recipe_file.overrides if "baseline" in text] == [
        f'eval.baseline="{world.folder / "two.lock"}"']
    assert pipeline.owed(pipeline.open_for(tiny_run.read(world.recipe), world.runs)) == []  # without it, all is done
    with pytest.raises(RecipeError, match="has no finished evaluation"):
        shutil.rmtree(world.run / "eval")
        pipeline.write_baseline(run, world.folder / "three.lock")


def test_a_time_for_the_evaluation_is_a_setting_of_it(world):
    run = rundir.open_run(world.run)
    limited = pipeline.within(run, "5m")
    assert limited.recipe.eval.budget == 300.0 and pipeline.owed(limited) == ["eval"]
    assert pipeline.within(limited, "10s").recipe_file.overrides[-1] == 'eval.budget="10s"'
    with pytest.raises(RecipeError, match="eval.budget.*should be a time such as 300s or 5m"):
        pipeline.within(limited, "soon")
    assert pipeline.owed(pipeline.open_for(tiny_run.read(world.recipe), world.runs)) == []


def test_folders_may_be_given_as_text(world):
    run = pipeline.run_recipe(tiny_run.read(world.recipe), runs_dir=str(world.runs))
    assert rundir.open_run(str(run.path)).path == world.run


# ---- mistakes that would be found late -------------------------------------------------


@pytest.mark.parametrize(("override", "what"), [
    ("eval.suite=chta", "did you mean 'chat'"),
    ("eval.suite=mine.yaml", "no such suite"),
    ('quantize=[{"method": "gguf", "type": "q9_0"}]', "'q9_0' is not a type of gguf"),
])
def test_mistakes_of_later_sections_are_told_before_a_run_is_opened(world, override, what):
    before = state_of(world.runs)
    with pytest.raises(RecipeError, match=what):
        pipeline.open_for(tiny_run.read(world.recipe, "seed=1", override), world.runs)
    assert state_of(world.runs) == before


def test_a_model_that_cannot_take_a_form_is_told_before_training(world):
    config = world.folder / "model" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "GraniteForCausalLM"))
    with pytest.raises(ModelError, match="GraniteForCausalLM is not written"):
        pipeline.open_for(tiny_run.read(world.recipe), world.runs)


def test_a_form_without_its_package_is_told_before_training_and_only_where_it_is_made(world, monkeypatch):
    from lora_kit.quantizers import gguf

    monkeypatch.setattr(gguf, "missing", lambda type=None: "pip install it")
    heard = []
    with events.listening(heard.append), pytest.raises(MachineError, match="pip install it"):
        pipeline.run_recipe(tiny_run.read(world.recipe), runs_dir=world.runs, fresh=True)
    assert not any(isinstance(event, StageStarted) for event in heard)
    assert go(world, fresh=True, until="merge") == ["data", "train", "merge"]


def test_an_older_run_that_is_another_is_not_even_read(world):
    (world.run / "recipe.yaml").write_text("model: {from: an older version}\n")
    assert pipeline.open_for(tiny_run.read(world.recipe, "seed=1"), world.runs).path.exists()
    with pytest.raises(RecipeError, match="recipe.yaml:1: 'model.base' is missing"):
        pipeline.open_for(tiny_run.read(world.recipe), world.runs)


def test_a_run_that_does_not_say_what_it_is_is_refused(world):
    lock = world.run / "lock.json"
    lock.write_text(lock.read_text()[:100])
    with pytest.raises(RefusedError, match=r"lock\.json: is not whole; move .* away"):
        pipeline.open_for(tiny_run.read(world.recipe), world.runs)


# ---- what a user may name --------------------------------------------------------------


@pytest.mark.parametrize(("target", "name"), [
    ("", "merged"), ("merged", "merged"), ("base", "base"), ("adapter", "adapter"), ("gguf-q8_0", "gguf-q8_0"),
    ("merge", "merged"), ("merge/model", "merged"), ("train/adapter", "adapter"),
    ("quantize/gguf-q8_0/model/model.gguf", "gguf-q8_0"), ("quantize/bitsandbytes-nf4/model", "bitsandbytes-nf4"),
])
def test_whatever_lies_in_a_run_is_its_artifact(world, target, name, monkeypatch):
    monkeypatch.chdir(world.run.parent)
    artifact, run = pipeline.artifact_at(str(Path(world.run.name) / target), Path("runs"))
    assert artifact == rundir.open_run(world.run).artifact(name) and run.path.resolve() == world.run
    assert Path(artifact.path).exists() and Path(artifact.tokenizer).is_dir()


def test_before_a_merge_a_run_stands_for_its_adapter(world):
    shutil.rmtree(world.run / "merge")
    assert pipeline.artifact_at(str(world.run), world.runs)[0].name == "adapter"


def test_models_outside_of_a_run_are_found_too(world):
    run = rundir.open_run(world.run)
    stray = world.folder / "stray"
    shutil.copytree(run.stage_dir("train") / "adapter", stray / "adapter")
    shutil.copytree(run.stage_dir("quantize") / "gguf-q8_0" / "model", stray / "gguf")
    artifact, found = pipeline.artifact_at(str(run.stage_dir("merge") / "model"), world.runs)
    assert artifact.name == "merged" and found is not None

    shutil.copytree(run.stage_dir("merge") / "model", stray / "model")
    artifact, found = pipeline.artifact_at(str(stray / "model"), world.runs)
    assert (artifact.name, artifact.kind, artifact.tokenizer, found) == ("model", "hf", str(stray / "model"), None)
    assert artifact.size_bytes > 1000

    with pytest.raises(ModelError, match="model.gguf: lies in no run, and no tokenizer lies beside it; put tokenizer"):
        pipeline.artifact_at(str(stray / "gguf" / "model.gguf"), world.runs)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(world.folder / "model" / name, stray / "gguf")
    artifact, _ = pipeline.artifact_at(str(stray / "gguf" / "model.gguf"), world.runs)
    assert (artifact.kind, artifact.tokenizer) == ("gguf", str(stray / "gguf"))

    with pytest.raises(ModelError, match="no such file or folder"):  # "./model" is beside the recipe, not here
        pipeline.artifact_at(str(stray / "adapter"), world.runs)
    config = json.loads((stray / "adapter" / "adapter_config.json").read_text())
    for base in (None, str(world.folder / "model")):
        (stray / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        if base is None:
            with pytest.raises(ModelError, match="does not say which base it is for"):
                pipeline.artifact_at(str(stray / "adapter"), world.runs)
    artifact, _ = pipeline.artifact_at(str(stray / "adapter"), world.runs)
    assert (artifact.kind, artifact.base) == ("adapter", str(world.folder / "model"))


def test_what_is_nothing_is_told_so(world):
    with pytest.raises(RecipeError, match="has no artifact 'nothing'; it has: base, adapter, merged"):
        pipeline.artifact_at(str(world.run / "nothing"), world.runs)
    with pytest.raises(RecipeError, match="is neither a run nor a model"):
        pipeline.artifact_at(str(world.folder / "nowhere"), world.runs)


# ---- artifacts without lora-kit --------------------------------------------------------


def logits_of(model, tokens: list[int]):
    import torch

    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].float()


@pytest.fixture(scope="module")
def tuned(finished):
    """Base and adapter side by side, by transformers and peft alone, with a prompt."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(finished.folder / "model")
    tokens = AutoTokenizer.from_pretrained(finished.run / "merge" / "model").apply_chat_template(
        [{"role": "user", "content": "say red"}], add_generation_prompt=True, return_dict=False)
    untrained = logits_of(base, tokens)
    model = PeftModel.from_pretrained(base, finished.run / "train" / "adapter")
    trained = logits_of(model, tokens)
    assert (trained - untrained).abs().max() > 0.1
    return tokens, trained


@pytest.mark.parametrize(("place", "tolerance"), [
    ("merge/model", 0.02), ("quantize/bitsandbytes-int8/model", 0.05), ("quantize/bitsandbytes-nf4/model", 0.1),
])
def test_transformers_loads_what_was_made(finished, tuned, place, tolerance):
    from transformers import AutoModelForCausalLM

    tokens, trained = tuned
    model = AutoModelForCausalLM.from_pretrained(finished.run / place)
    assert (logits_of(model, tokens) - trained).abs().max() < tolerance
    assert bool(getattr(model.config, "quantization_config", None)) == ("bitsandbytes" in place)


def test_llama_cpp_loads_the_gguf_file_and_answers(finished, tuned):
    pytest.importorskip("llama_cpp")
    # llama-cpp-python alone, in a process of its own: its crash would end the tests.
    program = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_default_params()
params.use_extra_bufts = False  # crashes on CPUs with AMX otherwise (llama.cpp #20824)
model = llama_cpp.llama_model_load_from_file(sys.argv[1].encode(), params)
context = llama_cpp.llama_init_from_model(model, llama_cpp.llama_context_default_params())
text = b"<|im_start|>user\\nsay red<|im_end|>\\n<|im_start|>assistant\\n"
ids = (llama_cpp.llama_token * 100)()
count = llama_cpp.llama_tokenize(llama_cpp.llama_model_get_vocab(model), text, len(text), ids, 100, False, True)
assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, count)) == 0
logits = llama_cpp.llama_get_logits(context)
print(list(ids[:count]), max(range(259), key=lambda token: logits[token]), sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(finished.run / "quantize" / "gguf-q8_0" / "model" / "model.gguf")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    tokens, trained = tuned
    said, chosen = done.stdout.splitlines()
    assert json.loads(said) == tokens  # the tokenizer inside the file is the model's
    assert int(chosen) == int(trained[-1].argmax())


def test_the_same_merge_again_leaves_what_comes_after_it_done(world):
    run = rundir.open_run(world.run)
    assert started(lambda: pipeline.continue_run(run, until="merge", redo=True)) == ["merge"]
    assert pipeline.owed(rundir.open_run(world.run)) == []


def test_training_under_other_versions_starts_anew(world):
    seal_path = world.run / "train" / "stage.json"
    seal = json.loads(seal_path.read_text())
    seal_path.write_text(json.dumps({**seal, "fingerprint": "of another torch"}))
    heard = []
    with events.listening(heard.append):
        pipeline.continue_run(rundir.open_run(world.run), until="train")
    assert not any("going on from" in getattr(event, "text", "") for event in heard)
    assert sum(isinstance(event, events.Progress) for event in heard) == seal["figures"]["steps"]
    assert not (world.run / ".train.old").exists()
