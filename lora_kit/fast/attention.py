"""Part ``attention``: causal attention of packed rows on a CPU, all rows of a layer as one node of autograd.

In bf16 on a CPU with matrix units both passes are kernels of ``attention.c``, which multiply blocks that stay in the
cache. Elsewhere the forward pass is torch's fused kernel, row by row; its backward kernel is slow, and
here the probabilities are made again from the kernel's logarithms of sums, a block of queries at a time, and
the gradients are batched matrix products. Queries that share a key (grouped-query attention) stand in
one matrix with it, so that keys and values are never repeated. The output is laid out as the next
layer takes it, and kept once.

Shape suffixes: B 1, H heads, G key heads, T tokens, S keys of a row, D head size. Reads and writes nothing.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lora_kit.fast import compiled
from lora_kit.packing import attend_per_document

NAME = "lora_kit_fast"
"""Name under which transformers knows :func:`attend`."""
_MULTIPLE = 32
_BLOCK = 256
"""Queries of a block: with rows below it one product serves; above it, keys after a block are left out."""


def attend(module, query_BHTD, key_BGTD, value_BGTD, attention_mask, dropout: float = 0.0,
           scaling: float | None = None, document_lengths: tuple[int, ...] | None = None, prefix_length: int = 0,
           sliding_window: int | None = None, **options):
    """:func:`lora_kit.packing.attend_per_document`, faster where it can be; the same arguments and results."""
    lengths = tuple(document_lengths or (query_BHTD.shape[2],))
    unusual = (
        attention_mask is not None or dropout or query_BHTD.device.type != "cpu" or query_BHTD.shape[0] != 1
        or any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
        or (sliding_window is not None and max(lengths) + prefix_length > sliding_window)
        or query_BHTD.shape[-1] != value_BGTD.shape[-1] or not torch.is_grad_enabled())
    if unusual:
        return attend_per_document(
            module, query_BHTD, key_BGTD, value_BGTD, attention_mask, dropout=dropout, scaling=scaling,
            document_lengths=document_lengths, prefix_length=prefix_length, sliding_window=sliding_window, **options)
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else float(scaling)
    tensors = (query_BHTD, key_BGTD, value_BGTD)
    in_tiles = (compiled.multiplies(*tensors) and query_BHTD.shape[3] % _MULTIPLE == 0
                and all(tensor.stride(3) == 1 for tensor in tensors))
    return (_InTiles if in_tiles else _Node).apply(*tensors, lengths, prefix_length, scale), None


class _InTiles(torch.autograd.Function):
    """The kernels of attention.c as a node."""

    @staticmethod
    def forward(ctx, query_BHTD, key_BGTD, value_BGTD, lengths, prefix, scale):
        _, heads, num_tokens, size = query_BHTD.shape
        starts = torch.tensor([0, *itertools.accumulate(lengths)])
        out_BTHD = query_BHTD.new_empty(1, num_tokens, heads, size)
        log_HT = torch.empty(heads, num_tokens)
        ctx.shape = len(lengths), prefix, heads, key_BGTD.shape[1], size, scale
        compiled.call("attend_forward", query_BHTD.dtype, *_placed(query_BHTD, key_BGTD, value_BGTD), out_BTHD, log_HT,
                      starts, *ctx.shape)
        ctx.save_for_backward(query_BHTD, key_BGTD, value_BGTD, out_BTHD, log_HT, starts)
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BTHD):
        query_BHTD, key_BGTD, value_BGTD, out_BTHD, log_HT, starts = ctx.saved_tensors
        rows, prefix, _, groups, size, _ = ctx.shape
        dquery, dkey, dvalue = (tensor.new_empty(1, tensor.shape[2], tensor.shape[1], size)
                                for tensor in (query_BHTD, key_BGTD, value_BGTD))
        dprefix = torch.empty(rows, 2, groups, prefix, size)
        compiled.call("attend_backward", query_BHTD.dtype, *_placed(query_BHTD, key_BGTD, value_BGTD), out_BTHD,
                      dout_BTHD.contiguous(), log_HT, dquery, dkey, dvalue, dprefix, starts, *ctx.shape)
        if prefix:
            dkey[0, :prefix], dvalue[0, :prefix] = dprefix.sum(0).transpose(1, 2)
        return dquery.transpose(1, 2), dkey.transpose(1, 2), dvalue.transpose(1, 2), None, None, None


def _placed(*tensors: torch.Tensor) -> tuple[torch.Tensor | int, ...]:
    """Of each where it begins and how far its tokens and its heads are apart, as kernels take it."""
    return tuple(each for tensor in tensors for each in (tensor, tensor.stride(2), tensor.stride(1)))


class _Node(torch.autograd.Function):

    @staticmethod
    def forward(ctx, query_BHTD, key_BGTD, value_BGTD, lengths, prefix, scale):
        heads = query_BHTD.shape[1]
        out_BTHD = query_BHTD.new_empty(1, query_BHTD.shape[2], heads, query_BHTD.shape[3])
        logs, start = [], 0
        for length in lengths:
            rows, before = slice(start, start + length), prefix if start else 0
            out_BHTD, log_BHT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _padded(query_BHTD, rows, before, heads, reads_prefix=False), _padded(key_BGTD, rows, before, heads),
                _padded(value_BGTD, rows, before, heads), 0.0, True, scale=scale)
            own = slice(before, before + length)
            out_BTHD[:, rows] = out_BHTD[:, :, own].transpose(1, 2)
            log_HT = log_BHT[..., own].contiguous()
            logs.append(log_HT)
            start += length
        ctx.lengths, ctx.prefix, ctx.scale = lengths, prefix, scale
        ctx.save_for_backward(query_BHTD, key_BGTD, value_BGTD, out_BTHD, *logs)
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BTHD):
        query_BHTD, key_BGTD, value_BGTD, out_BTHD, *logs = ctx.saved_tensors
        dquery, dkey, dvalue = (torch.empty_like(tensor, memory_format=torch.contiguous_format)
                                for tensor in (query_BHTD, key_BGTD, value_BGTD))
        delta_HT = _delta(dout_BTHD, out_BTHD)
        heads, groups, start = query_BHTD.shape[1], key_BGTD.shape[1], 0
        for length, log_HT in zip(ctx.lengths, logs, strict=True):
            rows, before = slice(start, start + length), ctx.prefix if start else 0
            dquery[0, :, rows], dkey_GTD, dvalue_GTD = _gradients(
                *(_padded(tensor, rows, 0, heads)[0] for tensor in (query_BHTD, dout_BTHD.transpose(1, 2))),
                *(_padded(tensor, rows, before, groups)[0] for tensor in (key_BGTD, value_BGTD)),
                log_HT[0], delta_HT[:, rows], ctx.scale, before)
            for whole, part in ((dkey, dkey_GTD), (dvalue, dvalue_GTD)):
                whole[0, :, rows] = part[:, before:before + length]
                if before:
                    whole[0, :, :before] += part[:, :before]
            start += length
        return dquery, dkey, dvalue, None, None, None


def _padded(tensor_BGTD: torch.Tensor, rows: slice, before: int, heads: int, reads_prefix: bool = True) -> torch.Tensor:
    """(B, H, a multiple of _MULTIPLE, D): the first ``before`` tokens, those of ``rows``, and zeros.

    As queries of the first tokens zeros do: causal attention begins with them then, and needs no mask. No token sees
    the zeros after it, and torch's kernel on a CPU is up to twice as fast on whole blocks.
    """
    groups, length, size = tensor_BGTD.shape[1], rows.stop - rows.start, tensor_BGTD.shape[3]
    whole = before + length
    padded = -(-whole // _MULTIPLE) * _MULTIPLE
    out = tensor_BGTD.new_empty(1, groups, heads // groups, padded, size)
    out[..., before:whole, :] = tensor_BGTD[:, :, None, rows]
    if before and reads_prefix:
        out[..., :before, :] = tensor_BGTD[:, :, None, :before]
    elif before:
        out[..., :before, :] = 0
    out[..., whole:, :] = 0
    return out.view(1, heads, padded, size)


def _gradients(query_HTD, dout_HTD, key_GSD, value_GSD, log_HT, delta_HT, scale, before: int):
    """Gradients of query, key and value of one row's attention, ``before`` of whose keys come before its queries.

    All but ``log`` and ``delta`` end with zeros (:func:`_padded`), and so do the gradients of key and value.
    """
    (heads, padded, size), groups, length = query_HTD.shape, key_GSD.shape[0], log_HT.shape[1]
    shared = heads // groups
    dquery_HTD = torch.empty_like(query_HTD)
    dkey_GSD, dvalue_GSD = torch.zeros_like(key_GSD), torch.zeros_like(value_GSD)
    # A zero for what is no query: its p is some number, that meets a dout of zero.
    log_HT, delta_HT = (torch.nn.functional.pad(tensor, (0, padded - length)) for tensor in (log_HT, delta_HT))
    for first in range(0, padded, _BLOCK):
        last = min(first + _BLOCK, padded)
        num_keys = min(-(-(before + last) // _MULTIPLE) * _MULTIPLE, key_GSD.shape[1])

        def grouped(tensor, first=first, last=last):
            return tensor[:, first:last].reshape(groups, shared * (last - first), -1)

        query, dout = grouped(query_HTD), grouped(dout_HTD)
        key, value = key_GSD[:, :num_keys], value_GSD[:, :num_keys]
        if compiled.serves(query, dout):
            p, ds = torch.bmm(query, key.transpose(1, 2)), torch.bmm(dout, value.transpose(1, 2))
            log, delta = log_HT[:, first:last], delta_HT[:, first:last]
            compiled.call("attention_backward", p.dtype, p, ds, log, log.stride(0), delta, delta.stride(0), heads,
                          last - first, num_keys, before + first, scale)
        else:
            p, ds = _probabilities(query, key, value, dout, grouped(log_HT[..., None]), grouped(delta_HT[..., None]),
                                   (shared, last - first), before + first, scale)
        dquery_HTD[:, first:last] = torch.bmm(ds, key).view(heads, last - first, size)
        dkey_GSD[:, :num_keys] += torch.bmm(ds.transpose(1, 2), query)
        dvalue_GSD[:, :num_keys] += torch.bmm(p.transpose(1, 2), dout)
        del p, ds, query, dout  # before the next block's are made
    return dquery_HTD[:, :length], dkey_GSD, dvalue_GSD


def _probabilities(query, key, value, dout, log, delta, shape: tuple[int, int], before: int, scale: float):
    """Probabilities of a block and the gradients of query times key; ``before`` keys come before its first."""
    groups, num_keys, (shared, length) = len(key), key.shape[1], shape
    p = _less(query * scale, key, log).view(groups, shared, length, num_keys)
    p.masked_fill_(torch.ones(length, num_keys, dtype=torch.bool).triu_(1 + before), -torch.inf)
    p = p.exp_().view(groups, -1, num_keys)
    ds = _less(dout, value, delta).mul_(p).mul_(scale)
    return p.to(query.dtype), ds.to(query.dtype)


def _delta(dout_BTHD: torch.Tensor, out_BTHD: torch.Tensor) -> torch.Tensor:
    """(H, T), fp32: the sum of dout times out, which is that of p times dp, of each query and head."""
    dout_BTHD = dout_BTHD.contiguous()
    if not compiled.serves(dout_BTHD, out_BTHD):
        return (dout_BTHD * out_BTHD)[0].sum(-1, dtype=torch.float32).t()
    _, length, heads, size = out_BTHD.shape
    delta_HT = torch.empty(heads, length)
    compiled.call("dot_of_heads", out_BTHD.dtype, dout_BTHD, out_BTHD, delta_HT, length, heads, size)
    return delta_HT


def _less(left: torch.Tensor, right: torch.Tensor, less: torch.Tensor) -> torch.Tensor:
    """``left`` times ``right`` transposed, less ``less``, in fp32."""
    if left.dtype == torch.float32:
        return torch.baddbmm(less, left, right.transpose(1, 2), beta=-1)
    return torch.bmm(left, right.transpose(1, 2)).float().sub_(less)


def is_faster(heads: int, groups: int, size: int, dtype: torch.dtype, lengths: tuple[int, ...]) -> bool:
    """Whether :func:`attend` takes less time here, forward and backward, than torch's own kernels on such rows.

    Which it is depends on the arithmetic, the machine's matrix units, the threads and the lengths, so it is measured:
    the faster of three passes of each, in turns.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, sum(lengths), number, size) for number in (heads, groups, groups))
    tensors = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes]
    seconds: dict[Any, list[float]] = {attend: [], attend_per_document: []}
    with torch.enable_grad():
        for _ in range(3):
            for function, taken in seconds.items():
                started = time.perf_counter()
                out, _ = function(None, *tensors, None, document_lengths=lengths)
                torch.autograd.grad(out.sum(), tensors)
                taken.append(time.perf_counter() - started)
    return min(seconds[attend]) < min(seconds[attend_per_document])
