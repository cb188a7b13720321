"""Signals that ask a training to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, which Slurm can send before its limit.

While there is something to lose, a signal is noted and the loop saves at the next point where it can. Before and
after that nothing is lost, and the signal ends what is under way at once. Either way the run can go on: exit code 75.

Reads and writes nothing. (torch inside functions.)
"""

from __future__ import annotations

import signal
from typing import Any

from lora_kit.errors import StoppedError
from lora_kit.events import Caution, tell

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class _StopNow(KeyboardInterrupt):
    """Raised out of whatever is under way; libraries that catch every Exception leave it alone."""


class StopSignals:
    """Handles SIGNALS in its block.

    Args:
        where: the run, for the error.
        todo: how to go on.
        said: what a signal has stopped, before :meth:`note_only`.
    """

    def __init__(self, where: str, todo: str, said: str = "stopped before the first step") -> None:
        self.where, self.todo, self.said = where, todo, said
        self.received = False
        self.at_once = True
        self.earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in SIGNALS:
            try:
                self.earlier[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: whoever called us handles signals
                break
        return self

    def __exit__(self, kind, error, trace) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)
        if isinstance(error, _StopNow):
            raise StoppedError(self.where, self.said, self.todo) from None

    def note_only(self) -> None:
        """From now on a signal is noted, for :meth:`requested`."""
        self.at_once = False

    def end_at_once(self, said: str) -> None:
        """From now on a signal ends what is under way, and the error says ``said``."""
        self.at_once, self.said = True, said

    def _note(self, number, frame) -> None:
        if self.at_once:
            raise _StopNow
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        tell(Caution(text="saving a checkpoint and stopping; a second Ctrl-C stops at once"))

    def requested(self, accelerator) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        if accelerator.num_processes == 1:
            return self.received
        import torch

        return bool(accelerator.reduce(torch.tensor(float(self.received), device=accelerator.device), "sum"))

    def requested_here(self, accelerator) -> bool:
        """Whether a lone process was asked to stop; False with several, which would have to agree on it."""
        return accelerator.num_processes == 1 and self.received
