"""A tiny recipe, its run, and the command line in a process of its own, for tests of whole stages and verbs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_kit import events, isolate, pipeline, rundir
from lora_kit.errors import StoppedError
from lora_kit.recipe_file import RecipeFile, read_recipe

ROOT = Path(__file__).parent.parent
_WORDS = "red green blue one two three sun moon tree house river stone bird fish bread salt".split()
FORMS = [{"method": "bitsandbytes", "type": "int8"}, {"method": "bitsandbytes", "type": "nf4"},
         {"method": "gguf", "type": "q8_0"}]
SECTIONS = {
    "lora": {"rank": 4, "alpha": 8},
    "train": {"steps": 30, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 0.02, "precision": "fp32"},
    "bench": {"prompt_tokens": 8, "new_tokens": 4, "repeats": 1, "threads": 1},
    "eval": {"samples": 1, "sample_tokens": 4, "threads": 1, "cache": False},
}
"""Sections of :func:`write_recipe`, as small as they can be and still learn."""


def conversation(row: int) -> dict[str, Any]:
    """A question and its answer, told by the row's number."""
    return {"messages": [{"role": "user", "content": f"say {_WORDS[row % 16]} " * (1 + row % 3)},
                         {"role": "assistant", "content": f"{_WORDS[(row * 3) % 16]} {_WORDS[row // 2 % 16]}"}]}


def write_rows(path: Path, num_rows: int = 24) -> Path:
    path.write_text("".join(json.dumps(conversation(row)) + "\n" for row in range(num_rows)))
    return path


def write_recipe(folder: Path, model: Path | str, *, name: str = "tiny", **sections: Any) -> Path:
    """``folder/<name>.yaml`` with rows.jsonl beside it (unless it is there); ``sections`` replace those of SECTIONS."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows.jsonl").exists():
        write_rows(folder / "rows.jsonl")
    values = {"model": {"base": str(model)}, "data": {"train": "rows.jsonl", "held_out_rows": 8}, **SECTIONS,
              **sections}
    path = folder / f"{name}.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items() if value is not None))
    return path


def read(path: Path, *overrides: str) -> RecipeFile:
    return read_recipe(path, overrides)


def call_here(function: str, arguments: dict[str, Any], *, threads: int | None = None,
              timeout_seconds: float | None = None, fresh: bool = False) -> isolate.Isolated:
    """``isolate.call`` in this process: for tests of what a stage does, not of who does it. Patch it in."""
    import importlib

    module, _, name = function.partition(":")
    value = getattr(importlib.import_module(module), name)(**json.loads(json.dumps(arguments)))
    return isolate.Isolated(value=json.loads(json.dumps(value)), seconds=0.1, peak_memory_bytes=1_000_000)


@contextmanager
def interrupted_at(step: int) -> Iterator[pytest.ExceptionInfo]:
    """SIGINT comes after ``step`` of the training in this block, which ends with the StoppedError that is yielded."""
    def interrupt(event):
        if isinstance(event, events.Progress) and event.done == step:
            os.kill(os.getpid(), signal.SIGINT)

    with events.listening(interrupt), pytest.raises(StoppedError) as stopped:
        yield stopped


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command: one thread, no network, and ``changes``."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100",
            "PYTHONDONTWRITEBYTECODE": "1", **changes}


def lora_kit(*arguments: str | Path, cwd: Path, stdin: str = "", timeout: float = 300, preexec_fn=None,
             **changes: str) -> subprocess.CompletedProcess[str]:
    """``lora-kit ARGUMENTS`` in ``cwd``, run by this interpreter with pipes for its input and output."""
    return subprocess.run(
        [sys.executable, "-m", "lora_kit.cli", *map(str, arguments)], cwd=cwd, input=stdin, capture_output=True,
        text=True, timeout=timeout, env=environment(**changes), preexec_fn=preexec_fn)


@dataclass(frozen=True, kw_only=True)
class World:
    """A folder with a recipe (``tiny.yaml``), its rows, a model, a cache, and perhaps runs."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny.yaml"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def run(self) -> Path:
        return rundir.newest(self.runs)

    def use(self, patch: pytest.MonkeyPatch) -> World:
        """Make its cache the cache, with one thread."""
        patch.setenv("LORA_KIT_CACHE", str(self.folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        return self

    def lora_kit(self, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        """``lora-kit ARGUMENTS`` in the folder; see :func:`lora_kit`."""
        return lora_kit(*arguments, cwd=self.folder, **{"LORA_KIT_CACHE": str(self.folder / "cache"), **options})


_FINISHED: dict[Path, World] = {}


def finished(base: Path, factory: pytest.TempPathFactory) -> World:
    """A world whose recipe, with every kind of quantized form, has been run through all stages. Not to be changed.

    What stages do in fresh processes happens in this one: the processes' own tests, and the run of the real
    model, cover those.
    """
    if base in _FINISHED:
        return _FINISHED[base]
    world = World(folder=factory.mktemp("finished"))
    shutil.copytree(base, world.folder / "model")
    write_recipe(world.folder, "./model", quantize=FORMS)
    with pytest.MonkeyPatch.context() as patch:
        world.use(patch)
        patch.setattr(isolate, "call", call_here)
        pipeline.run_recipe(read(world.recipe), runs_dir=world.runs)
    _FINISHED[base] = world
    return world


def copy(world: World, folder: Path) -> World:
    """A copy of ``world`` in ``folder`` that a test may change; its runs name the copy as their place."""
    shutil.copytree(world.folder, folder, dirs_exist_ok=True)
    for path in (*folder.glob("runs/*/*/lock.json"), *folder.glob("runs/*/*/train/stage.json")):
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        path.write_text(path.read_text().replace(str(world.folder), str(folder)))
        os.utime(path, ns=times)
    return World(folder=folder)
