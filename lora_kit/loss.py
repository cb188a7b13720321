"""The loss: negative log-likelihood of the trained tokens, summed, in fp32.

Sums, not means: the loop divides by the trained tokens of the whole global batch, so
that accumulation and the number of processes change nothing. The head runs only at
positions that some row of the batch trains on.

Shape suffixes: B rows, T positions, K positions kept, V vocabulary. Reads and writes nothing.
"""

from __future__ import annotations

import torch
from torch.nn.functional import cross_entropy

from lora_kit.tokens import IGNORED
from lora_kit.types import Batch


def loss_per_row(model, batch: Batch) -> torch.Tensor:
    """Summed loss of each row, shape (B,), fp32, in nats.

    Args:
        model: a causal LM of transformers (or wrapped by peft or DDP) whose forward takes ``logits_to_keep``
            as a tensor of positions, as every decoder of transformers 5 does.
        batch: see :class:`lora_kit.types.Batch`.
    """
    targets_BT = batch.labels_BT[:, 1:]
    keep_K = (targets_BT != IGNORED).any(dim=0).nonzero().squeeze(1)
    logits_BKV = model(
        input_ids=batch.tokens_BT, attention_mask=batch.attention_mask_BT, use_cache=False, logits_to_keep=keep_K,
    ).logits
    targets_BK = targets_BT[:, keep_K]
    losses = cross_entropy(
        logits_BKV.float().flatten(0, 1), targets_BK.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view(targets_BK.shape).sum(dim=1)
