"""Intervals: cases worked by hand, and coverage where the truth is known."""

import math

import numpy
import pytest

from lora_kit.stats import corpus_difference, corpus_interval, holm, mean_interval, paired_difference, wilson


def test_unclustered_t_interval_equals_scipys():
    from scipy import stats

    scores = [0.2, 0.9, 0.4, 0.55, 0.1]
    expected = stats.t.interval(0.95, 4, loc=numpy.mean(scores), scale=stats.sem(scores))
    found = mean_interval(scores)
    assert (found.ci_low, found.ci_high) == pytest.approx(expected)
    assert found.mean == pytest.approx(0.43) and found.num_items == found.num_clusters == 5


def test_clustered_interval_by_hand():
    # Clusters a: 0.1, 0.3; b: 0.8; c: 0.4. Mean 0.4; cluster sums of residuals -0.4, 0.4, 0.0.
    # Variance 3/2 * (0.16 + 0.16 + 0) / 16 = 0.03; t(0.975, 2) = 4.302653.
    found = mean_interval([0.1, 0.3, 0.8, 0.4], ["a", "a", "b", "c"])
    half = 4.302653 * math.sqrt(0.03)
    assert found.mean == pytest.approx(0.4)
    assert (found.ci_low, found.ci_high) == pytest.approx((0.4 - half, 0.4 + half), rel=1e-6)
    assert (found.num_items, found.num_clusters) == (4, 3)


def test_clusters_of_equal_items_count_once():
    once = mean_interval([0.1, 0.7, 0.5])
    thrice = mean_interval([0.1] * 3 + [0.7] * 3 + [0.5] * 3, list("aaabbbccc"))
    assert (thrice.ci_low, thrice.ci_high) == pytest.approx((once.ci_low, once.ci_high))


def test_weights_stand_for_repeated_items_of_one_cluster():
    # A conversation of 3 tokens and mean loss x is three tokens of loss x in one cluster.
    weighted = mean_interval([2.5, 4.1, 3.3], ["a", "b", "c"], weights=[3, 1, 2])
    spelled = mean_interval([2.5] * 3 + [4.1] + [3.3] * 2, list("aaabcc"))
    assert weighted.mean == pytest.approx((7.5 + 4.1 + 6.6) / 6)
    assert (weighted.ci_low, weighted.ci_high) == pytest.approx((spelled.ci_low, spelled.ci_high))


def test_wilson_published_case():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81/263 and 0/20, Wilson without correction.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)


