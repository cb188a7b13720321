"""TRL's prompt-completion format: ``prompt`` and ``completion``, as strings or as lists of messages.

Strings are one user and one assistant turn and go through the chat template like every
other format. Of lists the messages are read as in format ``messages``; assistant turns
inside the prompt are trained on as well. Standard library only; reads and writes nothing.
"""

from __future__ import annotations

from typing import Any

from lora_kit.formats import UnusableRow, conversation, message_of, tools_of
from lora_kit.types import Conversation, Message

EXAMPLE: dict[str, Any] = {
    "prompt": "Count the lines of notes.txt in the shell.",
    "completion": "wc -l notes.txt",
}


def fits(record: dict[str, Any]) -> bool:
    """Whether ``prompt`` and ``completion`` are both there, each a string or a list."""
    return all(isinstance(record.get(key), (str, list)) for key in ("prompt", "completion"))


def to_conversation(record: dict[str, Any], origin: str) -> Conversation:
    """The prompt's messages, then the completion's, which must end in an assistant turn."""
    messages = [*_messages(record.get("prompt"), "user", origin),
                *_messages(record.get("completion"), "assistant", origin)]
    if messages and messages[-1].role != "assistant":
        raise UnusableRow("no assistant turn")
    return conversation(messages, origin=origin, tools=tools_of(record.get("tools")))


def _messages(value: Any, role: str, origin: str) -> list[Message]:
    if isinstance(value, list):
        return [message_of(raw, origin) for raw in value]
    if value is not None and not isinstance(value, str):
        raise UnusableRow("content is not text")
    return [Message(role=role, content=value)]
