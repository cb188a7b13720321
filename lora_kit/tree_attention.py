"""Attention of many trees of tokens that lie one behind the other in one row, each seeing itself alone.

The layers of a model multiply a row of 500 tokens in half the time of 25 rows of 20, and need no padding. Only
attention has to know where a tree ends: it takes the trees apart, reads those of a batch side by side, and puts them
together again. What all trees go on from (few-shot examples, read before) is one matrix of keys for all queries; the
two softmaxes become one by their logarithms of sums, so that keys and values are never repeated. Queries that share a
key (grouped-query attention) stand in one matrix with it, for the same reason.

An attention function for transformers' AttentionInterface; which trees there are, is told by :func:`attending`.

Shape suffixes: N trees, T tokens of the largest, M tokens of the row, P tokens read before, H heads, G key heads,
R = H / G, S = R * T, D head size. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

NAME = "lora_kit_trees"
"""Name under which transformers knows :func:`attend`."""


_SHORT = 256
"""Tokens of a tree up to which queries that share a key stand in one matrix: the mask is repeated for it. (Of longer
ones keys are repeated, as the mask is larger.)"""


class Unserved(Exception):
    """The model attends in a way that :func:`attend` does not know."""


@dataclass
class Forest:
    """The trees of a row.

    Attributes:
        places_N_T: (N * T,) place in the row of each token of each tree; any where a tree has fewer than T.
        back_M: (M,) the inverse: where each token of the row stands in ``places_N_T``.
        mask_N1TT: added to the scores; a row of it that is padding sees itself.
        before: keys and values (1, G, P, D) of each layer that all trees see; empty where they begin the text.
        num_calls: how often a layer has attended by it.
    """

    places_N_T: torch.Tensor
    back_M: torch.Tensor
    mask_N1TT: torch.Tensor
    before: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    num_calls: int = 0


_FOREST: ContextVar[Forest] = ContextVar("forest")


@contextmanager
def served(model: Any) -> Iterator[bool]:
    """Let ``model`` (of transformers, perhaps in one of peft) attend by :func:`attend`; yields whether it can."""
    from transformers import AttentionInterface

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    usual = plain.config.get_text_config()._attn_implementation
    # Models whose attention is code of their own ignore what is set.
    if usual not in ("sdpa", "eager") or not plain._can_set_attn_implementation():
        yield False
        return
    AttentionInterface.register(NAME, attend)
    plain.set_attn_implementation(NAME)
    try:
        yield True
    finally:
        plain.set_attn_implementation(usual)


@contextmanager
def attending(forest: Forest) -> Iterator[None]:
    """In this block the row that a served model reads is ``forest``.

    Raises:
        Unserved: after it, where no layer has asked.
    """
    token = _FOREST.set(forest)
    try:
        yield
    finally:
        _FOREST.reset(token)
    if not forest.num_calls:
        raise Unserved


def attend(module, query_1HMD, key_1GMD, value_1GMD, _mask, dropout: float = 0.0, scaling: float | None = None,
           **options):
    """Attention of the trees that :func:`attending` names: (1, M, H, D), and None for the weights.

    Raises:
        Unserved: the model asks for something else than plain attention.
    """
    unusual = ("softcap", "s_aux", "position_bias", "sliding_window")
    if dropout or any(options.get(name) is not None for name in unusual):
        raise Unserved
    forest = _FOREST.get()
    forest.num_calls += 1
    num_trees, longest = forest.mask_N1TT.shape[0], forest.mask_N1TT.shape[-1]
    (heads, num_tokens, size), groups = query_1HMD.shape[1:], key_1GMD.shape[1]
    shared = heads // groups
    scale = size ** -0.5 if scaling is None else float(scaling)
    query_MGRD = query_1HMD[0].transpose(0, 1).reshape(num_tokens, groups, shared, size)

    def apart(tensor_GMD):
        tensor = tensor_GMD.transpose(0, 1).index_select(0, forest.places_N_T)
        return tensor.view(num_trees, longest, groups, -1).transpose(1, 2)

    query_NGSD = query_MGRD.index_select(0, forest.places_N_T).view(num_trees, longest, groups, shared, size)
    query_NGSD = query_NGSD.permute(0, 2, 3, 1, 4).reshape(num_trees, groups, shared * longest, size)
    keys, values, mask = apart(key_1GMD[0]), apart(value_1GMD[0]), forest.mask_N1TT
    if longest <= _SHORT:
        mask = mask.repeat(1, 1, shared, 1)
    else:
        query_NGSD = query_NGSD.view(num_trees, heads, longest, size)
        keys, values = (each.repeat_interleave(shared, 1) for each in (keys, values))
    out_NGSD, log_NGS = _attend(query_NGSD, keys, values, mask, scale)

    def together(tensor_NGS):
        tensor = tensor_NGS.reshape(num_trees, groups, shared, longest, -1).permute(0, 3, 1, 2, 4)
        return tensor.reshape(num_trees * longest, groups, shared, -1).index_select(0, forest.back_M)

    out_MGRD = together(out_NGSD)
    if forest.before:
        key_1GPD, value_1GPD = forest.before[module.layer_idx]
        query_1GQD = query_MGRD.transpose(0, 1).reshape(1, groups, num_tokens * shared, size)
        out, log = _attend(query_1GQD, key_1GPD, value_1GPD, None, scale)
        out_before = out.view(groups, num_tokens, shared, -1).transpose(0, 1)
        log_before = log.reshape(groups, num_tokens, shared, 1).transpose(0, 1)
        # The share of what was read before in the sum of both exponentials.
        share = torch.sigmoid(log_before - together(log_NGS)).to(out_MGRD.dtype)
        out_MGRD = torch.lerp(out_MGRD, out_before, share.expand_as(out_before))
    return out_MGRD.reshape(1, num_tokens, heads, -1), None


def _attend(query, key, value, mask, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of each query, and the logarithm of the sum of its exponentials in fp32."""
    if query.device.type == "cpu" and query.shape[-1] == value.shape[-1]:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False,
                                                                          attn_mask=mask, scale=scale)
    scores = (query.float() @ key.float().transpose(-1, -2)) * scale
    if mask is not None:
        scores = scores + mask
    log = scores.logsumexp(-1)
    return (scores - log[..., None]).exp().to(value.dtype) @ value, log
