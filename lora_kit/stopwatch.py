"""Where a start goes: the seconds before the first training step, in parts, by wall and by CPU.

A command begins a stopwatch with its process (:func:`begin_with_process`), and whoever does something that a user
waits for says so with :func:`part`; the train stage stops it before its first step and writes down what it found.
Without a command (the Python API) the stage begins one of its own. Each second belongs to one part: a part inside
another is taken from it. Torch-free; reads /proc; writes nothing.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.units import seconds_text

IMPORTS = "imports"
BESIDE = ("matrix ceiling", "proof", "held-out loss", "compile", "rehearsal")
"""Parts that are told beside the start: they measure, prove or prepare, and can be switched off."""
_OTHER = "other"


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of one part: ``seconds`` by the clock, ``cpu_seconds`` of all threads, user and system together."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(seconds=self.seconds + other.seconds, cpu_seconds=self.cpu_seconds + other.cpu_seconds)

    def __sub__(self, other: Spent) -> Spent:
        return Spent(seconds=self.seconds - other.seconds, cpu_seconds=self.cpu_seconds - other.cpu_seconds)


class Stopwatch:
    """Counts the time since it was made, each moment for the part that is under way.

    Args:
        of_process: what the process took before this counts as imports.
    """

    def __init__(self, *, of_process: bool = False) -> None:
        self.of_process = of_process
        self.parts: dict[str, Spent] = {}
        self._under_way = [_OTHER]
        self._last = _now()
        if of_process:
            self.parts[IMPORTS] = Spent(seconds=_process_age_seconds(), cpu_seconds=self._last.cpu_seconds)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the block for ``name``; what is counted for a part inside it is not."""
        self._count()
        self._under_way.append(name)
        try:
            yield
        finally:
            self._count()
            self._under_way.pop()

    def read(self) -> dict[str, Spent]:
        """What each part has taken by now, in the order in which they began."""
        self._count()
        return dict(self.parts)

    def _count(self) -> None:
        now, name = _now(), self._under_way[-1]
        self.parts[name] = self.parts.get(name, Spent()) + (now - self._last)
        self._last = now


def _now() -> Spent:
    times = os.times()
    return Spent(seconds=time.perf_counter(),
                 cpu_seconds=time.process_time() + times.children_user + times.children_system)


def _process_age_seconds() -> float:
    """Seconds since this process was started."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        import psutil

        return time.time() - psutil.Process().create_time()


_running: Stopwatch | None = None


def begin_with_process() -> None:
    """Let the parts of this process be counted, its first moment included, until :func:`end`."""
    global _running
    _running = Stopwatch(of_process=True)


def is_of_process() -> bool:
    """Whether this process is a command's own, and its first start is still under way."""
    return _running is not None and _running.of_process


@contextmanager
def one_start() -> Iterator[Stopwatch]:
    """The stopwatch that is running, or a new one, which ends with the block, if not with :func:`end`."""
    global _running
    _running = _running or Stopwatch()
    try:
        yield _running
    finally:
        _running = None


def end() -> dict[str, Any] | None:
    """End the start: what it took, as JSON values; None where none was counted.

    Returns:
        ``seconds`` and ``cpu_seconds`` without what is told BESIDE; ``parts``, name to both; and ``of_process``: False
        where the process had done other things before, so that only the stage's own part is known.
    """
    global _running
    if _running is None:
        return None
    of_process, parts, _running = _running.of_process, _running.read(), None
    total = sum((spent for name, spent in parts.items() if name not in BESIDE), Spent())
    return {"seconds": total.seconds, "cpu_seconds": total.cpu_seconds, "of_process": of_process,
            "parts": {name: {"seconds": spent.seconds, "cpu_seconds": spent.cpu_seconds}
                      for name, spent in parts.items()}}


@contextmanager
def part(name: str) -> Iterator[None]:
    """Count the block for ``name`` where a stopwatch is running."""
    if _running is None:
        yield
    else:
        with _running.part(name):
            yield


@contextmanager
def importing() -> Iterator[None]:
    """Import libraries in the block: counted as imports, and without collections.

    torch, transformers and peft make over a million objects that stay. Left alone, Python's collector walks through
    them again and again while they come: a sixth of the CPU time of the imports (measured: 6.5 s with, 5.3 s without).
    """
    was_on = gc.isenabled()
    with part(IMPORTS):
        gc.disable()
        try:
            yield
        finally:
            if was_on:
                if not gc.get_freeze_count():  # what another froze stays frozen
                    # Both together move what is there to the oldest generation without walking through it.
                    gc.freeze()
                    gc.unfreeze()
                gc.enable()


def start_text(start: dict[str, Any]) -> str:
    """One line for people: ``6.9 s of CPU (7.2 s): imports 4.1 s, ...; beside it proof 12 s``, parts in CPU."""
    def listed(names) -> str:
        return ", ".join(f"{name} {seconds_text(start['parts'][name]['cpu_seconds'])}" for name in names)

    beside = [name for name in start["parts"] if name in BESIDE]
    text = f"{seconds_text(start['cpu_seconds'])} of CPU ({seconds_text(start['seconds'])}): "
    text += listed(name for name in start["parts"] if name not in BESIDE)
    return text + (f"; beside it {listed(beside)}" if beside else "")
