"""Every interval against values that others published, and p-values that agree with the intervals."""

import numpy
import pytest

from lora_kit import intervals
from lora_kit.intervals import BCa, Exact, StudentT, Tango, Widest, Wilson, bootstrap, bootstrap_mean, clustered_t


@pytest.mark.parametrize("counts, level, published", [
    # Tango, Statistics in Medicine 17 (1998): 44 patients, one of whom changed; 90 %.
    ((0, 1, 44), 0.90, (-0.096, 0.037)),
    # Agresti & Min, Statistics in Medicine 24 (2005): 53, 16, 8, 9.
    ((16, 8, 86), 0.95, (-0.020, 0.207)),
    # Fagerland, Lydersen & Laake, Statistics in Medicine 33 (2014): airway hyper-responsiveness, 1, 1, 7, 12.
    ((1, 7, 21), 0.95, (-0.517, -0.026)),
    # Tests of the R package ratesci, pairbinci: 4, 9, 3, 16.
    ((9, 3, 32), 0.95, (-0.027, 0.390)),
])
def test_tango_published_cases(counts, level, published):
    gained, lost, num_items = counts
    assert Tango(gained=gained, lost=lost, num_items=num_items).limits(level) == pytest.approx(published, abs=5.1e-4)
    mirrored = Tango(gained=lost, lost=gained, num_items=num_items).limits(level)
    assert mirrored == pytest.approx((-published[1], -published[0]), abs=5.1e-4)


def test_tango_at_zero_is_mcnemars_test_and_at_the_edges_it_stays_within_one():
    for gained, lost in ((9, 3), (0, 5), (40, 60)):
        expected = (gained - lost) / (gained + lost) ** 0.5
        assert intervals.tango_z(gained, lost, 300, 0.0) == pytest.approx(expected)
    assert Tango(gained=0, lost=0, num_items=20).limits(0.95) == pytest.approx((-0.1611, 0.1611), abs=5e-5)
    low, high = Tango(gained=20, lost=0, num_items=20).limits(0.95)
    assert 0.6 < low < 0.8 and high == pytest.approx(1.0)
    assert Tango(gained=0, lost=0, num_items=20).above(0.0) == 0.5


def test_exact_published_cases():
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, Clopper-Pearson.
    assert Exact(successes=15, num_items=148).limits(0.95) == pytest.approx((0.0578, 0.1617), abs=5e-5)
    assert Exact(successes=0, num_items=20).limits(0.95) == pytest.approx((0.0, 0.1684), abs=5e-5)
    assert Exact(successes=1, num_items=29).limits(0.95) == pytest.approx((0.0009, 0.1776), abs=5e-5)
    from scipy.stats import binom

    found = Exact(successes=7, num_items=25)
    assert found.above(0.1) == pytest.approx(binom.sf(6, 25, 0.1)) and found.below(0.5) == pytest.approx(
        binom.cdf(7, 25, 0.5))


SPATIAL = numpy.array([48, 36, 20, 29, 42, 42, 20, 42, 22, 41, 45, 14, 6, 0, 33, 28, 34, 4, 32, 24, 47, 41, 24, 26,
                       30, 41])


def test_bca_published_case_and_another_implementation():
    # Efron & Tibshirani, An Introduction to the Bootstrap (1993), table 14.2: variance, 90 %, 2,000 resamples.
    found = bootstrap(lambda items: float(SPATIAL[items].var()), [[item] for item in range(26)])
    assert found.point == pytest.approx(171.5, abs=0.05) and found.acceleration == pytest.approx(0.061, abs=5e-4)
    assert found.limits(0.90) == pytest.approx((115.8, 259.6), rel=0.03)
    from scipy import stats

    scores = numpy.random.default_rng(3).lognormal(0, 1, 60)
    theirs = stats.bootstrap((scores,), numpy.mean, n_resamples=9999, method="BCa", rng=1).confidence_interval
    ours = bootstrap_mean(scores, numpy.ones(60), resamples=9999).limits(0.95)
    assert ours == pytest.approx((theirs.low, theirs.high), rel=0.02)


def test_bca_draws_clusters_as_wholes_by_its_seed_and_in_any_number_of_portions(monkeypatch):
    generator = numpy.random.default_rng(4)
    sizes = generator.integers(1, 5, 40)
    clusters = numpy.repeat(numpy.arange(40), sizes)
    scores = generator.exponential(size=40)[clusters] + 0.1 * generator.exponential(size=len(clusters))
    members = [numpy.flatnonzero(clusters == cluster) for cluster in range(40)]
    by_items = bootstrap(lambda items: float(scores[items].mean()), members)
    sums, weights = numpy.bincount(clusters, weights=scores), numpy.bincount(clusters).astype(float)
    fast = bootstrap_mean(sums, weights)
    assert fast.point == pytest.approx(by_items.point) and fast.acceleration == pytest.approx(by_items.acceleration)
    assert fast.limits(0.95) == pytest.approx(by_items.limits(0.95), rel=0.03)
    assert bootstrap_mean(sums, weights).limits(0.95) == fast.limits(0.95)
    monkeypatch.setattr(intervals, "_CELLS", 1000)
    assert len(bootstrap_mean(sums, weights).replicates_R) == intervals.RESAMPLES


FINDINGS = [
    Tango(gained=16, lost=8, num_items=86), Exact(successes=3, num_items=20), Wilson(successes=81, num_items=263),
    StudentT(mean=0.3, standard_error=0.1, degrees=5), bootstrap_mean(SPATIAL**2 / 1000, numpy.ones(26)),
    Widest(parts=(Tango(gained=16, lost=8, num_items=86), StudentT(mean=0.09, standard_error=0.1, degrees=9))),
]


@pytest.mark.parametrize("found", FINDINGS, ids=lambda found: found.method)
def test_p_values_are_those_of_the_intervals(found):
    for level in (0.8, 0.95):
        low, high = found.limits(level)
        tolerance = 2e-3 if isinstance(found, BCa) else 1e-6
        assert found.above(low) == pytest.approx((1 - level) / 2, abs=tolerance)
        assert found.below(high) == pytest.approx((1 - level) / 2, abs=tolerance)
    middle = sum(found.limits(0.01)) / 2
    assert found.above(middle - 9) < 1e-3 and found.above(middle + 9) > 0.999
    assert found.below(middle + 9) < 1e-3 and found.below(middle - 9) > 0.999


@pytest.mark.parametrize("found", FINDINGS, ids=lambda found: found.method)
def test_four_times_the_items_halve_the_interval(found):
    low, high = found.limits(0.9)
    less_low, less_high = found.with_items(4).limits(0.9)
    assert 0.4 * (high - low) < less_high - less_low < 0.6 * (high - low)


def test_without_any_spread_a_mean_is_certain():
    found = clustered_t([0.5] * 4, [1.0] * 4)
    assert found.limits(0.95) == (0.5, 0.5)
    assert (found.above(0.4), found.below(0.4), found.above(0.5), found.below(0.5)) == (0.0, 1.0, 1.0, 0.0)
    flat = bootstrap_mean([0.5] * 40, [1.0] * 40)
    assert flat.limits(0.95) == (0.5, 0.5) and (flat.above(0.5), flat.below(0.5)) == (1.0, 0.0)
