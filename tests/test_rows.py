"""Rows of a source, by the named or the detected format, and conversations as lines."""

import json
from dataclasses import dataclass

import pytest

from lora_kit import events, rows
from lora_kit.errors import DataError
from lora_kit.sources import Resolved
from lora_kit.types import Conversation, Message


@dataclass
class Source:
    source: str
    format: str | None = None
    split: str | None = None
    subset: str | None = None


def read(path, **fields):
    resolved = Resolved(reference=path.name, path=path, shown=path.name)
    return list(rows.rows_of(Source(source=path.name, **fields), resolved))


def test_detection_keeps_every_row(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path.write_text("".join(json.dumps({"messages": turns, "n": n}) + "\n" for n in range(50)))
    told = []
    with events.listening(told.append):
        found = read(path)
    assert [record["n"] for _, record, _ in found] == list(range(50))
    assert [event.text for event in told] == ["a.jsonl: format messages"]
    origin, record, to_conversation = found[7]
    assert origin == "a.jsonl:8" and to_conversation(record, origin).messages[1].content == "a"


def test_a_named_format_reads_its_own_files(tmp_path):
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / "q.json").write_text('{"id": "1", "question": [[{"role": "user", "content": "hi"}]], "function": []}\n')
    (tmp_path / "possible_answer" / "q.json").write_text('{"id": "1", "ground_truth": [{"f": {}}]}\n')
    [(_, record, _)] = read(tmp_path / "q.json", format="bfcl")
    assert record["ground_truth"] == [{"f": {}}]


def test_rows_of_no_format_are_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    with pytest.raises(DataError, match="fit no format"):
        read(tmp_path / "a.jsonl")


def test_a_conversation_survives_its_line(tmp_path):
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    conversation = Conversation(
        messages=(Message(role="user", content="é\n"), Message(role="assistant", tool_calls=(call,), weight=0),
                  Message(role="tool", content="3", name="f", tool_call_id="7")),
        tools=({"type": "function", "function": {"name": "f"}},), origin="a:1")
    assert rows.from_json(rows.to_json(conversation)) == conversation
    (tmp_path / "held_out.jsonl").write_text(rows.to_json(conversation) + "\n")
    assert rows.read_held_out(tmp_path) == [conversation]
    assert rows.read_held_out(tmp_path / "none") == []
