"""The eval stage over a tiny base and a merged model that was trained on what is held out."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_kit import baseline, chat, evaluation, events, isolate, rows, scoring, tokens
from lora_kit.errors import MachineError, RecipeError, RefusedError
from lora_kit.recipe import Recipe
from lora_kit.suite import read_suite
from lora_kit.types import Artifact, Conversation, Message
from tests.tiny_run import call_here

CONVERSATIONS = [
    Conversation(messages=(Message(role="user", content=f"say {n}"), Message(role="assistant", content="ok")),
                 origin=f"rows.jsonl:{n}") for n in range(8)
]
SUITE = """
tasks: [loss, answers]
gates:
  - {task: loss, better_than: base}
  - {task: loss, no_worse_than: base, margin: 0.1}
  - {task: answers, metric: token_f1, better_than: base-fewshot}
"""
ANSWERS = "kind: generate\ndata: held_out\nmetrics: [exact_match, token_f1]\nmax_new_tokens: 8\nnum_fewshot: 2\n"


class FakeRun:
    """What the stage asks of a run."""

    def __init__(self, path: Path, artifacts: dict[str, Artifact]) -> None:
        self.path, self._artifacts = path, artifacts
        self.recipe_file = SimpleNamespace(folder=path)
        self.resolved = {}

    def stage_dir(self, stage: str) -> Path:
        return self.path / stage

    def work(self, stage: str) -> Path:
        return self.path / f".{stage}.working"

    def artifacts(self) -> dict[str, Artifact]:
        return self._artifacts

    def artifact(self, name: str) -> Artifact:
        return self._artifacts[name]


def tuned(base: Path, folder: Path) -> Path:
    """The base after some steps on the held-out rows themselves: certain to be better at them."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = chat.load_tokenizer(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    batch = tokens.batch_of([chat.encode(tokenizer, each)[0] for each in CONVERSATIONS], 2, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=batch.tokens_BT, attention_mask=batch.attention_mask_BT, labels=batch.labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_run(folder: Path, artifacts: dict[str, Artifact], base: Path) -> FakeRun:
    run = FakeRun(folder, artifacts)
    run.work("eval").mkdir()
    run.stage_dir("data").mkdir()
    tokenizer = chat.load_tokenizer(base)
    examples = [example for each in CONVERSATIONS for example in chat.encode(tokenizer, each)]
    tokens.write_examples(run.stage_dir("data"), "held_out", examples)
    (run.stage_dir("data") / "held_out.jsonl").write_text(
        "".join(rows.to_json(each) + "\n" for each in CONVERSATIONS))
    training = [{"messages": [{"role": "user", "content": f"train {n}"}, {"role": "assistant", "content": "yes"}]}
                for n in range(4)]
    (folder / "train.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in training))
    for name, text in (("loss", "kind: held_out_loss\n"), ("answers", ANSWERS)):
        (folder / "mine" / "tasks" / name).mkdir(parents=True)
        (folder / "mine" / "tasks" / name / "task.yaml").write_text(text)
    (folder / "mine" / "suites").mkdir()
    (folder / "mine" / "suites" / "own.yaml").write_text(SUITE)
    return run


def recipe(**fields) -> Recipe:
    return Recipe(name="r", model={"base": "b"}, data={"train": {"source": "train.jsonl", "format": "messages"}},
                  eval={"samples": 2, "sample_tokens": 5, "threads": 1, "cache": False, **fields})


def artifacts_of(base: Path, merged: Path) -> dict[str, Artifact]:
    return {"base": Artifact(name="base", path=str(base), kind="hf"),
            "merged": Artifact(name="merged", path=str(merged), kind="hf")}


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_model):
    """The stage's result, folder and events over base, merged, and a form whose process crashes."""
    folder = tmp_path_factory.mktemp("run")
    merged = tuned(tiny_model, folder / "merged")
    artifacts = {
        "base": Artifact(name="base", path=str(tiny_model), kind="hf"),
        "adapter": Artifact(name="adapter", path=str(folder / "none"), kind="adapter"),
        "merged": Artifact(name="merged", path=str(merged), kind="hf"),
        "gguf-q8_0": Artifact(name="gguf-q8_0", path=str(folder / "none.gguf"), kind="gguf"),
    }
    run = make_run(folder, artifacts, tiny_model)
    real_call = isolate.call

    def call(function, arguments, **options):
        if arguments["artifacts"][0]["name"] == "gguf-q8_0":
            raise MachineError(function, "the process crashed (SIGILL)")
        if arguments["artifacts"][0]["name"] == "base":  # in this process, which has loaded torch already
            return isolate.Isolated(value=scoring.score_artifacts(**arguments), seconds=1.0, peak_memory_bytes=1)
        return real_call(function, arguments, **options)

    told = []
    with pytest.MonkeyPatch.context() as patch, events.listening(told.append):
        patch.setattr(isolate, "call", call)
        result = evaluation.stage(recipe(suite="mine/suites/own.yaml"), run)
    return SimpleNamespace(result=result, run=run, work=run.work("eval"), told=told,
                           scores=json.loads((run.work("eval") / "scores.json").read_text()))


