"""How many processes: from the recipe, an accelerate config, the option, or a launcher's variables."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from lora_kit import events, launch, launcher, ranks
from lora_kit.errors import RecipeError, StoppedError
from lora_kit.recipe import LaunchSection
from lora_kit.recipe_file import parse_recipe

RECIPE = "model: {base: ./model}\ndata: {train: rows.jsonl}\n"
CONFIG = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: MULTI_CPU
main_training_function: main
mixed_precision: 'no'
num_machines: 1
machine_rank: 0
num_processes: 4
rdzv_backend: static
use_cpu: true
"""


def recipe(text: str = ""):
    from pathlib import Path

    return parse_recipe(RECIPE + text, Path("/r/mine.yaml")).recipe


@pytest.fixture
def config(tmp_path):
    def write(text: str = CONFIG):
        (tmp_path / "accelerate.yaml").write_text(text)
        return tmp_path / "accelerate.yaml"

    return write


# ---- settings --------------------------------------------------------------------------


def test_one_process_unless_told_otherwise():
    assert launch.settings_of(recipe(), None, None) == LaunchSection()
    assert launch.settings_of(recipe("launch: {num_processes: 2}\n"), None, None).num_processes == 2
    assert launch.settings_of(recipe("launch: {num_processes: 2}\n"), None, 4).num_processes == 4


def test_an_accelerate_config_takes_the_recipes_place(config):
    told = []
    with events.listening(told.append):
        found = launch.settings_of(recipe("launch: {num_processes: 2}\n"), config(), None)
    assert found == LaunchSection(num_processes=4)
    assert [event.text for event in told] == [
        f"{config()}: not used by lora-kit: main_training_function, rdzv_backend, use_cpu"]


@pytest.mark.parametrize(("line", "what"), [
    ("distributed_type: FSDP", r":3: distributed_type is FSDP, and train.shard is none; set train.shard: fsdp"),
    ("distributed_type: DEEPSPEED", r":3: distributed_type DEEPSPEED is not supported"),
    ("mixed_precision: int4", r":5: mixed_precision is int4"),
    ("num_processes: many", r":8: .*num_processes"),
    ("deepspeed_config: {}", r":11: 'deepspeed_config' of an accelerate config is not supported"),
    ("compute_environment: AMAZON_SAGEMAKER", r":1: compute_environment AMAZON_SAGEMAKER is not supported"),
])
def test_what_a_config_asks_for_and_the_recipe_does_not_do(config, line, what):
    key = line.partition(":")[0]
    lines = [line if text.startswith(key + ":") else text for text in CONFIG.splitlines()]
    path = config("\n".join(lines if line in lines else [*lines, line]) + "\n")
    with pytest.raises(RecipeError, match=what):
        launch.settings_of(recipe(), path, None)


def test_an_impossible_split_names_the_nearest_possible_ones():
    with pytest.raises(RecipeError) as error:
        launch.settings_of(recipe("train: {batch_size: 8}\n"), None, 3)
    assert str(error.value) == ("train.batch_size: 8 examples cannot be shared by 3 processes; use 6 or 9, or "
                                "2 or 4 processes")
    with pytest.raises(RecipeError, match="use 5, or 1 or 2 processes"):
        launch.check_split(2, 5)
    with pytest.raises(RecipeError, match="--num-processes: 3 processes on 2 machines"):
        launch.settings_of(recipe("launch: {num_processes: 2, num_machines: 2}\ntrain: {batch_size: 6}\n"), None, 3)


# ---- srun ------------------------------------------------------------------------------


