"""The choice: who is beaten, who is within the budget, and why."""

import pytest

from lora_kit.frontier import Candidate, choose
from lora_kit.recipe import ChooseSection


def candidate(name, megabytes, kl, **fields):
    return Candidate(**{"name": name, "size_bytes": megabytes * 10**6, "mean_kl": kl, "top1": 1 - kl, "gain": 1 - kl,
                        "tokens_per_second": 1000 / megabytes, **fields})


MERGED, Q8, Q6, Q4, INT8 = (candidate("merged", 270, 0.0), candidate("q8", 145, 0.01), candidate("q6", 110, 0.03),
                            candidate("q4", 90, 0.2), candidate("int8", 164, 0.03, tokens_per_second=2))
ALL = (MERGED, Q8, Q6, Q4, INT8)


def test_the_frontier_is_what_no_other_beats():
    assert choose(ALL, ChooseSection()).frontier == ("merged", "q8", "q6", "q4")
    equal = (candidate("a", 100, 0.1), candidate("b", 100, 0.1))
    assert choose(equal, ChooseSection()).frontier == ("a", "b")


def test_without_a_budget_it_is_the_smallest_that_keeps_the_gain():
    found = choose(ALL, ChooseSection())
    assert found.recommended == "q6" and found.out == {"q4": "gain kept under 95%"}
    assert found.why.startswith("the smallest within the budget: 110 MB (gain kept at least 95%")


@pytest.mark.parametrize(("budget", "recommended", "out"), [
    ({"max_megabytes": 120}, "q6", {"merged": "over 120 MB", "q8": "over 120 MB", "int8": "over 120 MB"}),
    ({"max_kl": 0.02}, "q8", {"q6": "KL over 0.02", "q4": "KL over 0.02", "int8": "KL over 0.02"}),
    ({"min_top1": 0.985}, "q8", {"q6": "same first choice under 98%"}),
    ({"min_gain_retained": 0.7}, "q4", {}),
    ({"min_tokens_per_second": 9}, "q6", {"merged": "under 9 tokens/s", "int8": "under 9 tokens/s"}),
    ({"prefer": "speed"}, "q6", {}), ({"prefer": "speed", "min_gain_retained": 0.5}, "q4", {}),
])
def test_budgets(budget, recommended, out):
    found = choose(ALL, ChooseSection(**budget))
    assert found.recommended == recommended and out.items() <= found.out.items(), found


def test_where_the_gain_cannot_be_told_first_choices_decide():
    vague = [candidate("merged", 270, 0.0), candidate("good", 100, 0.05, gain=None),
             candidate("bad", 90, 0.3, gain=None)]
    found = choose(vague, ChooseSection())
    assert found.recommended == "good" and found.out == {"bad": "same first choice under 90%"}


def test_a_form_that_missed_its_own_bound_is_never_recommended():
    found = choose((MERGED, candidate("q6", 110, 0.01, missed=True)), ChooseSection())
    assert found.recommended == "merged" and found.out == {"q6": "misses its own bound"}


def test_none_within_the_budget():
    found = choose(ALL, ChooseSection(max_megabytes=50))
    assert found.recommended is None and found.why == "none is within the budget" and len(found.out) == 5


def test_speed_that_was_not_measured():
    found = choose((candidate("a", 100, 0.0, tokens_per_second=None),), ChooseSection(min_tokens_per_second=5))
    assert found.out == {"a": "speed not measured"}
    assert choose((candidate("a", 100, 0.0, tokens_per_second=None),), ChooseSection(prefer="speed")).recommended == "a"