def test_gates_are_decided(scored):
    better, no_worse, fewshot = scored.result.verdicts
    assert better.outcome == "PASS" and no_worse.outcome == "PASS", (better, no_worse)
    assert fewshot.outcome == "PASS", fewshot
    assert scored.scores["verdicts"] == [verdict.as_dict() for verdict in scored.result.verdicts]
    assert scored.result.summary.endswith("3 of 3 gates pass")


def test_loss_is_per_trained_token_with_the_conversation_as_cluster(scored):
    values = {(entry["artifact"], entry["task"]): entry for entry in scored.scores["scores"]}
    assert values["merged", "loss"]["value"] < 1 < values["base", "loss"]["value"]
    assert values["base", "loss"]["num_items"] == 8 and not values["base", "loss"]["higher_is_better"]
    lines = [json.loads(line) for line in (scored.work / "base" / "items.jsonl").read_text().splitlines()]
    losses = [(line["score"], line["weight"]) for line in lines if line["metric"] == "loss"]
    expected = sum(score * weight for score, weight in losses) / sum(weight for _, weight in losses)
    assert values["base", "loss"]["value"] == pytest.approx(expected)
    assert scored.scores["units"] == {"loss": "nats per trained token", "exact_match": "0 to 1", "token_f1": "0 to 1"}


def test_differences_are_paired_with_base_and_with_what_gates_ask_for(scored):
    found = {(entry["metric"], entry["artifact"], entry["baseline"]): entry for entry in scored.scores["differences"]}
    assert set(found) == {
        ("loss", "merged", "base"), ("exact_match", "merged", "base"), ("token_f1", "merged", "base"),
        ("exact_match", "base-fewshot", "base"), ("token_f1", "base-fewshot", "base"),
        ("token_f1", "merged", "base-fewshot")}
    loss = found["loss", "merged", "base"]
    assert loss["ci_low"] < loss["difference"] < loss["ci_high"] < 0 and loss["num_clusters"] == 8
    by_name = {entry["artifact"]: entry["value"] for entry in scored.scores["scores"] if entry["metric"] == "loss"}
    assert loss["difference"] == pytest.approx(by_name["merged"] - by_name["base"])


def test_what_cannot_run_is_listed_and_cautioned_not_invented(scored):
    why = "lora_kit.scoring:score_artifacts: the process crashed (SIGILL)"
    assert scored.scores["not_measured"] == [
        {"artifact": "gguf-q8_0", "task": task, "why": why} for task in ("loss", "answers")]
    assert not any(entry["artifact"] in ("gguf-q8_0", "adapter") for entry in scored.scores["scores"])
    cautions = [event.text for event in scored.told if isinstance(event, events.Caution)]
    assert cautions == [f"not measured: gguf-q8_0 on loss, gguf-q8_0 on answers: {why}"]
    table = next(event for event in scored.told if isinstance(event, events.Table))
    assert len(table.rows) == len(scored.scores["scores"]) == 8


def test_samples_before_and_after(scored):
    samples = json.loads((scored.work / "samples.json").read_text())["samples"]
    assert [sample["origin"] for sample in samples] == ["rows.jsonl:0", "rows.jsonl:1"]
    assert samples[1]["messages"] == [{"role": "user", "content": "say 1"}] and samples[1]["reference"] == "ok"
    assert set(samples[1]["answers"]) == {"base", "merged"}
    assert samples[1]["answers"]["merged"] == {"text": "ok", "stopped": True, "num_tokens": 2}


