"""All assertions hold, or the reason names those that do not."""

import pytest

from lora_kit.errors import DataError
from lora_kit.metrics import all_assertions
from tests.metrics.checks import check_build


def test_one_that_fails_is_named_among_those_that_hold():
    wanted = [{"contains": "Paris"}, {"max_words": 3}, {"not_regex": "[0-9]"}]
    assert all_assertions.score("Paris, France", assertions=wanted) == (1.0, "")
    assert all_assertions.score("It is Paris, of 2 million", assertions=wanted) == (
        0.0, 'max_words 3: has 6; not_regex "[0-9]": found "2"; 1 of 3 hold')


def test_no_assertion_is_no_zero():
    with pytest.raises(DataError, match="assertion 0: an assertion has one of contains"):
        all_assertions.score("x", assertions='[{"ignore_case": true}]')


def test_build():
    check_build(all_assertions, "all_assertions", ["a b", "c"], ["", ""],
                assertions=[[{"contains": "a"}], [{"max_chars": 0}]])
