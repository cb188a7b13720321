"""The optimizer over the adapter: AdamW in fp32 or with 8-bit moments, and LoRA+'s two learning rates.

Each group of parameters says in ``lr_ratio`` how many times the schedule's learning rate it
learns with, so that the training loop sets rates without knowing what the groups are.
Reads and writes nothing. (torch and bitsandbytes inside functions.)
"""

from __future__ import annotations

from typing import Any

from lora_kit.events import Caution, tell
from lora_kit.recipe import TrainSection


def make_optimizer(named: list[tuple[str, Any]], settings: TrainSection, device_type: str):
    """An optimizer over ``named``, the (name, parameter) pairs that are trained.

    With ``lora_plus_ratio`` above 1 the B factors, and with them DoRA's magnitudes, are a group of their own
    (Hayou et al. 2024, arXiv:2402.12354; the grouping of peft's create_loraplus_optimizer, except that an adapted
    embedding learns with the same two rates).

    Args:
        device_type: torch's name of the device that the parameters are on. Only CUDA pages moments out.
    """
    import torch

    if settings.lora_plus_ratio == 1.0:
        groups = [{"params": [parameter for _, parameter in named], "lr_ratio": 1.0}]
    else:
        fast = [parameter for name, parameter in named if _is_second(name)]
        slow = [parameter for name, parameter in named if not _is_second(name)]
        groups = [{"params": slow, "lr_ratio": 1.0}, {"params": fast, "lr_ratio": settings.lora_plus_ratio}]
        groups = [group for group in groups if group["params"]]
    options = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options)
    from bitsandbytes import optim

    paged = settings.optimizer == "paged_adamw_8bit"
    if paged and device_type != "cuda":
        tell(Caution(text=f"train.optimizer: paged_adamw_8bit pages on a CUDA device only; on {device_type} its "
                          "moments stay where they are (adamw_8bit)"))
        paged = False
    return (optim.PagedAdamW8bit if paged else optim.AdamW8bit)(groups, **options)


def set_learning_rate(optimizer, rate: float) -> None:
    """Set each group's learning rate to its ``lr_ratio`` times ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def _is_second(name: str) -> bool:
    return any(part in name for part in ("lora_B", "lora_embedding_B", "lora_magnitude_vector"))