def test_each_subject_has_its_own_files_and_all_answered_the_same_items(scored):
    subjects = {path.parent.name for path in scored.work.glob("*/scores.json")}
    assert subjects == {"base", "base-fewshot", "merged", "gguf-q8_0"}
    asked = json.loads((scored.work / "items" / "answers.json").read_text())
    assert len(asked["items"]) == 8 and len(asked["examples"]) == 2
    ids = [{json.loads(line)["item_id"] for line in (scored.work / name / "items.jsonl").read_text().splitlines()
            if '"answers"' in line} for name in ("base", "base-fewshot", "merged")]
    assert ids[0] == ids[1] == ids[2] == {item["item_id"] for item in asked["items"]}
    own = json.loads((scored.work / "merged" / "scores.json").read_text())
    assert own["peak_memory_bytes"] > 0 and own["seconds"] > 0 and len(own["scores"]) == 3
    assert scored.scores["tasks"]["loss"]["num_items"] == 8


def test_only_an_adapter_of_the_same_base_joins_its_process(tmp_path, tiny_model):
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    (quantized / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    base = Artifact(name="base", path=str(tiny_model), kind="hf")
    small = Artifact(name="base", path=str(quantized), kind="hf")
    merged = Artifact(name="merged", path=str(tmp_path / "merged"), kind="hf")

    def adapter(on: Path) -> Artifact:
        return Artifact(name="adapter", path=str(tmp_path / "adapter"), kind="adapter", base=str(on))

    def groups(*artifacts):
        return [[artifact.name for artifact in group] for group in evaluation._sharing_models(list(artifacts))]

    assert groups(adapter(tiny_model), merged, base) == [["merged"], ["base", "adapter"]]
    assert groups(base, merged, adapter(tmp_path)) == [["base"], ["merged"], ["adapter"]]
    assert groups(small, adapter(quantized)) == [["base"], ["adapter"]]


def test_an_artifact_that_the_recipe_names_must_run(tmp_path, tiny_model, monkeypatch):
    run = make_run(tmp_path, {"base": Artifact(name="base", path=str(tiny_model), kind="hf")}, tiny_model)

    def call(function, arguments, **options):
        assert arguments["strict"]
        raise MachineError("engine llamacpp", "is not installed")

    monkeypatch.setattr(isolate, "call", call)
    with pytest.raises(MachineError, match="is not installed"):
        evaluation.stage(recipe(artifacts=["base"]), run)


def test_without_held_out_rows_nothing_is_measured_and_gates_stay_open(tmp_path, tiny_model):
    run = make_run(tmp_path, {"base": Artifact(name="base", path=str(tiny_model), kind="hf")}, tiny_model)
    tokens.write_examples(run.stage_dir("data"), "held_out", [])
    (run.stage_dir("data") / "held_out.jsonl").write_text("")
    result = evaluation.stage(recipe(suite="chat"), run)
    assert result.summary == "nothing was measured" and result.figures["scores"] == []
    assert result.figures["not_measured"] == [
        {"artifact": "base", "task": "held_out_loss", "why": "nothing is held out"}]
    assert [(verdict.outcome, verdict.evidence) for verdict in result.verdicts] == [
        ("INCONCLUSIVE", "base was not measured: nothing is held out")]


def test_mistakes_in_the_suite_stop_before_anything_is_loaded(tmp_path, tiny_model):
    run = make_run(tmp_path, {}, tiny_model)
    with pytest.raises(RecipeError, match="no suite is called 'chta'; did you mean 'chat'"):
        evaluation.stage(recipe(suite="chta"), run)


def test_what_is_forgotten_is_measured_on_text_that_the_machine_brings(tmp_path, tiny_model, monkeypatch):
    """The general suite end to end: the tuned model lost what the base knows of other text, or cannot show it did not.
    """
    merged = tuned(tiny_model, tmp_path / "merged")
    run = make_run(tmp_path, {"base": Artifact(name="base", path=str(tiny_model), kind="hf"),
                              "merged": Artifact(name="merged", path=str(merged), kind="hf")}, tiny_model)
    monkeypatch.setattr(isolate, "call", call_here)
    result = evaluation.stage(recipe(suite="general", limit=6), run)
    scores = json.loads((run.work("eval") / "scores.json").read_text())
    assert scores["units"] == {"bits_per_byte": "bits per byte"}
    values = {(entry["task"], entry["artifact"]): entry for entry in scores["scores"]}
    assert len(values) == 4 and all(entry["num_items"] == 6 for entry in values.values())
    assert 5 < values["python_prose", "base"]["value"] < 12  # random weights: about log2(320) a byte
    assert not values["python_prose", "base"]["higher_is_better"]
    assert [verdict.outcome for verdict in result.verdicts] == ["FAIL", "FAIL"], result.verdicts
    assert "python_prose bits_per_byte: base" in result.summary


ROLES = """
tasks: [loss, answers]
roles:
  - {task: loss, role: retain, margin: 0.1, at_most: 5.0}
  - {task: answers, role: retain, margin: 0.1}
  - {task: answers, role: target, metric: token_f1, against: baseline/base}
"""


@pytest.fixture
def again(scored, tmp_path, monkeypatch):
    """The run once more, its artifacts scoring what they scored before; with a lock of what that was."""
    folder = tmp_path / "run"
    shutil.copytree(scored.run.path, folder)
    run = FakeRun(folder, {name: scored.run.artifact(name) for name in ("base", "merged")})
    shutil.move(run.work("eval"), run.stage_dir("eval"))
    baseline.write(run, read_suite("mine/suites/own.yaml", folder), folder / "baseline.lock")
    (folder / "mine" / "suites" / "own.yaml").write_text(ROLES)
    run.work("eval").mkdir()
    called = []

    def call(function, arguments, **options):
        (name,) = (artifact["name"] for artifact in arguments["artifacts"])
        called.append(name)
        (Path(arguments["work_dir"]) / name).mkdir()
        shutil.copy(scored.work / name / "items.jsonl", Path(arguments["work_dir"]) / name)
        value = {"engines": {}, "not_measured": [], "samples": None, "check": None, "task_seconds": {}, "num_known": 0,
                 "num_asked": 0, "seconds": 0.5}
        return isolate.Isolated(value=[value], seconds=1.0, peak_memory_bytes=1)

    monkeypatch.setattr(isolate, "call", call)
    return SimpleNamespace(run=run, called=called, lock=folder / "baseline.lock")


def test_a_lock_stands_in_for_earlier_models(again):
    result = evaluation.stage(
        recipe(suite="mine/suites/own.yaml", artifacts=["merged"], baseline="baseline.lock"), again.run)
    assert again.called == ["merged"] and again.lock.stat().st_size < 4000
    same, floor, few, better = result.verdicts
    assert (same.outcome, same.claim) == ("PASS", "loss loss: merged no worse than baseline (margin 0.1)")
    assert same.evidence.startswith("difference 0 [0, 0]")
    assert (floor.outcome, floor.role) == ("PASS", "floor") and better.outcome == "PASS"
    # No flip among eight items says little, and how many would say enough.
    assert few.outcome == "INCONCLUSIVE" and 30 < few.num_items_to_decide < 200
    scores = json.loads((again.run.work("eval") / "scores.json").read_text())
    assert {entry["artifact"] for entry in scores["scores"]} == {"merged"}
    assert {(entry["artifact"], entry["baseline"]) for entry in scores["flips"]} == {("merged", "baseline/merged")}
    assert scores["verdicts"][2]["num_items_to_decide"] == few.num_items_to_decide


def test_a_lock_of_other_questions_is_refused_before_anything_is_scored(again):
    with open(again.run.path / "data" / "held_out.jsonl", "a") as file:
        file.write(rows.to_json(Conversation(messages=(
            Message(role="user", content="say more"), Message(role="assistant", content="ok")), origin="x:1")) + "\n")
    with pytest.raises(RefusedError, match="baseline.lock: was made with other prompts: 1 of 9 items of task answers"):
        evaluation.stage(recipe(suite="mine/suites/own.yaml", baseline="baseline.lock"), again.run)
    assert again.called == []
    shutil.rmtree(again.run.work("eval"))
    again.run.work("eval").mkdir()
    with pytest.raises(RecipeError, match="nowhere.lock: no such baseline"):
        evaluation.stage(recipe(suite="mine/suites/own.yaml", baseline="nowhere.lock"), again.run)


def test_items_that_fail_fail_the_evaluation(again, scored):
    lines = [json.loads(line) for line in (scored.work / "merged" / "items.jsonl").read_text().splitlines()]
    failed = [{**line, "score": None, "error": "no memory"} if line["item_id"] == lines[0]["item_id"] else line
              for line in lines]
    real = isolate.call

    def call(function, arguments, **options):
        done = real(function, arguments, **options)
        if arguments["artifacts"][0]["name"] == "merged":
            path = Path(arguments["work_dir"]) / "merged" / "items.jsonl"
            path.write_text("".join(json.dumps(line) + "\n" for line in failed))
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolate, "call", call)
        with pytest.raises(MachineError, match=r"task loss: 1 of 8 items of merged have no loss, more than "
                           r"eval\.max_errors allows \(10 %\); the first: no memory"):
            evaluation.stage(recipe(suite="mine/suites/own.yaml"), again.run)
        shutil.rmtree(again.run.work("eval"))
        again.run.work("eval").mkdir()
        result = evaluation.stage(recipe(suite="mine/suites/own.yaml", max_errors=0.2), again.run)
    assert result.figures["scores"][-3]["num_errors"] == 1 and result.figures["scores"][-3]["num_items"] == 7


