"""Verdicts follow from the paired interval, and from nothing else."""

import pytest

from lora_kit import gates
from lora_kit.suite import Gate


def lines(scores, clusters=None, weights=None):
    return [{"item_id": str(i), "score": score, "cluster": str(clusters[i] if clusters else i),
             "weight": weights[i] if weights else 1} for i, score in enumerate(scores)]


def decide(gate, items, baseline_items, higher=True, why_not=""):
    found = gates.evidence(items, baseline_items, gate, higher_is_better=higher, why_not=why_not)
    return gates.decide([gate], [found])[0]


def compare(a, b, higher=True):
    return gates.difference(a, b, task="t", artifact="merged", baseline="base", metric="m", higher_is_better=higher)


BETTER = Gate(task="t", metric="m", better_than="base")
NO_WORSE = Gate(task="t", metric="m", no_worse_than="base", margin=0.1)
FLOOR = Gate(task="t", metric="m", at_least=0.5)


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
    found = decide(gate, lines(tuned), lines(base), higher)
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
    found = decide(BETTER, None, lines([1.0]), why_not="merged was not measured: no engine")
    assert (found.outcome, found.evidence) == ("INCONCLUSIVE", "merged was not measured: no engine")
    assert decide(BETTER, lines([None]), lines([1.0])).evidence == "no item has a score from both"
    assert decide(FLOOR, lines([None]), None).evidence == "no item has a score"
    one = decide(BETTER, lines([1.0]), lines([0.0]))
    assert one.evidence == "difference 1, no interval: 1 items in 1 clusters" and one.num_items_to_decide is None


def test_a_verdict_says_its_numbers():
    found = decide(BETTER, lines([2.0, 2.5, 3.0]), lines([3.0, 3.4, 4.1]), higher=False)
    assert found.claim == "t m: merged better than base"
    assert found.evidence == "difference -1 [-1.25, -0.752] at 95 %, lower is better, 3 items in 3 clusters"
    assert (found.role, found.artifact) == ("target", "merged")
    assert gates.claim_of(NO_WORSE) == "t m: merged no worse than base (margin 0.1)"
    assert gates.claim_of(FLOOR) == "t m: merged at least 0.5"
    assert gates.claim_of(Gate(task="t", metric="m", at_most=2.0)) == "t m: merged at most 2"


def binary(num_right, num_items=200):
    return lines([1.0] * num_right + [0.0] * (num_items - num_right))


@pytest.mark.parametrize("gate, items, higher, outcome", [
    (FLOOR, binary(120), True, "PASS"), (FLOOR, binary(80), True, "FAIL"), (FLOOR, binary(103), True, "INCONCLUSIVE"),
    (FLOOR, binary(12, 20), True, "INCONCLUSIVE"), (FLOOR, binary(16, 20), True, "PASS"),
    (Gate(task="t", metric="loss", at_most=2.0), lines([1.8, 1.7, 1.9, 1.85]), False, "PASS"),
    (Gate(task="t", metric="loss", at_most=2.0), lines([2.2, 2.3, 2.1, 2.15]), False, "FAIL"),
])
def test_floors(gate, items, higher, outcome):
    found = decide(gate, items, None, higher)
    assert found.outcome == outcome and found.role == "floor" and found.evidence.startswith("score "), found


def test_an_inconclusive_verdict_says_how_many_items_would_decide():
    # 6 of 200 lost, 4 gained: a difference of -0.01 against a margin of 0.03.
    base, tuned = binary(100), lines([0.0] * 6 + [1.0] * 94 + [1.0] * 4 + [0.0] * 96)
    gate = Gate(task="t", metric="m", no_worse_than="base", margin=0.03)
    found = decide(gate, tuned, base)
    assert found.outcome == "INCONCLUSIVE"
    assert found.evidence.endswith(
        f"; about {found.num_items_to_decide:,} items would decide, if it stays -0.01"), found.evidence
    assert 900 < found.num_items_to_decide < 1300  # (1.96 + 0.84)^2 * 0.05 / 0.02^2 = 980, were all spread the same
    # With as many items, four in five samples of such models do decide.
    import numpy

    shares = [0.03, 0.02, 0.95]
    counts = numpy.random.default_rng(8).multinomial(found.num_items_to_decide, shares, size=1000)
    from lora_kit.intervals import tango_z

    z = tango_z(counts[:, 1], counts[:, 0], found.num_items_to_decide, -0.03)
    assert 0.76 < (z > 1.96).mean() < 0.86
    on_it = decide(Gate(task="t", metric="m", no_worse_than="base", margin=0.01), tuned, base)
    assert on_it.evidence.endswith("it lies so near -0.01 that more items would hardly decide")


