"""The process that calls are forked from: reused, replaced, given up, and gone when nobody needs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from lora_kit import isolate, nursery
from lora_kit.errors import MachineError
from lora_kit.isolate import call
from tests import test_isolate, tiny_run

SHIPPED = nursery.LIBRARIES

pytestmark = pytest.mark.skipif(not nursery.is_possible(), reason="no process is forked on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("calls")


@pytest.fixture(autouse=True)
def calls(folder, monkeypatch):
    test_isolate.prepare(monkeypatch, folder)
    monkeypatch.setattr(nursery, "_state", nursery._State())
    yield
    nursery.close()


def double(**options):
    return call("lora_kit.calls:double", {"number": 1}, **options).value


def test_two_calls_are_children_of_one_nursery():
    first, second = double(), double()
    assert first["parent"] == second["parent"] == nursery._state.current.pid != os.getpid()
    assert first["pid"] != second["pid"]


def test_a_fresh_process_is_no_child_of_it():
    assert double()["parent"] != os.getpid()
    assert double(fresh=True)["parent"] == os.getpid()


def test_environment_folder_and_threads_reach_the_child(monkeypatch, tmp_path):
    first = double()
    monkeypatch.setenv("LORA_KIT_CACHE", "/elsewhere")
    monkeypatch.chdir(tmp_path)
    second = double(threads=3)
    assert first["parent"] == second["parent"], "what is read when it is used needs no new nursery"
    assert (second["cache"], second["threads"], second["folder"]) == ("/elsewhere", "3", str(tmp_path))
    fresh = double(threads=3, fresh=True)
    changed = {"pid", "parent"}
    assert {key: second[key] for key in second.keys() - changed} == {key: fresh[key] for key in fresh.keys() - changed}


def test_what_is_read_while_importing_needs_a_new_one(monkeypatch):
    first = double()
    monkeypatch.setenv("HF_HUB_OFFLINE", "0" if os.environ.get("HF_HUB_OFFLINE") == "1" else "1")
    assert double()["parent"] != first["parent"]
    assert not psutil.pid_exists(first["parent"])


def test_a_crash_leaves_it_usable():
    before = double()["parent"]
    for function in ("crash", "be_killed", "interrupt", "fail_to_start"):
        with pytest.raises((MachineError, isolate.InternalError)):
            call(f"lora_kit.calls:{function}", {})
    with pytest.raises(MachineError, match="was stopped"):
        call("lora_kit.calls:sleep", {}, timeout_seconds=0.5)
    assert double()["parent"] == before
    assert psutil.Process(before).children() == []


def test_a_killed_one_is_replaced():
    before = double()["parent"]
    os.kill(before, signal.SIGKILL)
    nursery._state.current._process.wait()
    assert double()["parent"] not in (before, os.getpid())


def test_one_that_is_killed_during_a_call_leaves_it_to_a_fresh_process(tmp_path):
    """The child that was under way ends too: two never do the same work at once."""
    double()
    note, found = tmp_path / "note", {}

    def kill():
        found["first"] = read_note(note)
        note.unlink()
        os.kill(found["first"][1], signal.SIGKILL)
        found["second"] = read_note(note)
        found["was there"] = is_running(found["first"][0])
        os.kill(found["second"][0], signal.SIGTERM)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(MachineError, match="SIGTERM"):
        call("lora_kit.calls:sleep", {"note": str(note)})
    killer.join()
    assert found["second"][1] == os.getpid() and not found["was there"]
    assert double()["parent"] not in (found["first"][1], os.getpid())


@pytest.mark.parametrize("libraries", [("lora_kit.no_such_module",), ("threading", "lora_kit.calls:start_thread")])
def test_one_that_cannot_fork_is_given_up(monkeypatch, libraries):
    monkeypatch.setattr(nursery, "LIBRARIES", libraries)
    assert double()["parent"] == os.getpid() and nursery._state.given_up
    assert not nursery._state.current.is_alive()
    assert double()["parent"] == os.getpid()


def test_there_is_none_beside_an_accelerator(monkeypatch, tmp_path):
    monkeypatch.setattr(nursery, "_ACCELERATORS", (str(tmp_path),))
    assert double()["parent"] == os.getpid()


def test_peak_memory_is_the_call_s_own():
    peak = [call("lora_kit.calls:use_memory", {"num_bytes": size}).peak_memory_bytes for size in (1, 300_000_000, 1)]
    assert peak[1] - peak[0] == pytest.approx(300_000_000, rel=0.05)
    assert peak[2] == pytest.approx(peak[0], abs=10_000_000)


def test_calls_of_several_threads_run_at_once():
    double()
    started, seconds = time.perf_counter(), []

    def stop():
        with pytest.raises(MachineError, match="was stopped"):
            call("lora_kit.calls:sleep", {}, timeout_seconds=2)
        seconds.append(time.perf_counter() - started)

    threads = [threading.Thread(target=stop) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seconds) == 3 and max(seconds) < 4


def test_a_call_within_a_call_has_a_fresh_process():
    outer, inner = call("lora_kit.calls:within", {}).value
    assert inner["parent"] == outer


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_of_this_process_leaves_it_alone():
    before = double()["parent"]
    pid = os.fork()
    if pid == 0:
        os._exit(0 if nursery._state.current is None else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert double()["parent"] == before


# ---- when the one that started it ends -------------------------------------------------

PARENT = """
import sys
from lora_kit import isolate, nursery
nursery.LIBRARIES = ("json",)
try:
    isolate.call("lora_kit.calls:sleep", {"note": sys.argv[1]})
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
"""


def read_note(note):
    """(child, its parent) that ``sleep`` wrote."""
    deadline = time.monotonic() + 30
    while not note.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return [int(word) for word in note.read_text().split()]


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def parent(folder, tmp_path):
    note = tmp_path / "note"
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(note)], stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=tiny_run.environment(PYTHONPATH=os.pathsep.join([str(folder), str(tiny_run.ROOT)])))
    child, started_by = read_note(note)
    assert psutil.Process(started_by).ppid() == process.pid
    yield process, child, started_by
    process.kill()
    process.communicate()


def wait_until_gone(*pids):
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_ends_with_the_process_that_started_it_however_that_ends(parent):
    process, child, started_by = parent
    process.kill()
    wait_until_gone(child, started_by)


@pytest.mark.parametrize("to_all", [True, False])
def test_an_interrupt_ends_all_without_a_traceback(parent, to_all):
    """Ctrl-C in a terminal goes to every process of the group; elsewhere to the first alone."""
    process, child, started_by = parent
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[1] == "interrupted\n"
    assert process.returncode == 130
    wait_until_gone(child, started_by)


# ---- with the libraries ----------------------------------------------------------------


def test_the_libraries_are_there_before_a_call_and_can_be_forked(monkeypatch):
    """What is imported ahead starts no thread, reads threads as a fresh process does, and draws anew."""
    monkeypatch.setattr(nursery, "LIBRARIES", SHIPPED)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    loaded = call("lora_kit.calls:loaded", {}).value
    assert {"torch", "transformers", "peft"} <= set(loaded)
    assert nursery._state.current is not None and not nursery._state.given_up, "it was not forked"
    assert call("lora_kit.calls:torch_threads", {}, threads=1).value == 1
    assert call("lora_kit.calls:torch_threads", {}).value == call("lora_kit.calls:torch_threads", {}, fresh=True).value
    draws = [call("lora_kit.calls:draw", {}).value for _ in range(2)]
    assert draws[0][0] != draws[1][0] and draws[0][1] != draws[1][1]