def test_flips_are_told_stage_by_stage(scored):
    found = {(entry["metric"], entry["artifact"], entry["baseline"]): entry for entry in scored.scores["flips"]}
    assert set(found) == {(metric, "merged", "base") for metric in ("loss", "exact_match", "token_f1")}
    exact = found["exact_match", "merged", "base"]
    assert (exact["num_better"], exact["num_worse"], exact["is_binary"]) == (8, 0, True)
    tables = [event for event in scored.told if isinstance(event, events.Table)]
    assert [table.title for table in tables] == ["Scores", "Items that changed, stage by stage"]


def within_budget(tmp_path, tiny_model, scored, monkeypatch, suite, **fields):
    """The stage with its calls made in this process; the result and scores.json."""
    run = make_run(tmp_path, artifacts_of(tiny_model, Path(scored.run.artifact("merged").path)), tiny_model)
    (tmp_path / "mine" / "suites" / "own.yaml").write_text(suite)
    calls = []

    def call(function, arguments, **options):
        calls.append((arguments["artifacts"][0]["name"], arguments["only"]))
        return call_here(function, arguments, **options)

    monkeypatch.setattr(isolate, "call", call)
    result = evaluation.stage(recipe(suite="mine/suites/own.yaml", **fields), run)
    lines = {path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
             for path in run.work("eval").glob("*/items.jsonl")}
    return result, json.loads((run.work("eval") / "scores.json").read_text()), lines, calls


