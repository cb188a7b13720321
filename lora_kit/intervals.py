"""What is known of one number: its interval, and how surely it lies above or below a bound.

Each class is one published method over what was counted or measured. ``limits(level)`` is
the two-sided interval. ``above(bound)`` is the p-value against "the true number is at most
``bound``", ``below(bound)`` against "it is at least ``bound``"; both belong to the interval: the
lower end of ``limits(1 - 2 p)`` is the bound that lies below with ``above(bound) = p``.
``with_items(factor)`` is the same finding from ``factor`` times as many items: how many would decide.

Sources: Wilson, JASA 22 (1927); Clopper & Pearson, Biometrika 26 (1934); Tango, Statistics in
Medicine 17 (1998), 891-908, for the difference of two shares of the same items; Cameron & Miller,
Journal of Human Resources 50(2) (2015), for the cluster-robust variance with Student's t; Efron, JASA 82
(1987), for the BCa bootstrap, with clusters drawn as wholes (Davison & Hinkley, 1997, chapter 3.8).
What is used when is decided in ``stats.py``.

Shape suffixes: N items, G clusters, R resamples. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol

RESAMPLES = 4000
"""Bootstrap resamples: the ends of a 95 % interval then move by about 2 % of its width from seed to seed."""
_CELLS = 2_000_000
"""Cluster numbers drawn at once: bounds the memory of a bootstrap."""


class Finding(Protocol):
    """What every class of this module offers; see the module's docstring."""

    method: str

    def limits(self, level: float) -> tuple[float, float]: ...
    def above(self, bound: float) -> float: ...
    def below(self, bound: float) -> float: ...
    def with_items(self, factor: float) -> Finding: ...


@dataclass(frozen=True, kw_only=True)
class StudentT:
    """A mean whose standard error has ``degrees`` degrees of freedom; without any spread it is certain."""

    mean: float
    standard_error: float
    degrees: float
    method: str = "t"

    def limits(self, level: float) -> tuple[float, float]:
        from scipy.special import stdtrit

        half = float(stdtrit(self.degrees, 0.5 + level / 2)) * self.standard_error
        return self.mean - half, self.mean + half

    def above(self, bound: float) -> float:
        return self._p(bound - self.mean, certain=self.mean > bound)

    def below(self, bound: float) -> float:
        return self._p(self.mean - bound, certain=self.mean <= bound)

    def _p(self, distance: float, *, certain: bool) -> float:
        from scipy.special import stdtr

        if self.standard_error == 0:
            return _certain(certain)
        return float(stdtr(self.degrees, distance / self.standard_error))

    def with_items(self, factor: float) -> StudentT:
        return replace(self, standard_error=self.standard_error / math.sqrt(factor), degrees=self.degrees * factor)


@dataclass(frozen=True, kw_only=True)
class Wilson:
    """A share, ``successes`` of ``num_items`` (at least one), by the score test."""

    successes: float
    num_items: float
    method: str = "Wilson"

    def limits(self, level: float) -> tuple[float, float]:
        z, n, share = _z(0.5 + level / 2), self.num_items, self.successes / self.num_items
        centre = share + z * z / (2 * n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        # At 0 and 1 the end is exact; rounding must not move it past.
        low = 0.0 if self.successes == 0 else (centre - half) / scale
        high = 1.0 if self.successes == n else (centre + half) / scale
        return low, high

    def above(self, bound: float) -> float:
        return _phi(-self._z(bound)) if 0 < bound < 1 else _certain(self.successes / self.num_items > bound)

    def below(self, bound: float) -> float:
        return _phi(self._z(bound)) if 0 < bound < 1 else _certain(self.successes / self.num_items < bound)

    def _z(self, bound: float) -> float:
        return (self.successes / self.num_items - bound) / math.sqrt(bound * (1 - bound) / self.num_items)

    def with_items(self, factor: float) -> Wilson:
        return replace(self, successes=self.successes * factor, num_items=self.num_items * factor)


@dataclass(frozen=True, kw_only=True)
class Exact:
    """A share by the binomial distribution itself (Clopper and Pearson): never too sure, however few the items."""

    successes: float
    num_items: float
    method: str = "exact"

    def limits(self, level: float) -> tuple[float, float]:
        from scipy.special import betaincinv

        tail, k, n = 0.5 - level / 2, self.successes, self.num_items
        low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
        high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - tail))
        return low, high

    def above(self, bound: float) -> float:
        from scipy.special import betainc

        if not 0 < bound < 1 or self.successes == 0:
            return _certain(self.successes / self.num_items > bound)
        return float(betainc(self.successes, self.num_items - self.successes + 1, bound))

    def below(self, bound: float) -> float:
        from scipy.special import betaincc

        if not 0 < bound < 1 or self.successes == self.num_items:
            return _certain(self.successes / self.num_items < bound)
        return float(betaincc(self.successes + 1, self.num_items - self.successes, bound))

    def with_items(self, factor: float) -> Exact:
        return replace(self, successes=self.successes * factor, num_items=self.num_items * factor)


