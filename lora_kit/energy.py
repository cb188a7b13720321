"""Energy that the machine says it has used: counters of its processors and of its NVIDIA GPUs.

Processors: RAPL, as Linux shows it under /sys/class/powercap (Intel, and AMD since kernel 5.8): each package, and its
main memory where that is counted apart. Since 2020 only root may read it on most systems. GPUs: the driver's own
counter (nvmlDeviceGetTotalEnergyConsumption, from Volta on), of those that CUDA_VISIBLE_DEVICES names by number, else
of all. Where there is no counter there is no figure: nothing is estimated from a nominal power. What is counted is
all that ran there, not one process. Torch-free; reads /sys and the driver's library, writes nothing.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


class Meter:
    """Joules since it was made."""

    def __init__(self, powercap: Path = _POWERCAP, nvml: Callable[[], ctypes.CDLL | None] | None = None) -> None:
        self._zones = [zone for zone in sorted(powercap.glob("*:*")) if _counts(zone)]
        self._start = {zone: _microjoules(zone) for zone in self._zones}
        self._gpus = _Gpus((nvml or _nvml)())
        self._gpu_start = self._gpus.joules()

    def joules(self) -> dict[str, float | None]:
        """``cpu`` and ``gpu``: joules since the start, None where the machine does not say.

        A counter of a processor that has come to its end and begun anew is seen once; a package at 200 W takes about
        twenty minutes for that.
        """
        used, now = [], self._gpus.joules()
        for zone in self._zones:
            before, after = self._start[zone], _microjoules(zone)
            if before is None or after is None:
                return {"cpu": None, "gpu": _difference(self._gpu_start, now)}
            used.append(after - before if after >= before else after - before + (_range(zone) or 0))
        return {"cpu": sum(used) / 1e6 if used else None, "gpu": _difference(self._gpu_start, now)}


def per_token(joules: dict[str, float | None], tokens: int) -> float | None:
    """Joules of all counters over ``tokens``; None without a counter."""
    known = [value for value in joules.values() if value is not None]
    return sum(known) / tokens if known and tokens else None


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _counts(zone: Path) -> bool:
    """Whether a zone is a package, or main memory; cores and graphics are parts of a package.

    The same counters stand there twice where both the intel-rapl and the intel-rapl-mmio driver run.
    """
    with suppress(OSError):
        name = (zone / "name").read_text().strip()
        return not zone.name.startswith("intel-rapl-mmio") and (name.startswith("package") or name == "dram") \
            and _microjoules(zone) is not None
    return False


def _microjoules(zone: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int((zone / "energy_uj").read_text())
    return None


def _range(zone: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int((zone / "max_energy_range_uj").read_text())
    return None


def _nvml() -> ctypes.CDLL | None:
    with suppress(OSError):
        return ctypes.CDLL("libnvidia-ml.so.1")
    return None


class _Gpus:
    """The GPUs' counters; none where the library, a GPU or its counter is missing."""

    def __init__(self, nvml) -> None:
        self._nvml, self._handles = nvml, []
        if nvml is None or nvml.nvmlInit_v2() != 0:
            return
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return
        for index in _visible(count.value):
            handle = ctypes.c_void_p()
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
                self._handles.append(handle)

    def joules(self) -> float | None:
        """All of them together since the driver was loaded."""
        total = 0.0
        for handle in self._handles:
            millijoules = ctypes.c_ulonglong()
            if self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)) != 0:
                return None
            total += millijoules.value / 1e3
        return total if self._handles else None


def _visible(count: int) -> list[int]:
    named = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if all(part.isdigit() for part in named):
        return [int(part) for part in named if int(part) < count]
    return list(range(count))
