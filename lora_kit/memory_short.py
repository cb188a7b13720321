"""What training says when memory runs out: the plan's own forecast, and the first changes that would make it fit.

Reads the run's data and its base's config.json; writes nothing. Torch-free.
"""

from __future__ import annotations

from pathlib import Path

from lora_kit import plan
from lora_kit.devices import Device, named
from lora_kit.errors import LoraKitError, MachineError
from lora_kit.rundir import Run
from lora_kit.units import bytes_text

_WITHOUT_FORECAST = "lower train.pack_tokens or data.max_tokens, or set train.gradient_checkpointing: true"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out: Python's, CUDA's, or that of torch's CPU allocator."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or isinstance(error, RuntimeError) and "allocate memory" in str(error))


def explained(run: Run, device: Device | None = None) -> MachineError:
    """The error to raise when training of ``run`` ran out of memory.

    Args:
        device: where it ran; None: the machine at hand.
    """
    try:
        device = device or named(None)
        base_dir = Path(run.resolved["base"]["artifact"]["path"])
        found = plan.advice_for(run.recipe, base_dir, run.stage_dir("data"), device)
    except (LoraKitError, OSError, KeyError):
        return MachineError("train", "out of memory", _WITHOUT_FORECAST)
    forecast, advice = found
    what = (f"out of memory; the plan forecasts {bytes_text(forecast.total)} at {forecast.moment}, and "
            f"{device.name} has {bytes_text(device.memory_bytes)}")
    if not advice.steps:
        return MachineError("train", what, _WITHOUT_FORECAST)
    changes = ", ".join(f"--set {change.key}={change.text.partition(': ')[2].replace(' ', '')}"
                        for change in advice.changes)
    return MachineError("train", what, f"{changes} comes to {bytes_text(advice.steps[-1][1])}; lora-kit plan "
                        f"{run.recipe_file.path} tells what that costs")
