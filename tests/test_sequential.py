"""Looking more than once: boundaries that others published, and the level kept."""

import numpy
import pytest

from lora_kit import sequential


@pytest.mark.parametrize("shares, alpha, published", [
    # R package ldbounds, O'Brien-Fleming type, alpha 0.025 on each side (r-help, March 2020).
    ((0.10, 0.33, 1.0), 0.025, (6.9913, 3.7308, 1.9605)),
    # Five even looks: the same package.
    ((0.2, 0.4, 0.6, 0.8, 1.0), 0.025, (4.8769, 3.3569, 2.6803, 2.2898, 2.0310)),
])
def test_published_boundaries(shares, alpha, published):
    assert sequential.boundaries(shares, alpha) == pytest.approx(published, abs=3e-4)


def test_one_look_is_the_usual_test_and_nothing_is_spent_for_nothing():
    assert sequential.boundaries((1.0,), 0.025) == pytest.approx((1.959964,), abs=1e-5)
    assert sequential.spent(1.0, 0.025) == pytest.approx(0.025) and sequential.spent(0.2, 0.025) < 1e-6
    assert sequential.levels([1.0], 0.025) == pytest.approx([0.025], abs=1e-6)
    early, last = sequential.levels([0.02, 1.0], 0.025)
    assert early == 0.0 and last == pytest.approx(0.025, abs=1e-5)


def test_the_level_is_kept_over_all_looks():
    shares = (0.25, 0.5, 0.75, 1.0)
    steps = numpy.random.default_rng(5).normal(size=(200_000, 4)) * 0.5
    z = steps.cumsum(axis=1) / numpy.sqrt(shares)
    crossed = (z > sequential.boundaries(shares, 0.025)).any(axis=1)
    assert crossed.mean() == pytest.approx(0.025, abs=0.0015)
    assert (z > 1.96).any(axis=1).mean() > 0.05  # looking four times without spending


def test_looks():
    assert sequential.looks(200, 4) == [50, 100, 150, 200]
    assert sequential.looks(3, 5) == [1, 2, 3] and sequential.looks(10, 4) == [3, 5, 8, 10]
