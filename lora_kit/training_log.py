"""What a training writes down step by step: ``metrics.jsonl`` and ``timings.jsonl``.

Writes both in ``train/``; the main process alone.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lora_kit import stopwatch, trackers
from lora_kit.events import Note, tell
from lora_kit.rundir import writing


class TrainingLog:
    """metrics.jsonl (what was computed) and timings.jsonl (what the clock said), written by the main process."""

    def __init__(self, work: Path, accelerator) -> None:
        self.paths = {"metrics": work / "metrics.jsonl", "timings": work / "timings.jsonl"}
        self.writes, self.accelerator = accelerator.is_main_process, accelerator

    def truncate(self, offsets: dict[str, int]) -> None:
        """Cut each file to the length that the checkpoint sealed (0 without one) and go on from there."""
        for name, path in self.paths.items() if self.writes else ():
            with writing(path), open(path, "ab") as file:
                file.truncate(offsets.get(name, 0))

    def metrics(self, values: dict[str, Any]) -> None:
        self._write("metrics", values)
        if self.accelerator.trackers:
            numbers, step = trackers.told(values)
            self.accelerator.log(numbers, step=step)

    def timings(self, values: dict[str, Any]) -> None:
        self._write("timings", values)

    def start_up(self, took: dict[str, Any] | None, step: int) -> dict[str, Any] | None:
        """Write down and tell what came before the first step after ``step``; hands it on."""
        if took is not None:
            for name, spent in took["parts"].items():
                self.timings({"part": name, "before_step": step + 1, **spent})
            tell(Note(text=f"ready to train after {stopwatch.start_text(took)}"))
        return took

    def _write(self, name: str, values: dict[str, Any]) -> None:
        if self.writes:
            with writing(self.paths[name]), open(self.paths[name], "ab") as file:
                file.write((json.dumps(values) + "\n").encode())

    def sealed_offsets(self) -> dict[str, int]:
        """Length of each file, after its lines have reached the disk."""
        offsets = {}
        for name, path in self.paths.items():
            with writing(path), open(path, "ab") as file:
                os.fsync(file.fileno())
                offsets[name] = file.tell()
        return offsets
