"""Looking at a claim more than once, with the error of looking once.

Items may be evaluated in batches, and a claim that is clear early may end the work early. Each look
at a p-value is one more chance to be wrong; so the level is spent over the looks by the
O'Brien-Fleming type function of Lan & DeMets, "Discrete sequential boundaries for clinical trials",
Biometrika 70 (1983), 659-663: at the share t of the items, 2 - 2 Phi(z(1 - alpha / 2) / sqrt(t)) of
alpha in all. Early looks ask for overwhelming evidence, the last one for hardly more than a single
look would. The boundary of each look follows by integration over what earlier looks let pass (Armitage,
McPherson & Rowe, JRSS A 132, 1969). The looks need not be evenly spaced, but must follow from the
number of items and never from the results so far.

Sums over batches are taken as normal with independent increments, which a mean over items drawn in
random order is. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

_POINTS = 1201
"""Points of the grid that densities are held on: boundaries are then right to four digits."""
_REACH = 8.5


def spent(share: float, alpha: float) -> float:
    """How much of the one-sided ``alpha`` is spent once ``share`` (over 0, at most 1) of the items is in."""
    return math.erfc(_z(1 - alpha / 2) / math.sqrt(share) / math.sqrt(2))


def looks(num_items: int, num_looks: int) -> list[int]:
    """After how many items to look: ``num_looks`` even batches, the last look with all; fewer of few items."""
    return sorted({math.ceil(num_items * look / num_looks) for look in range(1, num_looks + 1)} - {0})


def levels(shares: Sequence[float], alpha: float) -> list[float]:
    """One-sided level of each look: a claim is shown at a look when its p-value is below the look's level.

    Args:
        shares: of the items, rising, over 0 and at most 1.
        alpha: one-sided level of all looks together.
    """
    return [_phi(-z) for z in boundaries(tuple(shares), alpha)]


def times(shares: Sequence[float], alpha: float) -> Callable[[int], float]:
    """What Holm's method multiplies a p-value with at the last of these looks, by the number of claims left.

    One look at everything gives that number itself. Else a claim among ``left`` has alpha / left to spend over its
    looks, and the p-value is multiplied with what makes the level of this look alpha. Claims decided at an
    earlier look stay decided (Glimm, Maurer & Bretz, Statistics in Medicine 29, 2010: each hypothesis of a closed test
    keeps its own boundary).
    """
    if tuple(shares) == (1.0,):
        return float
    # No p-value is small enough for a look at which nothing is spent yet.
    return lambda left: min(alpha / max(levels(shares, alpha / left)[-1], 1e-300), 1e300)


@lru_cache(maxsize=256)
def boundaries(shares: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    """The boundary of each look for the standardized sum; infinite where nothing is spent yet."""
    import numpy
    from scipy.special import ndtr

    assert all(0 < share <= 1 for share in shares) and list(shares) == sorted(set(shares))
    found: list[float] = []
    grid, density, before, so_far = numpy.zeros(1), numpy.ones(1), 0.0, 0.0  # a sum that starts at 0
    for share in shares:
        step = math.sqrt(share - before)
        wanted = max(spent(share, alpha) - so_far, 0.0)

        def crossing(bound: float, grid=grid, density=density, step=step) -> float:
            """How much of what has not stopped lies above ``bound`` at this look."""
            return float((density * ndtr((grid - bound) / step)).sum())

        bound = math.inf
        if wanted > 1e-14:
            low, high = -_REACH, _REACH
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if crossing(middle) > wanted else (low, middle)
            bound = (low + high) / 2
            so_far += crossing(bound)
        found.append(bound / math.sqrt(share))
        end = min(bound, _REACH * math.sqrt(share))
        fresh = numpy.linspace(-_REACH * math.sqrt(share), end, _POINTS)
        normal = numpy.exp(-(((fresh[:, None] - grid[None, :]) / step) ** 2) / 2) / (step * math.sqrt(2 * math.pi))
        weights = numpy.full(_POINTS, fresh[1] - fresh[0])
        weights[[0, -1]] /= 2
        density, grid, before = (normal @ density) * weights, fresh, share
    return tuple(found)


def _z(share: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(share))


def _phi(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2
