"""Every program in examples/ runs, on the tiny model, and does what its first lines say."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit import isolate, rundir
from tests import tiny_run

EXAMPLES = sorted(path.stem for path in (tiny_run.ROOT / "examples").glob("*.py") if path.stem != "__init__")


@pytest.fixture
def world(tiny_model, tmp_path, monkeypatch):
    """A recipe and its rows in the current folder; what runs in fresh processes runs here."""
    tiny_run.write_recipe(tmp_path, tiny_model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(isolate, "call", tiny_run.call_here)
    return tiny_run.World(folder=tmp_path).use(monkeypatch)


def run_example(name: str, *arguments: str):
    return importlib.import_module(f"examples.{name}").main(list(arguments))


def test_every_example_has_its_test_here():
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(EXAMPLES) <= tested


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_short_and_says_how_it_is_called(name, capsys):
    path = tiny_run.ROOT / "examples" / f"{name}.py"
    text = path.read_text()
    lines = text.splitlines()
    assert len(lines) <= (150 if name == "minimal_loop" else 60)
    assert f"python examples/{name}.py" in ast.get_docstring(ast.parse(text))
    with pytest.raises(SystemExit) as end:
        run_example(name, "--help")
    assert end.value.code == 0 and "usage:" in capsys.readouterr().out


def test_an_example_runs_as_a_program():
    done = subprocess.run([sys.executable, "examples/watch_training.py", "--recipe", "nowhere.yaml"], cwd=tiny_run.ROOT,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tiny_run.ROOT)})
    assert done.returncode == 1 and "RecipeError: nowhere.yaml: no such recipe" in done.stderr


def test_the_minimal_loop_stands_on_its_own():
    tree = ast.parse((tiny_run.ROOT / "examples" / "minimal_loop.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.startswith(("lora_kit", "tests", "."))]


def test_minimal_loop(tiny_model, tmp_path, capsys):
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl")
    losses = run_example("minimal_loop", "--model", str(tiny_model), "--data", str(rows), "--steps", "6", "--rank", "4",
                         "--alpha", "8", "--learning-rate", "0.02", "--out", str(tmp_path / "adapter"))
    assert len(losses) == 6 and losses[-1] < losses[0]
    assert capsys.readouterr().out.count("loss") == 6
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 1000


def test_train_and_merge(world, capsys):
    answer = run_example("train_and_merge", "--recipe", "tiny.yaml", "--set", "train.steps=4", "--prompt", "say red",
                         "--max-new-tokens", "5")
    shown = capsys.readouterr().out
    assert shown.count("PASS  ") == 4 and answer and shown.endswith(f"say red\n  {answer}\n")
    run = rundir.open_run(world.run)
    assert run.recipe.train.steps == 4 and run.seal("merge") and run.seal("bench") is None


def test_compare_before_after(world, capsys):
    answers = run_example("compare_before_after", "--recipe", "tiny.yaml", "--prompt", "say red",
                          "--max-new-tokens", "5", "--artifacts", "base", "adapter", "merged")
    shown = capsys.readouterr().out
    assert list(answers) == ["base", "adapter", "merged"]
    assert answers["base"] != answers["merged"] == answers["adapter"]
    assert f"merged (transformers bf16): {answers['merged']}" in shown


def test_watch_training(world, capsys):
    losses = run_example("watch_training", "--recipe", "tiny.yaml", "--set", "train.steps=5", "--width", "20")
    shown = capsys.readouterr().out.splitlines()
    metrics = [json.loads(line) for line in Path(world.run / "train" / "metrics.jsonl").read_text().splitlines()]
    assert losses == pytest.approx([line["loss"] for line in metrics if "loss" in line], rel=1e-3) and len(losses) == 5
    assert f"    1/5 {'#' * 20} {losses[0]}" in shown and shown[-1].startswith("held-out loss after step 5: ")
    assert run_example("watch_training", "--recipe", "tiny.yaml", "--set", "train.steps=5") == []  # done already
    assert "train: done" in capsys.readouterr().out


def test_verdicts(capsys):
    improve, five, two = run_example("verdicts", "--lost", "9", "--gained", "13")
    shown = capsys.readouterr().out
    assert [verdict.outcome for verdict in (improve, five, two)] == ["INCONCLUSIVE", "PASS", "INCONCLUSIVE"]
    # docs/eval.md shows these numbers.
    page = (tiny_run.ROOT / "docs" / "eval.md").read_text()
    for line in shown.strip().splitlines():
        assert line.rstrip() in page, line
