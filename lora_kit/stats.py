"""Means and paired differences of item scores with their intervals, and what several claims cost.

The item is the unit, and where items share a passage, a function or a conversation, the
cluster is: an interval that ignores it is too narrow and calls noise a gain. Which method
of ``intervals.py`` is used follows from the kind and number of the scores, never from how the
comparison came out:

======================================  ====================================================================
scores                                  interval
======================================  ====================================================================
0 or 1, each alone, fewer than 30       exact (Clopper and Pearson): small numbers get no approximation
0 or 1, each alone, 30 and more         Wilson's
0 or 1, in clusters                     at each end the wider of cluster-robust t and Wilson's over the items;
                                        over the clusters where all scores are equal and no spread is seen
differences of 0 and 1, each alone      Tango's
differences of 0 and 1, in clusters     at each end the wider of cluster-robust t and Tango's over the items;
                                        over the clusters where all differences are equal
any other, 30 clusters and more, and    BCa bootstrap, clusters drawn as wholes, by a fixed seed
fewer than 25 times squared skewness
any other                               cluster-robust Student's t (each item its own cluster where none are named)
of a corpus metric, which is no mean    BCa bootstrap of the items' outcomes, clusters drawn as wholes
======================================  ====================================================================

The bound of 25 times the squared skewness, under which the normal approximation of a mean is not to
be trusted, is Cochran's (Sampling Techniques, 3rd ed., 1977, section 2.15). With fewer than 30
clusters a bootstrap has too little to draw from and is narrower still than t. With few clusters (under about
40), or with one that holds most items, the t interval is somewhat narrow too (Cameron & Miller
2015 say so). The use of clusters for evals, paired differences included, is Miller, "Adding Error
Bars to Evals", arXiv:2411.00640. :func:`holm` is Holm, Scandinavian Journal of Statistics 6 (1979).

Shape suffixes: N items, G clusters. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_kit import intervals
from lora_kit.intervals import Exact, Finding, Tango, Widest, Wilson

FEW_ITEMS = 30
"""Below this many independent 0-1 scores the interval is exact; from this many clusters on a bootstrap may serve."""
_COCHRAN = 25
_CORPUS_RESAMPLES = 2000
"""Each takes a pass over the outcomes in Python: half as many as of a mean."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over ``num_items`` items in ``num_clusters`` clusters, with its interval.

    ``finding`` is None, and with it the ends, where the items cannot tell: fewer than two clusters.
    """

    mean: float | None
    ci_low: float | None
    ci_high: float | None
    num_items: int
    num_clusters: int
    finding: Finding | None = field(default=None, repr=False, compare=False)

    @property
    def method(self) -> str:
        """The method of the interval; empty without one."""
        return self.finding.method if self.finding else ""


@dataclass(frozen=True, kw_only=True)
class Difference(Estimate):
    """The mean of ``a - b`` over items that both have, with its interval."""


def mean_interval(
    scores: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    weights: Sequence[float] | None = None,
) -> Estimate:
    """The mean of ``scores`` with a two-sided interval of ``level``; by which method, the module's docstring says.

    Args:
        scores: (N,) one number an item.
        clusters: (N,) the cluster of each item; None when every item stands alone.
        level: coverage, between 0 and 1.
        weights: (N,) how much of the mean each item carries, e.g. its number of tokens; None for equal.
    """
    values = [float(value) for value in scores]
    counted = weights is None and all(value in (0, 1) for value in values)
    return Estimate(**_estimate(values, clusters, level, weights, _share if counted else None))


def paired_difference(
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    level: float = 0.95,
    weights: Sequence[float] | None = None,
) -> Difference:
    """The mean of ``a - b`` over the same items, with its interval as the module's docstring says.

    Args:
        a: (N,) scores of one model.
        b: (N,) scores of the other on the same items, in the same order.
        clusters, level, weights: as for :func:`mean_interval`.
    """
    differences = [float(x) - float(y) for x, y in zip(a, b, strict=True)]
    counted = weights is None and all(value in (0, 1) for value in (*a, *b))
    return Difference(**_estimate(differences, clusters, level, weights, _flips if counted else None))


def corpus_interval(
    corpus: Callable[[Sequence[Any]], float], outcomes: Sequence[Any], clusters: Sequence[Hashable],
    level: float = 0.95,
) -> Estimate:
    """The value of a corpus metric over all items, such as a correlation or BLEU, with its interval.

    Args:
        corpus: from the outcomes of any selection of items to the value.
        outcomes: (N,) what of each item goes into the value.
        clusters, level: as for :func:`mean_interval`.
    """
    return Estimate(**_bootstrapped(lambda items: corpus([outcomes[item] for item in items]), clusters, level))


def corpus_difference(
    corpus: Callable[[Sequence[Any]], float], a: Sequence[Any], b: Sequence[Any], clusters: Sequence[Hashable],
    level: float = 0.95,
) -> Difference:
    """The value over the outcomes ``a`` minus that over ``b`` of the same items, which are drawn together."""
    assert len(a) == len(b)
    return Difference(**_bootstrapped(
        lambda items: corpus([a[item] for item in items]) - corpus([b[item] for item in items]), clusters, level))


def holm(p_values: Sequence[float], times: Callable[[int], float] = float) -> list[float]:
    """Holm's adjusted p-values, in the given order: claim those at most alpha, and any is wrong with at most alpha.

    Args:
        times: by what a p-value is multiplied while that many claims are left, their number where one looks once.
    """
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, times(len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def wilson(successes: float, num_items: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for ``successes`` out of ``num_items`` (at least one)."""
    return Wilson(successes=successes, num_items=num_items).limits(level)


