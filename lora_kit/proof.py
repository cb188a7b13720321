"""Proof on the model at hand that rows teach the same however they are computed, before the first step.

Two training rows that train unlike numbers of tokens, as one batch in five ways, compared by their loss and by
the gradients of the adapter. *Separate* is the reference: plain peft, a pass each, every loss divided by the tokens
of both.

* *Accumulated*: the same passes through the code that the loop learns with (``loss.accumulate``). It must give what
  separate does, whatever the arithmetic: a divisor that is wrong shows here.
* *Whole*: padded into one pass. It must agree but for rounding: where it does not, the loss is no sum, or the model
  mixes the rows of a batch.
* *Packed* into one sequence may differ ten times as much as whole does, which rounds for another shape too.
* *Fast*: as the loop will take them, through the fast path (``lora_kit/fast``); the same bound.

Adapters start with a B of zero, which would hide half of an error: while a proof is made, it is drawn.

Reads and writes nothing; leaves parameters as they were, gradients cleared and the model in training mode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lora_kit.loss import accumulate, loss_sum
from lora_kit.packing import packed_batch_of
from lora_kit.tokens import batch_of
from lora_kit.types import Batch, Example

FLOOR_FACTOR = 10.0
"""Packed and fast may differ from separate this many times as much as whole does."""
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
_PASSES = 5
_TIMES_AS_MANY = 2
_DRAWN_STD = 0.02


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


class Proof:
    """Loss and gradients of ``examples`` in separate passes, and of the same rows as a model takes them later.

    Args:
        model: with its adapter, without the fast path, not wrapped for several processes.
        precision: fp32, bf16 or fp16: the arithmetic.
    """

    def __init__(self, model, examples: Sequence[Example], accelerator, precision: str) -> None:
        self.model, self.examples = model, list(examples)
        self.accelerator, self.precision = accelerator, precision
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.num_trained = sum(int(example.loss_mask_T[1:].sum()) for example in self.examples)
        self.separate = self._measure(self._separately, self._one_by_one())
        self.accumulated = self._difference(self._one_by_one())
        device = accelerator.device
        self.floor = max(self._difference([batch_of(self.examples, 0, device)]))

    def of_batches(self, *, packed: bool) -> dict[str, Any]:
        """The plain model's passes, with ``packed`` (packing is in use on it then) those too.

        Returns:
            Relative differences from separate (the larger of that of the loss and that of the norm of all gradients
            together), each with its bound and whether it is within: ``accumulation``, ``accumulation_bound``,
            ``accumulates``; of whole ``floor``, ``floor_bound``, ``adds_up``; and where ``packed`` what
            :meth:`of_path` gives.
        """
        rounds_by_batch = any(type(module).__name__ == "Linear8bitLt" for module in self.model.modules())
        accumulation, accumulation_bound = max(self.accumulated), ACCUMULATION_BOUND[self.precision]
        floor_bound = LARGEST_BOUND if rounds_by_batch else LARGEST_FLOOR[self.precision]
        found = {"accumulation": accumulation, "accumulation_bound": accumulation_bound,
                 "accumulates": accumulation <= accumulation_bound,
                 "floor": self.floor, "floor_bound": floor_bound, "adds_up": self.floor <= floor_bound,
                 "tokens": sum(len(example.tokens_T) for example in self.examples)}
        return found | self.of_path(packed=True) if packed else found

    def of_path(self, *, packed: bool, share_prefix: bool = False) -> dict[str, Any]:
        """The model as it is now, its rows packed or one by one.

        Returns:
            ``loss_difference``, ``gradient_difference`` (relative), ``bound`` and ``holds``.
        """
        batches = [packed_batch_of(self.examples, self.accelerator.device, share_prefix)] if packed else \
            self._one_by_one()
        loss, gradient = self._difference(batches)
        bound = max(min(FLOOR_FACTOR * self.floor, LARGEST_BOUND), SMALLEST_BOUND[self.precision])
        return {"loss_difference": loss, "gradient_difference": gradient, "bound": bound,
                "holds": loss <= bound and gradient <= bound}

    def _one_by_one(self) -> list[Batch]:
        return [batch_of([example], 0, self.accelerator.device) for example in self.examples]

    def _separately(self, batches: Iterable[Batch]) -> float:
        total = 0.0
        for batch in batches:
            with self.accelerator.autocast():
                summed = loss_sum(self.model, batch)
            (summed * self.accelerator.num_processes / self.num_trained).backward()
            total += float(summed.detach())
        return total

    def _as_the_loop_does(self, batches: Iterable[Batch]) -> float:
        import torch

        # Without the loss scaling of fp16, which a first step may have to lower.
        return float(accumulate(self.model, batches, self.num_trained, self.accelerator,
                                backward=torch.Tensor.backward))

    def _difference(self, batches: Iterable[Batch]) -> tuple[float, float]:
        return _differences(self.separate, self._measure(self._as_the_loop_does, batches), self.accelerator)

    def _measure(self, learn, batches: Iterable[Batch]) -> tuple[float, list[Any]]:
        was_training = self.model.training
        self.model.eval()  # without dropout: the draws of two shapes differ
        try:
            with _drawn(self.trainable):
                total = learn(batches)
            return total, [_local(parameter.grad) for parameter in self.trainable]
        finally:
            for parameter in self.trainable:
                parameter.grad = None
            self.model.train(was_training)


def prove_batches(model, examples: Sequence[Example], accelerator, precision: str, *, packed: bool) -> dict[str, Any]:
    """What :class:`Proof` says of a plain model, in one call."""
    return Proof(model, examples, accelerator, precision).of_batches(packed=packed)


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
