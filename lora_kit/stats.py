"""Means, differences and their intervals, for items that may come in clusters.

Items that share a function, a passage or a conversation are not independent: an
interval that ignores it is too narrow and calls noise a gain. The cluster is the unit
here. Everything is a formula; nothing is drawn at random. Reads and writes nothing.

Sources: the cluster-robust variance with G/(G-1) and Student's t of G-1 degrees of
freedom is Cameron & Miller, "A Practitioner's Guide to Cluster-Robust Inference",
Journal of Human Resources 50(2), 2015; its use for evals, paired differences included,
is Miller, "Adding Error Bars to Evals", arXiv:2411.00640. The score interval of a
proportion is Wilson, JASA 22, 1927. With few clusters (under about 40), or with one that
holds most items, the t interval is still somewhat narrow (Cameron & Miller say so too).

Shape suffix: N items.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over ``num_items`` items in ``num_clusters`` clusters, with its interval.

    The ends are None where the items cannot tell: fewer than two clusters.
    """

    mean: float | None
    ci_low: float | None
    ci_high: float | None
    num_items: int
    num_clusters: int


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """The mean of ``a - b`` over items that both have, with its interval."""


def mean_interval(
    scores: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    weights: Sequence[float] | None = None,
) -> Estimate:
    """The mean of ``scores`` with a two-sided interval of ``level``.

    Scores that are all 0 or 1 and stand alone get Wilson's interval; all others a
    cluster-robust t interval. Where 0-1 scores in clusters are all equal there is no spread
    to estimate from, and Wilson's interval is taken over the clusters instead of the items.

    Args:
        scores: (N,) one number an item.
        clusters: (N,) the cluster of each item; None when every item stands alone.
        level: coverage, between 0 and 1.
        weights: (N,) how much of the mean each item carries, e.g. its number of tokens; None for equal.
    """
    return Estimate(**_estimate(scores, clusters, level, weights, signed=False))


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    weights: Sequence[float] | None = None,
) -> Difference:
    """The mean of ``a - b`` over the same items, with a cluster-robust t interval.

    Where the differences of 0-1 scores are all equal (no item flipped, or all did), the
    interval reaches as far as Wilson's for the share of clusters that would differ.

    Args:
        a: (N,) scores of one model.
        b: (N,) scores of the other on the same items, in the same order.
        clusters, level, weights: as for :func:`mean_interval`.
    """
    differences = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    binary = all(value in (0, 1) for value in a) and all(value in (0, 1) for value in b)
    return Difference(**_estimate(differences, clusters, level, weights, signed=True, binary=binary))


def wilson(successes: float, num_items: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for ``successes`` out of ``num_items`` (at least one)."""
    from scipy.stats import norm

    z = float(norm.ppf(0.5 + level / 2))
    share = successes / num_items
    centre = share + z * z / (2 * num_items)
    half = z * math.sqrt(share * (1 - share) / num_items + z * z / (4 * num_items**2))
    scale = 1 + z * z / num_items
    # At 0 and 1 the end is exact; rounding must not move it past.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == num_items else (centre + half) / scale
    return low, high


def _estimate(scores, clusters, level, weights, *, signed: bool, binary: bool | None = None) -> dict:
    import numpy

    assert 0 < level < 1
    values_N = numpy.asarray(scores, dtype=numpy.float64)
    num_items = len(values_N)
    assert values_N.ndim == 1 and numpy.isfinite(values_N).all()
    weights_N = numpy.ones(num_items) if weights is None else numpy.asarray(weights, dtype=numpy.float64)
    assert len(weights_N) == num_items and (weights_N > 0).all()
    keys = range(num_items) if clusters is None else clusters
    assert len(keys) == num_items
    numbers: dict[Hashable, int] = {}
    cluster_N = numpy.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=numpy.int64)
    num_clusters = len(numbers)
    found = {"num_items": num_items, "num_clusters": num_clusters, "ci_low": None, "ci_high": None}
    if num_items == 0:
        return found | {"mean": None}
    mean = float((weights_N * values_N).sum() / weights_N.sum())
    found["mean"] = mean
    if num_clusters < 2:
        return found
    if binary is None:
        binary = bool(numpy.isin(values_N, (0.0, 1.0)).all())
    all_equal = bool((values_N == values_N[0]).all())
    if binary and not signed and (all_equal or (num_clusters == num_items and weights is None)):
        low, high = wilson(mean * num_clusters, num_clusters, level)
    elif binary and signed and all_equal:
        reach = wilson(0, num_clusters, level)[1]
        low, high = max(-1.0, mean - reach), min(1.0, mean + reach)
    else:
        low, high = _clustered_t(values_N, weights_N, cluster_N, num_clusters, mean, level)
    return found | {"ci_low": low, "ci_high": high}


def _clustered_t(values_N, weights_N, cluster_N, num_clusters: int, mean: float, level: float) -> tuple[float, float]:
    import numpy
    from scipy.stats import t

    residual_of_cluster = numpy.bincount(cluster_N, weights=weights_N * (values_N - mean), minlength=num_clusters)
    variance = num_clusters / (num_clusters - 1) * float((residual_of_cluster**2).sum()) / float(weights_N.sum()) ** 2
    half = float(t.ppf(0.5 + level / 2, num_clusters - 1)) * math.sqrt(variance)
    return mean - half, mean + half
