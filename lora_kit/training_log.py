"""What a training writes down step by step: ``metrics.jsonl`` and ``timings.jsonl``.

``metrics.jsonl`` says what was computed, and is the same to the byte however often the run was stopped;
``timings.jsonl`` says what the clock said. Both are only appended to. A checkpoint seals how long each was, and what
the metrics said until then; a run that goes on cuts off what came later and computes it again.

Writes both in ``train/``; the main process alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from lora_kit import stopwatch, trackers
from lora_kit.errors import RefusedError
from lora_kit.events import Note, tell
from lora_kit.rundir import writing

_BLOCK_BYTES = 1 << 20


class TrainingLog:
    """metrics.jsonl (what was computed) and timings.jsonl (what the clock said), written by the main process."""

    def __init__(self, work: Path, accelerator) -> None:
        self.paths = {"metrics": work / "metrics.jsonl", "timings": work / "timings.jsonl"}
        self.writes, self.accelerator = accelerator.is_main_process, accelerator
        self._said = hashlib.sha256()

    def check(self, sealed: dict[str, Any]) -> None:
        """RefusedError when metrics.jsonl no longer begins with what was ``sealed``."""
        if self._hash_of(sealed["metrics"]).hexdigest() != sealed["metrics_sha256"]:
            raise RefusedError(str(self.paths["metrics"]), "is not what the checkpoint's run had written by then")

    def truncate(self, sealed: dict[str, Any]) -> None:
        """Cut each file to the length that the checkpoint sealed (0 without one) and go on from there."""
        for name, path in self.paths.items() if self.writes else ():
            with writing(path), open(path, "ab") as file:
                file.truncate(min(file.tell(), sealed.get(name, 0)))  # never longer: that would add zeros
        self._said = self._hash_of(sealed.get("metrics", 0))

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

    def sealed(self) -> dict[str, Any]:
        """Length of each file, after its lines have reached the disk, and the SHA-256 of the metrics."""
        found: dict[str, Any] = {}
        for name, path in self.paths.items():
            with writing(path), open(path, "ab") as file:
                os.fsync(file.fileno())
                found[name] = file.tell()
        return {**found, "metrics_sha256": self._said.hexdigest()}

    def _write(self, name: str, values: dict[str, Any]) -> None:
        if self.writes:
            line = (json.dumps(values) + "\n").encode()
            with writing(self.paths[name]), open(self.paths[name], "ab") as file:
                file.write(line)
            if name == "metrics":
                self._said.update(line)

    def _hash_of(self, num_bytes: int):
        """SHA-256 of the metrics' first ``num_bytes``, or of all where there are fewer."""
        digest, path = hashlib.sha256(), self.paths["metrics"]
        if path.exists():
            with open(path, "rb") as file:
                while num_bytes > 0 and (block := file.read(min(_BLOCK_BYTES, num_bytes))):
                    digest.update(block)
                    num_bytes -= len(block)
        return digest
