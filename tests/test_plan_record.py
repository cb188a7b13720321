"""plan_record.py: forecasts beside real runs, and what is learnt from them."""

from __future__ import annotations

import dataclasses

import pytest

from lora_kit import calibration, plan_record
from lora_kit.errors import DataError


@pytest.fixture
def world(finished_world):
    return finished_world


def test_a_run_is_set_beside_its_forecast(world):
    found, left = plan_record.records(world.runs)
    assert len(found) == 1 and not left
    record = found[0]
    assert record.measured_bytes > 100e6 and record.forecast_bytes > 400e6 and record.measured_seconds > 0
    assert record.is_of_this_machine and record.row()[3] == f"{record.error:+.1%}" and record.row()[5] == "–"
    parts = list(plan_record.parts(world.runs))
    assert parts[0][1] == plan_record.COLUMNS and "1 runs: peak memory off by" in parts[1]
    assert "nothing is learnt" in parts[2]


def test_times_are_compared_once_the_machine_is_calibrated(world):
    precision = plan_record.records(world.runs)[0][0].precision
    calibration.store(precision, train_flops_per_second=1e9, read_flops_per_second=1e9, write_bytes_per_second=1e9)
    record = plan_record.records(world.runs)[0][0]
    assert record.forecast_seconds > 0 and record.row()[6].endswith("%")


def test_a_share_is_learnt_from_enough_runs_of_this_machine(world):
    record = plan_record.records(world.runs)[0][0]
    runs = [dataclasses.replace(record, kept_share=share) for share in (0.2, 0.5, 0.3)]
    foreign = dataclasses.replace(record, kept_share=9.0, is_of_this_machine=False)
    assert "nothing is learnt" in plan_record.learn([*runs[:2], foreign])[0]
    assert calibration.load(record.precision).kept_share is None
    assert "0.38 of what the layers keep (70% of 3 runs have less)" in plan_record.learn([*runs, foreign])[0]
    assert calibration.load(record.precision).kept_share == pytest.approx(0.38)


def test_runs_that_cannot_be_compared_say_why(world, tmp_path):
    (world.run / "train" / "stage.json").unlink()
    found, left = plan_record.records(world.runs)
    assert not found and left[0].endswith("its training is not done")
    with pytest.raises(DataError, match="holds no run"):
        plan_record.records(tmp_path / "nothing")
