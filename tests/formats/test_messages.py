from __future__ import annotations

import pytest

from lora_kit.formats import UnusableRow, messages


def row(*contents: tuple[str, object], **more) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in contents], **more}


def test_the_example_keeps_calls_tools_and_order():
    read = messages.to_conversation(messages.EXAMPLE, "a.jsonl:3")
    assert [message.role for message in read.messages] == ["system", "user", "assistant", "tool", "assistant"]
    call = read.messages[2].tool_calls[0]
    assert call == {"type": "function", "function": {"name": "temperature", "arguments": {"city": "Turin"}}}
    assert read.messages[2].content is None
    assert read.tools == tuple(messages.EXAMPLE["tools"])
    assert not read.trains_all


def test_content_is_not_changed():
    read = messages.to_conversation(row(("user", " hi\n"), ("assistant", "\tyes ")), "a.jsonl:1")
    assert [message.content for message in read.messages] == [" hi\n", "\tyes "]


def test_parts_are_joined_and_developer_is_system():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]
    read = messages.to_conversation(row(("developer", "d"), ("user", parts), ("assistant", "a")), "a.jsonl:1")
    assert read.messages[0].role == "system" and read.messages[1].content == "one two"


def test_keys_that_arrow_fills_with_none_do_not_matter():
    filled = {
        "messages": [
            {"role": "user", "content": "q", "tool_calls": None, "name": None, "tool_call_id": None},
            {"role": "assistant", "content": "a", "tool_calls": [], "name": None, "tool_call_id": None},
        ],
        "tools": None,
    }
    plain = row(("user", "q"), ("assistant", "a"))
    assert messages.to_conversation(filled, "x") == messages.to_conversation(plain, "x")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (row(), "no messages"),
        ({"messages": "hello"}, "no messages"),
        (row(("user", "q")), "no assistant turn"),
        (row(("user", ""), ("assistant", "a")), "empty content"),
        (row(("user", "q"), ("assistant", "  ")), "empty content"),
        (row(("user", "q"), ("bot", "a")), "bad role"),
        (row(("assistant", "a"), ("user", "q")), "roles out of order"),
        (row(("user", "q"), ("assistant", "a"), tools="[{"), "broken tools"),
    ],
)
def test_unusable_rows_say_why(record, reason):
    with pytest.raises(UnusableRow) as caught:
        messages.to_conversation(record, "a.jsonl:1")
    assert caught.value.reason == reason
