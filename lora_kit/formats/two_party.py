"""Any log of two speakers with ids: the first is the user, the second the assistant.

Messages stand under ``messages``, ``turns``, ``conversation``, ``dialogue``, ``dialog`` or
``utterances``, flat or in runs (a list of lists), each an object with a speaker and a
text under one of the usual keys (below). Messages of one speaker in a row are one turn,
joined by newlines; empty ones are skipped; a last turn of the user is dropped, since
nothing answers it. Standard library only; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lora_kit.formats import UnusableRow, conversation
from lora_kit.types import Conversation, Message

EXAMPLE: dict[str, Any] = {
    "messages": [
        {"sender": "a17", "text": "Hello!"},
        {"sender": "a17", "text": "Did you see the match?"},
        {"sender": "b02", "text": "I did. What a goal."},
    ]
}

_LISTS = ("messages", "turns", "conversation", "dialogue", "dialog", "utterances")
_SPEAKERS = ("sender", "speaker", "from", "author", "user", "name")
_TEXTS = ("text", "content", "message", "body", "utterance")
_ASSISTANTS = {"assistant", "bot", "chatbot", "gpt", "model", "agent"}


def fits(record: dict[str, Any]) -> bool:
    """Whether one of the lists holds objects with a speaker and a text, and no roles."""
    return any(_is_log(record.get(key)) for key in _LISTS)


def _is_log(items: Any) -> bool:
    flat = list(_flat(items)) if isinstance(items, list) else []
    return bool(flat) and all(
        isinstance(item, dict) and "role" not in item
        and any(key in item for key in _SPEAKERS) and any(key in item for key in _TEXTS)
        for item in flat
    )


def _flat(items: list[Any]) -> Iterator[Any]:
    for item in items:
        yield from item if isinstance(item, list) else [item]


def to_conversation(record: dict[str, Any], origin: str) -> Conversation:
    """The log as alternating turns.

    Raises:
        UnusableRow: no messages, single speaker, more than two speakers, message without
            speaker, content is not text, first speaker is the assistant (by its name).
    """
    log = next((record[key] for key in _LISTS if isinstance(record.get(key), list)), [])
    sent = [_speaker_and_text(item) for item in _flat(log)]
    if not sent:
        raise UnusableRow("no messages")
    said = [(speaker, text) for speaker, text in sent if text.strip()]
    speakers = list(dict.fromkeys(speaker for speaker, _ in said))
    if len({speaker for speaker, _ in sent}) == 2 and len(speakers) < 2:
        raise UnusableRow("empty content")
    if len(speakers) != 2:
        raise UnusableRow("single speaker" if len(speakers) == 1 else "more than two speakers")
    if speakers[0].lower() in _ASSISTANTS:
        # Read by order alone, a log that says who is the assistant would train on the user's words.
        raise UnusableRow("first speaker is the assistant")
    turns: list[tuple[str, list[str]]] = []
    for speaker, text in said:
        if not turns or turns[-1][0] != speaker:
            turns.append((speaker, []))
        turns[-1][1].append(text)
    if turns[-1][0] == speakers[0]:
        turns.pop()
    return conversation(
        [
            Message(role="user" if speaker == speakers[0] else "assistant", content="\n".join(texts))
            for speaker, texts in turns
        ],
        origin=origin,
    )


def _speaker_and_text(item: Any) -> tuple[str, str]:
    if not isinstance(item, dict):
        raise UnusableRow("message is not an object")
    speaker = next((item[key] for key in _SPEAKERS if item.get(key) is not None), None)
    if not isinstance(speaker, (str, int)):
        raise UnusableRow("message without speaker")
    text = next((item[key] for key in _TEXTS if item.get(key) is not None), "")
    if not isinstance(text, str):
        raise UnusableRow("content is not text")
    return str(speaker), text
