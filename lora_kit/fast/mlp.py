"""Part ``mlp``: a gated MLP, ``down(act(gate(x)) · up(x))``, with its LoRAs as one node of autograd.

Keeps x and the outputs of gate and up; plain autograd keeps the activation and the product as
well. Both are made again in the backward pass, elementwise, which is cheaper than holding them.

Shape suffixes: N tokens, C width, F width of the MLP. Reads and writes nothing.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from lora_kit.fast import compiled, linear

_KINDS = {"silu": 0, "tanh": 1}
"""Activations that kernels.c has."""
_NAMES = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"))


class GatedMLP:
    """Mixed into the class of a gated MLP of transformers."""

    def forward(self, x, *args, **kwargs):
        layers = [getattr(self, name) for name in self._layers]
        if args or kwargs or not all(linear.in_plain_use(layer) for layer in layers if hasattr(layer, "base_layer")):
            return super().forward(x, *args, **kwargs)
        return _run(x, layers, self._activation)


def _run(x, layers, activation: str):
    weights = [*_weights(layers), linear.weights_of(layers[-1])]
    parameters = [parameter for layer in layers for parameter in
                  (linear.adapter_parameters(layer) if hasattr(layer, "base_layer") else (None, None))]
    y_NC = _Node.apply(x.reshape(-1, x.shape[-1]).to(weights[0].weight_OC.dtype), activation, weights, *parameters)
    return y_NC.view(*x.shape[:-1], y_NC.shape[-1])


def _weights(layers) -> list[linear.Weights]:
    """Of gate and up: as one where both have a LoRA and stand in one array."""
    inner = layers[:-1]
    bases = [getattr(layer, "base_layer", None) for layer in inner]
    as_one = (len(inner) == 2 and None not in bases and bases[0].weight.dtype != torch.float32
              and (bases[0].bias is None) == (bases[1].bias is None))
    return [linear.weights_of(*inner)] if as_one else [linear.weights_of(layer) for layer in inner]


class _Node(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x_NC, activation, weights, *parameters):
        with torch.autocast(x_NC.device.type, enabled=False):
            *inner, down = weights
            outs = [linear.forward(x_NC, w) for w in inner]
            gate_NF, up_NF = _halves([out for out, _ in outs])
            room = linear.room_for_input(len(x_NC), down, x_NC)
            y_NC, h_NR = linear.forward(_gated(activation, gate_NF, up_NF, room), down, room)
        ctx.activation, ctx.weights = activation, weights
        ctx.save_for_backward(x_NC, h_NR, *(tensor for pair in outs for tensor in pair))
        return y_NC

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NC):
        x_NC, h_NR, *kept = ctx.saved_tensors
        *inner, down = ctx.weights
        outs, hidden = kept[::2], kept[1::2]
        gate_NF, up_NF = _halves(outs)
        dm_NF, dh_NR = linear.backward_of_input(dy_NC, down)
        rooms = [linear.room_for_gradient(len(x_NC), w, dm_NF) for w in inner]
        m_NF, douts = _gated_backward(ctx.activation, dm_NF, gate_NF, up_NF, rooms)
        down_grads = linear.backward_of_adapter(dy_NC, dh_NR, m_NF, h_NR, down)
        del dm_NF, m_NF
        dx_NC, grads = None, []
        for dout, h, w, room in zip(douts, hidden, inner, rooms, strict=True):
            dx_NC, dh = linear.backward_of_input(dout, w, ctx.needs_input_grad[0], dx_NC, room)
            grads += linear.backward_of_adapter(dout, dh, x_NC, h, w)
        return dx_NC, None, None, *grads, *down_grads


def _gated(activation: str, gate_NF, up_NF, room: torch.Tensor | None):
    """act(gate) · up; in the first columns of ``room`` where there is one."""
    width = gate_NF.shape[1]
    out_NF = gate_NF.new_empty(gate_NF.shape) if room is None else room[:, :width]
    if activation in _KINDS and compiled.serves(gate_NF, up_NF):
        compiled.call("gate_forward", gate_NF.dtype, gate_NF, gate_NF.stride(0), up_NF, up_NF.stride(0), out_NF,
                      out_NF.stride(0), *gate_NF.shape, _KINDS[activation])
        return out_NF
    return torch.mul(_forward(activation, gate_NF), up_NF, out=out_NF)


def _gated_backward(activation: str, dm_NF, gate_NF, up_NF, rooms: list[torch.Tensor | None]):
    """(act(gate) · up once more, [gradients of gate and up], one beside the other where ``rooms`` has one place).

    Each gradient lies in the first columns of its room where there is one.
    """
    if activation in _KINDS and compiled.serves(dm_NF, gate_NF, up_NF):
        douts = _places(dm_NF, 2 * gate_NF.shape[1] // len(rooms), rooms)
        again_NF, (dgate_NF, dup_NF) = torch.empty_like(dm_NF), _halves(douts)
        compiled.call("gate_backward", dm_NF.dtype, dm_NF, gate_NF, gate_NF.stride(0), up_NF, up_NF.stride(0),
                      dgate_NF, dup_NF, dgate_NF.stride(0), again_NF, *dm_NF.shape, _KINDS[activation])
        return again_NF, douts
    active_NF = _forward(activation, gate_NF)
    again_NF, dgate_NF = active_NF * up_NF, _backward(activation, dm_NF * up_NF, gate_NF)
    dup_NF = dm_NF.mul_(active_NF)
    if len(rooms) == 2 and None in rooms:
        return again_NF, [dgate_NF, dup_NF]
    del active_NF
    douts = _places(dm_NF, 2 * gate_NF.shape[1] // len(rooms), rooms)
    for place, gradient in zip(_halves(douts), (dgate_NF, dup_NF), strict=True):
        place.copy_(gradient)
    return again_NF, douts


def _places(like: torch.Tensor, width: int, rooms: list[torch.Tensor | None]) -> list[torch.Tensor]:
    return [like.new_empty(len(like), width) if room is None else room[:, :width] for room in rooms]


def _halves(outs):
    return outs if len(outs) == 2 else outs[0].chunk(2, dim=1)


def _forward(activation: str, x):
    if activation == "silu":
        return torch.nn.functional.silu(x)
    return torch.nn.functional.gelu(x, approximate=activation)


def _backward(activation: str, dy, x):
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, x)
    return torch.ops.aten.gelu_backward(dy, x, approximate=activation)


def is_candidate(module) -> bool:
    """Whether ``module`` looks like a gated MLP."""
    return any(all(hasattr(module, name) for name in names) for names in _NAMES)


def prepare(module) -> str | None:
    """Note on ``module`` what :class:`GatedMLP` needs; the reason where it does not serve."""
    names = next(names for names in _NAMES if all(hasattr(module, name) for name in names))
    for name in names:
        layer = getattr(module, name)
        reason = linear.why_not(layer) if hasattr(layer, "base_layer") else _why_not_plain(layer)
        if reason:
            return f"{name}: {reason}"
    function = getattr(module, "act_fn", None) or getattr(module, "activation_fn", None)
    activation = _activation_of(function)
    if activation is None:
        return f"activation {type(function).__name__}"
    module._layers, module._activation = names, activation
    weight = getattr(module, names[0]).weight
    with torch.no_grad():
        x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device, dtype=weight.dtype).view(1, 2, -1)
        tolerance = 1e-4 if weight.dtype == torch.float32 else 3e-2
        wanted, ours = module(x), _run(x, [getattr(module, name) for name in names], activation)
        if wanted.shape != ours.shape or (ours - wanted).abs().max() > tolerance * wanted.abs().max():
            return f"{type(module).__name__} has another formula"
    return None


def _why_not_plain(layer) -> str | None:
    if type(layer) is not torch.nn.Linear:
        return f"a {type(layer).__name__} is not a plain linear layer"
    if any(parameter.requires_grad for parameter in layer.parameters()):
        return "a layer that is trained as a whole"
    if any(hasattr(parameter, "to_local") for parameter in layer.parameters()):
        return "weights that are sharded"
    return "hooks" if linear.has_hooks(layer) else None


def _activation_of(function) -> str | None:
    """``silu`` or the ``approximate`` of gelu that gives what ``function`` gives; None when none does."""
    if not callable(function):
        return None
    x = torch.linspace(-6, 6, 101)
    with torch.no_grad():
        wanted = function(x)
        return next((name for name in ("silu", "none", "tanh")
                     if torch.allclose(_forward(name, x), wanted, rtol=1e-5, atol=1e-6)), None)
