"""Alpaca's format: ``instruction``, ``input`` and ``output``, with ``system`` and ``history`` where given.

The user turn is the instruction, then, after an empty line, the input when there is one.
``history`` is a list of earlier [question, answer] pairs. The model's own chat template is
used, not Alpaca's "### Instruction". Standard library only; reads and writes nothing.
"""

from __future__ import annotations

from typing import Any

from lora_kit.formats import UnusableRow, conversation
from lora_kit.types import Conversation, Message

EXAMPLE: dict[str, Any] = {
    "instruction": "Name the capital of the country.",
    "input": "Peru",
    "output": "Lima",
}


def fits(record: dict[str, Any]) -> bool:
    """Whether ``instruction`` and ``output`` are there."""
    return isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str)


def to_conversation(record: dict[str, Any], origin: str) -> Conversation:
    """System, history, then the instruction with its input and the output."""
    messages = []
    system = _text(record, "system")
    if system.strip():
        messages.append(Message(role="system", content=system))
    history = record.get("history") or []
    if not isinstance(history, list):
        raise UnusableRow("broken history")
    for pair in history:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise UnusableRow("broken history")
        messages += [Message(role="user", content=pair[0]), Message(role="assistant", content=pair[1])]
    instruction, extra = _text(record, "instruction"), _text(record, "input")
    question = "\n\n".join(part for part in (instruction, extra) if part.strip())
    messages += [
        Message(role="user", content=question), Message(role="assistant", content=_text(record, "output")),
    ]
    return conversation(messages, origin=origin)


def _text(record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise UnusableRow("content is not text")
    return value or ""
