"""Part ``linear``: a linear layer and its LoRA as one node of autograd.

Plain peft runs five operations, each with a node of its own that keeps what it needs, rounds
after each and passes over the whole output three times. Here the low-rank term is added by the
product itself, and x and xAᵀ are all that is kept.

In fp32 the term is accumulated into the output (``addmm``). In bf16 that would round xWᵀ before a
small term is added, which loses most of it in the first steps; there one product over augmented
matrices is used, ``y = [x, xAᵀ]·[W, sB]ᵀ`` and ``dx = [dy, dy·sB]·[W; A]``, which adds in the
product's own fp32 accumulators. Both augmented matrices are views of one array, which holds W
itself: no weight is held twice. Layers that read the same x stand in one array, below each other
(``siblings.py``): one product each way serves them all.

Shape suffixes: N tokens, C inputs, O outputs, R rank. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable


class Block(NamedTuple):
    """Where one layer stands in :class:`Weights` of several: its outputs, its ranks, and alpha over rank."""

    outputs: slice
    ranks: slice
    scale: float


class Weights(NamedTuple):
    """One linear layer as the products below take it, or several of one input, below each other.

    ``a`` and ``b`` are None without a LoRA. ``joined`` is [[W, sB], [A, 0]] of shape (O+R, C+R) where the arithmetic is
    below fp32, else None; ``b`` is sB then, and of several layers each has columns of its own, zero for the others.
    """

    weight_OC: torch.Tensor
    bias_O: torch.Tensor | None
    a_RC: torch.Tensor | None
    b_OR: torch.Tensor | None
    blocks: tuple[Block, ...]
    joined: torch.Tensor | None


def room_for_input(num_tokens: int, w: Weights, like: torch.Tensor) -> torch.Tensor | None:
    """An array whose first C columns are for an x that is to be made, so that :func:`forward` need not copy it."""
    return None if w.joined is None else like.new_empty(num_tokens, w.joined.shape[1])


def room_for_gradient(num_tokens: int, w: Weights, like: torch.Tensor) -> torch.Tensor | None:
    """An array whose first O columns are for a dy that is to be made: the same of :func:`backward_of_input`."""
    return None if w.joined is None else like.new_empty(num_tokens, w.joined.shape[0])


def forward(
    x_NC: torch.Tensor, w: Weights, room: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y_NO, h_NR) with y = xWᵀ + bias + s·hBᵀ and h = xAᵀ; x may lie in ``room``."""
    if w.a_RC is None:
        return torch.nn.functional.linear(x_NC, w.weight_OC, w.bias_O), None
    h_NR = x_NC @ w.a_RC.t()
    if w.joined is not None:
        return torch.nn.functional.linear(_beside(x_NC, h_NR, room), w.joined[:len(w.weight_OC)], w.bias_O), h_NR
    y_NO = torch.nn.functional.linear(x_NC, w.weight_OC, w.bias_O)
    return y_NO.addmm_(h_NR, w.b_OR.t(), alpha=w.blocks[0].scale), h_NR


