"""A well-formed call of an offered function, and everything that is not."""

import pytest

from lora_kit.metrics import tool_call_valid
from tests.metrics.checks import check_build

FUNCTIONS = [{"name": "get_weather", "parameters": {"type": "dict", "properties": {}, "required": []}},
             {"type": "function", "function": {"name": "book", "parameters": {}}}]


@pytest.mark.parametrize("text", [
    '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>',
    'Sure.\n<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>\n',
    '{"name": "get_weather", "arguments": {}}',
    '[{"name": "book", "arguments": {}}]',
    '{"name": "book", "parameters": {"a": 1}}',
])
def test_spellings_that_count(text):
    assert tool_call_valid.score(text, functions=FUNCTIONS) == (1.0, "")


@pytest.mark.parametrize("text, reason", [
    ("", "the answer is empty"),
    ("I would call get_weather.", "the answer is not JSON"),
    ('Sure: {"name": "book", "arguments": {}}', "the answer is not JSON"),
    ("<tool_call>{}", "the answer opens <tool_call> and does not close it"),
    ('<tool_call>{"name": "book", "arguments": ...}</tool_call>', "the answer is not JSON"),
    ("[]", "the answer is an empty list"),
    ("3", "the answer is JSON but no object"),
    ('{"arguments": {}}', "the answer has no function name"),
    ('{"name": "book"}', "the answer has no object of arguments"),
    ('{"name": "book", "arguments": "{}"}', "the answer has no object of arguments"),
    ('[{"name": "book", "arguments": {}}, {"name": "book", "arguments": {}}]', "2 calls, not one"),
    ('{"name": "fly", "arguments": {}}', "fly is not offered"),
    ("[" * 100_000, "the answer is not JSON"),
    ('{"name": "book", "arguments": {"a": ' + "9" * 5000 + "}}", "the answer is not JSON"),
])
def test_what_does_not_count_is_a_zero_with_a_reason(text, reason):
    assert tool_call_valid.score(text, functions=FUNCTIONS) == (0.0, reason)


def test_build():
    check_build(tool_call_valid, "tool_call_valid", ["x", '{"name": "book", "arguments": {}}'], [[], []],
                functions=[FUNCTIONS, FUNCTIONS])
