"""eval_checks.py: which items overlap, as the data stage named them, and what the others score alone."""

import json

import pytest

from lora_kit import eval_checks, gates, pipeline
from lora_kit.metrics import mcc
from lora_kit.suite import GenerateTask, HeldOutLossTask, Suite, Task
from tests import tiny_run
from tests.scored_on_paper import line


@pytest.fixture
def suite(tmp_path):
    own = GenerateTask(kind="generate", data="items.jsonl", metrics="exact_match")
    on_held_out = GenerateTask(kind="generate", data="held_out", metrics="exact_match")
    return Suite(name="s", tasks=(
        Task(name="answers", folder=tmp_path, spec=own), Task(name="held", folder=tmp_path, spec=on_held_out),
        Task(name="loss", folder=tmp_path, spec=HeldOutLossTask(kind="held_out_loss"))))


def named(folder, group, items):
    """What the data stage leaves: overlap with held-out rows in the ledger, with tasks in a file of its own."""
    report = [{"against": group, "overlapping": items}]
    if group == "held_out":
        (folder / "ledger.json").write_text(json.dumps({"splits": {}, "overlap": report}))
    else:
        (folder / "overlap.json").write_text(json.dumps(report))


def loss(item, score, weight=1):
    return line(item, score, task="loss", metric="loss", weight=weight)


SCORED = {
    "merged": {("answers", "exact_match"): [line(n, n % 2) for n in range(10)],
               ("held", "exact_match"): [line("1", 1, task="held"), line("1 (2)", 0, task="held"),
                                         line("2", 1, task="held")],
               ("loss", "loss"): [loss("1 [0]", 1.0), loss("1 [1]", 2.0), loss("2 [2]", 4.0)]}}


def test_items_are_known_by_what_the_data_stage_called_them(suite, tmp_path):
    named(tmp_path, "answers", ["rows.jsonl:1", "rows.jsonl:3", "rows.jsonl:999"])
    named(tmp_path, "held_out", ["rows.jsonl:1"])
    found = eval_checks.overlap_of(suite, SCORED, tmp_path, drops=False)
    assert found["answers"] == {"num_items": 10, "num_overlapping": 2, "items": ["rows.jsonl:1", "rows.jsonl:3"],
                                "why_not": ""}
    assert found["held"]["items"] == ["rows.jsonl:1", "rows.jsonl:1 (2)"]
    assert found["loss"]["items"] == ["rows.jsonl:1 [0]", "rows.jsonl:1 [1]"]
    assert eval_checks.overlap_text(found).startswith(
        "overlap with training rows: 2 of 10 items of answers (e.g. rows.jsonl:1, rows.jsonl:3); 2 of 3 items of held")


def test_the_clean_score_is_that_of_the_other_items(suite, tmp_path):
    named(tmp_path, "answers", ["rows.jsonl:1", "rows.jsonl:3"])
    named(tmp_path, "held_out", [])
    overlap = eval_checks.overlap_of(suite, SCORED, tmp_path, drops=False)
    higher = {("answers", "exact_match"): True, ("held", "exact_match"): True, ("loss", "loss"): False}
    [clean] = eval_checks.clean_scores(overlap, SCORED, higher)
    assert (clean["task"], clean["num_items"]) == ("answers", 8) and clean["value"] == pytest.approx(3 / 8)
    whole = {"task": "answers", "metric": "exact_match", "artifact": "merged", "value": 0.5, "num_items": 10}
    [row] = eval_checks.clean_rows([clean], [whole])
    assert row[:5] == ("answers exact_match", "merged", "0.5", "10", "0.375") and row[6] == "8"


def test_rows_that_training_left_out_overlap_nothing(suite, tmp_path):
    named(tmp_path, "answers", ["rows.jsonl:1"])
    assert eval_checks.overlap_of(suite, SCORED, tmp_path, drops=True)["answers"]["num_overlapping"] == 0


def test_what_was_not_counted_is_not_zero(suite, tmp_path):
    (tmp_path / "overlap.json").write_text(json.dumps([{"against": "answers", "same_question": 3}]))  # an older run
    found = eval_checks.overlap_of(suite, SCORED, tmp_path, drops=False)
    assert found["answers"]["num_overlapping"] is None and "did not count it" in found["answers"]["why_not"]
    assert "overlap of answers with training rows is not known" in eval_checks.overlap_text(found)
    assert eval_checks.clean_scores(found, SCORED, {}) == []


def test_a_corpus_metric_has_its_own_value_on_the_clean_items():
    overlap = {"answers": {"items": ["rows.jsonl:1"]}}
    labels = [["a", "a"], ["b", "a"], ["b", "b"], ["a", "b"], ["b", "b"]]
    scored = {"merged": {("answers", "mcc"): [line(n, 1, metric="mcc", outcome=of) for n, of in enumerate(labels)]}}
    key = ("answers", "mcc")
    [clean] = eval_checks.clean_scores(overlap, scored, {key: True}, {key: mcc.corpus})
    assert clean["num_items"] == 4 and clean["value"] == pytest.approx(mcc.corpus([labels[0], *labels[2:]]))


