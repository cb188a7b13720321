"""Proof on the model at hand that rows teach the same however they share forward passes, before the first step.

Two training rows that train unlike numbers of tokens, as one batch in four ways, compared by their loss and by
the gradients of the adapter. *Separate* is the reference: a pass each, every loss divided by the tokens of both.

* *Accumulated*: the same passes through the code that the loop learns with (``loss.accumulate``). It must give what
  separate does, whatever the arithmetic: a divisor that is wrong shows here.
* *Whole*: padded into one pass. It must agree but for rounding: where it does not, the loss is no sum, or the model
  mixes the rows of a batch.
* *Packed* into one sequence may differ ten times as much as whole does, which rounds for another shape too.

Reads and writes nothing; leaves gradients cleared and the model in training mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lora_kit.loss import accumulate, loss_sum
from lora_kit.packing import packed_batch_of
from lora_kit.tokens import batch_of
from lora_kit.types import Example

FLOOR_FACTOR = 10.0
"""Packed may differ from separate this many times as much as whole does."""
SMALLEST_BOUND = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}
"""Relative difference that is allowed where the floor is below it, by arithmetic."""
LARGEST_BOUND = 0.3
"""Relative difference that is never allowed: rows that read their neighbour differ by 0.38 to 0.68, losses that are
means and no sums by 0.5 (gradients of SmolLM2-135M before the first step)."""
ACCUMULATION_BOUND = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}
"""Relative difference of accumulated and separate that is allowed, by arithmetic: the same passes, so none on a CPU."""
LARGEST_FLOOR = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}
"""Relative difference of whole and separate that rounding explains, by arithmetic: SmolLM2-135M shows 1e-6 in fp32
and 1e-2 in bf16. A base in 8 bits, whose rounding depends on all rows of a pass, shows up to 0.25, and has
LARGEST_BOUND."""
MAX_COST = 0.02
"""Share of the run's tokens that ``train.prove: auto`` may spend on the proof."""
_PASSES = 4
_TIMES_AS_MANY = 2


def rows_to_prove(lengths: Sequence[int], num_trained: Sequence[int]) -> list[int]:
    """Numbers of two short rows that train something; fewer when there are not two.

    The shortest, and the shortest of those that train at least twice as many tokens or at most half: rows that
    train as many weigh the same however a batch is divided. Where there is none, the second shortest.
    """
    usable = sorted((row for row, trained in enumerate(num_trained) if trained), key=lambda row: (lengths[row], row))
    if len(usable) < 2:
        return usable
    first, *others = usable
    unlike = (row for row in others if max(num_trained[row], num_trained[first])
              >= _TIMES_AS_MANY * min(num_trained[row], num_trained[first]))
    return [first, next(unlike, others[0])]


def is_cheap(num_proof_tokens: int, num_run_tokens: int) -> bool:
    """Whether the proof costs at most MAX_COST of a run that trains on ``num_run_tokens`` tokens."""
    return _PASSES * num_proof_tokens <= MAX_COST * num_run_tokens


def prove_batches(model, examples: Sequence[Example], accelerator, precision: str, *, packed: bool) -> dict[str, Any]:
    """Loss and gradients of ``examples`` in separate passes, against those of the same rows as the loop takes them.

    Args:
        model: with its adapter, not wrapped for several processes; packing is in use on it where ``packed``.
        precision: fp32, bf16 or fp16: the arithmetic.
        packed: whether to compare a packed pass too.

    Returns:
        Relative differences from separate (the larger of that of the loss and that of the norm of all gradients
        together), each with its bound and whether it is within: ``accumulation``, ``accumulation_bound``,
        ``accumulates``; of whole ``floor``, ``floor_bound``, ``adds_up``; and where ``packed``, ``loss_difference``,
        ``gradient_difference``, ``bound``, ``holds``.
    """
    import torch

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_trained = sum(int(example.loss_mask_T[1:].sum()) for example in examples)
    was_training = model.training
    model.eval()  # without dropout: the draws of two shapes differ

    def separately(batches) -> float:
        total = 0.0
        for batch in batches:
            with accelerator.autocast():
                summed = loss_sum(model, batch)
            (summed * accelerator.num_processes / num_trained).backward()
            total += float(summed.detach())
        return total

    def as_the_loop_does(batches) -> float:
        # Without the loss scaling of fp16, which a first step may have to lower.
        return float(accumulate(model, batches, num_trained, accelerator, backward=torch.Tensor.backward))

    def measure(learn, batches) -> tuple[float, list[Any]]:
        total = learn(batches)
        gradients = [_local(parameter.grad) for parameter in trainable]
        for parameter in trainable:
            parameter.grad = None
        return total, gradients

    device = accelerator.device
    try:
        separate = measure(separately, [batch_of([example], 0, device) for example in examples])
        accumulated = measure(as_the_loop_does, [batch_of([example], 0, device) for example in examples])
        whole = measure(as_the_loop_does, [batch_of(list(examples), 0, device)])
        together = measure(as_the_loop_does, [packed_batch_of(examples, device)]) if packed else None
    finally:
        model.train(was_training)
    rounds_by_batch = any(type(module).__name__ == "Linear8bitLt" for module in model.modules())
    accumulation, floor = (max(_differences(separate, other, accelerator)) for other in (accumulated, whole))
    accumulation_bound = ACCUMULATION_BOUND[precision]
    floor_bound = LARGEST_BOUND if rounds_by_batch else LARGEST_FLOOR[precision]
    found = {"accumulation": accumulation, "accumulation_bound": accumulation_bound,
             "accumulates": accumulation <= accumulation_bound,
             "floor": floor, "floor_bound": floor_bound, "adds_up": floor <= floor_bound,
             "tokens": sum(len(example.tokens_T) for example in examples)}
    if together is not None:
        loss_difference, gradient_difference = _differences(separate, together, accelerator)
        bound = max(min(FLOOR_FACTOR * floor, LARGEST_BOUND), SMALLEST_BOUND[precision])
        found |= {"loss_difference": loss_difference, "gradient_difference": gradient_difference, "bound": bound,
                  "holds": loss_difference <= bound and gradient_difference <= bound}
    return found


def _local(gradient):
    """This process's part of a gradient; None where a parameter took no part."""
    if gradient is None:
        return None
    return gradient.to_local() if callable(getattr(gradient, "to_local", None)) else gradient


def _differences(right: tuple[float, list], other: tuple[float, list], accelerator) -> tuple[float, float]:
    """Relative differences of the losses and of the gradients, the latter over all processes; infinite for NaN."""
    import torch

    squares = torch.zeros(2, device=accelerator.device)
    for ours, theirs in zip(right[1], other[1], strict=True):
        if ours is None or theirs is None:
            assert ours is theirs, "a parameter took part in one and not in the other"
            continue
        squares += torch.stack([(ours - theirs).float().square().sum(), ours.float().square().sum()])
    apart, whole = accelerator.reduce(squares, "sum").tolist()
    found = (abs(right[0] - other[0]) / max(abs(right[0]), 1e-30),
             math.sqrt(apart / whole) if whole else float(apart > 0))
    return tuple(math.inf if math.isnan(each) else each for each in found)
