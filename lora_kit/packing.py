"""Packing: rows laid end to end in one sequence, each attending to itself alone.

A padded batch works on padding; a packed one does not. Rows of a micro-batch are chosen by
first-fit-decreasing into a budget of tokens, positions start anew with each row, and no row
reads its neighbour. How that is kept depends on the attention implementation:

* ``sdpa``: an attention function of ours runs torch's fused attention row by row, so that no
  mask over all pairs of tokens is built (transformers' own block mask is right too, but slower);
  it can also let all rows go on from tokens that they share, such as a system prompt;
* ``flash_attention_2``: the kernel takes the bounds of the rows (``cu_seq_lens``);
* ``eager``: transformers makes a block mask from the positions, which it does only without an
  attention mask and without a cache.

Shape suffixes: B rows of a batch, T tokens, H heads, D head size. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy

from lora_kit.recipe import Recipe
from lora_kit.tokens import IGNORED
from lora_kit.types import Batch, Example

PER_DOCUMENT = "lora_kit_per_document"
"""Name under which transformers knows our attention function."""
CPU_PASS_TOKENS = {"fp32": 1024, "bf16": 2048}
"""Tokens of a packed pass on a CPU by arithmetic (about as many bytes), where the recipe names none and no row is
longer."""
_ISOLATING = ("sdpa", "eager", "flash_attention_2", PER_DOCUMENT)


def first_fit_decreasing(rows: Sequence[int], length: Callable[[int], int], budget: int) -> list[list[int]]:
    """``rows`` in bins of at most ``budget`` tokens: longest first, each into the first bin that has room.

    At most 11/9 of the fewest possible bins, plus 6/9 (Dósa 2007). A row over the budget gets a bin of its own;
    rows of the same length keep the order of their numbers.
    """
    bins: list[list[int]] = []
    free: list[int] = []
    for row in sorted(rows, key=lambda row: (-length(row), row)):
        needed = length(row)
        place = next((index for index, room in enumerate(free) if needed <= room), None)
        if place is None:
            bins.append([row])
            free.append(budget - needed)
        else:
            bins[place].append(row)
            free[place] -= needed
    return bins


def budget_of(recipe: Recipe, device_type: str, precision: str) -> int:
    """Tokens of a packed pass: those that the recipe names, else ``micro_batch_size`` rows of ``max_tokens``.

    A CPU gains little from longer passes than CPU_PASS_TOKENS (docs/speed.md has the figures), while activations grow
    with them.
    """
    longest = recipe.data.max_tokens
    rows = recipe.train.micro_batch_size * longest
    on_cpu = min(rows, max(longest, CPU_PASS_TOKENS[precision])) if device_type == "cpu" else rows
    return recipe.train.pack_tokens or on_cpu


def micro_batches(
    rows: Sequence[int], length: Callable[[int], int], *, micro_batch_size: int, budget: int | None, process: int = 0,
    num_processes: int = 1,
) -> list[list[int]]:
    """The forward passes that ``process`` makes of ``rows``, as many as every other process makes.

    Args:
        length: tokens of a row.
        micro_batch_size: rows of a padded forward pass.
        budget: tokens of a packed forward pass; None pads.

    Returns:
        Row numbers of each pass. Passes are empty where this process has fewer rows than another has passes:
        sharded weights are gathered by all processes at once, so that each has to take part.
    """
    by_length = sorted(rows, key=lambda row: (-length(row), row))

    def passes_of(share: list[int]) -> list[list[int]]:
        if budget is not None:
            return first_fit_decreasing(share, length, budget)
        return [share[start:start + micro_batch_size] for start in range(0, len(share), micro_batch_size)]

    # Every n-th row of those in order of length: all processes get about as many tokens.
    plans = [passes_of(by_length[other::num_processes]) for other in range(num_processes)]
    mine, number = plans[process], max(map(len, plans))
    while len(mine) < number:
        largest = max(mine, key=len, default=[])
        if len(largest) < 2:
            mine.append([])
            continue
        mine[mine.index(largest)] = largest[::2]
        mine.append(largest[1::2])
    return mine


def packed_batch_of(examples: Sequence[Example], device, share_prefix: bool = False) -> Batch:
    """``examples`` end to end as one sequence: B is 1, T the sum of their lengths; int64 on ``device``.

    With ``share_prefix`` what all of them begin with, and none is trained on, comes once: see
    :class:`lora_kit.types.Batch`.
    """
    import torch

    shared = shared_prefix(examples) if share_prefix else 0
    starts = [0, *(shared for _ in examples[1:])]
    lengths = tuple(len(example.tokens_T) - start for example, start in zip(examples, starts, strict=True))
    labels = [numpy.where(example.loss_mask_T == 1, example.tokens_T, IGNORED) for example in examples]
    for label_T in labels:
        label_T[:1] = IGNORED  # a row's first token is predicted by nothing, least of all by the row before it

    def joined(rows):
        parts = [row_T[start:] for row_T, start in zip(rows, starts, strict=True)]
        return torch.from_numpy(numpy.concatenate(parts).astype(numpy.int64))[None]

    labels_1T = joined(labels)
    positions_1T = joined([numpy.arange(len(example.tokens_T)) for example in examples])
    return Batch(
        tokens_BT=joined([example.tokens_T for example in examples]).to(device), labels_BT=labels_1T.to(device),
        attention_mask_BT=None, positions_BT=positions_1T.to(device), document_lengths=lengths, prefix_length=shared,
        num_trained_tokens=int((labels_1T != IGNORED).sum()), num_tokens=sum(lengths),
    )


def shared_prefix(examples: Sequence[Example]) -> int:
    """Tokens that all of several ``examples`` begin with, up to before the first that one is trained on."""
    if len(examples) < 2:
        return 0
    first = examples[0]
    shared = min(len(example.tokens_T) - 1 for example in examples)
    for example in examples:
        trained = numpy.flatnonzero(example.loss_mask_T == 1)
        # The token after the prefix is predicted by the prefix, which does not know whose it is.
        shared = min(shared, int(trained[0]) - 1 if len(trained) else shared)
        differ = numpy.flatnonzero(example.tokens_T[:max(shared, 0)] != first.tokens_T[:max(shared, 0)])
        shared = int(differ[0]) if len(differ) else shared
    return max(shared, 0)


def forward_inputs(batch: Batch) -> dict[str, Any]:
    """Keyword arguments of a causal LM's forward beside the tokens: a mask for padding, or bounds of packed rows."""
    if not batch.document_lengths:
        return {"attention_mask": batch.attention_mask_BT}
    inputs: dict[str, Any] = {"position_ids": batch.positions_BT, "document_lengths": batch.document_lengths}
    if batch.prefix_length:
        return inputs | {"prefix_length": batch.prefix_length}
    if batch.tokens_BT.device.type == "cuda":
        import torch

        ends = numpy.cumsum((0, *batch.document_lengths)).astype(numpy.int32)
        bounds = torch.from_numpy(ends).to(batch.tokens_BT.device)
        longest = max(batch.document_lengths)
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
    return inputs


