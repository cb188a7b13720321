"""A model's answer read as tool calls.

Four spellings count, since models are trained on different ones::

    <tool_call>{"name": "f", "arguments": {...}}</tool_call>     text around the tags is ignored
    {"name": "f", "arguments": {...}}                            the whole answer
    [{"name": "f", "arguments": {...}}]                          the whole answer
    any of these with "parameters" for "arguments"

Everything else is malformed. Torch-free. Reads and writes nothing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_TAGGED = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]


class Malformed(ValueError):
    """The text is no tool call; the message says why, in words that fit after "the answer"."""


def parse_calls(text: str) -> list[ToolCall]:
    """The calls in ``text``, at least one, in order.

    Raises:
        Malformed: the text is none of the spellings above.
    """
    tagged = _TAGGED.findall(text)
    if tagged:
        return [call for part in tagged for call in _calls_of(part)]
    if not text.strip():
        raise Malformed("is empty")
    if "<tool_call>" in text:
        raise Malformed("opens <tool_call> and does not close it")
    return _calls_of(text)


def _calls_of(text: str) -> list[ToolCall]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise Malformed("is not JSON") from None
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise Malformed("is an empty list")
    return [_call_of(entry) for entry in entries]


def _call_of(entry: Any) -> ToolCall:
    if not isinstance(entry, dict):
        raise Malformed("is JSON but no object")
    if not isinstance(entry.get("name"), str):
        raise Malformed("has no function name")
    arguments = entry.get("arguments", entry.get("parameters"))
    if not isinstance(arguments, dict):
        raise Malformed("has no object of arguments")
    return ToolCall(name=entry["name"], arguments=arguments)