def test_a_budget_stops_at_the_look_that_decides_and_counts_what_was_scored(tmp_path, tiny_model, scored, monkeypatch):
    """The merged model is so much better that fewer than all of forty rows show it."""
    from tests import test_evaluation

    monkeypatch.setattr(test_evaluation, "CONVERSATIONS", [
        Conversation(messages=each.messages, origin=f"rows.jsonl:{place}")
        for place, each in enumerate(CONVERSATIONS * 5)])
    suite = "tasks: [loss, answers]\ngates:\n  - {task: loss, better_than: base}\n"
    result, scores, lines, calls = within_budget(tmp_path, tiny_model, scored, monkeypatch, suite, budget="10m")
    assert [verdict.outcome for verdict in result.verdicts] == ["PASS"]
    assert scores["budget"]["stopped"] == "every gate is decided"
    counted = scores["budget"]["looks"][-1]["num_items"]["loss"]
    assert 8 <= counted < 40 and set(scores["budget"]["looks"][-1]["num_items"]) == {"loss"}
    for name in ("base", "merged"):
        assert len(lines[name]) == len({line["item_id"] for line in lines[name]}) == counted
        assert {line["task"] for line in lines[name]} == {"loss"}
    assert {score["num_items"] for score in scores["scores"]} == {counted}
    assert f"{counted} items in" in result.verdicts[0].evidence
    assert {"artifact": "base", "task": "answers", "why": "no gate is about it, and the time is limited"} in \
        scores["not_measured"]
    # Every batch is asked of both, and none of it twice.
    for name in ("base", "merged"):
        asked = [item for who, only in calls if who == name for item in only["loss"]]
        assert sorted(asked) == sorted(line["item_id"] for line in lines[name])


def test_a_budget_that_is_too_short_still_says_what_it_found(tmp_path, tiny_model, scored, monkeypatch):
    suite = "tasks: [loss]\ngates:\n  - {task: loss, no_worse_than: base, margin: 0.1}\n"
    result, scores, *_ = within_budget(tmp_path, tiny_model, scored, monkeypatch, suite, budget=0.001)
    assert scores["budget"]["looks"][0]["num_items"] == {"loss": 8} and len(scores["budget"]["looks"]) == 1
    assert result.verdicts[0].outcome == "PASS"  # all eight rows are the first batch


def test_a_budget_without_gates_is_an_error(tmp_path, tiny_model, scored, monkeypatch):
    with pytest.raises(RecipeError, match="eval.budget: has no effect: the suite claims nothing"):
        within_budget(tmp_path, tiny_model, scored, monkeypatch, "tasks: [loss]\n", budget=10)
