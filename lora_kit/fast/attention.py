"""Part ``attention``: causal attention of packed rows on a CPU, all rows of a layer as one node of autograd.

The forward pass is torch's fused kernel, row by row. Its backward kernel on a CPU is slow; here the
probabilities are made again from the kernel's logarithms of sums, a block of queries at a time, and
the gradients are batched matrix products. Queries that share a key (grouped-query attention) stand in
one matrix with it, so that keys and values are never repeated. The output is laid out as the next
layer takes it, and kept once.

Shape suffixes: B 1, H heads, G key heads, T tokens, D head size. Reads and writes nothing.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from lora_kit.packing import attend_per_document

NAME = "lora_kit_fast"
"""Name under which transformers knows :func:`attend`."""
_BLOCK = 512
"""Queries of a block: with rows below it one product serves; above it, keys after a block are left out."""


def attend(module, query_BHTD, key_BGTD, value_BGTD, attention_mask, dropout: float = 0.0,
           scaling: float | None = None, document_lengths: tuple[int, ...] | None = None,
           sliding_window: int | None = None, **options):
    """:func:`lora_kit.packing.attend_per_document`, faster where it can be; the same arguments and results."""
    lengths = tuple(document_lengths or (query_BHTD.shape[2],))
    unusual = (
        attention_mask is not None or dropout or query_BHTD.device.type != "cpu" or query_BHTD.shape[0] != 1
        or any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
        or (sliding_window is not None and max(lengths) > sliding_window)
        or query_BHTD.shape[-1] != value_BGTD.shape[-1] or not torch.is_grad_enabled())
    if unusual:
        return attend_per_document(
            module, query_BHTD, key_BGTD, value_BGTD, attention_mask, dropout=dropout, scaling=scaling,
            document_lengths=document_lengths, sliding_window=sliding_window, **options)
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else float(scaling)
    return _Node.apply(query_BHTD, key_BGTD, value_BGTD, lengths, scale), None


class _Node(torch.autograd.Function):

    @staticmethod
    def forward(ctx, query_BHTD, key_BGTD, value_BGTD, lengths, scale):
        heads, groups = query_BHTD.shape[1], key_BGTD.shape[1]
        out_BTHD = query_BHTD.new_empty(1, query_BHTD.shape[2], heads, query_BHTD.shape[3])
        logs = []
        start = 0
        for length in lengths:
            rows = slice(start, start + length)
            key, value = (tensor[:, :, rows].repeat_interleave(heads // groups, 1) if heads != groups
                          else tensor[:, :, rows] for tensor in (key_BGTD, value_BGTD))
            out, log_HT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query_BHTD[:, :, rows], key, value, 0.0, True, scale=scale)
            out_BTHD[:, rows] = out.transpose(1, 2)
            logs.append(log_HT)
            start += length
        ctx.lengths, ctx.scale = lengths, scale
        ctx.save_for_backward(query_BHTD, key_BGTD, value_BGTD, out_BTHD, *logs)
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_BTHD):
        query_BHTD, key_BGTD, value_BGTD, out_BTHD, *logs = ctx.saved_tensors
        groups = key_BGTD.shape[1]
        dquery, dkey, dvalue = (torch.empty_like(tensor, memory_format=torch.contiguous_format)
                                for tensor in (query_BHTD, key_BGTD, value_BGTD))
        # d(sum of p·dp), one number a query and head.
        delta_HT = (dout_BTHD * out_BTHD)[0].sum(-1, dtype=torch.float32).t()
        start = 0
        for length, log_HT in zip(ctx.lengths, logs, strict=True):
            rows = slice(start, start + length)
            query, dout = query_BHTD[0, :, rows], dout_BTHD[0, rows].transpose(0, 1)
            _backward_of_row(
                query, key_BGTD[0, :, rows], value_BGTD[0, :, rows], dout, log_HT[0], delta_HT[:, rows], groups,
                ctx.scale, (dquery[0, :, rows], dkey[0, :, rows], dvalue[0, :, rows]))
            start += length
        return dquery, dkey, dvalue, None, None


def _backward_of_row(query_HTD, key_GTD, value_GTD, dout_HTD, log_HT, delta_HT, groups, scale, into) -> None:
    """Gradients of one row's attention, written to the three arrays of ``into``."""
    heads, length, size = query_HTD.shape
    shared = heads // groups
    dquery_HTD, dkey_GTD, dvalue_GTD = into
    for first in range(0, length, _BLOCK):
        last = min(first + _BLOCK, length)

        def grouped(tensor, first=first, last=last):
            return tensor[:, first:last].reshape(groups, shared * (last - first), -1)

        query, dout = grouped(query_HTD), grouped(dout_HTD)
        key, value = key_GTD[:, :last], value_GTD[:, :last]
        # Logits and all that is made of them in fp32; the products in the arithmetic's own type.
        p = torch.bmm(query, key.transpose(1, 2)).float().mul_(scale).sub_(grouped(log_HT[..., None]))
        p = p.view(groups, shared, last - first, last)
        future = torch.ones(last - first, last - first, dtype=torch.bool).triu_(1)
        p[..., first:].masked_fill_(future, -torch.inf)
        p = p.exp_().view(groups, -1, last)
        dp = torch.bmm(dout, value.transpose(1, 2)).float().sub_(grouped(delta_HT[..., None])).mul_(p).mul_(scale)
        p, ds = p.to(query.dtype), dp.to(query.dtype)
        dquery_HTD[:, first:last] = torch.bmm(ds, key).view(heads, last - first, size)
        dvalue, dkey = torch.bmm(p.transpose(1, 2), dout), torch.bmm(ds.transpose(1, 2), query)
        if first == 0:
            dvalue_GTD[:, last:], dkey_GTD[:, last:] = 0, 0
            dvalue_GTD[:, :last], dkey_GTD[:, :last] = dvalue, dkey
        else:
            dvalue_GTD[:, :last] += dvalue
            dkey_GTD[:, :last] += dkey
