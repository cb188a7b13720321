"""What gates can show, said before anything is computed: by counts and assumptions, or by earlier scores."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_kit import baseline, foresight, power
from lora_kit.recipe_file import read_recipe
from tests.test_baseline import World

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def write(folder: Path, suite: str, **sections) -> Path:
    (folder / "suites").mkdir()
    (folder / "suites" / "mine.yaml").write_text(suite)
    for name, metrics in (("answers", "exact_match"), ("words", "token_f1")):
        (folder / "tasks" / name).mkdir(parents=True)
        (folder / "tasks" / name / "task.yaml").write_text(
            f"kind: generate\ndata: {{source: ../../rows.jsonl, format: messages}}\nmetrics: {metrics}\n")
    (folder / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 200)
    values = {"model": {"base": "./model"}, "data": {"train": "rows.jsonl"},
              "eval": {"suite": "suites/mine.yaml"}, **sections}
    (folder / "mine.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    return folder / "mine.yaml"


def test_a_recipe_alone_tells_what_counts_and_assumptions_can(tmp_path):
    path = write(tmp_path, "tasks: [answers]\nroles: {task: answers, role: retain, margin: 0.02}\n")
    found = foresight.of_recipe(read_recipe(path))
    [gate] = found.gates
    assert (gate.num_items, gate.worth) == (200, 200)
    assert gate.smallest == pytest.approx(
        power.smallest_detectable(lambda size: power.chance_paired(200, size), 0.97))
    assert gate.passes == pytest.approx(power.chance_paired(200, 0.0, bound=-0.02))
    assert found.lines()[0] == (
        "answers exact_match: merged no worse than base (margin 0.02): with 200 items a drop under 6.4 points cannot "
        f"be seen; an unchanged model passes with {gate.passes * 100:.0f} %, with {gate.needed:,} items in four of "
        "five cases (5 % of items are assumed to flip either way between equally good models: eval.discordance)")
    # docs/eval.md shows this very line.
    assert found.lines()[0] in (Path(__file__).parent.parent / "docs" / "eval.md").read_text()
    assert found.lines()[1] == ("(80 % power, 5 % level, half of it on each side: the figures are for the strictest "
                                "step)")
    assert found.rows() == [["answers exact_match: merged no worse than base (margin 0.02)", "200", "200", "6.4 points",
                             f"{gate.passes * 100:.0f} %", f"{gate.needed:,}"]]


def test_the_assumption_can_be_set_items_limited_and_gates_share_the_level(tmp_path):
    path = write(tmp_path, "tasks: [answers]\ngates:\n  - {task: answers, better_than: base}\n"
                           "  - {task: answers, at_least: 0.5}\n")
    first, floor = foresight.of_recipe(read_recipe(path, ["eval.discordance=0.2", "eval.limit=100"])).gates
    assert first.num_items == 100 and first.passes is None and "20 % of items are assumed" in first.why
    assert first.smallest == pytest.approx(power.smallest_detectable(
        lambda size: power.chance_paired(100, size, discordance=0.2, alpha=0.0125), 0.9))
    assert "an improvement under" in first.line() and "a distance from the floor under" in floor.line()
    assert 0.1 < floor.smallest < 0.2


def test_what_nobody_can_tell_yet_is_said(tmp_path):
    path = write(tmp_path, "tasks: [words, held_out_loss]\nroles:\n  - {task: words, role: target}\n"
                           "  - {task: held_out_loss, role: retain, margin: 0.1}\n")
    words, loss = foresight.of_recipe(read_recipe(path)).gates
    assert words.line() == (
        "words token_f1: merged better than base: with 200 items nothing can be said yet (how much token_f1 of an item "
        "differs between models is known after a first run, or from a baseline)")
    assert (loss.num_items, loss.smallest) == (64, None)
    recipe = read_recipe(path, ['data.held_out=["rows.jsonl"]'])
    assert foresight.of_recipe(recipe).gates[1].line().endswith("is known once they are prepared: lora-kit data")
    (tmp_path / "other").mkdir()
    empty = write(tmp_path / "other", "tasks: [answers]\n")
    assert foresight.of_recipe(read_recipe(empty)).lines() == ["the suite claims nothing: it has neither roles nor "
                                                               "gates"]


@pytest.fixture
def world(tmp_path):
    """A finished evaluation with a recipe that claims something of it."""
    world = World(tmp_path)
    (tmp_path / "suites" / "mine.yaml").write_text(
        "tasks: [answers, loss]\nroles:\n  - {task: answers, role: retain, margin: 0.1}\n"
        "  - {task: answers, role: target, metric: token_f1}\n  - {task: loss, role: retain, margin: 0.3}\n")
    (tmp_path / "tasks" / "answers" / "rows.jsonl").write_text("".join(
        json.dumps({"messages": [{"role": "user", "content": str(number)}, ROW["messages"][1]]}) + "\n"
        for number in range(300)))
    (tmp_path / "mine.yaml").write_text("model: {base: ./model}\ndata: {train: rows.jsonl}\n"
                                        "eval: {suite: suites/mine.yaml}\n")
    return world


def run_of(world, recipe_file, sealed=("data", "eval")):
    return SimpleNamespace(recipe=recipe_file.recipe, recipe_file=recipe_file, path=world.path,
                           stage_dir=lambda stage: world.path / stage,
                           seal=lambda stage: {} if stage in sealed else None)


def test_earlier_scores_of_the_run_tell_the_spread(world):
    found = foresight.of_run(run_of(world, read_recipe(world.folder / "mine.yaml")))
    exact, words, loss = found.gates
    assert "of items flip either way, as between this run's merged and base" in exact.why
    assert 0.3 < float(exact.why.split(" ")[0]) / 100 < 0.6  # half of random answers differ
    assert words.smallest == pytest.approx(
        power.smallest_detectable(lambda size: power.chance_mean(
            300, size, spread=float(words.why.split("deviation of ")[1].split()[0]), alpha=0.025 / 3), 9.0), rel=0.02)
    assert loss.num_items == 12 and loss.unit == "nats a token" and loss.passes < 0.8 < loss.smallest + 0.7


def test_a_lock_tells_it_too_and_before_any_score_of_the_run(world):
    baseline.write(world.run, world.suite, world.folder / "baseline.lock")
    recipe_file = read_recipe(world.folder / "mine.yaml")
    found = foresight.of_run(run_of(world, recipe_file, sealed=()), world.folder / "baseline.lock")
    assert [gate.gate.baseline for gate in found.gates] == ["baseline"] * 3
    assert "as between the baseline's merged and base" in found.gates[0].why
    assert "between the baseline's merged and base" in found.gates[1].why
    of_recipe = foresight.of_recipe(read_recipe(world.folder / "mine.yaml", ["eval.baseline=baseline.lock"]))
    assert of_recipe.gates[1].smallest == pytest.approx(found.gates[1].smallest)
