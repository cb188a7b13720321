"""repeats.py: the interval, and when to stop."""

import numpy as np
import pytest
from scipy import stats

from lora_kit import repeats


def test_half_width_is_students():
    values = np.random.default_rng(0).lognormal(size=12)
    low, high = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    assert repeats.half_width(list(values)) == pytest.approx((high - low) / 2 / values.mean())
    assert repeats.half_width([1.0, 1.0]) is None and repeats.half_width([2.0] * 3) == 0


def test_when_it_is_enough():
    even, wild = [1.0] * 5, [1.0, 9.0] * 3
    assert not repeats.enough(even, least=6, spent=99, seconds=1)
    assert repeats.enough(wild, least=6, spent=0, seconds=None)
    assert repeats.enough(even, least=5, spent=0, seconds=9) and not repeats.enough(wild, least=5, spent=0, seconds=9)
    assert repeats.enough(wild, least=5, spent=9, seconds=9)
    assert not repeats.enough(even[:2], least=1, spent=0, seconds=9)  # of two nobody knows how wide it is
