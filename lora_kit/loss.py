"""The loss: negative log-likelihood of the trained tokens, summed, in fp32; and its gradients over a whole batch.

Sums, not means: what is learnt is divided by the trained tokens of the whole global batch, so
that accumulation, packing and the number of processes change nothing. The loop and the proof
before it (``proof.py``) both go through :func:`accumulate`. The head runs only at positions that
some row of the batch trains on.

Shape suffixes: B rows, T positions, K positions kept, V vocabulary. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch.nn.functional import cross_entropy

from lora_kit.fast import head
from lora_kit.packing import forward_inputs
from lora_kit.tokens import IGNORED
from lora_kit.types import Batch


def loss_sum(model, batch: Batch) -> torch.Tensor:
    """Summed loss of the batch's trained tokens: a scalar, fp32, in nats.

    Args:
        model: a causal LM of transformers (or wrapped by peft or DDP) whose forward takes ``logits_to_keep``
            as a tensor of positions, as every decoder of transformers 5 does.
        batch: padded or packed; see :class:`lora_kit.types.Batch`.
    """
    targets_BT = batch.labels_BT[:, 1:]
    keep_K = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    targets_BK = targets_BT[:, keep_K]
    fast_head = head.head_of(model)
    with head.targets_set(fast_head, targets_BK) if fast_head else nullcontext():
        logits_BKV = model(
            input_ids=batch.tokens_BT, use_cache=False, logits_to_keep=keep_K, **forward_inputs(batch),
        ).logits
    if fast_head:
        return logits_BKV.sum()  # one number: the loss itself
    return cross_entropy(logits_BKV.float().flatten(0, 1), targets_BK.flatten(), ignore_index=IGNORED,
                         reduction="sum")


def accumulate(
    net, batches: Iterable[Batch], num_trained: int, accelerator, *,
    backward: Callable[[torch.Tensor], None] | None = None, abandon: Callable[[], bool] = lambda: False,
) -> torch.Tensor | None:
    """Add to the gradients of ``net`` those of a whole batch, one forward pass after another.

    Args:
        net: as for :func:`loss_sum`; wrapped by DDP where several processes share the batch.
        batches: this process's forward passes, at least one.
        num_trained: trained tokens of the whole batch, over all passes and processes: the divisor of each pass.
        backward: in place of ``accelerator.backward``.
        abandon: asked before each pass: whether to leave it at that.

    Returns:
        The summed loss of this process's passes: a scalar, in nats, not divided; None where it was abandoned.
    """
    total = torch.zeros((), device=accelerator.device)
    waiting = iter(batches)
    batch = next(waiting, None)
    while batch is not None:
        if abandon():
            return None
        following = next(waiting, None)
        # DDP sums over the processes once, after the last pass.
        with getattr(net, "no_sync", nullcontext)() if following is not None else nullcontext():
            with accelerator.autocast():
                summed = loss_sum(net, batch)
            # DDP averages gradients over processes, so the sum is scaled back up.
            (backward or accelerator.backward)(summed * accelerator.num_processes / num_trained)
        total += summed.detach()
        batch = following
    return total