def why_not_packed(model) -> str | None:
    """None when rows packed for ``model`` can be kept apart, else the reason."""
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    if implementation not in _ISOLATING:
        return f"attention {implementation} is not known to keep rows apart"
    kinds = set(getattr(config, "layer_types", None) or ())
    others = sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"})
    if others or "chunked_attention" in kinds:
        return f"its layers of kind {(others or ['chunked_attention'])[0]} carry a state over from row to row"
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder"
    if not getattr(type(model), "_can_set_attn_implementation", lambda: False)():
        return "its attention cannot be replaced"
    return None


def use_packing(model) -> None:
    """Let ``model`` (of transformers, without a wrapper) attend within each packed row; see the module's text."""
    if model.config.get_text_config()._attn_implementation != "sdpa":
        return
    from transformers import AttentionInterface

    AttentionInterface.register(PER_DOCUMENT, attend_per_document)
    model.set_attn_implementation(PER_DOCUMENT)


def stop_packing(model) -> None:
    """Undo :func:`use_packing`."""
    if model.config.get_text_config()._attn_implementation == PER_DOCUMENT:
        model.set_attn_implementation("sdpa")


def attend_per_document(
    module, query_BHTD, key_BHTD, value_BHTD, attention_mask, dropout: float = 0.0, scaling: float | None = None,
    document_lengths: tuple[int, ...] | None = None, prefix_length: int = 0, sliding_window: int | None = None,
    **options,
):
    """Causal attention inside each packed row: an attention function for transformers' AttentionInterface.

    Args:
        key_BHTD, value_BHTD: may have fewer heads than the query (grouped-query attention).
        document_lengths: tokens of each row, summing to T; None: each B is one row.
        prefix_length: tokens at the start of the first row that come before every other row too.
        sliding_window: tokens that a position sees, itself included.

    Returns:
        (B, T, H, D) and None, as transformers expects.

    Raises:
        ValueError: the model wants something of its attention that this does not do (soft caps, sinks, biases).
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    asked = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if asked or attention_mask is not None:
        raise ValueError(f"packed attention has no {', '.join(asked) or 'attention mask'}")
    lengths = list(document_lengths or (query_BHTD.shape[2],))
    grouped = query_BHTD.shape[1] != key_BHTD.shape[1]
    attended = []
    for number, (query, key, value) in enumerate(zip(
            *(tensor.split(lengths, dim=2) for tensor in (query_BHTD, key_BHTD, value_BHTD)), strict=True)):
        before = prefix_length if number else 0
        if before:
            key, value = (torch.cat([whole[:, :, :before], own], dim=2)
                          for whole, own in ((key_BHTD, key), (value_BHTD, value)))
        mask = None
        if before or (sliding_window is not None and query.shape[2] > sliding_window):
            mask = causal_mask(query.shape[2], before, sliding_window, query.device)
        attended.append(scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling,
            enable_gqa=grouped))
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def causal_mask(num_queries: int, before: int, sliding_window: int | None, device):
    """(queries, before + queries), True where a query sees a key: ``before`` keys come before the first query's own."""
    import torch

    ones = torch.ones(num_queries, before + num_queries, dtype=torch.bool, device=device)
    seen = ones.tril(before)
    return seen if sliding_window is None else seen & ones.triu(before + 1 - sliding_window)
