"""The launchers themselves, with whole processes: our own, accelerate's, srun's variables, two torchrun agents."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_kit import rundir
from tests import tiny_run
from tests.test_train import metrics_of, own_cache, recipe_for, rows  # noqa: F401 - fixtures

MODULE = ["-m", "lora_kit.cli", "train", "tiny.yaml"]


@pytest.fixture
def place(tiny_model, rows, tmp_path):  # noqa: F811
    (tmp_path / "tiny.yaml").write_text(recipe_for(tiny_model, rows).text)
    return tmp_path


def start(place: Path, *command: str, **changes: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *command], cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=tiny_run.environment(LORA_KIT_CACHE=str(place / "cache"), **changes))


def end(*processes: subprocess.Popen, seconds: float = 120) -> list[int]:
    codes = []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=seconds)
        finally:
            process.kill()
        codes.append(process.returncode)
        process.output = output
    return codes


def trained(place: Path):
    run = rundir.open_run(rundir.newest(place / "runs"))
    return run, run.seal("train")["figures"]["num_processes"]


def test_our_own_launcher_and_one_process_learn_the_same(place):
    alone = start(place, *MODULE, "--runs", "alone")
    assert end(alone) == [0], alone.output
    several = start(place, *MODULE, "--num-processes", "2")
    assert end(several) == [0], several.output
    run, number = trained(place)
    assert number == 2 and several.output.count("adapter: ") == 1
    expected = rundir.open_run(rundir.newest(place / "alone"))
    assert metrics_of(run) == pytest.approx(metrics_of(expected), rel=1e-6)


def test_run_trains_in_the_recipes_processes_and_does_the_rest_in_one(place):
    with open(place / "tiny.yaml", "a") as file:
        file.write("launch: {num_processes: 2}\nmerge: {dtype: fp32}\n")
    ran = start(place, "-m", "lora_kit.cli", "run", "tiny.yaml", "--set", "bench.repeats=1", "--set",
                "bench.new_tokens=4", "--set", "eval.samples=1", "--set", "eval.sample_tokens=4")
    assert end(ran, seconds=240)[0] in (0, 1, 3), ran.output  # whatever the gates say of so short a training
    run, number = trained(place)
    assert number == 2 and run.seal("merge") is not None and run.seal("report") is not None


def test_accelerates_launcher_enters_the_same_function(place):
    launched = start(place, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *MODULE)
    assert end(launched) == [0], launched.output
    assert trained(place)[1] == 2


def test_the_tasks_of_srun_enter_the_same_function(place):
    # srun itself is not at hand: its tasks' environment is.
    tasks = [start(place, *MODULE, SLURM_STEP_NUM_TASKS="2", SLURM_PROCID=str(task), SLURM_LOCALID=str(task),
                   SLURM_JOB_ID=str(os.getpid()), SLURM_LAUNCH_NODE_IPADDR="127.0.0.1") for task in range(2)]
    assert end(*tasks) == [0, 0], tasks[0].output + tasks[1].output
    assert trained(place)[1] == 2


def wait_for_step(place: Path, processes: list[subprocess.Popen], step: int) -> None:
    ends = time.monotonic() + 120
    while not any(f'"step": {step},' in path.read_text() for path in place.glob("runs/tiny/*/train/metrics.jsonl")):
        assert time.monotonic() < ends and all(process.poll() is None for process in processes)
        time.sleep(0.1)


def test_two_machines_one_of_them_lost_and_gone_on_with(place, tiny_model, rows):  # noqa: F811
    """Two torchrun agents on one machine stand for two machines that share a disk."""
    (place / "tiny.yaml").write_text(recipe_for(tiny_model, rows, steps=300, save_every=20).text)
    from lora_kit.launcher import _free_port

    def agents() -> list[subprocess.Popen]:
        port = _free_port()
        return [start(place, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node),
                      "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port), *MODULE)
                for node in range(2)]

    both = agents()
    wait_for_step(place, both, 45)
    import psutil

    [worker] = [child for child in psutil.Process(both[1].pid).children() if "lora_kit.cli" in child.cmdline()]
    both[1].kill()  # the agent, and with it its machine's process
    worker.send_signal(signal.SIGKILL)
    lost = time.monotonic()
    codes = end(*both)
    assert time.monotonic() - lost < 60 and codes[0] != 0 and codes[1] == -signal.SIGKILL
    run = rundir.open_run(rundir.newest(place / "runs"))
    steps = [int(path.name.removeprefix("step-")) for path in (run.path / "train" / "checkpoints").glob("step-*")]
    assert max(steps) >= 40 and run.seal("train") is None
    again = agents()
    assert end(*again) == [0, 0], again[0].output + again[1].output
    assert "going on from step-0000" in again[0].output
    assert len(metrics_of(run)) == 300 and trained(place)[1] == 2


def test_a_process_that_is_killed_ends_ours_with_75_and_the_run_goes_on(place, tiny_model, rows):  # noqa: F811
    (place / "tiny.yaml").write_text(recipe_for(tiny_model, rows, steps=300, save_every=20).text)
    launched = start(place, *MODULE, "--num-processes", "2")
    wait_for_step(place, [launched], 45)
    import psutil

    victim = psutil.Process(launched.pid).children()[1]
    victim.send_signal(signal.SIGKILL)
    lost = time.monotonic()
    assert end(launched) == [75], launched.output
    assert time.monotonic() - lost < 60 and "process 1 was ended by SIGKILL" in launched.output
    run = rundir.open_run(rundir.newest(place / "runs"))
    assert run.seal("train") is None
    again = start(place, *MODULE, "--num-processes", "2")
    assert end(again) == [0], again.output
    assert "going on from step-0000" in again.output and trained(place)[1] == 2
    assert len(metrics_of(run)) == 300
