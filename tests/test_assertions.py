"""What can be asserted of an answer: when it holds, when not, and what is said."""

import json

import pytest

from lora_kit import assertions
from lora_kit.errors import DataError

SCHEMA = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}


def check(answer, **fields):
    (one,) = assertions.read(fields, "row")
    return one.check(answer)


@pytest.mark.parametrize("fields, answer", [
    ({"contains": "a"}, "cat"), ({"contains": ["a", "t"]}, "cat"), ({"contains": "CAT", "ignore_case": True}, "a cat"),
    ({"contains_any": ["x", "a"]}, "cat"), ({"not_contains": ["x", "y"]}, "cat"), ({"equals": "cat"}, " cat\n"),
    ({"equals": ["dog", "cat"]}, "cat"), ({"starts_with": "Yes"}, " Yes, it is"), ({"ends_with": "."}, "So it is.\n"),
    ({"regex": "^c.t$"}, "cat"), ({"not_regex": "[0-9]"}, "cat"), ({"min_words": 2}, "a cat"),
    ({"max_words": 2}, "a cat"), ({"max_words": 0}, ""), ({"max_chars": 3}, "cat"),
    ({"json_schema": True}, "[1]"), ({"json_schema": SCHEMA}, '{"city": "Paris"}')])
def test_it_holds(fields, answer):
    assert check(answer, **fields)[0] is True


@pytest.mark.parametrize("fields, answer, found", [
    ({"contains": ["a", "x"]}, "cat", 'contains ["a", "x"]: lacks ["x"]'),
    ({"contains": "CAT"}, "cat", 'contains ["CAT"]: lacks ["CAT"]'),
    ({"contains_any": ["x"]}, "cat", 'contains_any ["x"]: has none'),
    ({"not_contains": "a"}, "cat", 'not_contains ["a"]: has ["a"]'),
    ({"equals": "dog"}, "cat", 'equals ["dog"]: is "cat"'),
    ({"starts_with": "Yes"}, "No way", 'starts_with "Yes": starts with "No "'),
    ({"ends_with": "."}, "Yes", 'ends_with ".": ends with "s"'),
    ({"regex": "x"}, "cat", 'regex "x": not found'), ({"not_regex": "A", "ignore_case": True}, "cat",
                                                      'not_regex "A": found "a"'),
    ({"min_words": 3}, "a cat", "min_words 3: has 2"), ({"max_words": 1}, "a cat", "max_words 1: has 2"),
    ({"max_chars": 2}, "cat", "max_chars 2: has 3")])
def test_it_does_not_hold(fields, answer, found):
    assert check(answer, **fields) == (False, found)


def test_schemas_say_where_an_answer_does_not_fit():
    assert check("no", json_schema=True)[1].startswith("json_schema true: no JSON (")
    assert check('{"city": 7}', json_schema=SCHEMA)[1].endswith(": $.city: 7 is not of type 'string'")
    assert check("{}", json_schema=SCHEMA)[1].endswith(": $: 'city' is a required property")


def test_a_schema_is_never_fetched():
    with pytest.raises(DataError, match="refers to what is not in it"):
        check("{}", json_schema={"$ref": "http://127.0.0.1:1/schema.json"})


@pytest.mark.parametrize("value, what", [
    ({}, "assertion 0: an assertion has one of contains"),
    ({"contains": "a", "regex": "b"}, "assertion 0: an assertion has one of contains"),
    ([{"contains": "a"}, {"regex": "("}], r"assertion 1.regex: no regular expression \("),
    ({"json_schema": {"type": "objekt"}}, r"assertion 0.json_schema: no JSON Schema \('objekt'"),
    ({"contain": "a"}, "assertion 0.contain: Extra inputs"),
    ({"max_words": 3, "ignore_case": True}, "'ignore_case' has no effect on max_words"), ("a", "assertion list")])
def test_what_is_no_assertion_is_said(value, what):
    with pytest.raises(DataError, match=what):
        assertions.read(value, "rows.jsonl:3")


def test_as_json_reads_back():
    made = assertions.read([{"contains": "é"}, {"json_schema": SCHEMA}], "row")
    assert assertions.read(json.loads(assertions.as_json(made)), "row") == made
