"""The machine at hand, described without torch.

What the lock file, the benchmark and the report say about where a figure was measured,
and what memory and disk there is before a stage starts. Counts cores and memory as this
process may use them: affinity and container limits included.
Reads /proc, /sys and the answer of nvidia-smi; writes nothing.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One accelerator as its driver names it."""

    name: str
    memory_bytes: int | None
    driver: str | None = None


def describe() -> dict[str, Any]:
    """The machine that this process runs on, as JSON values; takes well under a second.

    Returns:
        platform, cpu, cores, cpu_bf16, memory_bytes, available_memory_bytes (as of now; the rest does
        not change), gpus (a list of name, memory_bytes, driver), python.
    """
    total, available = memory_bytes()
    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "cpu_bf16": cpu_supports_bf16(),
        "memory_bytes": total,
        "available_memory_bytes": available,
        "gpus": [asdict(gpu) for gpu in gpus()],
        "python": platform.python_version(),
    }


def cpu_model(cpuinfo: str | None = None) -> str:
    """The processor's name as it calls itself; the architecture when it does not.

    Args:
        cpuinfo: text of /proc/cpuinfo; read when None.
    """
    text = _read(Path("/proc/cpuinfo")) if cpuinfo is None else cpuinfo
    for key in ("model name", "Model", "Hardware"):
        for line in text.splitlines():
            name, colon, value = line.partition(":")
            if colon and name.strip() == key and value.strip():
                return " ".join(value.split())
    if sys.platform == "darwin":
        return _output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine()


def cpu_flags(cpuinfo: str | None = None) -> frozenset[str]:
    """Instruction sets that the first processor of /proc/cpuinfo lists; empty where there is no such file."""
    text = _read(Path("/proc/cpuinfo")) if cpuinfo is None else cpuinfo
    for line in text.splitlines():
        name, colon, value = line.partition(":")
        if colon and name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def cpu_supports_bf16(cpuinfo: str | None = None) -> bool:
    """Whether the CPU multiplies bf16 matrices faster than fp32 ones: amx_bf16 on x86, bf16 on arm.

    Without a matrix unit bf16 is slower than fp32 on a CPU, also where avx512_bf16 is listed: a Xeon that had it
    without amx_bf16 took twice as long for a product in bf16 as in fp32 (torch 2.13, 2048³). Where the flags
    cannot be read (macOS, Windows) the answer is False.
    """
    return bool(cpu_flags(cpuinfo) & {"amx_bf16", "bf16", "svebf16"})


def usable_cores() -> int:
    """CPU cores that this process may use: affinity, then the container's quota, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(_CGROUP / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def memory_bytes() -> tuple[int, int]:
    """Total and available main memory, as far as this process's container allows."""
    import psutil

    memory = psutil.virtual_memory()
    total, available = memory.total, memory.available
    limit, used = _read(_CGROUP / "memory.max").strip(), _read(_CGROUP / "memory.current").strip()
    if limit.isdigit() and int(limit) < total:
        total = int(limit)
        available = min(available, max(0, total - int(used))) if used.isdigit() else min(available, total)
    return total, available


def free_disk_bytes(path: Path) -> int:
    """Bytes that an unprivileged process can still write below ``path``, which need not exist yet."""
    path = Path(path).absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


@cache
def gpus() -> tuple[Gpu, ...]:
    """NVIDIA GPUs that nvidia-smi lists; empty without it. (Apple's and AMD's are known to torch only.)"""
    answer = _output_of("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    return parse_nvidia_smi(answer)


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """GPUs from nvidia-smi's ``name, MiB, driver`` lines; other lines are passed over."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and cells[0]:
            mebibytes = int(cells[1]) * 2**20 if cells[1].isdigit() else None
            found.append(Gpu(name=cells[0], memory_bytes=mebibytes, driver=cells[2] or None))
    return tuple(found)


def measure_matrix_gflops(*, size: int = 768, seconds: float = 0.25) -> float:
    """GFLOP/s of fp32 matrix products of ``size`` on the CPU right now: a yardstick, not a speed of the kit.

    Taken beside a measurement it shows whether the machine was as fast as for the one it is
    compared with. 2·size³ operations a product; the mean over ``seconds`` after one warm-up, so
    that a neighbour who takes the core for part of the time is seen.
    """
    import numpy as np

    left, right = np.ones((2, size, size), dtype=np.float32)
    out = np.empty_like(left)
    np.matmul(left, right, out=out)
    products, spent, started = 0, 0.0, time.perf_counter()
    while spent < seconds:
        np.matmul(left, right, out=out)
        products += 1
        spent = time.perf_counter() - started
    return 2 * size**3 * products / spent / 1e9


def measure_read_bandwidth(threads: int, *, num_bytes: int = 2**28, seconds: float = 0.5) -> float:
    """Bytes a second that ``threads`` threads read from main memory together: the best of several passes.

    Each takes its share of an array of ``num_bytes``, far more than any cache holds, and finds its largest byte, which
    takes less time than to fetch it. Writing a token reads all weights once, so this is the limit of decoding.
    """
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    parts = np.array_split(np.ones(num_bytes, dtype=np.int8), threads)
    best, ends = 0.0, time.perf_counter() + seconds
    with ThreadPoolExecutor(threads) as pool:
        while True:
            started = time.perf_counter()
            list(pool.map(np.max, parts))  # numpy lets go of Python's lock
            now = time.perf_counter()
            best = max(best, num_bytes / (now - started))
            if now > ends:
                return best


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output_of(*command: str) -> str:
    """What ``command`` prints; empty when it is missing, fails or takes over ten seconds."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
