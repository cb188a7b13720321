"""baseline.lock: small, whole, the same scores again, and refused when anything that matters changed."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest

from lora_kit import baseline, tokens
from lora_kit.errors import RecipeError, RefusedError
from lora_kit.suite import read_suite
from lora_kit.types import Artifact, Example

MANY = 300


def items():
    return [{"item_id": f"rows.jsonl:{number}", "cluster": f"c{number // 3}", "tools": [], "inputs": {},
             "messages": [{"role": "user", "content": f"question {number}"}], "target": f"answer {number}"}
            for number in range(MANY)]


class World:
    """A finished evaluation, written by hand: a task with items, and loss on twelve held-out rows."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "run"
        (folder / "suites").mkdir(parents=True)
        for name, text in (("answers", "kind: generate\ndata: rows.jsonl\nmetrics: [exact_match, token_f1]\n"),
                           ("loss", "kind: held_out_loss\n")):
            (folder / "tasks" / name).mkdir(parents=True)
            (folder / "tasks" / name / "task.yaml").write_text(text)
        (folder / "suites" / "mine.yaml").write_text("tasks: [answers, loss]\n")
        for part in ("eval/items", "eval/base", "eval/merged", "data", "model"):
            (self.path / part).mkdir(parents=True)
        (self.path / "model" / "tokenizer.json").write_text('{"version": "1", "vocab": ["a"]}')
        (self.path / "model" / "chat_template.jinja").write_text("{{ messages }}")
        self.write_items(items())
        self.write_rows()
        generator = numpy.random.default_rng(1)
        for name in ("base", "merged"):
            lines = [self.line("answers", "exact_match", number, float(generator.integers(2)), margin=number / 100 - 1)
                     for number in range(MANY)]
            lines[7]["score"] = None
            lines += [self.line("answers", "token_f1", number, float(generator.random())) for number in range(MANY)]
            lines += [{**self.line("loss", "loss", number, float(generator.random())), "weight": 5,
                       "item_id": f"held.jsonl:{number} [{number}]"} for number in range(12)]
            (self.path / "eval" / name / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def line(self, task, metric, number, score, **more):
        return {"task": task, "metric": metric, "item_id": f"rows.jsonl:{number}", "score": score,
                "cluster": f"c{number // 3}", "weight": 1, **more}

    def write_items(self, entries):
        (self.path / "eval" / "items" / "answers.json").write_text(json.dumps({"items": entries, "examples": []}))

    def write_rows(self, change=0):
        tokens.write_examples(self.path / "data", "held_out", [
            Example(tokens_T=numpy.arange(5) + number + change * (number == 3), loss_mask_T=numpy.ones(5, "u1"),
                    origin=f"held.jsonl:{number}") for number in range(12)])

    @property
    def suite(self):
        return read_suite("suites/mine.yaml", self.folder)

    @property
    def run(self):
        return SimpleNamespace(path=self.path, stage_dir=lambda stage: self.path / stage, artifacts=self.artifacts)

    def artifacts(self):
        model = str(self.path / "model")
        return {name: Artifact(name=name, path=model, kind="hf", tokenizer=model) for name in ("base", "merged")}

    def write(self):
        path = self.folder / "baseline.lock"
        baseline.write(self.run, self.suite, path)
        return path

    def check(self, lock):
        hashes = baseline.item_hashes(self.suite, self.path / "eval", self.path / "data")
        baseline.check(lock, baseline.describe(self.suite, self.artifacts()), hashes, "baseline.lock")
        return hashes

    def scored(self):
        found = {}
        for name in ("base", "merged"):
            for line in map(json.loads, (self.path / "eval" / name / "items.jsonl").read_text().splitlines()):
                found.setdefault(name, {}).setdefault((line["task"], line["metric"]), []).append(line)
        return found


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_the_same_scores_come_back_from_a_few_kilobytes(world):
    path = world.write()
    assert path.stat().st_size < 12_000  # 300 items, two metrics and a loss, of two models
    lock = baseline.read(path, "baseline.lock")
    now = world.scored()
    found = baseline.scored(lock, world.check(lock), now)
    assert set(found) == {"baseline/base", "baseline/merged"}
    for name in ("base", "merged"):
        for key, lines in now[name].items():
            again = {line["item_id"]: line for line in found[f"baseline/{name}"][key]}
            assert set(again) == {line["item_id"] for line in lines}
            for line in lines:
                other = again[line["item_id"]]
                assert (other["cluster"], other["weight"]) == (line["cluster"], line["weight"])
                assert other["score"] == line["score"]  # to the last bit: an unchanged model has no difference
                assert other.get("margin") == pytest.approx(line.get("margin"), abs=2e-3)


def test_only_items_that_are_asked_now_are_compared(world):
    lock = baseline.read(world.write(), "baseline.lock")
    world.write_items(items()[:40])
    hashes = world.check(lock)
    found = baseline.scored(lock, hashes, world.scored())
    assert len(found["baseline/base"]["answers", "exact_match"]) == 40


def changed_prompt(world):
    entries = items()
    entries[3]["messages"][0]["content"] += "?"
    entries[9]["target"] += "!"
    world.write_items(entries)


def changed_tokenizer(world):
    (world.path / "model" / "tokenizer.json").write_text('{"version": "1", "vocab": ["b"]}')


def changed_template(world):
    (world.path / "model" / "chat_template.jinja").write_text("{{ messages }} ")


def changed_settings(world):
    (world.folder / "tasks" / "answers" / "task.yaml").write_text(
        "kind: generate\ndata: rows.jsonl\nmetrics: [exact_match, token_f1]\nmax_new_tokens: 9\n")


@pytest.mark.parametrize("change, what", [
    (changed_prompt, "other prompts: 2 of 300 items of task answers are not in it, e.g. rows.jsonl:3"),
    (lambda world: world.write_rows(change=1),
     "other prompts: 1 of 12 items of task loss are not in it, e.g. held.jsonl:3 [3]"),
    (changed_tokenizer, "another tokenizer of base"), (changed_template, "another template of base"),
    (changed_settings, "other settings of task answers"),
])
def test_a_lock_is_refused_in_one_line_when_the_question_changed(world, change, what):
    lock = baseline.read(world.write(), "baseline.lock")
    world.check(lock)
    change(world)
    with pytest.raises(RefusedError) as error:
        world.check(lock)
    assert error.value.exit_code == 7
    assert str(error.value) == (
        f"baseline.lock: was made with {what}; make it again with lora-kit eval RUN --write-baseline")


def test_versions_that_matter_are_told_and_builds_are_not(world, monkeypatch):
    versions = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "tokenizers": "0.22"}
    monkeypatch.setattr(baseline.metadata, "version", lambda name: versions[name])
    lock = baseline.read(world.write(), "baseline.lock")
    versions["torch"] = "2.13.0+cu130"
    world.check(lock)
    versions["transformers"] = "5.24.0"
    with pytest.raises(RefusedError, match=r"was made with transformers 5\.23\.0, this is 5\.24\.0; make it again"):
        world.check(lock)


