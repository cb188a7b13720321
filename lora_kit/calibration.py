"""What was measured of machines: rates of training and inference, the floor of a process, what the allocator keeps.

One file in the cache, an entry for each machine (processor, cores, GPUs, torch) and precision. ``lora-kit plan
--calibrate`` writes rates and floor, ``lora-kit plan --accuracy`` the allocator's share; the plan reads them and says
from when they are. Torch-free. Reads and writes ``calibration.json`` in the cache.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path

from lora_kit import hardware, sources
from lora_kit.outlook import Rates
from lora_kit.rundir import writing


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What was measured of one machine at one precision; None where it was not."""

    train_flops_per_second: float | None = None
    read_flops_per_second: float | None = None
    write_bytes_per_second: float | None = None
    floor_bytes: float | None = None
    kept_share: float | None = None
    kept_from: int = 0
    """Runs that ``kept_share`` is the median of."""
    date: str = ""
    model: str = ""

    @property
    def rates(self) -> Rates | None:
        """The rates; None when one of them was not measured."""
        values = (self.train_flops_per_second, self.read_flops_per_second, self.write_bytes_per_second)
        if None in values:
            return None
        return Rates(train_flops_per_second=values[0], read_flops_per_second=values[1],
                     write_bytes_per_second=values[2], source=f"measured here on {self.date}, with {self.model}")


def path() -> Path:
    """The file."""
    return sources.cache_dir() / "calibration.json"


def machine() -> str:
    """The machine at hand, by what decides its speed."""
    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "none"
    gpus = "+".join(gpu.name for gpu in hardware.gpus())
    return " | ".join([hardware.cpu_model(), f"{hardware.usable_cores()} cores", gpus or "no GPU", f"torch {torch}"])


def load(precision: str) -> Calibration:
    """What is known of the machine at hand; an empty Calibration where nothing is, or the file is not whole."""
    try:
        return Calibration(**_read()[machine()][precision])
    except (KeyError, TypeError):
        return Calibration()


def store(precision: str, **values: float | str | None) -> Calibration:
    """Lay ``values`` over what is known of the machine at hand; returns the whole."""
    found = replace(load(precision), **values, date=time.strftime("%Y-%m-%d"))
    whole = _read()
    whole.setdefault(machine(), {})[precision] = asdict(found)
    target = path()
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        os.replace(part, target)
    return found


def _read() -> dict:
    try:
        found = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
