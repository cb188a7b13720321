"""The loss: negative log-likelihood of the trained tokens, summed, in fp32.

Sums, not means: the loop divides by the trained tokens of the whole global batch, so
that accumulation, packing and the number of processes change nothing. The head runs only
at positions that some row of the batch trains on.

Shape suffixes: B rows, T positions, K positions kept, V vocabulary. Reads and writes nothing.
"""

from __future__ import annotations

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
