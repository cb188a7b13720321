"""What a stage tells while it works.

A stage calls :func:`tell`; whoever listens renders it (the command line in the
terminal, a notebook as it likes, a test in a list). Nothing below the command
line prints. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class StageStarted:
    stage: str
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class StageFinished:
    stage: str
    seconds: float
    summary: str = ""


@dataclass(frozen=True, kw_only=True)
class StageSkipped:
    stage: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """``done`` of ``total`` units; ``fields`` are short texts to show beside them.

    ``table`` is what is known so far, to be seen at a terminal until all is done and told as a table of its own.
    """

    stage: str
    done: int
    total: int
    unit: str = "step"
    fields: dict[str, str] = field(default_factory=dict)
    table: Table | None = None


@dataclass(frozen=True, kw_only=True)
class Note:
    text: str


@dataclass(frozen=True, kw_only=True)
class Caution:
    """Something that the user should know and that does not stop the work."""

    text: str


Event = StageStarted | StageFinished | StageSkipped | Progress | Note | Caution | Table

_listeners: list[Callable[[Event], None]] = []


def tell(event: Event) -> None:
    """Hand ``event`` to every listener, in the order in which they came."""
    for listener in list(_listeners):
        listener(event)


@contextmanager
def listening(listener: Callable[[Event], None]) -> Iterator[None]:
    """Call ``listener`` with every event that is told inside the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
