"""OpenAI's chat format: ``messages`` with roles, and ``tools`` where there are any.

The format of OpenAI's fine-tuning files and of most chat datasets on the hub. Content may
be a list of text parts, arguments of a tool call an object or a JSON string of one. An
assistant's message with ``"weight": 0`` is not trained on.
Standard library only; reads and writes nothing.
"""

from __future__ import annotations

from typing import Any

from lora_kit.formats import UnusableRow, conversation, message_of, tools_of
from lora_kit.types import Conversation

EXAMPLE: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "You answer with a tool call."},
        {"role": "user", "content": "How warm is it in Turin?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "temperature", "arguments": "{\"city\": \"Turin\"}"}}
            ],
        },
        {"role": "tool", "content": "17.5"},
        {"role": "assistant", "content": "It is 17.5 degrees in Turin."},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "temperature",
                "description": "The temperature of a city, in degrees Celsius.",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            },
        }
    ],
}


def fits(record: dict[str, Any]) -> bool:
    """Whether ``messages`` is a list of objects with a role; an empty list is one too."""
    messages = record.get("messages")
    return isinstance(messages, list) and all(isinstance(item, dict) and "role" in item for item in messages)


def to_conversation(record: dict[str, Any], origin: str) -> Conversation:
    """The row as it stands; see ``formats.message_of`` and ``formats.conversation`` for what is unusable."""
    messages = record.get("messages")
    if not isinstance(messages, list):
        raise UnusableRow("no messages")
    read = [message_of(raw, origin) for raw in messages]
    return conversation(read, origin=origin, tools=tools_of(record.get("tools")))
