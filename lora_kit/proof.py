"""Proof on the model at hand that packing and the fast path change nothing, before the first step.

Two training rows, packed into one sequence and through the fast path, must give the loss and the
gradients of the adapter that plain peft gives one row after the other. What rounding alone makes of a
change of shape is measured beside it, with the same rows padded into one batch: that floor sets the bound.
Adapters start with a B of zero, which would hide half of an error: while a proof is made, it is drawn.

Reads and writes nothing; leaves parameters as they were, gradients cleared and the model in training mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lora_kit.loss import loss_sum
from lora_kit.packing import packed_batch_of
from lora_kit.tokens import batch_of
from lora_kit.types import Batch, Example

FLOOR_FACTOR = 10.0
"""Loss and gradients may differ from plain ones this many times as much as padding makes them differ."""
SMALLEST_BOUND = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Relative difference that is allowed where the floor is below it, by arithmetic."""
MAX_COST = 0.02
"""Share of the run's tokens that ``train.prove: auto`` may spend on the proof."""
_PASSES = 4
_DRAWN_STD = 0.02


def rows_to_prove(lengths: Sequence[int], num_trained: Sequence[int]) -> list[int]:
    """Numbers of the two shortest rows that train something; fewer when there are not two."""
    usable = [row for row, trained in enumerate(num_trained) if trained]
    return sorted(usable, key=lambda row: (lengths[row], row))[:2]


def is_cheap(num_proof_tokens: int, num_run_tokens: int) -> bool:
    """Whether the proof costs at most MAX_COST of a run that trains on ``num_run_tokens`` tokens."""
    return _PASSES * num_proof_tokens <= MAX_COST * num_run_tokens


class Reference:
    """Loss and gradients of ``examples`` one by one, and how far padding moves them.

    Args:
        model: with its adapter, without the fast path, not wrapped for several processes; packing may be in use.
        precision: fp32, bf16 or fp16: the arithmetic.
    """

    def __init__(self, model, examples: Sequence[Example], accelerator, precision: str) -> None:
        self.model, self.examples, self.accelerator = model, list(examples), accelerator
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.separate = self._measure(self.batches(packed=False))
        padded = self._measure([batch_of(self.examples, 0, accelerator.device)])
        self.floor = max(_differences(self.separate, padded, accelerator))
        smallest = SMALLEST_BOUND[precision]
        self.bound = max(FLOOR_FACTOR * self.floor, smallest) if math.isfinite(self.floor) else smallest

    def batches(self, packed: bool, share_prefix: bool = False) -> list[Batch]:
        """The examples as the loop would pass them: in one packed sequence, or one by one."""
        device = self.accelerator.device
        if packed:
            return [packed_batch_of(self.examples, device, share_prefix)]
        return [batch_of([example], 0, device) for example in self.examples]

    def compare(self, packed: bool, share_prefix: bool = False) -> dict[str, Any]:
        """The model as it is now against the reference.

        Returns:
            ``loss_difference`` and ``gradient_difference`` (relative: of the sum, and of the norm of all gradients
            together), ``floor`` (the larger of the two for padded against one by one), ``bound``, ``holds`` and
            ``tokens``.
        """
        measured = self._measure(self.batches(packed, share_prefix))
        loss, gradient = _differences(self.separate, measured, self.accelerator)
        return {"loss_difference": loss, "gradient_difference": gradient, "floor": self.floor, "bound": self.bound,
                "holds": max(loss, gradient) <= self.bound,
                "tokens": sum(len(example.tokens_T) for example in self.examples)}

    def _measure(self, batches: Sequence[Batch]) -> tuple[float, list[Any]]:
        was_training = self.model.training
        self.model.eval()  # without dropout: the draws of two shapes differ
        total = 0.0
        try:
            with _drawn(self.trainable):
                for batch in batches:
                    with self.accelerator.autocast():
                        loss = loss_sum(self.model, batch)
                    loss.backward()
                    total += float(loss.detach())
            return total, [_local(parameter.grad) for parameter in self.trainable]
        finally:
            for parameter in self.trainable:
                parameter.grad = None
            self.model.train(was_training)


def prove_packing(model, examples: Sequence[Example], accelerator, precision: str) -> dict[str, Any]:
    """Loss and gradients of ``examples`` packed, against one by one: see :class:`Reference`, also for what is given."""
    return Reference(model, examples, accelerator, precision).compare(packed=True)


@contextmanager
def _drawn(parameters: Sequence[Any]) -> Iterator[None]:
    """Matrices that are all zero hold small numbers inside, the same ones each time, and zero again after."""
    import torch

    zero = [local for local in (_local(parameter.detach()) for parameter in parameters)
            if local.dim() == 2 and not local.any()]
    generator = torch.Generator().manual_seed(0)
    for local in zero:
        local.copy_(torch.randn(local.shape, generator=generator) * _DRAWN_STD)
    try:
        yield
    finally:
        for local in zero:
            local.zero_()


def _local(tensor):
    """This process's part of a tensor; None where a parameter took no part."""
    if tensor is None:
        return None
    return tensor.to_local() if callable(getattr(tensor, "to_local", None)) else tensor


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
