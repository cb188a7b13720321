"""Power: against published values, against drawn samples, and what follows from it."""

import math

import numpy
import pytest

from lora_kit import intervals, power
from lora_kit.intervals import tango_z


def test_large_numbers_of_items_follow_connors_formula():
    # R package pwrss 1.0 (validated by its authors against PASS and G*Power), approximate McNemar, 0.10 and 0.20.
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(power, "_EXACT_UP_TO", 0)
        assert power.chance_paired(500, 0.1, discordance=0.2) == pytest.approx(0.984567, abs=1e-5)
        assert power.chance_paired(500, 0.1, discordance=0.2, alpha=0.05) == pytest.approx(0.993418, abs=1e-5)
    assert power.chance_paired(500, 0.1, discordance=0.2) == pytest.approx(0.9846, abs=0.003)  # exact
    near, far = (power.chance_paired(number, 0.02, discordance=0.05, bound=-0.005) for number in (3000, 3001))
    assert near == pytest.approx(far, abs=0.01)


@pytest.mark.parametrize("number, difference, bound, discordance", [
    (200, 0.06, 0.0, 0.05), (100, -0.01, -0.05, 0.1), (60, 0.0, 0.0, 0.3), (40, 0.2, 0.0, 0.0)])
def test_the_chance_is_the_share_of_samples_that_show_it(number, difference, bound, discordance):
    gain, loss = discordance / 2 + max(difference, 0), discordance / 2 + max(-difference, 0)
    counts = numpy.random.default_rng(2).multinomial(number, [gain, loss, 1 - gain - loss], size=40_000)
    shown = tango_z(counts[:, 0], counts[:, 1], number, bound) > 1.959964
    assert power.chance_paired(number, difference, bound=bound, discordance=discordance) == pytest.approx(
        shown.mean(), abs=0.008)


def test_equally_good_models_are_told_apart_at_the_level():
    for discordance in (0.01, 0.05, 0.1, 0.3):
        assert power.chance_paired(200, 0.0, discordance=discordance) < 0.027


def test_the_smallest_detectable_difference_has_the_power_and_less_has_not():
    for number in (50, 200, 1000):
        found = power.smallest_detectable(lambda size, n=number: power.chance_paired(n, size), 0.95)
        assert power.chance_paired(number, found) == pytest.approx(0.8, abs=1e-3)
        assert power.chance_paired(number, 0.9 * found) < 0.78
    assert power.smallest_detectable(lambda size: power.chance_paired(3, size), 0.95) is None


def test_items_needed():
    needed = power.items_needed(lambda number: power.chance_paired(number, 0.0, bound=-0.02))
    assert power.chance_paired(needed, 0.0, bound=-0.02) >= 0.8
    # Normal formula: (1.96 + 0.84)^2 * 0.05 / 0.02^2 = 981, with the flips of the bound a little more.
    assert 950 < needed < 1150
    assert power.items_needed(lambda number: 0.5) is None and power.items_needed(lambda number: 1.0) == 1


def test_shares_and_means():
    from scipy.stats import nct, t

    counts = numpy.random.default_rng(3).binomial(200, 0.6, size=20_000)
    shown = [intervals.Wilson(successes=count, num_items=200).above(0.5) < 0.025 for count in counts]
    assert power.chance_share(200, 0.6, bound=0.5) == pytest.approx(numpy.mean(shown), abs=0.01)
    few = numpy.random.default_rng(3).binomial(20, 0.8, size=20_000)
    shown = [intervals.Exact(successes=count, num_items=20).above(0.5) < 0.025 for count in few]
    assert power.chance_share(20, 0.8, bound=0.5) == pytest.approx(numpy.mean(shown), abs=0.01)
    assert (power.chance_share(20, 0.0, bound=0.5), power.chance_share(20, 1.0, bound=0.5)) == (0.0, 1.0)
    exact = nct.sf(t.ppf(0.975, 29), 29, 0.5 * math.sqrt(30))
    assert power.chance_mean(30, 0.5, spread=1.0) == pytest.approx(exact, abs=0.01)
    assert power.chance_mean(1, 9.0, spread=1.0) == 0.0 and power.chance_mean(9, 0.0, spread=0.0) == 0.0


def test_clusters_are_worth_fewer_items():
    assert power.effective_items([1] * 50) == 50
    # Kish: 40 clusters of 5 at a correlation of 0.2: 200 / (1 + 4 * 0.2) = 111.
    assert power.effective_items([5] * 40) == pytest.approx(111.1, abs=0.1)
    assert power.effective_items([100] * 10, correlation=1.0) == 10 and power.effective_items([]) == 0
