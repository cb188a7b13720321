"""Rotary positions of query and key as one node of autograd, in compiled kernels.

Attention layers of transformers call a function of their own module, ``apply_rotary_pos_emb``, which is eight
operations with a copy each. A layer whose function turns the halves of every head, which is tried on numbers, is
given the same forward with the function of
:func:`rotation` in that place. Belongs to the part ``kernels``.

Shape suffixes: B rows, H heads, T tokens, D head size. Reads and writes nothing.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from lora_kit.fast import compiled
from lora_kit.fast.linear import has_hooks, original_class

_NAME = "apply_rotary_pos_emb"


class Rotated:
    """Mixed into the class of an attention layer: its forward with the function of :func:`rotation`, in training."""

    def forward(self, *args, **kwargs):
        if not torch.is_grad_enabled() or kwargs.get("cache") is not None or "past_key_values" in kwargs:
            return super().forward(*args, **kwargs)
        return self._rotated(*args, **kwargs)


def rotation(plain: Callable) -> Callable:
    """``apply_rotary_pos_emb``: for whole heads of one packed row by the kernel, else by ``plain``."""

    def rotate(query_BHTD, key_BHTD, cos_BTD, sin_BTD, *others, **options):
        fits = (query_BHTD.shape[0] == 1 == cos_BTD.shape[0] and not others and not options
                and cos_BTD.shape[-1] == query_BHTD.shape[-1] == key_BHTD.shape[-1]
                and query_BHTD.stride(-1) == 1 == key_BHTD.stride(-1)
                and compiled.serves(query_BHTD, key_BHTD, cos_BTD, sin_BTD))
        if not fits:
            return plain(query_BHTD, key_BHTD, cos_BTD, sin_BTD, *others, **options)
        cos_BTD, sin_BTD = cos_BTD.contiguous(), sin_BTD.contiguous()
        return tuple(_Node.apply(x, cos_BTD, sin_BTD) for x in (query_BHTD, key_BHTD))

    return rotate


class _Node(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x_BHTD, cos_BTD, sin_BTD):
        ctx.save_for_backward(cos_BTD, sin_BTD)
        return _turned(x_BHTD, cos_BTD, sin_BTD, 1.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_BHTD):
        dy_BHTD = dy_BHTD if dy_BHTD.stride(-1) == 1 else dy_BHTD.contiguous()
        return _turned(dy_BHTD, *ctx.saved_tensors, -1.0), None, None


def _turned(x_BHTD, cos_BTD, sin_BTD, sign: float):
    _, heads, length, size = x_BHTD.shape
    out_BTHD = x_BHTD.new_empty(1, length, heads, size)
    compiled.call("rotate", x_BHTD.dtype, x_BHTD, x_BHTD.stride(2), x_BHTD.stride(1), cos_BTD, sin_BTD, out_BTHD,
                  length, heads, size, sign)
    return out_BTHD.transpose(1, 2)


def use(plain) -> int:
    """Let the attention layers of ``plain`` whose rotation is the known one compute it here; how many do."""
    served = 0
    for module in list(plain.modules()):
        forward = inspect.unwrap(getattr(type(module), "forward", None) or type(module).__call__)
        if not isinstance(forward, types.FunctionType) or _NAME not in forward.__code__.co_names or has_hooks(module):
            continue
        function = forward.__globals__.get(_NAME)
        if not _is_known(function):
            continue
        ours = types.FunctionType(forward.__code__, forward.__globals__ | {_NAME: rotation(function)},
                                  forward.__name__, forward.__defaults__, forward.__closure__)
        ours.__kwdefaults__ = forward.__kwdefaults__
        original = original_class(module)
        module.__class__ = type(original.__name__, (Rotated, original), {
            "original_class": original, "__module__": original.__module__, "__doc__": Rotated.__doc__,
            "_rotated": ours})
        served += 1
    return served


def _is_known(function) -> bool:
    """Whether ``function`` turns numbers as the kernel does; called while the kernels are in use."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2))
    angles = torch.rand(1, 3, 4, generator=generator).repeat(1, 1, 2)
    try:
        theirs = function(query, key, angles.cos(), angles.sin())
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    return all(torch.allclose(one, other, atol=1e-6)
               for one, other in zip(theirs, rotation(function)(query, key, angles.cos(), angles.sin()), strict=True))
