"""stopwatch.py: every second belongs to one part, CPU of threads and children included."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time

import pytest

from lora_kit import stopwatch


@pytest.fixture(autouse=True)
def nothing_running(monkeypatch):
    monkeypatch.setattr(stopwatch, "_running", None)


def work(cpu_seconds: float) -> None:
    ends = time.process_time() + cpu_seconds
    while time.process_time() < ends:
        pass


def test_a_part_inside_another_is_taken_from_it():
    with stopwatch.one_start():
        with stopwatch.part("outer"):
            work(0.05)
            with stopwatch.part("inner"):
                time.sleep(0.1)
            work(0.05)
        work(0.03)
        start = stopwatch.end()
    parts = start["parts"]
    assert list(parts) == ["other", "outer", "inner"]
    assert parts["outer"]["cpu_seconds"] == pytest.approx(0.1, abs=0.03)
    assert parts["inner"]["seconds"] >= 0.1 and parts["inner"]["cpu_seconds"] < 0.03
    assert parts["other"]["cpu_seconds"] == pytest.approx(0.03, abs=0.02)
    for key in ("seconds", "cpu_seconds"):
        assert start[key] == pytest.approx(sum(spent[key] for spent in parts.values()))
    assert start["of_process"] is False


def test_what_is_told_beside_is_not_in_the_sum():
    with stopwatch.one_start():
        with stopwatch.part("model"):
            work(0.02)
        with stopwatch.part("proof"):
            work(0.2)
        start = stopwatch.end()
    assert start["cpu_seconds"] < 0.1 and start["parts"]["proof"]["cpu_seconds"] >= 0.2


def test_child_processes_count():
    code = "import time\nwhile time.process_time() < 0.3: pass"
    with stopwatch.one_start():
        with stopwatch.part("child"):
            subprocess.run([sys.executable, "-c", code], check=True)
        start = stopwatch.end()
    assert start["parts"]["child"]["cpu_seconds"] >= 0.25


def test_a_command_counts_from_its_first_moment():
    code = ("import time\nwhile time.process_time() < 0.3: pass\ntime.sleep(0.2)\nfrom lora_kit import stopwatch\n"
            "stopwatch.begin_with_process()\nwith stopwatch.part('later'): time.sleep(0.2)\n"
            "start = stopwatch.end()\nimports = start['parts']['imports']\n"
            "print(imports['cpu_seconds'], imports['seconds'], start['of_process'])")
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": os.getcwd()})
    cpu, wall, of_process = done.stdout.split()
    assert 0.3 <= float(cpu) and 0.49 <= float(wall) <= time.perf_counter() - began - 0.2 and of_process == "True"


def test_without_a_start_parts_cost_nothing_and_none_is_left_behind():
    with stopwatch.part("model"):
        pass
    assert stopwatch.end() is None
    with pytest.raises(ValueError), stopwatch.one_start():
        raise ValueError
    assert stopwatch.end() is None
    stopwatch.begin_with_process()
    with stopwatch.one_start() as watch:
        assert watch.of_process  # the command's own goes on
        assert stopwatch.end()["of_process"] is True
        with stopwatch.part("after"):
            pass
    assert "after" not in watch.parts


def test_a_function_can_be_a_part():
    @stopwatch.part("model")
    def load(value):
        """Load."""
        work(0.02)
        return value

    assert load(3) == 3 and load.__doc__ == "Load."
    with stopwatch.one_start():
        load(1), load(2)
        assert stopwatch.end()["parts"]["model"]["cpu_seconds"] >= 0.04


def test_imports_are_counted_and_made_without_collections():
    gc.unfreeze()  # an earlier test of this process may have frozen something, which would stay so
    for before in (True, False):
        (gc.enable if before else gc.disable)()
        try:
            with stopwatch.one_start():
                with stopwatch.part("model"), stopwatch.importing():
                    assert not gc.isenabled()
                    work(0.02)
                assert stopwatch.end()["parts"]["imports"]["cpu_seconds"] >= 0.02
            assert gc.isenabled() is before and gc.get_freeze_count() == 0
        finally:
            gc.enable()


def test_what_another_froze_stays_frozen():
    gc.freeze()
    try:
        with stopwatch.importing():
            pass
        assert gc.get_freeze_count() > 0 and gc.isenabled()
    finally:
        gc.unfreeze()


def test_a_line_for_people():
    spent = {"seconds": 2.0, "cpu_seconds": 1.5}
    start = {"seconds": 4.0, "cpu_seconds": 3.0, "of_process": True,
             "parts": {"imports": spent, "held-out loss": spent, "model": spent}}
    assert stopwatch.start_text(start) == (
        "3 s of CPU (4 s): imports 1.5 s, model 1.5 s; beside it held-out loss 1.5 s")
    del start["parts"]["held-out loss"]
    assert stopwatch.start_text(start) == "3 s of CPU (4 s): imports 1.5 s, model 1.5 s"
