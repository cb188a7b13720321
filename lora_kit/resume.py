"""Where a training stands, into a checkpoint and back.

Reads and writes ``train/checkpoints/``. (torch inside functions.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kit import checkpoint
from lora_kit.events import Note, tell
from lora_kit.training_log import TrainingLog


def _adapter_tensors(named) -> dict[str, Any]:
    return {name: checkpoint.whole(parameter.detach()) for name, parameter in named}


def save(work: Path, state: dict, named, optimizer, log: TrainingLog, accelerator) -> Path | None:
    adapter = _adapter_tensors(named)
    moments = checkpoint.optimizer_tensors(optimizer.optimizer)
    if not accelerator.is_main_process:
        return None
    return checkpoint.save(work / "checkpoints", state["step"], {"adapter": adapter, "optimizer": moments},
                           {**state, "random": checkpoint.random_state(), "metrics_offsets": log.sealed_offsets()})


def go_on_from(work: Path, state: dict, named, optimizer, log: TrainingLog) -> dict:
    found = checkpoint.newest(work / "checkpoints")
    if found is None:
        log.truncate({})
        return state
    import torch

    saved = checkpoint.load_tensors(found, "adapter")
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(checkpoint.like(saved[name], parameter))
    checkpoint.load_optimizer_tensors(optimizer.optimizer, checkpoint.load_tensors(found, "optimizer"))
    checkpoint.restore_random_state(found.state["random"])
    log.truncate(found.state["metrics_offsets"])
    tell(Note(text=f"going on from {found.folder.name}"))
    return {key: value for key, value in found.state.items() if key not in ("random", "metrics_offsets")}
