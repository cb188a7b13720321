"""Part ``linear``: a linear layer and its LoRA as one node of autograd.

Plain peft runs five operations, each with a node of its own that keeps what it needs, rounds
after each and passes over the whole output three times. Here the low-rank term is added by the
product itself, and x and xAᵀ are all that is kept.

In fp32 the term is accumulated into the output (``addmm``). In bf16 that would round xWᵀ before a
small term is added, which loses most of it in the first steps; there one product over augmented
matrices is used, ``y = [x, xAᵀ]·[W, sB]ᵀ`` and ``dx = [dy, s·dyB]·[W; A]``, which adds in the
product's own fp32 accumulators. Both augmented matrices are views of one array, which holds W
itself: no weight is held twice.

Shape suffixes: N tokens, C inputs, O outputs, R rank. Reads and writes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable


class Weights(NamedTuple):
    """One linear layer as the products below take it; ``a`` and ``b`` are None where it has no LoRA.

    ``joined`` is [[W, sB], [A, 0]] of shape (O+R, C+R) where the arithmetic is below fp32, else None.
    """

    weight_OC: torch.Tensor
    bias_O: torch.Tensor | None
    a_RC: torch.Tensor | None
    b_OR: torch.Tensor | None
    scale: float
    joined: torch.Tensor | None


def forward(x_NC: torch.Tensor, w: Weights) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(y_NO, h_NR) with y = xWᵀ + bias + s·hBᵀ and h = xAᵀ."""
    if w.a_RC is None:
        return torch.nn.functional.linear(x_NC, w.weight_OC, w.bias_O), None
    h_NR = x_NC @ w.a_RC.t()
    if w.joined is not None:
        out = w.weight_OC.shape[0]
        return torch.nn.functional.linear(torch.cat([x_NC, h_NR], 1), w.joined[:out], w.bias_O), h_NR
    y_NO = torch.nn.functional.linear(x_NC, w.weight_OC, w.bias_O)
    return y_NO.addmm_(h_NR, w.b_OR.t(), alpha=w.scale), h_NR


def backward(
    dy_NO: torch.Tensor, x_NC: torch.Tensor, h_NR: torch.Tensor | None, w: Weights, wants_dx: bool,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dx_NC, dA_RC, dB_OR) of :func:`forward`; dx is None unless wanted, and is added to ``into`` when given."""
    dx_NC, dh_NR = backward_of_input(dy_NO, w, wants_dx, into)
    return dx_NC, *backward_of_adapter(dy_NO, dh_NR, x_NC, h_NR, w)


def backward_of_input(
    dy_NO: torch.Tensor, w: Weights, wants_dx: bool = True, into: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dx_NC, dh_NR): what :func:`backward` can say without x; dh is None without a LoRA."""
    if w.a_RC is None:
        return (_product(dy_NO, w.weight_OC, into) if wants_dx else None), None
    dh_NR = dy_NO @ w.b_OR
    dh_NR *= w.scale
    if not wants_dx:
        return None, dh_NR
    if w.joined is not None:
        inputs = w.weight_OC.shape[1]
        return _product(torch.cat([dy_NO, dh_NR], 1), w.joined[:, :inputs], into), dh_NR
    return _product(dy_NO, w.weight_OC, into).addmm_(dh_NR, w.a_RC), dh_NR


def backward_of_adapter(
    dy_NO: torch.Tensor, dh_NR: torch.Tensor | None, x_NC: torch.Tensor, h_NR: torch.Tensor | None, w: Weights,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(dA_RC, dB_OR), from the dh of :func:`backward_of_input`; None without a LoRA."""
    if dh_NR is None:
        return None, None
    # The product with few rows is the fast one of the two that give the same matrix.
    return dh_NR.t() @ x_NC, (h_NR.t() @ dy_NO).t() * w.scale


def _product(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor | None) -> torch.Tensor:
    if into is None:
        return left @ right
    return into.addmm_(left, right) if into.dtype == torch.float32 else into.add_(left @ right)


class LoraLinear:
    """Mixed into the class of a LoRA linear layer of peft: its forward as one node where it is in plain use."""

    def forward(self, x, *args, **kwargs):
        if args or kwargs or not in_plain_use(self):
            return super().forward(x, *args, **kwargs)
        w = weights_of(self)
        lora = adapter_parameters(self)
        y_NO = _Node.apply(x.reshape(-1, x.shape[-1]).to(w.weight_OC.dtype), w, *lora)
        return y_NO.view(*x.shape[:-1], y_NO.shape[-1])


class _Node(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x_NC, w, a_RC, b_OR):
        with torch.autocast(x_NC.device.type, enabled=False):
            y_NO, h_NR = forward(x_NC, w)
        ctx.w = w
        ctx.save_for_backward(x_NC, h_NR)
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_NO):
        x_NC, h_NR = ctx.saved_tensors
        dx_NC, da_RC, db_OR = backward(dy_NO, x_NC, h_NR, ctx.w, ctx.needs_input_grad[0])
        return dx_NC, None, da_RC, db_OR


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


def weights_of(module) -> Weights:
    """What :func:`forward` takes of a LoRA layer, or of a plain linear one, in the type of its base's weight."""
    base = getattr(module, "base_layer", module)
    if base is module:
        return Weights(base.weight.detach(), _detached(base.bias), None, None, 1.0, None)
    a, b = adapter_parameters(module)
    scale = float(module.scaling[module.active_adapters[0]])
    weight, dtype = base.weight.detach(), base.weight.dtype
    if dtype == torch.float32:
        return Weights(weight, _detached(base.bias), a.detach(), b.detach(), scale, None)
    out, inputs = weight.shape
    joined = join(module)
    made_from = (a._version, b._version, a.data_ptr(), b.data_ptr(), scale)
    if module.__dict__.get("_joined_from") != made_from:
        # Once per optimizer step.
        joined[:out, inputs:] = b.detach() * scale
        joined[out:, :inputs] = a.detach()
        module.__dict__["_joined_from"] = made_from
        module.__dict__["_b"] = b.detach().to(dtype)
    return Weights(weight, _detached(base.bias), joined[out:, :inputs], module.__dict__["_b"], scale, joined)


def join(module) -> torch.Tensor:
    """The array of ``module`` that holds W, sB and A; made when there is none, W then being a view of it."""
    base, rank = module.base_layer, adapter_parameters(module)[0].shape[0]
    joined = module.__dict__.get("_joined")
    if joined is None or joined.data_ptr() != base.weight.data_ptr():
        out, inputs = base.weight.shape
        joined = base.weight.new_zeros(out + rank, inputs + rank)
        joined[:out, :inputs] = base.weight.detach()
        base.weight.data = joined[:out, :inputs]
        module.__dict__["_joined"] = joined
        module.__dict__.pop("_joined_from", None)
    return joined


def part(module) -> None:
    """Undo :func:`join`: the base's weight is an array of its own again."""
    if module.__dict__.pop("_joined", None) is not None:
        module.base_layer.weight.data = module.base_layer.weight.detach().contiguous()
        module.__dict__.pop("_joined_from", None)
        module.__dict__.pop("_b", None)


def _detached(tensor):
    return None if tensor is None else tensor.detach()
