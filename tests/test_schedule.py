"""How long training is, how fast it learns, when it saves."""

from __future__ import annotations

import pytest

from lora_kit.recipe import TrainSection
from lora_kit.schedule import count_steps, learning_rate_at, save_interval


@pytest.mark.parametrize(("settings", "num_rows", "steps"), [
    ({"steps": 7}, 1000, 7), ({}, 360, 45), ({}, 361, 46), ({"epochs": 3, "batch_size": 8}, 600, 225),
    ({"epochs": 0.5, "batch_size": 4}, 10, 2), ({"epochs": 0.01}, 3, 1),
])
def test_steps_are_given_or_follow_from_epochs(settings, num_rows, steps):
    assert count_steps(TrainSection(**settings), num_rows) == steps


def test_the_learning_rate_warms_up_and_falls_to_zero():
    settings = TrainSection(learning_rate=1.0, warmup=0.2)
    rates = [learning_rate_at(step, 10, settings) for step in range(11)]
    assert rates[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates[6] == pytest.approx(0.5)
    assert rates[10] == pytest.approx(0.0)
    assert all(later < earlier for earlier, later in zip(rates[2:], rates[3:], strict=False))
    assert 0 < rates[9] < 0.05, "the last step still learns"


def test_a_constant_rate_stays_after_warm_up():
    settings = TrainSection(learning_rate=2e-4, warmup=0.1, schedule="constant")
    assert {learning_rate_at(step, 20, settings) for step in range(1, 20)} == {2e-4}
    assert learning_rate_at(0, 20, settings) == 1e-4


def test_without_warm_up_the_first_step_has_the_peak_rate():
    assert learning_rate_at(0, 1, TrainSection(learning_rate=3.0, warmup=0)) == 3.0


@pytest.mark.parametrize(("settings", "num_steps", "interval"), [
    ({"save_every": 3}, 1000, 3), ({}, 45, 20), ({}, 1000, 100),
])
def test_checkpoints_are_a_tenth_apart_and_at_least_twenty_steps(settings, num_steps, interval):
    assert save_interval(TrainSection(**settings), num_steps) == interval
