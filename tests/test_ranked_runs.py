"""Several processes learn what one does, stop and go on exactly, and do not wait for one that is gone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests import tiny_run


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranked_runs", str(tmp_path_factory.mktemp("ranked"))], cwd=tiny_run.ROOT,
        env=tiny_run.environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("shard", ["none", "fsdp"])
@pytest.mark.parametrize("number", [2, 4])
def test_one_times_eight_is_two_times_four_is_four_times_two(found, shard, number):
    alone, several = found[f"{shard} 1"], found[f"{shard} {number}"]
    assert several["num_processes"] == number and alone["num_processes"] == 1
    assert len(alone["losses"]) == 20 and alone["losses"][-1] < alone["losses"][0] - 0.1
    assert several["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    assert several["held_out"] == pytest.approx(alone["held_out"], rel=1e-6)


@pytest.mark.parametrize("number", [2, 4])
def test_an_adapter_of_shared_weights_is_written_whole(found, number):
    assert found[f"fsdp {number}"]["shapes"] == found["none 1"]["shapes"]


def test_a_base_in_four_bits_can_be_shared(found):
    plain, shared = found["4bit none"], found["4bit fsdp"]
    assert shared["losses"] == pytest.approx(plain["losses"], rel=1e-5)
    assert plain["losses"][-1] < plain["losses"][0] and shared["shapes"] == plain["shapes"]


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_one_process_is_told_to_stop_and_all_go_on_to_the_same_bytes(found, shard):
    stopped = found[f"stopped {shard}"]
    assert stopped["codes"] == [[75, 75], [75, 75]]
    assert stopped["gone_on"] == stopped["straight"]
    assert len(stopped["straight"]["ending"]) == 4


@pytest.mark.parametrize("name", ["dead", "stopped rank", "hanging rank"])
def test_a_process_that_is_gone_ends_the_others_within_a_minute(found, name):
    lost = found[name]
    assert lost["code"] == 75 and lost["seconds"] < 60
    assert lost["step"] == 8  # what there is to go on from
    assert "so this one stopped" in lost["said"]


def test_a_process_that_hangs_ends_by_itself(found):
    assert found["hanging rank"]["others"] == [75]
