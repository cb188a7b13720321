"""speed_ratio.py: how often it is wrong, by simulation, and its arithmetic."""

import math

import numpy as np
import pytest

from lora_kit import speed_ratio
from lora_kit.errors import RecipeError
from lora_kit.speed_ratio import SpeedRatio


def times(generator, number, slower=1.0):
    """Pairs on a drifting machine, a fifth of the times hit by a burst of up to three times as long."""
    drift = np.exp(np.cumsum(generator.normal(0, 0.05, number)))
    both = []
    for factor in (1.0, slower):
        burst = np.where(generator.random(number) < 0.2, 1 + 2 * generator.random(number), 1.0)
        both.append(drift * factor * burst * np.exp(generator.normal(0, 0.03, number)))
    return both


def verdicts(slower, number=60, repeats=120):
    return [speed_ratio.of_pairs(*times(np.random.default_rng(seed), number, slower)).verdict
            for seed in range(repeats)]


def test_the_same_is_called_different_in_at_most_one_of_twenty():
    assert verdicts(1.0).count("cannot tell") >= 0.95 * 120


def test_what_is_slower_is_found():
    found = verdicts(1.1)
    assert found.count("slower") >= 0.8 * 120 and found.count("faster") == 0


def test_a_ratio_of_exact_times_is_exact():
    found = speed_ratio.of_pairs([2.0] * 9, [1.0] * 9)
    assert (found.ratio, found.low, found.high) == pytest.approx((2, 2, 2)) and found.verdict == "faster"
    assert "B is 2.000 times as fast as A" in found.text()
    assert speed_ratio.of_pairs([1.0] * 9, [2.0] * 9).verdict == "slower"


def test_one_burst_moves_nothing():
    a, b = [1.0] * 12, [1.0] * 11 + [50.0]
    assert speed_ratio.of_pairs(a, b).ratio == pytest.approx(1)


@pytest.mark.parametrize(("degrees", "expected"), [(3, 3.182), (5, 2.571), (9, 2.262), (30, 2.042), (1000, 1.962)])
def test_students_t(degrees, expected):
    assert speed_ratio._t_quantile(degrees) == pytest.approx(expected, rel=0.01)


def test_times_that_are_none():
    for a, b in (([1.0] * 5, [1.0] * 5), ([1.0] * 9, [1.0] * 8), ([1.0] * 9, [1.0] * 8 + [0.0]),
                 ([1.0] * 9, [1.0] * 8 + [math.nan])):
        with pytest.raises(ValueError, match="pairs|not positive"):
            speed_ratio.of_pairs(a, b)


def test_limits():
    assert speed_ratio.parse_limit("slower:5%") == 0.05 and speed_ratio.parse_limit("slower:2.5%") == 0.025
    for wrong in ("5%", "slower:5", "slower:0%", "faster:5%", "slower:100%"):
        with pytest.raises(RecipeError, match="write it like --fail-on slower:5%"):
            speed_ratio.parse_limit(wrong)


@pytest.mark.parametrize(("ratio", "low", "high", "expected"), [
    (0.9, 0.85, 0.94, True), (0.95, 0.92, 0.98, True), (1.0, 0.97, 1.03, False), (0.99, 0.985, 0.995, False),
    (0.97, 0.9, 1.05, None), (1.1, 1.05, 1.2, False)])
def test_the_gate(ratio, low, high, expected):
    assert speed_ratio.fails(SpeedRatio(ratio=ratio, low=low, high=high, num_pairs=20), 0.05) is expected
