"""Kernels of others that parts of the fast path use on CUDA where they are installed.

``cut_cross_entropy`` for part ``loss`` (16-bit weights), ``liger_kernel`` for part ``norm``. Without them the
kit's own nodes serve there too. Nothing here has been run or measured on a GPU: none was at hand. The proof
before the first step compares what they give with plain peft, as it does for everything else.

Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch


def applies(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is where these kernels run."""
    return tensor.device.type == "cuda"


def loss_kernel(hidden_KC: torch.Tensor) -> Callable | None:
    """``kernel(hidden, weight, bias, targets)``: the summed loss of head and cross-entropy; None without one."""
    if not applies(hidden_KC) or hidden_KC.dtype == torch.float32:
        return None
    linear_cross_entropy = _installed("cut_cross_entropy", "linear_cross_entropy")
    if linear_cross_entropy is None:
        return None
    return lambda hidden, weight, bias, targets: linear_cross_entropy(hidden, weight, targets, bias=bias,
                                                                      reduction="sum")


def norm_kernel(x: torch.Tensor) -> Callable | None:
    """``kernel(x, weight, plus_one, eps)``, an RMSNorm; None where there is none."""
    if not applies(x):
        return None
    function = _installed("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    if function is None:
        return None
    return lambda x, weight, plus_one, eps: function.apply(
        x, weight, eps, 1.0 if plus_one else 0.0, "gemma" if plus_one else "llama", False)


@cache
def _installed(module: str, name: str):
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, RuntimeError):  # Triton raises what it likes where it cannot be used
        return None
