"""JSON match: values and not spellings are compared, and the reason names the place."""

import pytest

from lora_kit.errors import DataError
from lora_kit.metrics import json_match
from tests.metrics.checks import check_build


@pytest.mark.parametrize("prediction, target", [
    ('{"a": 1, "b": [true, null]}', '{"b": [true, null], "a": 1.0}'),
    ('```json\n{"a": "x"}\n```', '{"a": "x"}'), ("```\n[1]\n```", "[1]"), ("  7\n", "7"), ('"é"', '"\\u00e9"')])
def test_the_same_value(prediction, target):
    assert json_match.score(prediction, target) == (1.0, "")


@pytest.mark.parametrize("prediction, target, reason", [
    ('{"a": 1}', '{"a": 2}', "$.a is 1, not 2"),
    ('{"a": {"b": [1, 2]}}', '{"a": {"b": [1, 3]}}', "$.a.b[1] is 2, not 3"),
    ("{}", '{"a": 1}', '$ has no "a"'), ('{"a": 1, "c": 2}', '{"a": 1}', '$ has "c", which is not wanted'),
    ("[1]", "[1, 2]", "$ has 1 elements, not 2"), ("true", "1", "$ is true, not 1"), ("1", '"1"', '$ is 1, not "1"'),
    ("[2, 1]", "[1, 2]", "$[0] is 2, not 1"), ("null", "{}", "$ is null, not {}")])
def test_another_value(prediction, target, reason):
    assert json_match.score(prediction, target) == (0.0, reason)


@pytest.mark.parametrize("prediction", ["", "Here it is: {}", '{"a": 1} {"a": 1}', "NaN", "[" * 100_000, "{'a': 1}"])
def test_no_json_is_a_zero_with_a_reason(prediction):
    value, reason = json_match.score(prediction, "{}")
    assert value == 0.0 and reason.startswith("the answer is no JSON (")


def test_a_target_that_is_no_json_is_no_zero():
    with pytest.raises(DataError, match="the target is no JSON"):
        json_match.score("{}", "{'a'}")


def test_build():
    check_build(json_match, "json_match", ['{"a": 1}', "x"], [{"a": 1}, [1]])
