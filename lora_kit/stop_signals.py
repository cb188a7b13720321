"""Signals that ask a training to save and stop.

Reads and writes nothing. (torch inside functions.)
"""

from __future__ import annotations

import signal
from typing import Any

from lora_kit.events import Caution, tell


class StopSignals:
    """SIGINT and SIGTERM ask for a stop after the step; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = False
        self.earlier: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.earlier[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: whoever called us handles signals
                break
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        tell(Caution(text="stopping after this step; a second Ctrl-C stops at once"))

    def requested(self, accelerator) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        if accelerator.num_processes == 1:
            return self.received
        import torch

        return bool(accelerator.reduce(torch.tensor(float(self.received), device=accelerator.device), "sum"))
