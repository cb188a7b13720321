"""Linear layers that read the same input, such as query, key and value, as one product (part ``linear``).

The first that is called computes all, and the others take theirs. That they read the same is seen when they are
called; where they do not, each is on its own from then on. Below fp32 only: there the layers stand in one array
anyhow (``linear.py``), and one product over it saves copies of the input and sums of gradients.

Reads and writes nothing.
"""

from __future__ import annotations

from typing import Any

import torch

from lora_kit.fast import linear

_NAMES = ("q_proj", "k_proj", "v_proj")
_TRIES = 2
"""Passes in a row whose outputs may stay untaken (one that ran out of memory, say) before the layers part."""


class Siblings:
    """LoRA layers of one input, which are called one after the other, the first one first."""

    def __init__(self, layers: list) -> None:
        self.layers = layers
        self._untaken: dict[int, torch.Tensor] = {}
        self._made_from: tuple[Any, ...] = ()
        self._lost = 0
        for layer in layers:
            layer.__dict__["_siblings"] = self

    def output_of(self, layer, x: torch.Tensor) -> torch.Tensor | None:
        """What ``layer`` makes of ``x``; None when it has to compute that itself, as from then on."""
        if not all(map(linear.in_plain_use, self.layers)):
            return None
        if layer is self.layers[0]:
            self._lost = self._lost + 1 if self._untaken else 0
            if self._lost > _TRIES:
                return self._part()
            outputs = linear.outputs_of(self.layers, x)
            self._made_from = (x, x._version, torch.is_grad_enabled())
            self._untaken = dict(zip(map(id, self.layers), outputs, strict=True))
        elif not self._untaken or self._made_from[0] is not x or self._made_from[1:] != (
                x._version, torch.is_grad_enabled()):
            return self._part()
        output = self._untaken.pop(id(layer), None)
        if output is None:
            return self._part()
        if not self._untaken:
            self._made_from = ()
        return output

    def _part(self) -> None:
        self._untaken, self._made_from = {}, ()
        for layer in self.layers:
            layer.__dict__.pop("_siblings", None)


def use(plain) -> None:
    """Let the layers of ``plain`` that ``linear`` serves and that read one input by their names do so."""
    for module in plain.modules():
        layers = [getattr(module, name, None) for name in _NAMES]
        if not all(isinstance(layer, linear.LoraLinear) for layer in layers):
            continue
        bases = [layer.base_layer for layer in layers]
        alike = len({(base.weight.shape[1], base.weight.dtype, base.bias is None) for base in bases}) == 1
        if alike and bases[0].weight.dtype != torch.float32:
            Siblings(layers)
