"""How often to measure: until the interval is narrow, or the time is spent.

A measurement that stops when its interval pleases is fit to say how fast something is, not to decide whether it got
slower: there the number is fixed before (``bench_compare.py``). Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

NARROW = 0.02
"""Share of the mean that half of its 95 % interval may be wide."""


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean of positive ``values``, as a share of it; None of fewer than three.

    Student's t of the values as they are, taken as independent of each other.
    """
    if len(values) < 3:
        return None
    from scipy.special import stdtrit

    spread = statistics.stdev(values) / math.sqrt(len(values))
    return float(stdtrit(len(values) - 1, 0.975)) * spread / statistics.mean(values)


def enough(values: Sequence[float], *, least: int, spent: float, seconds: float | None) -> bool:
    """Whether to stop: after ``least`` of them, or where ``seconds`` are given when they are spent or it is narrow."""
    if len(values) < least:
        return False
    if seconds is None or spent >= seconds:
        return True
    width = half_width(values)
    return width is not None and width <= NARROW
