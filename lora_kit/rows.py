"""Rows of a source as conversations, and conversations as lines of JSON.

Which reader a source needs follows from its reference and its format; the format is
detected when none is named. Stages that read rows meet here. Torch-free.
Reads the source; writes only ``datasets``' cache.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from lora_kit import formats, records, sources
from lora_kit.errors import DataError
from lora_kit.events import Note, tell
from lora_kit.sources import Resolved
from lora_kit.types import Conversation, Message

Read = Callable[[dict[str, Any], str], Conversation]


class Source(Protocol):
    """What is read of a recipe's or a task's source."""

    source: str
    format: str | None
    split: str | None
    subset: str | None


def rows_of(source: Source, resolved: Resolved) -> Iterator[tuple[str, dict[str, Any], Read]]:
    """``(origin, record, to_conversation)`` of each row, by the source's own format or the detected one.

    Args:
        resolved: what ``prepared.resolve_source`` made of ``source``.

    Raises:
        DataError: the file is missing, empty or broken, or its rows fit no format.
        RecipeError: there is no such format.
    """
    reader = formats.load(source.format) if source.format else None
    cache_dir = sources.cache_dir() / "datasets"
    if source.source.startswith("python:"):
        reader = reader or formats.load("python_docstrings")
        rows = reader.records_of(str(resolved.path))
    elif source.source.startswith("hub:"):
        rows = records.read_hub_records(str(resolved.path), revision=resolved.revision, subset=source.subset,
                                        split=source.split or "train", cache_dir=cache_dir)
    elif getattr(reader, "records", None):
        rows = reader.records(resolved.path)
    else:
        rows = records.read_records(resolved.path, resolved.shown, cache_dir=cache_dir)
    if reader is None:
        rows = iter(rows)
        first = list(itertools.islice(rows, formats.DETECTION_ROWS))
        name = formats.detect([record for _, record in first], resolved.shown)
        tell(Note(text=f"{resolved.shown}: format {name}"))
        reader, rows = formats.load(name), itertools.chain(first, rows)
        if getattr(reader, "records", None):
            # Such a format reads files beside this one, and they belong into the cache's key.
            raise DataError(source.source, f"has rows of format {name}, which reads more than one file",
                            f"write format: {name} beside the source")
    for origin, record in rows:
        yield origin, record, reader.to_conversation


def to_json(conversation: Conversation) -> str:
    """``conversation`` as one line of JSON."""
    return json.dumps({
        "messages": [message.as_dict() | ({} if message.weight else {"weight": 0})
                     for message in conversation.messages], "tools": list(conversation.tools),
        "origin": conversation.origin, "trains_all": conversation.trains_all,
    }, ensure_ascii=False)


def from_json(line: str) -> Conversation:
    """The conversation that :func:`to_json` wrote."""
    fields = json.loads(line)
    messages = tuple(Message(**{**message, "tool_calls": tuple(message.get("tool_calls", ()))})
                     for message in fields["messages"])
    return Conversation(messages=messages, tools=tuple(fields["tools"]), origin=fields["origin"],
                        trains_all=fields.get("trains_all", False))


def read_held_out(data_dir: Path) -> list[Conversation]:
    """The conversations of ``held_out.jsonl`` in the data stage's folder, in order; none when there is no file."""
    path = data_dir / "held_out.jsonl"
    if not path.exists():
        return []
    with open(path, encoding="utf-8") as file:
        return [from_json(line) for line in file if line.strip()]