@dataclass(frozen=True, kw_only=True)
class Tango:
    """The difference of two shares of the same ``num_items``: ``gained`` went from wrong to right, ``lost`` back.

    At a difference of zero this is McNemar's test without correction, whose error stays at or hardly above its
    level (Fagerland, Lydersen & Laake, BMC Medical Research Methodology 13, 2013).
    """

    gained: float
    lost: float
    num_items: float
    method: str = "Tango"

    def limits(self, level: float) -> tuple[float, float]:
        return _tango_limits(self.gained, self.lost, self.num_items, level)

    def above(self, bound: float) -> float:
        return _phi(-tango_z(self.gained, self.lost, self.num_items, bound))

    def below(self, bound: float) -> float:
        return _phi(tango_z(self.gained, self.lost, self.num_items, bound))

    def with_items(self, factor: float) -> Tango:
        return replace(self, gained=self.gained * factor, lost=self.lost * factor, num_items=self.num_items * factor)


@dataclass(frozen=True, kw_only=True)
class BCa:
    """A statistic by its bootstrap: bias-corrected and accelerated.

    Args:
        point: its value on the items themselves.
        replicates_R: its values on the resamples, sorted.
        bias: z0, how far off the middle of the replicates the point lies.
        acceleration: from the skewness of the jackknife's values.
    """

    point: float
    replicates_R: Any
    bias: float
    acceleration: float
    method: str = "BCa bootstrap"

    def limits(self, level: float) -> tuple[float, float]:
        import numpy

        ends = []
        for tail in (0.5 - level / 2, 0.5 + level / 2):
            shifted = self.bias + _z(tail)
            share = _phi(self.bias + shifted / (1 - self.acceleration * shifted))
            ends.append(float(numpy.quantile(self.replicates_R, share)))
        return ends[0], ends[1]

    def above(self, bound: float) -> float:
        import numpy

        many = len(self.replicates_R)
        low, high = (int(numpy.searchsorted(self.replicates_R, bound, side)) for side in ("left", "right"))
        if low == 0 and high == many:  # every resample gives the bound itself
            return 1.0
        share = min(max((low + high) / 2, 0.5), many - 0.5) / many
        away = _z(share) - self.bias
        return _phi(away / (1 + self.acceleration * away) - self.bias)

    def below(self, bound: float) -> float:
        above = self.above(bound)
        return 1 - above if above < 1 else 0.0

    def with_items(self, factor: float) -> StudentT:
        import numpy

        # More resamples of the same items say nothing of more items: their spread does.
        error = float(numpy.std(self.replicates_R))
        return StudentT(mean=self.point, standard_error=error / math.sqrt(factor), degrees=math.inf)


@dataclass(frozen=True, kw_only=True)
class Widest:
    """Several methods at once: at each end the one that claims least."""

    parts: tuple[Any, ...]

    @property
    def method(self) -> str:
        return " and ".join(part.method for part in self.parts)

    def limits(self, level: float) -> tuple[float, float]:
        found = [part.limits(level) for part in self.parts]
        return min(low for low, _ in found), max(high for _, high in found)

    def above(self, bound: float) -> float:
        return max(part.above(bound) for part in self.parts)

    def below(self, bound: float) -> float:
        return max(part.below(bound) for part in self.parts)

    def with_items(self, factor: float) -> Widest:
        return Widest(parts=tuple(part.with_items(factor) for part in self.parts))


def clustered_t(sums_G: Sequence[float], weights_G: Sequence[float]) -> StudentT:
    """The weighted mean ``sum(sums_G) / sum(weights_G)`` of at least two clusters, cluster-robust.

    Args:
        sums_G: of weight times score over the items of each cluster.
        weights_G: of the items of each cluster.
    """
    import numpy

    sums_G, weights_G = numpy.asarray(sums_G, dtype=float), numpy.asarray(weights_G, dtype=float)
    many, total = len(sums_G), float(weights_G.sum())
    mean = float(sums_G.sum()) / total
    residuals_G = sums_G - weights_G * mean
    variance = many / (many - 1) * float((residuals_G**2).sum()) / total**2
    return StudentT(mean=mean, standard_error=math.sqrt(variance), degrees=many - 1,
                    method="t" if numpy.all(weights_G == 1) else "clustered t")