def _bootstrapped(statistic: Callable[[Any], float], clusters: Sequence[Hashable], level: float) -> dict:
    members: dict[Hashable, list[int]] = defaultdict(list)
    for item, cluster in enumerate(clusters):
        members[cluster].append(item)
    found = {"num_items": len(clusters), "num_clusters": len(members), "mean": None, "ci_low": None, "ci_high": None}
    if not members:
        return found
    if len(members) < 2:
        return found | {"mean": float(statistic(range(len(clusters))))}
    finding = intervals.bootstrap(statistic, list(members.values()), resamples=_CORPUS_RESAMPLES)
    low, high = finding.limits(level)
    return found | {"mean": finding.point, "ci_low": low, "ci_high": high, "finding": finding}


def _share(values: Sequence[float], num_items: int) -> Finding:
    """Of 0-1 scores, their mean taken as that of ``num_items``."""
    successes = sum(values) / len(values) * num_items
    kind = Exact if num_items < FEW_ITEMS else Wilson
    return kind(successes=successes, num_items=num_items)


def _flips(differences: Sequence[float], num_items: int) -> Finding:
    """Of differences of 0-1 scores, their shares taken as those of ``num_items``."""
    share = num_items / len(differences)
    return Tango(gained=sum(value > 0 for value in differences) * share,
                 lost=sum(value < 0 for value in differences) * share, num_items=num_items)


def _estimate(values: list[float], clusters, level: float, weights, counted) -> dict:
    import numpy

    assert 0 < level < 1 and all(math.isfinite(value) for value in values)
    num_items = len(values)
    weights_N = numpy.ones(num_items) if weights is None else numpy.asarray(weights, dtype=numpy.float64)
    assert len(weights_N) == num_items and (weights_N > 0).all()
    keys = range(num_items) if clusters is None else clusters
    assert len(keys) == num_items
    numbers: dict[Hashable, int] = {}
    cluster_N = numpy.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=numpy.int64)
    num_clusters = len(numbers)
    found = {"num_items": num_items, "num_clusters": num_clusters, "ci_low": None, "ci_high": None, "mean": None}
    if num_items == 0:
        return found
    values_N = numpy.asarray(values, dtype=numpy.float64)
    found["mean"] = float((weights_N * values_N).sum() / weights_N.sum())
    if num_clusters < 2:
        return found
    weights_G = numpy.bincount(cluster_N, weights=weights_N)
    sums_G = numpy.bincount(cluster_N, weights=weights_N * values_N)
    finding: Finding
    if counted is not None and num_clusters == num_items:
        finding = counted(values, num_items)
    elif counted is not None:
        if min(values) == max(values):
            finding = counted(values, num_clusters)
        else:
            finding = Widest(parts=(intervals.clustered_t(sums_G, weights_G), counted(values, num_items)))
    elif FEW_ITEMS <= num_clusters < _COCHRAN * _skewness(sums_G - weights_G * found["mean"])**2:
        finding = intervals.bootstrap_mean(sums_G, weights_G)
    else:
        finding = intervals.clustered_t(sums_G, weights_G)
    low, high = finding.limits(level)
    return found | {"ci_low": low, "ci_high": high, "finding": finding}


def _skewness(residuals_G) -> float:
    """Third standardized moment; 0 where there is no spread."""
    away_G = residuals_G - residuals_G.mean()
    square = float((away_G**2).mean())
    # Equal numbers leave rounding behind, which has a skewness too.
    return float((away_G**3).mean()) / square**1.5 if square > 1e-24 else 0.0
