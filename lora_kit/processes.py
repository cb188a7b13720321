"""The processes that train together: their accelerator, their precision, their share of the batch, their shards.

Reads the environment that a launcher sets; writes nothing. (torch and accelerate inside functions.)
"""

from __future__ import annotations

import os
from typing import Any

from lora_kit import stopwatch
from lora_kit.errors import RecipeError
from lora_kit.recipe import TrainSection


def num_launched() -> int:
    """Processes that a launcher says it has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def make_accelerator(settings: TrainSection, **options: Any):
    import torch

    with stopwatch.importing():
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

    precision = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}.get(settings.precision)
    if precision is None:
        precision = "bf16" if _has_bf16() else "no"
    if precision == "fp16" and not torch.accelerator.is_available():
        raise RecipeError("train.precision", "fp16 trains only on a GPU", "set bf16, fp32 or auto")
    expected = num_launched()
    # accelerate keeps the precision of the first training of a process for all later ones; ours have their own.
    AcceleratorState._reset_state()
    # Without cpu=True accelerate 1.15 forms no group of processes on a machine without a GPU.
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available(), **options)
    if accelerator.num_processes != expected:
        # Measured: `accelerate launch --cpu --num_processes 2` silently runs one process.
        raise RecipeError("launch", f"{expected} processes were launched and {accelerator.num_processes} take part",
                          "launch with torchrun --nproc_per_node, or accelerate launch --multi_gpu")
    return accelerator


def _has_bf16() -> bool:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return False
    from lora_kit.hardware import cpu_supports_bf16

    return cpu_supports_bf16()


def precision_of(accelerator) -> str:
    return {"bf16": "bf16", "fp16": "fp16"}.get(accelerator.mixed_precision, "fp32")


def shard_model(net) -> None:
    """FSDP2 over all processes: each decoder layer, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for module in net.get_base_model().model.layers:
        fully_shard(module)
    fully_shard(net)