def bootstrap_mean(sums_G: Sequence[float], weights_G: Sequence[float], *, resamples: int = RESAMPLES,
                   seed: int = 0) -> BCa:
    """The same mean as in :func:`clustered_t` by its BCa bootstrap, clusters drawn as wholes.

    Weights that are differences may cancel, or be negative; a draw without any is as far out as can be.
    """
    import numpy

    sums_G, weights_G = numpy.asarray(sums_G, dtype=float), numpy.asarray(weights_G, dtype=float)
    many, generator = len(sums_G), numpy.random.default_rng(seed)
    values = []
    for size in _portions(resamples, many):
        drawn_RG = generator.integers(many, size=(size, many))
        tops_R, bottoms_R = sums_G[drawn_RG].sum(axis=1), weights_G[drawn_RG].sum(axis=1)
        values.append(numpy.divide(tops_R, bottoms_R, out=numpy.full(size, numpy.inf), where=bottoms_R != 0))
    rest_G = weights_G.sum() - weights_G
    left_out_G = numpy.divide(sums_G.sum() - sums_G, rest_G, out=numpy.zeros(many), where=rest_G != 0)
    return _bca(float(sums_G.sum() / weights_G.sum()), numpy.concatenate(values), left_out_G)


def bootstrap(statistic: Callable[[Any], float], members: Sequence[Sequence[int]], *, resamples: int = RESAMPLES,
              seed: int = 0) -> BCa:
    """Any statistic of items, such as a corpus metric, by its BCa bootstrap, clusters drawn as wholes.

    Args:
        statistic: from an array of item numbers (with repeats) to the value.
        members: the item numbers of each cluster; at least two clusters.
    """
    import numpy

    arrays = [numpy.asarray(items, dtype=numpy.int64) for items in members]
    many, generator = len(arrays), numpy.random.default_rng(seed)
    assert many >= 2
    replicates = [statistic(numpy.concatenate([arrays[index] for index in generator.integers(many, size=many)]))
                  for _ in range(resamples)]
    left_out = [statistic(numpy.concatenate(arrays[:index] + arrays[index + 1:])) for index in range(many)]
    return _bca(float(statistic(numpy.concatenate(arrays))), numpy.asarray(replicates, dtype=float),
                numpy.asarray(left_out, dtype=float))


def _portions(resamples: int, width: int) -> list[int]:
    size = max(1, min(resamples, _CELLS // max(width, 1)))
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def _bca(point: float, replicates, left_out) -> BCa:
    import numpy

    replicates_R = numpy.sort(replicates)
    many = len(replicates_R)
    low, high = (int(numpy.searchsorted(replicates_R, point, side)) for side in ("left", "right"))
    bias = _z(min(max((low + high) / 2, 0.5), many - 0.5) / many)
    away = left_out.mean() - left_out
    square = float((away**2).sum())
    acceleration = float((away**3).sum()) / (6 * square**1.5) if square else 0.0
    return BCa(point=point, replicates_R=replicates_R, bias=bias, acceleration=acceleration)


def tango_z(gained, lost, num_items, difference):
    """Tango's score statistic against a true ``difference``; numbers or arrays of them, all finite.

    The share of lost items under that difference is its maximum-likelihood estimate, a root of a quadratic
    (Tango 1998, section 3). Where nothing flipped and the difference is zero, nothing speaks for either side: 0.
    """
    import numpy

    b, c = numpy.asarray(gained, dtype=float), numpy.asarray(lost, dtype=float)
    n, d = numpy.asarray(num_items, dtype=float), numpy.asarray(difference, dtype=float)
    linear = -b - c + (2 * n - b + c) * d
    constant = -c * d * (1 - d)
    lost_share = (numpy.sqrt(numpy.maximum(linear**2 - 8 * n * constant, 0)) - linear) / (4 * n)
    variance = numpy.maximum(n * (2 * lost_share + d * (1 - d)), 0)
    away = b - c - n * d
    with numpy.errstate(divide="ignore", invalid="ignore"):
        z = numpy.where(variance > 1e-12, away / numpy.sqrt(variance),
                        numpy.where(numpy.abs(away) < 1e-9, 0.0, numpy.sign(away) * 40.0))
    return z if z.ndim else float(z)


@lru_cache(maxsize=65_536)
def _tango_limits(gained: float, lost: float, num_items: float, level: float) -> tuple[float, float]:
    target, middle = _z(0.5 + level / 2), (gained - lost) / num_items
    ends = []
    for wanted, edge in ((target, -1.0), (-target, 1.0)):
        # The statistic falls as the difference rises: `inside` stays within the interval, `outside` beyond it.
        inside, outside = middle, edge
        for _ in range(44):
            between = (inside + outside) / 2
            if abs(tango_z(gained, lost, num_items, between)) <= abs(wanted):
                inside = between
            else:
                outside = between
        ends.append(inside)
    return ends[0], ends[1]


def _certain(holds: bool) -> float:
    """The p-value where a share lies on the edge of what shares can be."""
    return 0.0 if holds else 1.0


def _z(share: float) -> float:
    """The point below which the standard normal distribution has ``share``."""
    from scipy.special import ndtri

    return float(ndtri(share))


def _phi(z: float) -> float:
    """The share of the standard normal distribution below ``z``."""
    return math.erfc(-z / math.sqrt(2)) / 2
