"""The run folder: published whole or not at all, one writer, found again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_kit import rundir
from lora_kit.errors import DataError, MachineError, RecipeError, RefusedError
from lora_kit.recipe_file import parse_recipe
from lora_kit.rundir import Run, create, is_run, newest, open_run, runs_in, update, write_json, writing
from tests import nobody

TEXT = "model: {base: ./base}\ndata: {train: rows.jsonl}\n"


def recipe_file(text: str = TEXT, *overrides: str):
    return parse_recipe(text, Path("/recipes/mine.yaml"), overrides)


def resolved(**fields):
    base = {"artifact": {"name": "base", "path": "/models/base", "kind": "hf"}}
    return {"recipe_path": "/recipes/mine.yaml", "overrides": [], "base": base, **fields}


@pytest.fixture
def run(tmp_path) -> Run:
    return create(tmp_path / "runs", recipe_file(), resolved())


def publish(run: Run, stage: str, text: str, **seal) -> None:
    with run.publishing(stage) as work:
        (work / "result").write_text(text)
        run.publish(stage, seal)


# ---- publishing ------------------------------------------------------------------------


def test_a_stage_is_done_when_its_seal_is_there(run):
    assert run.seal("merge") is None
    with run.publishing("merge") as work:
        assert work == run.work("merge") and work != run.stage_dir("merge")
        (work / "result").write_text("one")
        assert run.seal("merge") is None and not run.stage_dir("merge").exists()
        run.publish("merge", {"summary": "fine"})
    assert run.seal("merge") == {"summary": "fine"}
    assert (run.stage_dir("merge") / "result").read_text() == "one"
    assert not run.work("merge").exists()


def test_a_stage_that_is_done_again_takes_the_place_of_the_old_one(run):
    publish(run, "merge", "one", number=1)
    (run.stage_dir("merge") / "stale").write_text("")
    publish(run, "merge", "two", number=2)
    assert run.seal("merge") == {"number": 2}
    assert {path.name for path in run.stage_dir("merge").iterdir()} == {"result", "stage.json"}
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_a_stage_that_fails_leaves_the_old_one(run):
    publish(run, "merge", "one", number=1)
    with pytest.raises(RuntimeError), run.publishing("merge") as work:
        (work / "result").write_text("half")
        raise RuntimeError
    assert run.seal("merge") == {"number": 1}
    assert (run.stage_dir("merge") / "result").read_text() == "one"


def test_what_a_failed_stage_left_is_not_in_the_next_try(run):
    with pytest.raises(RuntimeError), run.publishing("merge") as work:
        (work / "half").write_text("")
        raise RuntimeError
    with run.publishing("merge") as work:
        assert list(work.iterdir()) == []


def test_parts_of_a_failed_try_stay_for_one_that_makes_them_from_the_same(run):
    def left(made_from, **options):
        with pytest.raises(RuntimeError), run.publishing("quantize", made_from, **options) as work:
            there = sorted(path.name for path in work.iterdir())
            (work / "part").mkdir(exist_ok=True)
            raise RuntimeError
        return there

    assert left("a") == [] and left("a") == ["part"] and left("b") == [] and left("b") == ["part"]
    assert left("b", anew=True) == [] and left("b") == ["part"] and left("b", anew=True) == []


def test_published_parts_are_there_again_and_stay_as_they_are(run):
    publish(run, "quantize", "one", made_from="a")
    with pytest.raises(RuntimeError), run.publishing("quantize", "b") as work:
        assert not list(work.iterdir())
        raise RuntimeError
    with run.publishing("quantize", "a") as work:
        assert (work / "result").read_text() == "one"
        (work / "result").unlink()
        (work / "other").write_text("two")
        assert (run.stage_dir("quantize") / "result").read_text() == "one"
        run.publish("quantize", {"made_from": "a"})
    assert sorted(path.name for path in run.stage_dir("quantize").iterdir()) == ["other", "stage.json"]
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")]


def test_train_works_in_place_so_that_it_can_go_on(run):
    with pytest.raises(RuntimeError), run.publishing("train") as work:
        (work / "checkpoint").write_text("")
        raise RuntimeError
    assert run.seal("train") is None
    with run.publishing("train") as work:
        assert work == run.stage_dir("train") and (work / "checkpoint").exists()
        run.publish("train", {"number": 1})
    assert run.seal("train") == {"number": 1}


def test_a_rename_that_fails_puts_the_old_stage_back(run, monkeypatch):
    publish(run, "merge", "one", number=1)
    replace = os.replace

    def failing(source, target):
        if Path(source) == run.work("merge"):
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    with run.publishing("merge") as work:
        (work / "result").write_text("two")
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", failing)
            with pytest.raises(MachineError, match="No space left on device"):
                run.publish("merge", {"number": 2})
    assert run.seal("merge") == {"number": 1}
    assert (run.stage_dir("merge") / "result").read_text() == "one"


# ---- artifacts -------------------------------------------------------------------------


def test_artifacts_come_in_order_with_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = create(Path("runs"), recipe_file(), resolved())
    for stage, name in (("quantize", "gguf-q8_0"), ("merge", "merged"), ("train", "adapter")):
        tokenizer = f"{stage}/t" if name == "merged" else None
        publish(run, stage, "", artifacts=[{"name": name, "path": f"{stage}/x", "kind": "hf", "tokenizer": tokenizer}])
    assert list(run.artifacts()) == ["base", "adapter", "merged", "gguf-q8_0"]
    merged = run.artifact("merged")
    assert merged.path == str(tmp_path / run.path / "merge/x") and Path(merged.path).is_absolute()
    assert merged.tokenizer == str(tmp_path / run.path / "merge/t")
    assert run.artifact("base").path == "/models/base"


def test_an_artifact_that_is_not_there_is_told_with_those_that_are(run):
    with pytest.raises(RecipeError, match=r"has no artifact 'merged'; it has: base$"):
        run.artifact("merged")


# ---- opening ---------------------------------------------------------------------------


def test_a_run_is_opened_with_the_recipe_it_was_made_from(tmp_path):
    made = create(tmp_path, recipe_file(TEXT, "train.steps=3"), resolved(overrides=["train.steps=3"]))
    opened = open_run(made.path)
    assert opened.recipe == made.recipe and opened.recipe.train.steps == 3
    assert opened.recipe_file.folder == Path("/recipes")
    assert (made.path / "recipe.yaml").read_text() == TEXT
    assert opened.resolved == made.resolved
    assert made.path.parent == tmp_path / "mine"


def test_an_update_keeps_the_folder_and_takes_later_sections(run):
    text = TEXT + "bench: {repeats: 9}\n"
    updated = update(run, recipe_file(text), resolved(note="new"))
    assert updated.path == run.path
    opened = open_run(run.path)
    assert opened.recipe.bench.repeats == 9 and opened.resolved["note"] == "new"


def test_the_newest_run_is_found_also_within_a_second(tmp_path):
    made = [create(tmp_path, recipe_file(TEXT + f"name: {name}\n"), resolved()).path for name in "bababa"]
    assert runs_in(tmp_path) == made
    assert runs_in(tmp_path, "a") == made[1::2]
    assert newest(tmp_path) == made[-1]
    assert all(rundir._RUN_ID.match(path.name) for path in made)


def test_what_is_no_run_is_passed_over(tmp_path):
    made = create(tmp_path, recipe_file(), resolved()).path
    (tmp_path / "mine" / "29990101-000000-0000").mkdir()
    (tmp_path / "mine" / "notes").mkdir()
    assert newest(tmp_path) == made


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(DataError, match="holds no run; lora-kit run RECIPE makes one"):
        newest(tmp_path / "runs")


def test_what_is_no_run_folder_is_a_usage_error(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TEXT)
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "recipe.yaml"):
        assert not is_run(path)
        with pytest.raises(RecipeError, match="is not a run folder; name a folder with a recipe.yaml and a lock.json"):
            open_run(path)


@pytest.mark.parametrize("content", [b'{"recipe_path": "/r', b"", b"[]", b"\xff\xfe"])
def test_a_broken_lock_json_is_refused_by_name(run, content):
    (run.path / "lock.json").write_bytes(content)
    with pytest.raises(RefusedError) as caught:
        open_run(run.path)
    assert str(caught.value).startswith(f"{run.path}/lock.json: is not whole; move {run.path} away")


def test_a_lock_json_without_its_fields_is_refused(run):
    write_json(run.path / "lock.json", {"overrides": []})
    with pytest.raises(RefusedError, match="lock.json: is not whole: 'recipe_path' is missing"):
        open_run(run.path)


@pytest.mark.parametrize("content", ["{", "", "[1]"])
def test_a_broken_stage_json_is_refused_by_name(run, content):
    publish(run, "merge", "one")
    (run.stage_dir("merge") / "stage.json").write_text(content)
    with pytest.raises(RefusedError, match=r"merge/stage.json: is not whole; remove .*/merge and run again"):
        run.seal("merge")


# ---- one writer ------------------------------------------------------------------------

HOLD = """
import sys, time
from pathlib import Path
from lora_kit.rundir import open_run
with open_run(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(run):
    """A second process that holds the run."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_at_once(run, holder):
    started = time.monotonic()
    with pytest.raises(MachineError) as caught, run.locked():
        pass
    assert time.monotonic() - started < 2
    assert f"{run.path}: is in use by pid {holder.pid} on " in str(caught.value)
    assert caught.value.exit_code == 6


def test_a_run_is_free_when_its_holder_died(run, holder):
    holder.kill()
    holder.wait()
    with run.locked():
        assert json.loads((run.path / "run.lock").read_text())["pid"] == os.getpid()
    with run.locked():
        pass


def test_a_run_is_free_when_the_work_failed(run):
    with pytest.raises(RuntimeError), run.locked():
        raise RuntimeError
    with run.locked():
        pass


def test_a_run_is_refused_to_the_same_process_too(run):
    with run.locked(), pytest.raises(MachineError, match=f"is in use by pid {os.getpid()}"):
        with run.locked():
            pass


def on_another_machine(run, seconds_ago: float) -> None:
    """Leave run.lock as a process on another machine does, whose lock this system does not see."""
    path = run.path / "run.lock"
    path.write_text(json.dumps({"pid": 4711, "host": "node7", "machine": "another", "since": "today", "token": "t"}))
    then = time.time() - seconds_ago
    os.utime(path, (then, then))


def test_a_holder_on_another_machine_is_believed_while_it_gives_signs(run):
    on_another_machine(run, 20)
    before = (run.path / "run.lock").read_bytes()
    started = time.monotonic()
    with pytest.raises(MachineError, match=r"is in use by pid 4711 on node7 since today, which gave a sign \d+ s ago"):
        with run.locked():
            pass
    assert time.monotonic() - started < 2 and (run.path / "run.lock").read_bytes() == before


def test_a_lock_left_by_a_machine_that_is_gone_is_recovered(run):
    on_another_machine(run, rundir.STALE_SECONDS + 5)
    with run.locked():
        assert json.loads((run.path / "run.lock").read_text())["pid"] == os.getpid()
    assert (run.path / "run.lock").read_text() == ""


def test_the_holder_gives_signs(run, monkeypatch):
    monkeypatch.setattr(rundir, "BEAT_SECONDS", 0.05)
    with run.locked():
        path = run.path / "run.lock"
        os.utime(path, (0, 0))
        ends = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < ends:
            time.sleep(0.05)
        assert abs(path.stat().st_mtime - time.time()) < 10


def test_a_holder_that_was_taken_for_dead_notices_and_leaves_the_run_alone(run):
    with run.locked():
        run.check_held()
        on_another_machine(run, 0)
        with pytest.raises(MachineError, match="was taken over by another process"):
            run.check_held()
    assert json.loads((run.path / "run.lock").read_text())["pid"] == 4711  # not wiped at the end either
    run.check_held()  # not held: nothing to lose


def test_a_disk_without_locks_is_not_called_in_use(run, monkeypatch):
    def flock(file, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(rundir.fcntl, "flock", flock)
    with pytest.raises(MachineError, match=r"cannot be locked \(Operation not supported\)"), run.locked():
        pass


# ---- writing ---------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_json(path, {"a": "é"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError):
            write_json(path, {"a": "new"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "é"}
    assert list(tmp_path.iterdir()) == [path], "the half-written file is left"


def test_a_failed_write_is_one_line_with_what_to_do():
    with pytest.raises(MachineError) as caught, writing(Path("/runs/x")):
        raise OSError(28, "No space left on device")
    assert str(caught.value) == ("/runs/x: cannot be written (No space left on device); make the folder writable, "
                                 "free space, or choose another with --runs")
    assert caught.value.exit_code == 6


@nobody.needs_root
def test_an_unwritable_output_folder_is_one_line(run, tmp_path):
    imports = """
import socket, sys
from pathlib import Path
from lora_kit.errors import LoraKitError
from lora_kit.recipe_file import parse_recipe
from lora_kit.rundir import create, open_run
"""
    code = f"""
def tried(action):
    try:
        action()
    except LoraKitError as error:
        print(error.exit_code, error)

def lock(run):
    with run.locked():
        pass

def publish(run):
    with run.publishing("merge"):
        pass

run = open_run(Path({str(run.path)!r}))
tried(lambda: create(Path({str(tmp_path / "runs")!r}), parse_recipe({TEXT!r}, Path("/r/other.yaml")), {{}}))
tried(lambda: lock(run))
tried(lambda: publish(run))
"""
    lines = nobody.run(imports, code, run.path)
    assert len(lines) == 3
    for line in lines:
        assert line.startswith(f"6 {tmp_path}/runs/") and "cannot be written (Permission denied)" in line