def test_binary_scores_get_wilson_and_clusters_without_spread_get_it_over_clusters():
    found = mean_interval([1.0] * 81 + [0.0] * 182)
    assert (found.ci_low, found.ci_high) == pytest.approx(wilson(81, 263))
    nothing = mean_interval([0.0] * 200, [index // 5 for index in range(200)])
    assert (nothing.mean, nothing.ci_low) == (0.0, 0.0)
    assert nothing.ci_high == pytest.approx(wilson(0, 40)[1])


def test_the_method_follows_kind_and_number_of_the_scores():
    generator = numpy.random.default_rng(5)
    binary, pairs = [0.0, 1.0] * 20, [index // 2 for index in range(40)]
    skewed, even = generator.lognormal(0, 1.5, 40).tolist(), generator.normal(size=40).tolist()
    assert mean_interval(binary[:20]).method == "exact" and mean_interval(binary).method == "Wilson"
    assert mean_interval(binary, pairs).method == "clustered t and Wilson"
    assert mean_interval(even).method == "t" and mean_interval(skewed).method == "BCa bootstrap"
    assert mean_interval(skewed[:29]).method == "t" and mean_interval(skewed, pairs).method == "clustered t"
    assert paired_difference(binary, [0.0] * 40).method == "Tango"
    assert paired_difference(binary, [0.0] * 40, [0] + pairs[1:]).method == "clustered t and Tango"
    assert mean_interval(binary, weights=[1.0, 2.0] * 20).method == "clustered t"
    assert mean_interval([0.4]).method == ""
    for scores in (skewed, [-value for value in skewed]):  # never by which side the scores lie on
        assert paired_difference(scores, [0.0] * 40).method == "BCa bootstrap"


def test_one_flip_among_clustered_items_is_not_called_sure():
    # The spread of one flip is seen in one cluster only: t alone would leave out losses of two items.
    clusters = [index // 2 for index in range(200)]
    found = paired_difference([0.0] * 199 + [1.0], [0.0] * 200, clusters)
    alone = paired_difference([0.0] * 199 + [1.0], [0.0] * 200)
    assert (found.ci_low, found.ci_high) == pytest.approx((alone.ci_low, alone.ci_high)) and alone.ci_low < -0.013


def test_a_corpus_metric_is_resampled_by_clusters():
    generator = numpy.random.default_rng(6)
    a, b = (generator.integers(0, 5, (60, 2)) + [extra, 4] for extra in (2, 0))

    def ratio(outcomes):
        return sum(top for top, _ in outcomes) / sum(bottom for _, bottom in outcomes)

    alone = corpus_interval(ratio, a.tolist(), range(60))
    # Of a ratio of sums, the delta method is the t interval with the denominators as weights.
    delta = mean_interval(a[:, 0] / a[:, 1], weights=a[:, 1])
    assert alone.mean == pytest.approx(delta.mean) and alone.method == "BCa bootstrap"
    assert (alone.ci_low, alone.ci_high) == pytest.approx((delta.ci_low, delta.ci_high), rel=0.03)
    paired = corpus_difference(ratio, a.tolist(), b.tolist(), range(60))
    assert paired.mean == pytest.approx(ratio(a) - ratio(b)) and paired.ci_low > 0
    doubled = corpus_interval(ratio, [*a.tolist(), *a.tolist()], [*range(60), *range(60)])
    assert doubled.ci_high - doubled.ci_low == pytest.approx(alone.ci_high - alone.ci_low, rel=0.1)
    assert corpus_interval(ratio, a.tolist()[:1], ["x"]).ci_low is None
    assert corpus_interval(ratio, [], []).mean is None


def test_holm_by_hand():
    # Holm 1979: multiply the smallest by the number of claims, the next by one less, never falling.
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([0.02]) == [0.02] and holm([]) == []


def test_paired_difference_by_hand():
    # Differences 1, 0, 0, 1 in clusters x, x, y, z: mean 0.5, sums of residuals 0, -0.5, 0.5.
    found = paired_difference([1, 0, 1, 1], [0, 0, 1, 0], ["x", "x", "y", "z"])
    half = 4.302653 * math.sqrt(3 / 2 * 0.5 / 16)
    assert found.mean == pytest.approx(0.5)
    assert (found.ci_low, found.ci_high) == pytest.approx((0.5 - half, 0.5 + half), rel=1e-6)
    assert (found.num_items, found.num_clusters) == (4, 3)


def test_no_flip_among_binary_items_is_not_certainty():
    found = paired_difference([0.0] * 20, [0.0] * 20)
    assert found.mean == 0.0
    assert (found.ci_low, found.ci_high) == pytest.approx((-0.1611, 0.1611), abs=5e-5)
    # Equal losses of a model compared with itself are certain: nothing was drawn.
    same = paired_difference([2.5, 3.0, 2.7], [2.5, 3.0, 2.7])
    assert (same.mean, same.ci_low, same.ci_high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("scores, clusters", [([0.4], None), ([0.4, 0.9, 0.1], ["a", "a", "a"])])
def test_one_cluster_cannot_tell(scores, clusters):
    found = mean_interval(scores, clusters)
    assert found.mean == pytest.approx(sum(scores) / len(scores))
    assert found.ci_low is None and found.ci_high is None
    other = paired_difference(scores, [0.0] * len(scores), clusters)
    assert other.mean == pytest.approx(found.mean) and other.ci_low is None and other.num_clusters == 1


def test_no_items():
    found = mean_interval([])
    assert (found.mean, found.ci_low, found.num_items) == (None, None, 0)


def test_coverage_of_clustered_interval_and_failure_of_the_naive_one():
    # 40 clusters of 1 to 6 items that share half of their variance; true mean 0.3.
    random = numpy.random.default_rng(20)
    covered = naive = 0
    runs = 600
    for _ in range(runs):
        sizes = random.integers(1, 7, 40)
        shared = random.normal(0.3, 1.0, 40)
        clusters = numpy.repeat(numpy.arange(40), sizes)
        scores = shared[clusters] + random.normal(0.0, 1.0, len(clusters))
        found = mean_interval(scores, clusters.tolist())
        covered += found.ci_low <= 0.3 <= found.ci_high
        alone = mean_interval(scores)
        naive += alone.ci_low <= 0.3 <= alone.ci_high
    assert 0.925 <= covered / runs <= 0.975
    assert naive / runs < 0.87


def test_coverage_of_paired_difference_on_binary_items():
    random = numpy.random.default_rng(21)
    covered, runs = 0, 600
    for _ in range(runs):
        ability = random.uniform(0, 1, 60)
        before = random.uniform(size=60) < 0.6 * ability
        after = random.uniform(size=60) < 0.6 * ability + 0.1
        found = paired_difference(after.astype(float), before.astype(float))
        covered += found.ci_low <= 0.1 <= found.ci_high
    assert 0.925 <= covered / runs <= 0.975
