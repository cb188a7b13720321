"""Exact match, with and without whitespace."""

from lora_kit.metrics import exact_match
from tests.metrics.checks import check_build


def test_whitespace_is_normalised_unless_asked_not_to():
    assert exact_match.score(" a  b\n", "a b") == (1.0, "")
    assert exact_match.score(" a  b\n", "a b", normalise_whitespace=False)[0] == 0.0
    assert exact_match.score("a B", "a b") == (0.0, "differs from character 3 on")


def test_a_prefix_is_no_match():
    assert exact_match.score("abc", "abcd") == (0.0, "differs from character 4 on")
    assert exact_match.score("", "")[0] == 1.0


def test_build():
    check_build(exact_match, "exact_match", ["a b", "c"], ["a  b", "d"])
    found = exact_match.build().compute(predictions=["a  b"], references=["a b"], normalise_whitespace=False)
    assert found["exact_match"] == 0.0


def test_the_example_of_evaluates_own_page():
    found = exact_match.build().compute(predictions=["cat?", "theater", "yelling", "agent"],
                                        references=["the cat", "theater", "YELLING", "agent007"])
    assert found["exact_match"] == 0.25 and found["item_scores"] == [0.0, 1.0, 0.0, 0.0]