def test_what_changes_nothing_is_accepted(world):
    lock = baseline.read(world.write(), "baseline.lock")
    (world.path / "model" / "tokenizer.json").write_text('{"vocab": ["a"],  "version": "1"}')
    path = world.folder / "tasks" / "answers" / "task.yaml"
    path.write_text(path.read_text() + "description: For people.\n")
    entries = items()
    for entry in entries:
        entry["cluster"] = "one"
    world.write_items(entries)
    world.check(lock)


@pytest.mark.parametrize("damage", [
    lambda text: text[:-40], lambda text: text.replace('"num_items": 300', '"num_items": 301'), lambda text: "[]",
    lambda text: text.replace('"format"', '"formal"'), lambda text: text.replace('"bits": "', '"bits": "zz'),
])
def test_a_lock_that_is_not_whole_is_refused(world, damage):
    path = world.write()
    path.write_text(damage(path.read_text()))
    with pytest.raises(RefusedError, match="lock: is not a whole baseline"):
        baseline.read(path, "lock")


def test_another_format_and_no_lock(world):
    path = world.write()
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(RefusedError, match="lock: is of format 2; this lora-kit reads 1"):
        baseline.read(path, "lock")
    with pytest.raises(RecipeError, match="no such baseline; check the path"):
        baseline.read(world.folder / "none", "none")


def test_outcomes_of_a_corpus_metric_come_along(world):
    path = world.path / "eval" / "base" / "items.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        if line["metric"] == "token_f1":
            line["outcome"] = ["yes", "no"][number % 2]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lock = baseline.read(world.write(), "baseline.lock")
    found = baseline.scored(lock, world.check(lock), world.scored())["baseline/base"]["answers", "token_f1"]
    assert [line["outcome"] for line in found[:3]] == ["yes", "no", "yes"]
