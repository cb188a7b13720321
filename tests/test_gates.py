"""Verdicts follow from the paired interval, and from nothing else."""

import pytest

from lora_kit import gates
from lora_kit.suite import Gate


def lines(scores, clusters=None, weights=None):
    return [{"item_id": str(i), "score": score, "cluster": str(clusters[i] if clusters else i),
             "weight": weights[i] if weights else 1} for i, score in enumerate(scores)]


def compare(a, b, higher=True):
    return gates.difference(a, b, task="t", artifact="merged", baseline="base", metric="m", higher_is_better=higher)


BETTER = Gate(task="t", metric="m", better_than="base")
NO_WORSE = Gate(task="t", metric="m", no_worse_than="base", margin=0.1)


@pytest.mark.parametrize("gate, changes, higher, outcome", [
    (BETTER, [0.3, 0.4, 0.5, 0.4], True, "PASS"),
    (BETTER, [0.3, 0.4, 0.5, 0.4], False, "FAIL"),  # a loss that rose
    (BETTER, [-0.3, -0.4, -0.5, -0.4], False, "PASS"),
    (BETTER, [-0.3, -0.4, -0.5, -0.4], True, "FAIL"),
    (BETTER, [-0.9, 0.9, 0.5, -0.2], True, "INCONCLUSIVE"),
    (BETTER, [0.5], True, "INCONCLUSIVE"),
    (BETTER, [0.0, 0.0, 0.0], False, "FAIL"),  # the same model is not better than itself
    (NO_WORSE, [-0.05, -0.04, -0.06, -0.05], True, "PASS"),
    (NO_WORSE, [0.05, 0.04, 0.06, 0.05], False, "PASS"),
    (NO_WORSE, [-0.3, -0.4, -0.5, -0.4], True, "FAIL"),
    (NO_WORSE, [-0.09, -0.2, 0.1, 0.0], True, "INCONCLUSIVE"),
])
def test_outcomes(gate, changes, higher, outcome):
    base = [0.31, 0.52, 0.43, 0.64][:len(changes)]
    tuned = [score + change for score, change in zip(base, changes, strict=True)]
    found = gates.decide(gate, compare(lines(tuned), lines(base), higher))
    assert found.outcome == outcome, found


def test_pairs_are_items_that_both_have_and_errors_are_no_zeros():
    found = compare(lines([1.0, None, 1.0, 0.0]), lines([0.0, 1.0, None, 0.0]))
    assert (found["num_items"], found["num_unpaired"], found["difference"]) == (2, 2, 0.5)
    score = gates.task_score(lines([1.0, None, 0.0]), task="t", artifact="a", metric="m", higher_is_better=True)
    assert (score.value, score.num_items, score.num_errors) == (0.5, 2, 1)


def test_clusters_widen_and_weights_count():
    alone = compare(lines([1.0, 1.0, 1.0, 0.5]), lines([0.0] * 4))
    shared = compare(lines([1.0, 1.0, 1.0, 0.5], clusters=[0, 0, 0, 1]), lines([0.0] * 4, clusters=[0, 0, 0, 1]))
    assert shared["num_clusters"] == 2 and shared["ci_high"] > alone["ci_high"]
    weighted = gates.task_score(lines([2.0, 5.0], weights=[3, 1]), task="t", artifact="a", metric="loss",
                                higher_is_better=False)
    assert weighted.value == pytest.approx(2.75)


def test_nothing_to_compare_is_inconclusive_and_says_why():
    found = gates.decide(BETTER, None, "merged was not measured: no engine")
    assert (found.outcome, found.evidence) == ("INCONCLUSIVE", "merged was not measured: no engine")
    assert gates.decide(BETTER, compare(lines([None]), lines([1.0]))).evidence == "no item has a score from both"


def test_a_verdict_says_its_numbers():
    found = gates.decide(BETTER, compare(lines([2.0, 2.5, 3.0]), lines([3.0, 3.4, 4.1]), higher=False))
    assert found.claim == "t m: merged better than base"
    assert found.evidence == "difference -1 [-1.25, -0.752] at 95 %, lower is better, 3 items in 3 clusters"
    assert gates.decide(NO_WORSE, None).claim == "t m: merged no worse than base (margin 0.1)"