def backward_of_input(
    dy_NO: torch.Tensor, w: Weights, wants_dx: bool = True, into: torch.Tensor | None = None,
    room: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx_NC, dh_NR): what of the backward pass needs no x; dy may lie in ``room``, dx is added to ``into``.

    dx is None unless wanted, dh without a LoRA.
    """
    if w.a_RC is None:
        return (_product(dy_NO, w.weight_OC, into) if wants_dx else None), None
    dh_NR = dy_NO @ w.b_OR
    if w.joined is None:
        dh_NR *= w.blocks[0].scale
    if not wants_dx:
        return None, dh_NR
    if w.joined is not None:
        return _product(_beside(dy_NO, dh_NR, room), w.joined[:, :w.weight_OC.shape[1]], into), dh_NR
    return _product(dy_NO, w.weight_OC, into).addmm_(dh_NR, w.a_RC), dh_NR


def backward_of_adapter(
    dy_NO: torch.Tensor, dh_NR: torch.Tensor | None, x_NC: torch.Tensor, h_NR: torch.Tensor | None, w: Weights,
) -> list[torch.Tensor | None]:
    """dA_RC and dB_OR of each layer, from the dh of :func:`backward_of_input`; None without a LoRA."""
    if dh_NR is None:
        return [None, None]
    # The product with few rows is the fast one of the two that give the same matrix.
    da_RC, db_RO = dh_NR.t() @ x_NC, h_NR.t() @ dy_NO
    return [gradient for block in w.blocks
            for gradient in (da_RC[block.ranks], db_RO[block.ranks, block.outputs].t() * block.scale)]


def _beside(left: torch.Tensor, right: torch.Tensor, room: torch.Tensor | None) -> torch.Tensor:
    """[left, right]: in ``room``, where left lies already, or copied."""
    if room is None:
        return torch.cat([left, right], 1)
    room[:, left.shape[1]:] = right
    return room


def _product(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    if into is None:
        return left @ right
    return into.addmm_(left, right) if into.dtype == torch.float32 else into.add_(left @ right)


class LoraLinear:
    """Mixed into the class of a LoRA linear layer of peft: its forward as one node where it is in plain use."""

    def forward(self, x, *args, **kwargs):
        if args or kwargs or not in_plain_use(self):
            return super().forward(x, *args, **kwargs)
        siblings = self.__dict__.get("_siblings")
        y = siblings.output_of(self, x) if siblings else None
        return outputs_of([self], x)[0] if y is None else y


def outputs_of(layers: Sequence, x: torch.Tensor) -> list[torch.Tensor]:
    """What LoRA layers make of the same ``x``, as one node; several only below fp32."""
    w = weights_of(*layers)
    parameters = [parameter for layer in layers for parameter in adapter_parameters(layer)]
    outputs = Node.apply(x.reshape(-1, x.shape[-1]).to(w.weight_OC.dtype), w, *parameters)
    return [y_NO.view(*x.shape[:-1], y_NO.shape[-1]) for y_NO in outputs]


class Node(torch.autograd.Function):
    """:class:`Weights` as one node that gives the outputs of each layer."""

    @staticmethod
    def forward(ctx, x_NC, w, *parameters):
        with torch.autocast(x_NC.device.type, enabled=False):
            y_NO, h_NR = forward(x_NC, w)
        ctx.w = w
        ctx.save_for_backward(x_NC, h_NR)
        *others, last = (y_NO[:, block.outputs] for block in w.blocks)
        # Values are kept as they are until the backward pass; as a view they would keep queries and keys too.
        return *others, last.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys_NO):
        x_NC, h_NR = ctx.saved_tensors
        dy_NO, room = dys_NO[0], None
        if len(dys_NO) > 1:
            room = room_for_gradient(len(x_NC), ctx.w, x_NC)
            dy_NO = room[:, :len(ctx.w.weight_OC)]
            for block, own_NO in zip(ctx.w.blocks, dys_NO, strict=True):
                dy_NO[:, block.outputs] = own_NO
        dx_NC, dh_NR = backward_of_input(dy_NO, ctx.w, ctx.needs_input_grad[0], None, room)
        return dx_NC, None, *backward_of_adapter(dy_NO, dh_NR, x_NC, h_NR, ctx.w)


def why_not(module) -> str | None:
    """None when :class:`LoraLinear` serves ``module`` (a LoRA layer of peft), else the reason."""
    from peft.tuners.lora.layer import Linear

    if original_class(module) is not Linear:
        return f"a {type(module).__name__} is not a plain LoRA linear layer"
    if type(module.base_layer) is not torch.nn.Linear:
        return f"its base is a {type(module.base_layer).__name__}"
    if len(module.active_adapters) != 1 or len(module.lora_A) != 1:
        return "several adapters are on it"
    name = module.active_adapters[0]
    if name in module.lora_variant:
        return "its variant of LoRA"
    if getattr(module.lora_dropout[name], "p", 0.0):
        return "dropout"
    inner = (module.base_layer, module.lora_A[name], module.lora_B[name])
    if any(has_hooks(part) for part in inner):
        return "hooks"
    if module.lora_A[name].bias is not None or module.lora_B[name].bias is not None:
        return "a LoRA with bias"
    if any(parameter.requires_grad for parameter in module.base_layer.parameters()):
        return "a base that is trained too"
    if any(hasattr(parameter, "to_local") for parameter in module.parameters()):
        return "weights that are sharded"
    return None


def original_class(module) -> type:
    """The class of ``module`` before the fast path gave it another."""
    return getattr(type(module), "original_class", type(module))


def has_hooks(module) -> bool:
    """Whether something watches or changes what goes in or out of ``module``."""
    return any(getattr(module, name, None) for name in (
        "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"))


def in_plain_use(module) -> bool:
    """Whether the adapter of a layer that was prepared is switched on and not merged."""
    return not (module.disable_adapters or module.merged)


def adapter_parameters(module) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    """(A, B): the parameters that train."""
    name = module.active_adapters[0]
    return module.lora_A[name].weight, module.lora_B[name].weight


def weights_of(*layers) -> Weights:
    """What :func:`forward` takes of a LoRA layer, or of a plain linear one, in the type of its base's weight.

    Several have to be LoRA layers of one input and below fp32.
    """
    layer = layers[0]
    base = getattr(layer, "base_layer", layer)
    weight, bias = base.weight.detach(), _detached(base.bias)
    if base is layer:
        return Weights(weight, bias, None, None, (), None)
    if weight.dtype == torch.float32:
        a, b = adapter_parameters(layer)
        return Weights(weight, bias, a.detach(), b.detach(), (Block(slice(None), slice(None), _scale_of(layer)),), None)
    return joined_of(layers).weights()


class Joined:
    """The array of LoRA layers of one input that holds their W, sB and A; each base's weight becomes a view of it."""

    def __init__(self, layers: Sequence) -> None:
        self.layers = tuple(layers)
        bases = [layer.base_layer for layer in layers]
        outputs, ranks = sum(len(base.weight) for base in bases), sum(map(_rank_of, layers))
        self.num_outputs, self.num_inputs = outputs, bases[0].weight.shape[1]
        self.array = bases[0].weight.new_zeros(outputs + ranks, self.num_inputs + ranks)
        biases = [_detached(base.bias) for base in bases]
        self.bias = None if biases[0] is None else torch.cat(biases)
        self.blocks, self._made_from, output, rank = (), None, 0, 0
        for layer, base in zip(layers, bases, strict=True):
            block = Block(slice(output, output + len(base.weight)), slice(rank, rank + _rank_of(layer)),
                          _scale_of(layer))
            self.blocks += (block,)
            output, rank = block.outputs.stop, block.ranks.stop
            self.array[block.outputs, :self.num_inputs] = base.weight.detach()
            base.weight.data = self.array[block.outputs, :self.num_inputs]
            layer.__dict__["_joined"] = self

    def holds(self, layers: Sequence) -> bool:
        """Whether it is that of ``layers``, and their weights still lie in it."""
        return len(layers) == len(self.layers) and all(
            one is other and one.base_layer.weight.data_ptr() == self.array[block.outputs].data_ptr()
            for one, other, block in zip(layers, self.layers, self.blocks, strict=True))

    def weights(self) -> Weights:
        """It as the products take it, with A and B as they are now."""
        parameters = [adapter_parameters(layer) for layer in self.layers]
        made_from = [(a._version, b._version, a.data_ptr(), b.data_ptr(), _scale_of(layer))
                     for (a, b), layer in zip(parameters, self.layers, strict=True)]
        if made_from != self._made_from:
            # Once per optimizer step.
            self.blocks = tuple(block._replace(scale=_scale_of(layer))
                                for block, layer in zip(self.blocks, self.layers, strict=True))
            for (a, b), block in zip(parameters, self.blocks, strict=True):
                self._right[block.outputs, block.ranks] = b.detach() * block.scale
                self._below[block.ranks] = a.detach()
            self._made_from = made_from
        return Weights(self.array[:self.num_outputs, :self.num_inputs], self.bias, self._below, self._right,
                       self.blocks, self.array)

    @property
    def _right(self) -> torch.Tensor:
        return self.array[:self.num_outputs, self.num_inputs:]

    @property
    def _below(self) -> torch.Tensor:
        return self.array[self.num_outputs:, :self.num_inputs]


def joined_of(layers: Sequence) -> Joined:
    """The array of ``layers``; made when there is none, each then leaving the one that it was in."""
    joined = layers[0].__dict__.get("_joined")
    return joined if joined is not None and joined.holds(layers) else Joined(layers)


def part(module) -> None:
    """Undo :func:`joined_of`: the base's weight is an array of its own again."""
    module.__dict__.pop("_siblings", None)
    if module.__dict__.pop("_joined", None) is not None:
        module.base_layer.weight.data = module.base_layer.weight.detach().contiguous()


def _rank_of(layer) -> int:
    return adapter_parameters(layer)[0].shape[0]


def _scale_of(layer) -> float:
    return float(layer.scaling[layer.active_adapters[0]])


def _detached(tensor):
    return None if tensor is None else tensor.detach()
