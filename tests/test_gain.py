"""Gain retention by hand, its interval, and when there is none."""

import numpy as np
import pytest

from lora_kit.gain import retained


def test_the_share_by_hand():
    found = retained([40, 60], [20, 30], [25, 40], [10, 10])
    assert found["value"] == pytest.approx(35 / 50)
    assert (found["base"], found["tuned"], found["form"]) == (5, 2.5, 3.25)
    assert found["num_rows"] == 2 and found["num_weights"] == 20


def test_it_is_the_same_for_scores_that_rise():
    assert retained([0, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1] * 4)["form"] == 0.5
    losses = retained([3, 4], [1, 2], [2, 3], [1, 1])["value"]
    assert losses == retained([-3, -4], [-1, -2], [-2, -3], [1, 1])["value"] == 0.5


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator, covered = np.random.default_rng(0), 0
    for _ in range(60):
        weights = generator.integers(5, 30, 40)
        base = weights * generator.normal(3, 0.3, 40)
        tuned = base - weights * generator.normal(1, 0.3, 40)
        form = tuned + weights * generator.normal(0.1, 0.2, 40)  # 10 % of the gain is lost
        found = retained(base, tuned, form, weights)
        assert found["ci_low"] < found["value"] < found["ci_high"]
        covered += found["ci_low"] <= 0.9 <= found["ci_high"]
    assert 51 <= covered <= 60


@pytest.mark.parametrize(("rows", "why"), [
    (([], [], [], []), "nothing is scored"), (([1], [1], [1], [0]), "nothing is scored"),
    (([3, 4], [3, 4], [3, 5], [2, 2]), "as good as its base"),
    (([3, 4, 3, 4, 3], [2, 5, 4, 2, 3], [3, 3, 3, 3, 3], [1] * 5), "not surely another than its base"),
])
def test_no_gain_is_none_to_keep(rows, why):
    found = retained(*rows)
    assert found["value"] is None and why in found["why_not"]


def test_one_row_has_a_value_and_no_interval():
    found = retained([3], [1], [1.5], [4])
    assert found["value"] == 0.75 and found["ci_low"] is None
