"""ShareGPT's format: ``conversations`` of ``from`` and ``value``, or of ``role`` and ``content``.

Speakers are human (user), gpt (assistant, chatgpt, bot, model), system, function_call and
observation (tool, function_response). A ``function_call`` holds JSON with name and arguments; it
joins the assistant turn before it. ``system`` and ``tools`` may stand beside the turns,
``tools`` as JSON too. A gpt turn with ``"weight": 0`` is not trained on. Standard library only;
reads and writes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lora_kit.formats import UnusableRow, conversation, message_of, text_of, tool_calls_of, tools_of, weight_of
from lora_kit.types import Conversation, Message

EXAMPLE: dict[str, Any] = {
    "conversations": [
        {"from": "human", "value": "How warm is it in Turin?"},
        {"from": "function_call", "value": "{\"name\": \"temperature\", \"arguments\": {\"city\": \"Turin\"}}"},
        {"from": "observation", "value": "17.5"},
        {"from": "gpt", "value": "It is 17.5 degrees in Turin."},
    ],
    "system": "You have a thermometer.",
    "tools": "[{\"name\": \"temperature\", \"description\": \"The temperature of a city, in degrees Celsius.\", "
    "\"parameters\": {\"type\": \"object\", \"properties\": {\"city\": {\"type\": \"string\"}}}}]",
}

_SPEAKERS = {
    "human": "user", "user": "user",
    "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "system": "system",
    "observation": "tool", "tool": "tool", "function_response": "tool",
}


def fits(record: dict[str, Any]) -> bool:
    """Whether ``conversations`` is a list of objects with from and value, or with a role."""
    turns = record.get("conversations")
    return isinstance(turns, list) and all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn and "value" in turn) for turn in turns
    )


def to_conversation(record: dict[str, Any], origin: str) -> Conversation:
    """The turns in order, ``system`` before them when the turns have none of their own."""
    turns = record.get("conversations")
    if not isinstance(turns, list):
        raise UnusableRow("no messages")
    messages: list[Message] = []
    for turn in turns:
        message = _message_of(turn, origin)
        if message.tool_calls and message.content is None and messages and messages[-1].role == "assistant":
            if messages[-1].weight != message.weight:
                raise UnusableRow("a turn and its call have different weights")
            messages[-1] = replace(messages[-1], tool_calls=messages[-1].tool_calls + message.tool_calls)
        else:
            messages.append(message)
    system = record.get("system")
    if isinstance(system, str) and system.strip() and not any(message.role == "system" for message in messages):
        messages.insert(0, Message(role="system", content=system))
    return conversation(messages, origin=origin, tools=tools_of(record.get("tools")))


def _message_of(turn: Any, origin: str) -> Message:
    if not isinstance(turn, dict):
        raise UnusableRow("message is not an object")
    speaker = turn.get("from")
    if speaker is None:
        return message_of(turn, origin)
    weight = weight_of(turn.get("weight"), origin)
    if speaker == "function_call":
        calls = tool_calls_of(turn.get("value"))
        if not calls:
            raise UnusableRow("broken tool call")
        return Message(role="assistant", tool_calls=calls, weight=weight)
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise UnusableRow("bad role")
    return Message(role=_SPEAKERS[speaker], content=text_of(turn.get("value")), weight=weight)
