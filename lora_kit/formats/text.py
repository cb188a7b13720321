"""Plain text: one ``text`` key. Every token is trained on and no chat template is applied.

For continued training on documents, or on rows whose template was applied beforehand.
Rows with other keys that carry content (a label, an answer) are not detected as text:
they would be trained without it. Standard library only; reads and writes nothing.
"""

from __future__ import annotations

from typing import Any

from lora_kit.formats import UnusableRow, check_characters
from lora_kit.types import Conversation, Message

EXAMPLE: dict[str, Any] = {"text": "The quick brown fox jumps over the lazy dog."}

_ABOUT_THE_TEXT = {
    "id", "_id", "idx", "index", "meta", "metadata", "source", "url", "title", "author", "date", "timestamp",
    "added", "created", "file_path", "path", "dump", "lang", "language", "language_score", "license", "token_count",
}


def fits(record: dict[str, Any]) -> bool:
    """Whether ``text`` is a string and every other key only says where it is from."""
    return isinstance(record.get("text"), str) and set(record) - {"text"} <= _ABOUT_THE_TEXT


def to_conversation(record: dict[str, Any], origin: str) -> Conversation:
    """One message that holds the text, marked ``trains_all``."""
    text = record.get("text")
    if not isinstance(text, str) or not text.strip():
        raise UnusableRow("empty content")
    check_characters(text)
    return Conversation(messages=(Message(role="assistant", content=text),), origin=origin, trains_all=True)
