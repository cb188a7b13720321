"""Conversations on disk while data is prepared: written once in order, read back by number.

Preparing asks for rows more than once (what to hold out, what to leave out, each copy of a
weighted source), and data may be larger than memory. So each source is read once, and
its usable conversations lie in one scratch file, which has no name and goes with the process.
Of each row 16 bytes stay in memory: where it lies, and a hash of what it says.

Torch-free. Writes the scratch file into the folder it is given.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from array import array
from dataclasses import replace
from pathlib import Path

import numpy

from lora_kit.rows import from_json, to_json
from lora_kit.types import Conversation


class Spool:
    """A growing file of conversations, each with the whole that it was cut from, if it was; use as a context."""

    def __init__(self, folder: Path) -> None:
        self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed in __exit__
        self.ends = array("q", [0])
        self.keys = array("Q")

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __len__(self) -> int:
        return len(self.keys)

    def append(self, conversation: Conversation, whole: Conversation | None = None) -> int:
        """Write ``conversation`` (and what it was cut from); returns its number."""
        text = to_json(conversation) + ("\n" + to_json(whole) if whole else "")
        line = text.encode("utf-8", "surrogatepass")
        self.file.write(line)
        self.ends.append(self.ends[-1] + len(line))
        self.keys.append(content_key(conversation))
        return len(self) - 1

    def read(self, number: int) -> tuple[Conversation, Conversation | None]:
        """The conversation of this number, and what it was cut from or None."""
        start, end = self.ends[number], self.ends[number + 1]
        self.file.flush()
        line = os.pread(self.file.fileno(), end - start, start).decode("utf-8", "surrogatepass")
        text, _, whole = line.partition("\n")
        return from_json(text), from_json(whole) if whole else None

    def keys_of(self, numbers: numpy.ndarray) -> numpy.ndarray:
        """Content keys (uint64) of the rows ``numbers``."""
        return numpy.array(self.keys, numpy.uint64)[numbers]


def content_key(conversation: Conversation) -> int:
    """64 bits of a hash over what a conversation says (messages, tools), without where it comes from."""
    # Without where it comes from and what of it is trained on.
    messages = tuple(replace(message, weight=1) for message in conversation.messages)
    text = to_json(replace(conversation, origin="", messages=messages)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