def test_of_several_gates_holm_holds_the_level():
    # Alone this difference would be shown (p 0.009); as one of three claims that show nothing it is not.
    base, tuned = binary(100), lines([0.0] * 4 + [1.0] * 96 + [1.0] * 14 + [0.0] * 86)
    gate = BETTER
    alone = decide(gate, tuned, base)
    assert alone.outcome == "PASS" and "Holm" not in alone.evidence
    found = gates.evidence(tuned, base, gate, higher_is_better=True)
    nothing = gates.evidence(base, base, gate, higher_is_better=True)
    first, *others = gates.decide([gate] * 3, [found, nothing, nothing])
    assert first.outcome == "INCONCLUSIVE" and "; alone it would PASS, one of 3 gates it does not (Holm)" \
        in first.evidence
    assert {verdict.outcome for verdict in others} == {"INCONCLUSIVE"}
    # Several that are shown share what the level allows.
    verdicts = gates.decide([gate] * 2, [found, found])
    assert [verdict.outcome for verdict in verdicts] == ["PASS", "PASS"]
    assert verdicts[0].evidence.endswith("; p 0.018 over 2 gates (Holm)")


def test_an_early_look_asks_for_more_and_what_it_decides_stays():
    base, tuned = binary(100), lines([0.0] * 4 + [1.0] * 96 + [1.0] * 14 + [0.0] * 86)  # p 0.009
    found = gates.evidence(tuned, base, BETTER, higher_is_better=True)
    (early,) = gates.decide([BETTER], [found], shares=[0.25])
    assert early.outcome == "INCONCLUSIVE" and "; look 1" not in early.evidence
    (second,) = gates.decide([BETTER], [found], shares=[0.25, 0.5])
    assert second.outcome == "INCONCLUSIVE" and "; look 2, at 50 % of the items planned" in second.evidence
    (last,) = gates.decide([BETTER], [found], shares=[0.25, 0.5, 0.75, 1.0])
    assert last.outcome == "PASS" and "; look 4, at 100 %" in last.evidence
    # What was decided stays, word for word, whatever is found later.
    worse = gates.evidence(base, tuned, BETTER, higher_is_better=True)
    assert gates.decide([BETTER], [worse], shares=[0.5, 1.0], decided={0: last}) == [last]
    assert gates.decide([BETTER], [worse], shares=[0.5, 1.0])[0].outcome == "FAIL"


def test_a_claim_that_an_earlier_look_decided_leaves_its_share_of_the_level_to_the_others():
    base, tuned = binary(100), lines([0.0] * 4 + [1.0] * 96 + [1.0] * 14 + [0.0] * 86)
    found = gates.evidence(tuned, base, BETTER, higher_is_better=True)
    nothing = gates.evidence(base, base, BETTER, higher_is_better=True)
    together = gates.decide([BETTER] * 3, [nothing, nothing, found], shares=[0.5, 1.0])
    assert [each.outcome for each in together] == ["INCONCLUSIVE"] * 3
    passed = gates.decide([BETTER], [found])[0]
    kept = gates.decide([BETTER] * 3, [nothing, nothing, found], shares=[0.5, 1.0], decided={0: passed, 1: passed})
    assert [each.outcome for each in kept] == ["PASS"] * 3


def test_flips_by_stage():
    earlier = lines([1.0, 1.0, 0.0, 0.0, 1.0, None])
    later = lines([1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    for index, margins in ((1, (0.00005, -0.00005)), (4, (3.0, -2.0))):
        earlier[index]["margin"], later[index]["margin"] = margins
    found = gates.flips(later, earlier, task="t", metric="m", artifact="gguf-q8_0", baseline="merged",
                        higher_is_better=True)
    assert (found["num_items"], found["num_worse"], found["num_better"], found["num_same"]) == (5, 2, 1, 2)
    assert (found["worse"], found["better"], found["is_binary"], found["num_numeric"]) == (["1", "4"], ["2"], True, 1)
    losses = gates.flips(lines([2.0, 1.0]), lines([1.5, 1.2]), task="t", metric="loss", artifact="a", baseline="b",
                         higher_is_better=False)
    assert (losses["num_worse"], losses["num_better"], losses["is_binary"]) == (1, 1, False)