def test_differences_on_clean_items_stand_beside_those_on_all():
    """Base and merged differ by the one item that training had, and by nothing else."""
    overlap = {"answers": {"items": ["rows.jsonl:1"]}, "held": {"items": []}}
    key, other = ("answers", "exact_match"), ("held", "exact_match")
    scored = {"base": {key: [line(n, n % 2 and n != 1) for n in range(10)], other: [line(1, 0, task="held")]},
              "merged": {key: [line(n, n % 2) for n in range(10)], other: [line(1, 1, task="held")]}}
    whole = [gates.difference(scored["merged"][of], scored["base"][of], task=of[0], metric=of[1], artifact="merged",
                              baseline="base", higher_is_better=True) for of in (key, other)]
    [clean] = eval_checks.clean_differences(overlap, scored, whole)
    assert whole[0]["difference"] == pytest.approx(0.1) and clean["difference"] == 0.0
    assert (clean["num_items"], clean["artifact"], clean["baseline"]) == (9, "merged", "base") and clean["ci_low"] <= 0
    [row] = eval_checks.clean_difference_rows([clean], whole)
    assert row[:6] == ("answers exact_match", "merged", "base", "0.1", "10", "0") and row[7] == "9"


def test_a_training_row_that_is_an_item_is_found_and_the_rest_scored(tiny_model, tmp_path, monkeypatch):
    """From the files to the table: two of eight questions stand in the training rows too."""
    recipe = tiny_run.write_recipe(tmp_path, tiny_model, quantize=None, eval={
        "suite": "./suites/own.yaml", "samples": 0, "threads": 1, "artifacts": ["base", "merged"]},
        train={**tiny_run.SECTIONS["train"], "steps": 1}, data={"train": "rows.jsonl", "held_out": "other.jsonl"})
    tiny_run.write_rows(tmp_path / "other.jsonl", 40).write_text(
        "".join((tmp_path / "other.jsonl").read_text().splitlines(keepends=True)[24:]))
    questions = [f"question number {n} about the {word} and what it does all day" for n, word in enumerate(
        "moon river house bird fish bread salt stone".split())]
    items = [{"prompt": question, "completion": f"answer {n}"} for n, question in enumerate(questions)]
    (tmp_path / "tasks" / "own").mkdir(parents=True)
    (tmp_path / "tasks" / "own" / "items.jsonl").write_text("".join(json.dumps(each) + "\n" for each in items))
    (tmp_path / "tasks" / "own" / "task.yaml").write_text(
        "kind: generate\ndata: ./items.jsonl\nmetrics: exact_match\nmax_new_tokens: 2\n")
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "own.yaml").write_text("tasks: [own]\n")
    with open(tmp_path / "rows.jsonl", "a") as file:
        for n in (2, 5):
            file.write(json.dumps({"messages": [{"role": "user", "content": questions[n]},
                                                {"role": "assistant", "content": f"answer {n}"}]}) + "\n")
    world = tiny_run.World(folder=tmp_path).use(monkeypatch)
    monkeypatch.setattr(pipeline.importlib.import_module("lora_kit.isolate"), "call", tiny_run.call_here)
    run = pipeline.run_recipe(tiny_run.read(recipe), runs_dir=world.runs, until="eval")
    scores = json.loads((run.stage_dir("eval") / "scores.json").read_text())
    about = scores["overlap"]["own"]
    assert (about["num_items"], about["num_overlapping"]) == (8, 2), about
    assert {(each["artifact"], each["num_items"]) for each in scores["clean"]} == {("base", 6), ("merged", 6)}
    assert [(each["artifact"], each["baseline"], each["num_items"]) for each in scores["clean_differences"]] == [
        ("merged", "base", 6)]
    assert [(check["artifact"], check["outcome"]) for check in scores["checks"]] == [
        ("base", "PASS"), ("merged", "PASS")]


def test_gains_as_texts():
    about = {"task": "answers", "metric": "exact_match", "artifact": "gguf", "base": 0.0, "tuned": 0.5, "num_items": 80}
    rows = eval_checks.gain_rows([
        {**about, "form": 0.4, "value": 0.8, "ci_low": 0.655, "ci_high": 0.934, "why_not": ""},
        {**about, "form": 0.0, "value": None, "ci_low": None, "ci_high": None, "why_not": "nothing is scored"}])
    assert rows[0] == ("answers exact_match", "gguf", "0", "0.5", "0.4", "80 %", "66 to 93 %", "80")
    assert rows[1][5:] == ("cannot tell: nothing is scored", "–", "80")
    assert len(rows[0]) == len(eval_checks.GAIN_COLUMNS)
