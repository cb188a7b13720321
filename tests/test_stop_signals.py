"""Signals end a training with 75 wherever it is, and it goes on to the same bytes.

(There are no loader workers whose number could matter: token files are mapped, and batches made in the process.)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from lora_kit import checkpoint, events, rundir, shares, training_model
from lora_kit import train as train_stage
from lora_kit.errors import StoppedError
from lora_kit.stop_signals import SIGNALS, StopSignals
from tests import tiny_run
from tests.test_train import own_cache, recipe_for, rows, train  # noqa: F401 - fixtures

SETTINGS = dict(steps=8, micro_batch_size=1, packing="false", eval_every=3, save_every=3, stop_prompts=2, stop_within=4)
MOMENTS = {
    "while the base is loaded": (training_model.model, "load_base", 1),
    "in the evaluation before the first step": (train_stage, "evaluate_loss", 1),
    "in a step, between its passes": (shares.Shares, "batch_of", 4 + 4 * 2 + 3),  # 4 held-out passes, 2 steps, 3 passes
    "in a later evaluation": (train_stage, "evaluate_loss", 2),
    "while a checkpoint is written": (checkpoint, "save", 3),  # the first is the rehearsal's
    "after the last step": (train_stage, "measure_stop_rate", 1),
}
AT = {"in a step, between its passes": 2, "in a later evaluation": 3, "while a checkpoint is written": 6,
      "in the evaluation before the first step": 0, "after the last step": 8}
"""Steps that are done by then."""


def bytes_of(run) -> dict[str, bytes]:
    train_dir = run.stage_dir("train")
    return {str(path.relative_to(train_dir)): path.read_bytes() for path in (
        train_dir / "metrics.jsonl", train_dir / "adapter" / "adapter_model.safetensors",
        train_dir / "checkpoints" / "step-000008" / "optimizer.safetensors")}


@pytest.fixture(scope="module")
def straight(tiny_model, tmp_path_factory):
    """Bytes of the training of SETTINGS that was not stopped."""
    from tests.test_train import write_rows

    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_KIT_CACHE", str(folder / "cache"))
        recipe_file = recipe_for(tiny_model, write_rows(folder / "rows.jsonl"), "lora.dropout=0.1", **SETTINGS)
        return bytes_of(train(recipe_file, folder))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_ends_with_75_and_the_run_goes_on_to_the_same_bytes(
        tiny_model, rows, tmp_path, monkeypatch, straight, moment, number):  # noqa: F811
    owner, name, nth = MOMENTS[moment]
    function, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        calls.append(name)
        if len(calls) == nth:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    recipe_file = recipe_for(tiny_model, rows, "lora.dropout=0.1", **SETTINGS)
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(StoppedError) as stopped:
            train(recipe_file, tmp_path)
    assert stopped.value.exit_code == 75 and "lora-kit train" in stopped.value.todo
    assert {each: signal.getsignal(each) for each in SIGNALS} == before
    run = rundir.open_run(rundir.newest(tmp_path / "runs"))
    saved = sorted((run.work("train") / "checkpoints").glob("step-*"))
    if moment in AT:
        assert saved and saved[-1].name == f"step-{AT[moment]:06d}"
        assert checkpoint.verified(saved[-1], AT[moment], run.uid).state["step"] == AT[moment]
    else:
        assert "stopped before the first step" in str(stopped.value) and not saved
    assert bytes_of(train(recipe_file, tmp_path)) == straight


def test_a_second_ctrl_c_ends_at_once():
    with pytest.raises(KeyboardInterrupt), StopSignals("here", "go on") as stop, events.listening(lambda event: None):
        stop.note_only()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def test_a_second_sigterm_waits_for_the_checkpoint():
    with StopSignals("here", "go on") as stop:
        stop.note_only()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_the_command_line_ends_with_75_within_20_seconds(tiny_model, rows, tmp_path, number):  # noqa: F811
    (tmp_path / "tiny.yaml").write_text(recipe_for(tiny_model, rows, steps=4000).text)
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_kit.cli", "train", "tiny.yaml"], cwd=tmp_path, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=tiny_run.environment(LORA_KIT_CACHE=str(tmp_path / "cache")))
    try:
        for line in process.stdout:
            if "train step" in line:
                break
        process.send_signal(number)
        sent = time.monotonic()
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75 and time.monotonic() - sent < 20
    assert len(stderr.strip().splitlines()) == 1 and "go on with: lora-kit train" in stderr
    assert checkpoint.newest(next(tmp_path.glob("runs/tiny/*/train/checkpoints")),
                             rundir.open_run(rundir.newest(tmp_path / "runs")).uid).state["step"] > 0
