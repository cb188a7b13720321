from __future__ import annotations

import json

import pytest

from lora_kit.formats import UnusableRow, sharegpt


def row(*turns: tuple[str, str], **more) -> dict:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns], **more}


def test_the_example_with_its_call_system_and_tools():
    read = sharegpt.to_conversation(sharegpt.EXAMPLE, "a.json#0")
    assert [message.role for message in read.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert read.messages[2].tool_calls[0]["function"] == {"name": "temperature", "arguments": {"city": "Turin"}}
    assert read.tools[0]["type"] == "function" and read.tools[0]["function"]["name"] == "temperature"


def test_speakers_and_a_system_turn():
    read = sharegpt.to_conversation(row(("system", "s"), ("human", "q"), ("gpt", "a"), system="other"), "x")
    assert [(message.role, message.content) for message in read.messages] == [
        ("system", "s"), ("user", "q"), ("assistant", "a"),
    ]


def test_an_empty_system_key_is_none():
    read = sharegpt.to_conversation(row(("human", "q"), ("gpt", "a"), system=""), "x")
    assert [message.role for message in read.messages] == ["user", "assistant"]


def test_calls_join_the_turn_before_them():
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    read = sharegpt.to_conversation(
        row(("human", "q"), ("gpt", "Let me see."), ("function_call", call), ("function_call", call),
            ("observation", "1"), ("tool", "2"), ("gpt", "a")), "x",
    )
    assert [message.role for message in read.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert read.messages[1].content == "Let me see." and len(read.messages[1].tool_calls) == 2


def test_role_and_content_in_place_of_from_and_value():
    record = {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    assert sharegpt.fits(record)
    assert sharegpt.to_conversation(record, "x") == sharegpt.to_conversation(row(("human", "q"), ("gpt", "a")), "x")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (row(), "no messages"),
        (row(("human", "q")), "no assistant turn"),
        (row(("gpt", "a"), ("human", "q")), "roles out of order"),
        (row(("human", "q"), ("narrator", "a")), "bad role"),
        (row(("human", "q"), ("function_call", "f(1)")), "broken tool call"),
        (row(("human", "q"), ("function_call", "")), "broken tool call"),
        (row(("human", ""), ("gpt", "a")), "empty content"),
    ],
)
def test_unusable_rows_say_why(record, reason):
    with pytest.raises(UnusableRow) as caught:
        sharegpt.to_conversation(record, "x")
    assert caught.value.reason == reason


def test_a_turn_of_weight_0_is_marked():
    record = row(("human", "q"), ("gpt", "a"), ("human", "r"), ("gpt", "b"))
    record["conversations"][1]["weight"] = 0
    assert [message.weight for message in sharegpt.to_conversation(record, "x").messages] == [1, 0, 1, 1]


def test_a_call_of_another_weight_than_the_turn_it_joins_is_unusable():
    record = row(("human", "q"), ("gpt", "Let me see."), ("function_call", '{"name": "f", "arguments": {}}'))
    record["conversations"][2]["weight"] = 0
    with pytest.raises(UnusableRow, match="a turn and its call have different weights"):
        sharegpt.to_conversation(record, "x")
    record["conversations"][1]["weight"] = 0
    assert sharegpt.to_conversation(record, "x").messages[-1].weight == 0
