"""Devices that a recipe may be planned for, as their makers describe them, and the machine at hand.

Memory in decimal gigabytes as stated (drivers of NVIDIA show a little more); bandwidth of that memory; dense bf16
matrix rate with fp32 accumulation, without sparsity; None where the maker states none. Each row has its source. No
figure here was measured by us. Torch-free; reads what ``hardware.py`` reads; writes nothing.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from lora_kit import hardware
from lora_kit.errors import RecipeError

_NVIDIA = "https://www.nvidia.com/en-us/"
_AMPERE = "NVIDIA A100 datasheet (nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf)"
_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device: ``kind`` is ``cuda``, ``mps`` or ``cpu``."""

    name: str
    kind: str
    memory_bytes: float
    bandwidth_bytes_per_second: float | None = None
    bf16_flops_per_second: float | None = None
    has_bf16: bool = True
    source: str = ""
    at_hand: bool = False


def _gpu(name: str, gigabytes: float, bandwidth: float, teraflops: float | None, source: str, *,
         kind: str = "cuda", has_bf16: bool = True) -> Device:
    return Device(name=name, kind=kind, memory_bytes=gigabytes * 1e9, bandwidth_bytes_per_second=bandwidth * 1e9,
                  bf16_flops_per_second=None if teraflops is None else teraflops * 1e12, has_bf16=has_bf16,
                  source=source)


_APPLE = "https://support.apple.com/specs (tech specs of the Mac with this chip and memory)"
TABLE: dict[str, Device] = {device.name: device for device in (
    _gpu("t4", 16, 320, None, _NVIDIA + "data-center/tesla-t4/", has_bf16=False),
    _gpu("v100-32gb", 32, 900, None, _NVIDIA + "data-center/v100/", has_bf16=False),
    _gpu("a10", 24, 600, 125, _NVIDIA + "data-center/products/a10-gpu/"),
    _gpu("l4", 24, 300, 121, _NVIDIA + "data-center/l4/"),
    _gpu("l40s", 48, 864, 362, _NVIDIA + "data-center/l40s/"),
    _gpu("a100-40gb", 40, 1555, 312, _AMPERE),
    _gpu("a100-80gb", 80, 2039, 312, _AMPERE),
    _gpu("h100", 80, 3350, 989, _NVIDIA + "data-center/h100/ (SXM)"),
    _gpu("h200", 141, 4800, 989, _NVIDIA + "data-center/h200/ (SXM)"),
    _gpu("rtx3090", 24, 936, 71, _GA102),
    _gpu("rtx4060ti-16gb", 16, 288, 44, _ADA),
    _gpu("rtx4080", 16, 717, 97.5, _ADA),
    _gpu("rtx4090", 24, 1008, 165, _ADA),
    _gpu("rtx5090", 32, 1792, 209.5, "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A"),
    _gpu("mi300x", 192, 5300, 1307, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"),
    _gpu("m3-max-36gb", 36, 300, None, _APPLE, kind="mps", has_bf16=False),
    _gpu("m3-max-64gb", 64, 400, None, _APPLE, kind="mps", has_bf16=False),
    _gpu("m4-max-36gb", 36, 410, None, _APPLE, kind="mps", has_bf16=False),
    _gpu("m4-max-64gb", 64, 546, None, _APPLE, kind="mps", has_bf16=False),
    _gpu("m2-ultra-128gb", 128, 800, None, _APPLE, kind="mps", has_bf16=False),
)}
"""Name -> device. ``has_bf16``: whether training takes bf16 there (on Apple's GPUs it takes fp32)."""


def named(name: str | None) -> Device:
    """The device called ``name``; ``cpu`` and None are the machine at hand, None its GPU where nvidia-smi shows one.

    Raises:
        RecipeError: no such device.
    """
    if name is None or name == "cpu":
        gpus = hardware.gpus() if name is None else ()
        if gpus and gpus[0].memory_bytes:
            return Device(name=gpus[0].name, kind="cuda", memory_bytes=gpus[0].memory_bytes, at_hand=True,
                          source="nvidia-smi")
        total, available = hardware.memory_bytes()
        return Device(name="cpu", kind="cpu", memory_bytes=available, has_bf16=hardware.cpu_supports_bf16(),
                      source=f"free main memory now, of {total / 1e9:.1f} GB", at_hand=True)
    key = name.lower().replace(" ", "").replace("_", "-")
    if key in TABLE:
        return TABLE[key]
    near = difflib.get_close_matches(key, [*TABLE, "cpu"], n=1, cutoff=0.6)
    raise RecipeError(f"--on {name}", "is no device of the table",
                      (f"did you mean {near[0]}? " if near else "") + f"Known: cpu, {', '.join(TABLE)}")
