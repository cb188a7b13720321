"""Gain retention by hand, its interval, and when there is none."""

import numpy as np
import pytest

from lora_kit.gain import of_items, retained


def test_the_share_by_hand():
    found = retained([40, 60], [20, 30], [25, 40], [10, 10])
    assert found["value"] == pytest.approx(35 / 50)
    assert (found["base"], found["tuned"], found["form"]) == (5, 2.5, 3.25)
    assert found["num_rows"] == 2 and found["num_weights"] == 20


def test_it_is_the_same_for_scores_that_rise():
    assert retained([0, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0], [1] * 4)["form"] == 0.5
    losses = retained([3, 4], [1, 2], [2, 3], [1, 1])["value"]
    assert losses == retained([-3, -4], [-1, -2], [-2, -3], [1, 1])["value"] == 0.5


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    generator, covered = np.random.default_rng(0), 0
    for _ in range(60):
        weights = generator.integers(5, 30, 40)
        base = weights * generator.normal(3, 0.3, 40)
        tuned = base - weights * generator.normal(1, 0.3, 40)
        form = tuned + weights * generator.normal(0.1, 0.2, 40)  # 10 % of the gain is lost
        found = retained(base, tuned, form, weights)
        assert found["ci_low"] < found["value"] < found["ci_high"]
        covered += found["ci_low"] <= 0.9 <= found["ci_high"]
    assert 51 <= covered <= 60


@pytest.mark.parametrize(("rows", "why"), [
    (([], [], [], []), "nothing is scored"), (([1], [1], [1], [0]), "nothing is scored"),
    (([3, 4], [3, 4], [3, 5], [2, 2]), "as good as its base"),
    (([3, 4, 3, 4, 3], [2, 5, 4, 2, 3], [3, 3, 3, 3, 3], [1] * 5), "not surely another than its base"),
])
def test_no_gain_is_none_to_keep(rows, why):
    found = retained(*rows)
    assert found["value"] is None and why in found["why_not"]


def test_one_row_has_a_value_and_no_interval():
    found = retained([3], [1], [1.5], [4])
    assert found["value"] == 0.75 and found["ci_low"] is None


def items(scores, clusters=None, weights=None, outcomes=None):
    return [{"item_id": f"i{number}", "score": score, "cluster": clusters[number] if clusters else number,
             "weight": weights[number] if weights else 1, "outcome": outcomes[number] if outcomes else None}
            for number, score in enumerate(scores)]


def test_of_items_counts_what_all_three_have_and_draws_clusters_whole():
    base, tuned = [0.0] * 60, [1.0] * 40 + [0.0] * 20
    form = [1.0] * 30 + [None] + [0.0] * 29
    alone = of_items(items(base), items(tuned), items(form), higher_is_better=True)
    assert alone["num_items"] == alone["num_clusters"] == 59
    assert (alone["base"], alone["tuned"], alone["form"]) == (0, 39 / 59, 30 / 59)
    assert alone["value"] == pytest.approx(30 / 39) and alone["ci_low"] < 30 / 39 < alone["ci_high"] <= 1
    clusters = [number // 5 for number in range(60)]
    together = of_items(items(base, clusters), items(tuned, clusters), items(form, clusters), higher_is_better=True)
    assert together["num_clusters"] == 12 and together["value"] == alone["value"]
    assert together["ci_high"] - together["ci_low"] > alone["ci_high"] - alone["ci_low"]


def test_of_losses_by_weight():
    weights = [10, 30, 20, 40, 10, 10]
    found = of_items(items([4.0] * 6, weights=weights), items([2.0, 2.1, 1.9, 2, 2.2, 1.8], weights=weights),
                     items([3.0, 2.1, 1.9, 2, 2.2, 1.8], weights=weights), higher_is_better=False)
    assert found["value"] == pytest.approx((480 - 251) / (480 - 241))
    by_rows = retained([40, 120, 80, 160, 40, 40], [20, 63, 38, 80, 22, 18], [30, 63, 38, 80, 22, 18], weights)
    for key in ("value", "ci_low", "ci_high", "base", "tuned", "form"):
        assert found[key] == pytest.approx(by_rows[key]), key


def test_of_a_corpus_metric_its_value_and_not_the_mean_of_the_items():
    generator = np.random.default_rng(1)
    sides = [[(int(generator.binomial(20, share)), 20) for _ in range(40)] for share in (0.2, 0.8, 0.65)]

    def corpus(outcomes):
        return (sum(top for top, _ in outcomes) / sum(bottom for _, bottom in outcomes)) ** 2

    found = of_items(*(items([0.0] * 40, outcomes=side) for side in sides), higher_is_better=True, corpus=corpus)
    base, tuned, form = (corpus(side) for side in sides)
    assert found["value"] == pytest.approx((form - base) / (tuned - base))
    assert found["ci_low"] < found["value"] < found["ci_high"] < 1


def test_a_task_that_training_made_worse_has_no_gain_to_keep():
    found = of_items(items([1.0] * 30), items([0.0] * 29 + [1.0]), items([0.5] * 30), higher_is_better=True)
    assert found["value"] is None and found["why_not"] == "the tuned model is worse than its base"
    assert of_items([], [], [], higher_is_better=True)["why_not"] == "nothing is scored"


def test_draws_in_which_nothing_was_gained_widen_the_interval():
    # 6 of 60 items hold all the gain: about one draw in 400 has none of them.
    found = of_items(items([0.0] * 60), items([1.0] * 6 + [0.0] * 54), items([1.0] * 5 + [0.0] * 55),
                     higher_is_better=True)
    assert found["value"] == pytest.approx(5 / 6) and found["ci_low"] < 0.6 and found["ci_high"] == 1
