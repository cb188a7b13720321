"""A training that is killed with kill -9, wherever it is, ends with the bytes of one that was not.

Chosen cuts; benchmarks/crash.py makes as many as one likes, whole processes and SmolLM2 among them.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys

import pytest

from tests import killed_runs, tiny_run

CUTS = {
    "while it opens the run": ("plain", [{"after": "begin", "seconds": 0.05}]),
    "in the evaluation before the first step": ("fast", [{"after": "eval 1", "seconds": 0.001}]),
    "in the first epoch": ("plain", [{"after": "step 2", "seconds": 0.005}]),
    "before the first checkpoint has a folder": ("fast", [{"after": "save 1", "boundary": 3}]),
    "before the first checkpoint is sealed": ("plain", [{"after": "save 1", "boundary": 12}]),
    "while a checkpoint is read back": ("fast", [{"after": "save 3", "boundary": 22}]),
    "while the oldest checkpoint goes": ("plain", [{"after": "save 3", "boundary": 36}]),
    "in an evaluation of the second epoch": ("plain", [{"after": "eval 3", "seconds": 0.001}]),
    "in the second epoch": ("fast", [{"after": "step 7", "seconds": 0.005}]),
    "after the last step, before it is saved": ("fast", [{"after": "step 13"}]),
    "while the adapter is written": ("plain", [{"after": "saved 5 after 40 operations", "seconds": 0.01}]),
    "again and again": ("plain", [{"after": "step 4"}, {"after": "save 1", "boundary": 30},
                                  {"after": "step 8", "seconds": 0.004}, {"after": "eval 1"}, {"after": "step 12"}]),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, dict]:
    """What came of each of CUTS, from a process of its own: this one has threads, which a fork would lose."""
    wanted = [{"kind": kind, "cuts": cuts} for kind, cuts in CUTS.values()]
    done = subprocess.run(
        [sys.executable, "-m", "tests.killed_runs", str(tmp_path_factory.mktemp("killed")), json.dumps(wanted)],
        cwd=tiny_run.ROOT, env=tiny_run.environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CUTS, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", CUTS)
def test_killed_and_gone_on_with_it_ends_the_same(outcomes, name):
    found = outcomes[name]
    assert found["differ"] == [] and found["equal"]
    assert found["codes"] == [-signal.SIGKILL] * len(CUTS[name][1]) + [0], "it was not killed where it should have been"
    assert found["lost_steps"] <= killed_runs.SAVE_EVERY


def test_a_difference_would_be_seen(tmp_path):
    run = tmp_path / "tiny" / "20260101-000000-0000" / "train"
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl", "checkpoints/step-000003/adapter.safetensors",
                 "checkpoints/step-000003/optimizer.safetensors"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    whole = killed_runs.ending(tmp_path)
    assert sorted(whole) == ["adapter", "metrics", "step-000003 adapter", "step-000003 optimizer"]
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl", "checkpoints/step-000003/optimizer.safetensors"):
        (run / name).write_text("other")
        assert killed_runs.ending(tmp_path) != whole
        (run / name).write_text(name)
        assert killed_runs.ending(tmp_path) == whole
