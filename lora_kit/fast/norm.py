"""Part ``norm``: RMSNorm as one node of autograd that keeps its input and one number a token.

Plain autograd keeps the input, its fp32 copy and the normalised values, and passes over them
a dozen times. Which formula a module has (weight, or one plus weight as Gemma's) is found by trying.

Shape suffixes: N tokens, C width. Reads and writes nothing.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from lora_kit.fast import compiled, cuda
from lora_kit.fast.linear import has_hooks


class RMSNorm:
    """Mixed into the class of an RMSNorm of transformers."""

    def forward(self, x, *args, **kwargs):
        if args or kwargs or self.weight.requires_grad or x.dtype not in (torch.float32, torch.bfloat16):
            return super().forward(x, *args, **kwargs)
        run = cuda.norm_kernel(x) or _Node.apply
        return run(x, self.weight.detach(), self._plus_one, self._eps)


class _Node(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight_C, plus_one, eps):
        with torch.autocast(x.device.type, enabled=False):
            x_NC = x.reshape(-1, x.shape[-1])
            if compiled.serves(x_NC):
                x_NC, factor_C = x_NC.contiguous(), weight_C.float() + plus_one
                y_NC, scale_N1 = torch.empty_like(x_NC), x_NC.new_empty(len(x_NC), 1, dtype=torch.float32)
                compiled.call("norm_forward", x.dtype, x_NC, factor_C, y_NC, scale_N1, *x_NC.shape, eps)
                ctx.save_for_backward(x_NC, scale_N1, factor_C)
                return y_NC.view(x.shape)
            norm_N1 = torch.linalg.vector_norm(x_NC, dim=1, keepdim=True, dtype=torch.float32)
            scale_N1 = torch.rsqrt(norm_N1.square_().div_(x.shape[-1]).add_(eps))
            factor_C = weight_C.float() + 1 if plus_one else weight_C.float()
            y_NC = (x_NC * scale_N1).mul_(factor_C)
        ctx.save_for_backward(x_NC, scale_N1, factor_C)
        return y_NC.to(x.dtype).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x_NC, scale_N1, factor_C = ctx.saved_tensors
        if compiled.serves(x_NC, dy):
            dx_NC = torch.empty_like(x_NC)
            compiled.call("norm_backward", x_NC.dtype, dy.contiguous(), x_NC, scale_N1, factor_C, dx_NC, *x_NC.shape)
            return dx_NC.view(dy.shape), None, None, None
        dx_NC = dy.reshape(x_NC.shape) * factor_C
        dot_N1 = (dx_NC * x_NC).sum(1, keepdim=True)
        # d(x·scale)/dx: the part of the gradient along x is taken out.
        along_N1 = dot_N1.mul_(scale_N1.pow(3)).div_(-x_NC.shape[1])
        dx_NC.mul_(scale_N1).addcmul_(x_NC.float(), along_N1)
        return dx_NC.to(x_NC.dtype).view(dy.shape), None, None, None


def is_candidate(module) -> bool:
    """Whether ``module`` is called an RMSNorm."""
    return type(module).__name__.endswith("RMSNorm")


def prepare(module) -> str | None:
    """Note on ``module`` which formula it has; the reason where :class:`RMSNorm` does not serve."""
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps", "epsilon")
                if isinstance(getattr(module, name, None), float)), None)
    if weight is None or weight.dim() != 1 or eps is None:
        return f"{type(module).__name__} has another form"
    if weight.requires_grad:
        return "it is trained"
    if hasattr(weight, "to_local"):
        return "weights that are sharded"
    if has_hooks(module):
        return "hooks"
    with torch.no_grad():
        x = torch.linspace(-3, 4, 3 * weight.numel(), device=weight.device).view(1, 3, -1).to(weight.dtype)
        wanted = module(x)
        tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
        for plus_one in (False, True):
            if torch.allclose(_Node.apply(x, weight, plus_one, eps), wanted, rtol=tolerance, atol=tolerance):
                module._plus_one, module._eps = plus_one, eps
                return None
    return f"{type(module).__name__} has another formula"
