"""A full disk, or a folder that cannot be written, ends a training with 6 and leaves the checkpoint before."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests import tiny_run

PROGRAM = """
import json, os, resource, shutil, sys, traceback
from pathlib import Path
from lora_kit import events, pipeline
from tests import killed_runs, tiny_run

folder, fault = Path(sys.argv[1]), sys.argv[2]
killed_runs.import_all()
reference = killed_runs.make_reference(folder, "plain")
runs = folder / "runs"

def break_disk(event):
    if not isinstance(event, events.Progress) or event.done != 4:  # after the checkpoint of step 3
        return
    if fault == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    else:
        [checkpoints] = runs.glob("*/*/train/checkpoints")
        checkpoints.rename(checkpoints.with_name("moved"))
        checkpoints.write_text("a file in the folder's place")

child = os.fork()
if child == 0:
    os.environ["LORA_KIT_CACHE"] = str(folder / "cache")
    code = 70
    try:
        with events.listening(break_disk):
            pipeline.run_recipe(tiny_run.read(reference.recipe), runs_dir=runs, until="train")
    except BaseException as error:
        (folder / "said.txt").write_text(str(error))
        code = getattr(error, "exit_code", 70)
    os._exit(code)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
[train] = runs.glob("*/*/train")
if fault == "unwritable":
    (train / "checkpoints").unlink()
    (train / "moved").rename(train / "checkpoints")
left = sorted(path.name for path in (train / "checkpoints").iterdir())
again = killed_runs.live(reference.recipe, runs)
print(json.dumps({"code": code, "said": (folder / "said.txt").read_text(), "left": left, "again": again.code,
                  "equal": killed_runs.ending(runs) == reference.ending}))
"""


@pytest.mark.parametrize(("fault", "said"), [("full", "cannot be written"), ("unwritable", "cannot be written")])
def test_the_checkpoint_before_stays_and_the_run_goes_on(tmp_path, fault, said):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), fault], cwd=tiny_run.ROOT,
                          env=tiny_run.environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["code"] == 6 and said in found["said"] and "free space" in found["said"]
    assert found["left"] == ["step-000003"], "half a checkpoint is left, or none"
    assert found["again"] == 0 and found["equal"]
