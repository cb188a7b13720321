from __future__ import annotations

from collections import Counter

import pytest

from lora_kit.formats import UnusableRow, detect, two_party
from lora_kit.records import read_records


def log(*said: tuple[object, str]) -> dict:
    return {"messages": [{"sender": sender, "text": text} for sender, text in said]}


def contents(record: dict) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in two_party.to_conversation(record, "x").messages]


def test_messages_in_a_row_are_one_turn_and_the_second_speaker_is_the_assistant():
    assert contents(two_party.EXAMPLE) == [
        ("user", "Hello!\nDid you see the match?"), ("assistant", "I did. What a goal."),
    ]


def test_runs_read_like_a_flat_log():
    flat = log(("b", "1"), ("b", "2"), ("a", "3"), ("b", "4"), ("a", "5"))
    items = flat["messages"]
    assert contents({"messages": [items[:2], items[2:3], items[3:4], items[4:]]}) == contents(flat)
    assert contents(flat)[0] == ("user", "1\n2")


def test_the_last_turn_of_the_user_is_dropped():
    assert contents(log((1, "a"), (2, "b"), (1, "c"), (1, "d"))) == [("user", "a"), ("assistant", "b")]


def test_empty_messages_are_skipped():
    assert contents(log((1, "a"), (2, ""), (1, "b"), (2, "c"))) == [("user", "a\nb"), ("assistant", "c")]


@pytest.mark.parametrize("items", ["messages", "turns", "conversation", "dialogue", "dialog", "utterances"])
@pytest.mark.parametrize("speaker", ["sender", "speaker", "from", "author", "user", "name"])
@pytest.mark.parametrize("text", ["text", "content", "message", "body", "utterance"])
def test_usual_names_of_keys(items, speaker, text):
    record = {items: [{speaker: "u1", text: "q"}, {speaker: "u2", text: "a"}]}
    assert detect([record], "x") == "two_party"
    assert contents(record) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (log((1, "a"), (1, "b")), "single speaker"),
        (log((1, "a"), (2, "b"), (3, "c")), "more than two speakers"),
        (log((1, "a"), (2, " ")), "empty content"),
        (log(), "no messages"),
        ({}, "no messages"),
        ({"messages": [{"text": "a"}, {"sender": 1, "text": "b"}]}, "message without speaker"),
        ({"messages": [{"sender": 1, "text": ["a"]}]}, "content is not text"),
        ({"messages": ["a", "b"]}, "message is not an object"),
        (log(("assistant", "a"), ("user", "b"), ("assistant", "c")), "first speaker is the assistant"),
    ],
)
def test_unusable_rows_say_why(record, reason):
    with pytest.raises(UnusableRow) as caught:
        two_party.to_conversation(record, "x")
    assert caught.value.reason == reason


@pytest.mark.archives
def test_the_chitchat_dataset(archive_member):
    path = archive_member("pypi:chitchat-dataset==0.9.0/chitchat_dataset/dataset.json")
    rows = list(read_records(path, "dataset.json"))
    assert detect((row for _, row in rows), "dataset.json") == "two_party"
    counts: Counter[str] = Counter()
    for origin, row in rows:
        try:
            read = two_party.to_conversation(row, origin)
        except UnusableRow as error:
            counts[error.reason] += 1
            continue
        counts["usable"] += 1
        assert [message.role for message in read.messages] == ["user", "assistant"] * (len(read.messages) // 2)
    # 4,018 have two senders; of one of them the second sent only an empty message.
    assert counts == {"usable": 4017, "single speaker": 3150, "empty content": 1}
