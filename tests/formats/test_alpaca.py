from __future__ import annotations

import pytest

from lora_kit.formats import UnusableRow, alpaca


def contents(record: dict) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in alpaca.to_conversation(record, "x").messages]


def test_the_input_follows_the_instruction_after_an_empty_line():
    assert contents(alpaca.EXAMPLE) == [("user", "Name the capital of the country.\n\nPeru"), ("assistant", "Lima")]


@pytest.mark.parametrize("nothing", [{}, {"input": ""}, {"input": None}, {"input": "  "}])
def test_without_an_input_the_instruction_stands_alone(nothing):
    assert contents({"instruction": "i", "output": "o", **nothing}) == [("user", "i"), ("assistant", "o")]


def test_system_and_history_come_first():
    record = {"instruction": "i", "output": "o", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]}
    assert contents(record) == [
        ("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"),
        ("user", "i"), ("assistant", "o"),
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "i", "output": ""}, "empty content"),
        ({"instruction": "", "input": "", "output": "o"}, "empty content"),
        ({"instruction": "i", "output": 3}, "content is not text"),
        ({"instruction": "i", "output": "o", "history": [["q"]]}, "broken history"),
        ({"instruction": "i", "output": "o", "history": "q"}, "broken history"),
    ],
)
def test_unusable_rows_say_why(record, reason):
    with pytest.raises(UnusableRow) as caught:
        alpaca.to_conversation(record, "x")
    assert caught.value.reason == reason
