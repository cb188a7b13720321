from __future__ import annotations

import pytest

from lora_kit.formats import UnusableRow, prompt_completion


def test_strings_are_one_turn_each():
    read = prompt_completion.to_conversation({"prompt": "q", "completion": " a"}, "x")
    assert [(message.role, message.content) for message in read.messages] == [("user", "q"), ("assistant", " a")]


def test_lists_are_messages_in_a_row():
    record = {
        "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
        "tools": [{"name": "f"}],
    }
    read = prompt_completion.to_conversation(record, "x")
    assert [message.role for message in read.messages] == ["system", "user", "assistant"]
    assert read.tools == ({"type": "function", "function": {"name": "f"}},)
    assert prompt_completion.to_conversation({**record, "completion": "a"}, "x").messages == read.messages


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "completion": ""}, "empty content"),
        ({"prompt": "", "completion": "a"}, "empty content"),
        ({"prompt": "q", "completion": None}, "empty content"),
        ({"prompt": 3, "completion": "a"}, "content is not text"),
        ({"prompt": "q", "completion": [{"role": "user", "content": "a"}]}, "no assistant turn"),
        ({"prompt": "q", "completion": []}, "no assistant turn"),
        ({"prompt": [], "completion": "a"}, "roles out of order"),
    ],
)
def test_unusable_rows_say_why(record, reason):
    with pytest.raises(UnusableRow) as caught:
        prompt_completion.to_conversation(record, "x")
    assert caught.value.reason == reason
