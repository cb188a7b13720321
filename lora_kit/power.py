"""What a number of items can show at all: said before anything is computed, from counts and stated assumptions.

A claim is shown when its one-sided p-value stays below ``alpha``. For 0-1 scores of two models on
the same items that chance is exact: the probability of every pair of flip counts, summed over those
that Tango's test (``intervals.py``) calls. The flips are assumed: ``discordance`` is the share of items
that flip between two models that are equally good, half of them each way; a true difference
adds its own flips on one side. For other scores it is the usual normal formula with Student's
quantiles, from a spread that somebody has measured. Clusters count as fewer items: Kish's design effect,
1 + (m - 1) r, with m the mean cluster size as an item meets it and r an assumed correlation
(Survey Sampling, 1965, section 8.2).

Sources: Connor, Biometrics 43 (1987), 207-211, for the normal formula of paired shares, here where items are
many. Shape suffixes: B gained, C lost. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from lora_kit.intervals import Exact, Wilson, tango_z
from lora_kit.stats import FEW_ITEMS

LEVEL = 0.05
"""Chance of a wrong claim, half of it on each side: verdicts read 95 % intervals."""
POWER = 0.8
"""Chance with which a difference of the smallest detectable size is shown."""
DISCORDANCE = 0.05
"""Share of items that flip between equally good models, where nobody says better."""
CORRELATION = 0.2
"""Of two items of one cluster, where nobody says better."""
_EXACT_UP_TO = 3000
MOST_ITEMS = 10_000_000
"""Where a search for a number of items ends."""


def effective_items(cluster_sizes: Iterable[int], correlation: float = CORRELATION) -> float:
    """As many independent items as these clusters are worth: at most their number, at least that of clusters."""
    sizes = list(cluster_sizes)
    total = sum(sizes)
    if not total:
        return 0.0
    as_met = sum(size * size for size in sizes) / total
    return max(total / (1 + (as_met - 1) * correlation), float(len(sizes)))


def chance_paired(
    num_items: float, difference: float, *, bound: float = 0.0, discordance: float = DISCORDANCE,
    alpha: float = LEVEL / 2,
) -> float:
    """The chance to show a paired ``difference`` of 0-1 scores to lie above ``bound``.

    Args:
        num_items: independent items; parts of one are dropped.
        difference: the true one, between -1 and 1.
        discordance: flips between equally good models, as a share of the items.
        alpha: one-sided level.
    """
    import numpy
    from scipy.special import gammaln, xlogy

    num_items = math.floor(num_items)
    gain = min(discordance / 2 + max(difference, 0.0), 1.0)
    loss = min(discordance / 2 + max(-difference, 0.0), 1.0 - gain)
    if num_items < 1:
        return 0.0
    if num_items > _EXACT_UP_TO:
        # The spread that the test takes for granted under the bound, and the true one: as Connor's for a bound of 0.
        away, spread = gain - loss - bound, math.sqrt(max(gain + loss - (gain - loss) ** 2, 1e-12))
        z = tango_z(num_items * gain, num_items * loss, num_items, bound)
        assumed = away * math.sqrt(num_items) / z if z else spread
        return _phi((away * math.sqrt(num_items) - _z(1 - alpha) * assumed) / spread)

    def likely(share: float):
        middle, reach = num_items * share, 8 * math.sqrt(num_items * share * (1 - share)) + 8
        return numpy.arange(max(0, math.floor(middle - reach)), min(num_items, math.ceil(middle + reach)) + 1)

    gained_BC, lost_BC = numpy.meshgrid(likely(gain), likely(loss), indexing="ij")
    same_BC = num_items - gained_BC - lost_BC
    possible_BC = same_BC >= 0
    same_BC = numpy.where(possible_BC, same_BC, 0)
    log_BC = (gammaln(num_items + 1) - gammaln(gained_BC + 1) - gammaln(lost_BC + 1) - gammaln(same_BC + 1)
              + xlogy(gained_BC, gain) + xlogy(lost_BC, loss) + xlogy(same_BC, max(1 - gain - loss, 0.0)))
    shown_BC = (tango_z(gained_BC, lost_BC, num_items, bound) > _z(1 - alpha)) & possible_BC
    return float(numpy.exp(log_BC[shown_BC]).sum())


def chance_share(num_items: float, share: float, *, bound: float, alpha: float = LEVEL / 2) -> float:
    """The chance to show a true ``share`` of right items to lie above ``bound``."""
    from scipy.special import betainc

    num_items = math.floor(num_items)
    kind = Exact if num_items < FEW_ITEMS else Wilson
    least = _smallest(0, num_items, lambda count: kind(successes=count, num_items=num_items).above(bound) < alpha)
    if least is None or share <= 0:
        return 0.0
    return 1.0 if share >= 1 or least == 0 else float(betainc(least, num_items - least + 1, share))


def chance_mean(num_items: float, distance: float, *, spread: float, alpha: float = LEVEL / 2) -> float:
    """The chance to show a mean that lies ``distance`` above a bound, of items whose standard deviation is ``spread``.

    Student's quantile, normal power: within a percent of the exact value from ten items on.
    """
    from scipy.special import stdtrit

    if num_items < 2:
        return 0.0
    if spread <= 0:
        return 1.0 if distance > 0 else 0.0
    quantile = float(stdtrit(num_items - 1, 1 - alpha))
    return _phi(distance * math.sqrt(num_items) / spread - quantile)


def smallest_detectable(chance: Callable[[float], float], most: float, power: float = POWER) -> float | None:
    """The smallest difference up to ``most`` whose ``chance`` to be shown reaches ``power``; None when none does."""
    if chance(most) < power:
        return None
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if chance(middle) >= power else (middle, high)
    return high


def items_needed(chance: Callable[[int], float], power: float = POWER) -> int | None:
    """The smallest number of items whose ``chance`` reaches ``power``, up to steps of a percent; None over ten million.

    Chances of counts rise in small steps with falls between them: what is returned has the power, and a few items
    fewer may have it too.
    """
    most = 8
    while chance(most) < power:
        most *= 2
        if most > MOST_ITEMS:
            return None
    low = most // 2 if most > 8 else 0
    while most - low > max(1, low // 100):
        middle = (low + most) // 2
        low, most = (low, middle) if chance(middle) >= power else (middle, most)
    return most


def _smallest(low: int, high: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest number from ``low`` to ``high`` that ``holds``, of a property that stays once it holds."""
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _z(share: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(share))


def _phi(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2
