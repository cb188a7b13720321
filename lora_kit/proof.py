"""Proof on the model at hand that packing changes nothing, before the first step.

Two training rows, packed into one sequence, must give the loss and the gradients of the
adapter that they give one after the other. What rounding alone makes of a change of shape is
measured beside it, with the same rows padded into one batch: that floor sets the bound.

Reads and writes nothing; leaves gradients cleared and the model in training mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lora_kit import stopwatch
from lora_kit.loss import loss_sum
from lora_kit.packing import packed_batch_of
from lora_kit.tokens import batch_of
from lora_kit.types import Example

FLOOR_FACTOR = 10.0
"""Packed may differ from separate this many times as much as padded does."""
SMALLEST_BOUND = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Relative difference that is allowed where the floor is below it, by arithmetic."""
MAX_COST = 0.02
"""Share of the run's tokens that ``train.prove: auto`` may spend on the proof."""
_PASSES = 3


def rows_to_prove(lengths: Sequence[int], num_trained: Sequence[int]) -> list[int]:
    """Numbers of the two shortest rows that train something; fewer when there are not two."""
    usable = [row for row, trained in enumerate(num_trained) if trained]
    return sorted(usable, key=lambda row: (lengths[row], row))[:2]


def is_cheap(num_proof_tokens: int, num_run_tokens: int) -> bool:
    """Whether the proof costs at most MAX_COST of a run that trains on ``num_run_tokens`` tokens."""
    return _PASSES * num_proof_tokens <= MAX_COST * num_run_tokens


@stopwatch.part("packing proof")
def prove_packing(model, examples: Sequence[Example], accelerator, precision: str) -> dict[str, Any]:
    """Loss and gradients of ``examples`` packed, against one by one.

    Args:
        model: with its adapter, not wrapped for several processes; packing is in use on it.
        precision: fp32, bf16 or fp16: the arithmetic.

    Returns:
        ``loss_difference`` and ``gradient_difference`` (relative: of the sum, and of the norm of all gradients
        together), ``floor`` (the larger of the two for padded against one by one), ``bound`` and ``holds``.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    model.eval()  # without dropout: the draws of two shapes differ

    def measure(batches) -> tuple[float, list[Any]]:
        total = 0.0
        for batch in batches:
            with accelerator.autocast():
                loss = loss_sum(model, batch)
            loss.backward()
            total += float(loss.detach())
        gradients = [_local(parameter.grad) for parameter in trainable]
        for parameter in trainable:
            parameter.grad = None
        return total, gradients

    try:
        separate = measure(batch_of([example], 0, accelerator.device) for example in examples)
        padded = measure([batch_of(list(examples), 0, accelerator.device)])
        packed = measure([packed_batch_of(examples, accelerator.device)])
    finally:
        model.train(was_training)
    floor = max(_differences(separate, padded, accelerator))
    loss_difference, gradient_difference = _differences(separate, packed, accelerator)
    bound = max(FLOOR_FACTOR * floor, SMALLEST_BOUND[precision]) if math.isfinite(floor) else SMALLEST_BOUND[precision]
    return {"loss_difference": loss_difference, "gradient_difference": gradient_difference, "floor": floor,
            "bound": bound, "holds": max(loss_difference, gradient_difference) <= bound,
            "tokens": sum(len(example.tokens_T) for example in examples)}


def _local(gradient):
    """This process's part of a gradient; None where a parameter took no part."""
    if gradient is None:
        return None
    return gradient.to_local() if callable(getattr(gradient, "to_local", None)) else gradient


def _differences(right: tuple[float, list], other: tuple[float, list], accelerator) -> tuple[float, float]:
    """Relative differences of the losses and of the gradients, the latter over all processes."""
    import torch

    squares = torch.zeros(2, device=accelerator.device)
    for ours, theirs in zip(right[1], other[1], strict=True):
        if ours is None or theirs is None:
            assert ours is theirs, "a parameter took part in one and not in the other"
            continue
        squares += torch.stack([(ours - theirs).float().square().sum(), ours.float().square().sum()])
    apart, whole = accelerator.reduce(squares, "sum").tolist()
    of_loss = abs(right[0] - other[0]) / max(abs(right[0]), 1e-30)
    return of_loss, math.sqrt(apart / whole) if whole else float(apart > 0)
