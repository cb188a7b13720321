"""A second `lora-kit train` on a run that is held is refused within two seconds, and changes nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import tiny_run

HOLD = """
import time
from pathlib import Path
from lora_kit import pipeline
from lora_kit.recipe_file import read_recipe
run = pipeline.open_for(read_recipe("tiny.yaml"), Path("runs"))
with run.locked():
    print(run.path, flush=True)
    time.sleep(120)
"""


@pytest.fixture
def held(tiny_model, tmp_path):
    """A world whose run another process holds."""
    tiny_run.write_recipe(tmp_path, tiny_model)
    world = tiny_run.World(folder=tmp_path)
    process = subprocess.Popen([sys.executable, "-c", HOLD], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                               env=tiny_run.environment(LORA_KIT_CACHE=str(tmp_path / "cache")))
    assert process.stdout.readline().startswith("runs/tiny/")
    yield world, process.pid
    process.kill()
    process.wait()
    process.stdout.close()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("by", ["run", "recipe"])
def test_it_is_refused_within_two_seconds_and_nothing_has_changed(held, by):
    world, pid = held
    target = world.run if by == "run" else world.recipe
    before, seconds = content(world.runs), []
    for _ in range(3):  # the least of three: the machine may be busy
        started = time.monotonic()
        done = world.lora_kit("train", target)
        seconds.append(time.monotonic() - started)
        assert done.returncode == 6 and f"is in use by pid {pid} on " in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert min(seconds) < 2
    assert content(world.runs) == before