@pytest.fixture
def slurm(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone
        monkeypatch.delenv(name)

    def set_all(**values: str) -> None:
        for name, value in {"STEP_NUM_TASKS": "4", "PROCID": "3", "LOCALID": "1", "JOB_ID": "4711",
                            "LAUNCH_NODE_IPADDR": "10.0.0.7", **values}.items():
            monkeypatch.setenv(f"SLURM_{name}", value)

    return set_all


def test_the_processes_of_srun_get_torchs_variables(slurm):
    slurm()
    launch.take_over_from_srun()
    assert {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")} == {
        "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "24711"}


def test_one_task_of_slurm_or_none_is_left_alone(slurm):
    launch.take_over_from_srun()
    assert "WORLD_SIZE" not in os.environ
    slurm(STEP_NUM_TASKS="1")
    launch.take_over_from_srun()
    assert "WORLD_SIZE" not in os.environ


def test_what_srun_does_not_say_is_asked_for(slurm, monkeypatch):
    slurm()
    monkeypatch.delenv("SLURM_LAUNCH_NODE_IPADDR")
    with pytest.raises(RecipeError, match="4 tasks were started, and SLURM_LAUNCH_NODE_IPADDR is not set; set MASTER"):
        launch.take_over_from_srun()


# ---- the launcher ----------------------------------------------------------------------

PROGRAM = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def say(number, frame):
    sys.exit(75)
signal.signal(signal.SIGTERM, say)
signal.signal(signal.SIGUSR1, say)
what = sys.argv[1 + rank]
if what == "wait":
    time.sleep(60)
if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(what))
"""


def run(*whats: str, **settings) -> tuple[int, float]:
    started = time.monotonic()
    code = launcher.launch(LaunchSection(num_processes=len(whats), **settings), [sys.executable, "-c", PROGRAM, *whats])
    return code, time.monotonic() - started


@pytest.mark.parametrize(("codes", "expected"), [
    (("0", "0"), 0), (("0", "6"), 6), (("75", "6"), 6), (("8", "4"), 8), (("7", "70", "8"), 70), (("75", "75"), 75),
    (("killed", "0"), 75), (("130", "0"), 75),
])
def test_the_worst_exit_code_is_handed_on(codes, expected):
    assert run(*codes)[0] == expected


def test_when_one_ends_badly_the_others_end(monkeypatch):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(launcher, "_KILL_AFTER_SECONDS", 0.5)
    code, seconds = run("killed", "wait", "deaf")
    assert code == 75 and seconds < 10


def test_signals_are_passed_on():
    threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    before = signal.getsignal(signal.SIGUSR1)
    code, seconds = run("wait", "wait")
    assert code == 75 and seconds < 30
    assert signal.getsignal(signal.SIGUSR1) == before


def test_each_process_is_told_who_it_is(tmp_path):
    code = ("import os, sys, pathlib; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(' '.join("
            "os.environ[name] for name in ('WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')))")
    settings = LaunchSection(num_processes=4, num_machines=2, machine_rank=1, main_process_ip="10.1.1.1",
                             main_process_port=4000)
    assert launcher.launch(settings, [sys.executable, "-c", code, str(tmp_path)]) == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "2": "4 0 10.1.1.1 4000", "3": "4 1 10.1.1.1 4000"}


def test_machines_that_do_not_know_each_other_are_an_error():
    with pytest.raises(RecipeError, match="2 machines, and no address of the first"):
        launcher.launch(LaunchSection(num_processes=2, num_machines=2), ["true"])


# ---- watching each other ---------------------------------------------------------------


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "BEAT_SECONDS", 0.05)
    folder = ranks.folder_of(tmp_path, "one")
    both = [ranks.Ranks(folder, rank, 2) for rank in range(2)]
    yield both
    for each in both:
        each._over.set()


def test_of_many_the_first_watches_all_and_all_watch_the_first(tmp_path):
    folder = ranks.folder_of(tmp_path, "many")
    several = [ranks.Ranks(folder, rank, 17) for rank in (0, 5)]
    assert several[0].watched == list(range(1, 17)) and several[1].watched == [0]
    for each in several:
        each.end(0)


def test_while_all_live_none_is_gone(pair):
    assert pair[0].gone() is None and pair[1].gone() is None


def test_one_that_ended_badly_is_gone_and_one_that_ended_well_is_not(pair):
    pair[1].end(0)
    assert pair[0].gone() is None
    pair[1].end(6)
    assert pair[0].gone() == "process 1 ended with 6"


def test_one_that_gives_no_sign_is_gone(pair, monkeypatch):
    monkeypatch.setattr(ranks, "STALE_SECONDS", 0.5)
    pair[1]._over.set()
    ends = time.monotonic() + 10
    while pair[0].gone() is None and time.monotonic() < ends:
        time.sleep(0.05)
    assert pair[0].gone().startswith("process 1 has given no sign for ")


def test_where_none_computes_all_are_gone_and_one_that_computes_is_enough(pair, monkeypatch):
    monkeypatch.setattr(ranks, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(ranks.Ranks, "_has_worked", lambda self: self.rank == 1)
    ends = time.monotonic() + 2
    while time.monotonic() < ends:
        assert pair[0].gone() is None
        time.sleep(0.05)
    monkeypatch.setattr(ranks.Ranks, "_has_worked", lambda self: False)
    time.sleep(1)
    assert pair[0].gone().startswith("none of 2 processes has computed anything for ")
    pair[0].end(0)  # has done its part
    assert pair[1].gone().startswith("none of 2 processes")


def test_computing_is_work_and_sleeping_is_none(pair, monkeypatch):
    monkeypatch.setattr(ranks, "_waits_for_disk", lambda: False)
    pair[0]._over.set()
    pair[0]._thread.join()
    pair[1].end(0)
    pair[1]._thread.join()
    pair[0]._has_worked()
    time.sleep(0.5)
    assert not pair[0]._has_worked()
    ends = time.monotonic() + 0.2
    while time.monotonic() < ends:
        pass
    assert pair[0]._has_worked()


def test_a_collective_that_failed_for_lack_of_another_is_a_stop(pair):
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    pair[1].end(8)
    found = pair[0].explain(error)
    assert isinstance(found, StoppedError) and "process 1 ended with 8, so this one stopped" in str(found)
    other = RuntimeError("shapes do not match")
    assert pair[0].explain(other) is other
