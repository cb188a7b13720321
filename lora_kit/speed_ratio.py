"""Whether one thing is faster than another, from times that were taken in turns.

Times on a shared machine drift by more than what is looked for, so only pairs count: A and B one right after the other,
each pair giving the logarithm of a ratio. Bursts that hit one side of a pair are trimmed off (a quarter at each end).
The interval is that of Student's t for a trimmed mean (Yuen 1974; Wilcox 2012, section 4.3), and it is checked against
a bootstrap of the pairs: the wider of both is taken. How many pairs there are is decided before the first is looked
at: who stops when the interval pleases is wrong more often than the interval says.

Torch-free. Reads and writes nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_kit.errors import RecipeError

TRIM = 0.25
FEWEST_PAIRS = 8
_DRAWS = 2000
_LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class SpeedRatio:
    """How many times as fast B is as A: ``ratio`` with its 95 % interval, over ``num_pairs`` pairs."""

    ratio: float
    low: float
    high: float
    num_pairs: int

    @property
    def verdict(self) -> str:
        """``faster``, ``slower`` or ``cannot tell``: whether the interval leaves out 1."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "cannot tell"

    def text(self) -> str:
        """One line."""
        return (f"B is {self.ratio:.3f} times as fast as A (95 % interval {self.low:.3f} to {self.high:.3f}, "
                f"{self.num_pairs} pairs): {self.verdict}")


def of_pairs(seconds_a: Sequence[float], seconds_b: Sequence[float], *, seed: int = 0) -> SpeedRatio:
    """The ratio of speeds from pairs of times, in the order in which they were taken.

    Raises:
        ValueError: there are too few, not as many of both, or a time is not positive.
    """
    a_N, b_N = np.asarray(seconds_a, dtype=float), np.asarray(seconds_b, dtype=float)
    if len(a_N) != len(b_N) or len(a_N) < FEWEST_PAIRS:
        raise ValueError(f"{len(a_N)} and {len(b_N)} times are no {FEWEST_PAIRS} pairs")
    if not (np.isfinite(a_N).all() and np.isfinite(b_N).all() and a_N.min() > 0 and b_N.min() > 0):
        raise ValueError("a time is not positive")
    logs_N = np.log(a_N / b_N)
    middle, half = _trimmed(logs_N)
    generator = np.random.default_rng(seed)
    draws = generator.choice(logs_N, size=(_DRAWS, len(logs_N)))
    means = np.array([_trimmed_mean(draw) for draw in draws])
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return SpeedRatio(ratio=math.exp(middle), low=math.exp(min(low, middle - half)),
                      high=math.exp(max(high, middle + half)), num_pairs=len(logs_N))


def _trimmed_mean(values_N: np.ndarray) -> float:
    cut = int(TRIM * len(values_N))
    return float(np.sort(values_N)[cut:len(values_N) - cut].mean())


def _trimmed(values_N: np.ndarray) -> tuple[float, float]:
    """The trimmed mean and half of its t interval: from the winsorized deviation, with n - 2·cut - 1 degrees."""
    number, cut = len(values_N), int(TRIM * len(values_N))
    ordered = np.sort(values_N)
    winsorized = np.clip(values_N, ordered[cut], ordered[number - cut - 1])
    error = float(winsorized.std(ddof=1)) / ((1 - 2 * TRIM) * math.sqrt(number))
    return _trimmed_mean(values_N), _t_quantile(number - 2 * cut - 1) * error


def _t_quantile(degrees: int) -> float:
    """Student's t at 97.5 %, by Cornish and Fisher's expansion around the normal one; within 1 % from 3 degrees on."""
    z, n = 1.959964, float(degrees)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96,
             (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
             (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160)
    return z + sum(term / n ** (power + 1) for power, term in enumerate(terms))


def parse_limit(text: str) -> float:
    """The share of ``slower:5%``.

    Raises:
        RecipeError: it is not written so.
    """
    found = re.fullmatch(r"slower:(\d+(?:\.\d+)?)%", text.strip())
    if not found or not 0 < float(found[1]) < 100:
        raise RecipeError(f"--fail-on {text}", "is not slower:PERCENT", "write it like --fail-on slower:5%")
    return float(found[1]) / 100


def fails(found: SpeedRatio, limit: float) -> bool | None:
    """Whether B is slower than A by more than ``limit``: True, False, or None where that cannot be told.

    It fails when the interval lies below 1 - limit, or below 1 with the ratio itself under 1 - limit/2 (a slowdown is
    certain and about that large); it passes when the interval lies above 1 - limit.
    """
    if found.high < 1 and found.ratio <= 1 - limit / 2:
        return True
    return False if found.low > 1 - limit else None
