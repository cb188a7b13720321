"""Operations of a LoRA step, counted from the model's own weights, and the rate that the machine reaches at best.

The two together give the share of the ceiling (model FLOPs utilisation): what the step needs, whatever was done to
make it quick, over its seconds, over the rate of one large matrix product of the same dtype on the same device right
before. Padding, work done twice (checkpointing), norms, softmax and activations are not counted as needed.

Per token 4 a frozen weight (forward, and the gradient to its input) and 6 a trained one; the same of the head where a
token is trained on; per pair of tokens that attend to each other 12·A·D a layer (scores and their weighted sum forward,
twice that backward; A heads of size D). Source: Kaplan et al. 2020 (arXiv:2001.08361) section 2.1 and table 1, without
the frozen weights' own gradients. The first block's input needs no gradient, which is not subtracted.

Shape-free; reads and writes nothing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

from lora_kit import stopwatch
from lora_kit.model import torch_dtype

_SIZES = (512, 1024, 2048, 4096, 8192)
_NOT_USED = ("original_module",)
"""Parts of the names of weights that peft keeps beside those it trains in their place."""


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """What a step costs: per token, per token that is trained on, and per pair of tokens that attend to each other."""

    per_token: float
    per_trained_token: float
    per_pair: float
    """Of one layer."""
    layers: tuple[tuple[int | None, int], ...]
    """(tokens that a position sees, itself included, None for all before it; number of such layers)."""

    def of_rows(self, lengths: Iterable[int], num_trained: int) -> float:
        """Operations, forward and backward, of rows of ``lengths`` tokens with ``num_trained`` trained on in all."""
        lengths = list(lengths)
        pairs = sum(number * num_pairs(length, window) for window, number in self.layers for length in lengths)
        return self.per_token * sum(lengths) + self.per_trained_token * num_trained + self.per_pair * pairs


def num_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a token and one that it attends to, itself included, in a causal row of ``length`` tokens."""
    if window is None or length <= window:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window


def count(net) -> StepFlops | None:
    """What a step of ``net`` (a causal LM of transformers with a peft adapter) costs a token; None where that cannot
    be said from its weights: convolutions, experts of which each token passes some, sizes that its config lacks."""
    from torch.nn import Embedding

    config = net.config.get_text_config()
    layers = _layers(config)
    heads = getattr(config, "num_attention_heads", None)
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else None)
    if layers is None or not size or any(getattr(config, name, None) for name in ("num_experts", "num_local_experts")):
        return None
    plain = net.get_base_model() if hasattr(net, "get_base_model") else net
    head = plain.get_output_embeddings()
    of_head = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    seen: set[int] = set()
    per_token = per_trained_token = 0.0
    for module_name, module in net.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{name}"
            looked_up = isinstance(module, Embedding) and id(parameter) not in of_head or "lora_embedding_A" in full
            if id(parameter) in seen or looked_up or any(part in full.split(".") for part in _NOT_USED):
                continue
            seen.add(id(parameter))
            shape = _shape(parameter)
            if len(shape) > 2:
                return None
            flops = (6.0 if parameter.requires_grad else 4.0) * math.prod(shape) if len(shape) == 2 else 0.0
            if id(parameter) in of_head:
                per_trained_token += flops
            else:
                per_token += flops
    return StepFlops(per_token=per_token, per_trained_token=per_trained_token, per_pair=12.0 * heads * size,
                     layers=layers)


def _shape(parameter) -> tuple[int, ...]:
    """A weight's shape; of a 4-bit one what it stands for."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return tuple(parameter.shape if shape is None else shape)


def _layers(config) -> tuple[tuple[int | None, int], ...] | None:
    """How far the layers see; None where some do not attend."""
    number, window = getattr(config, "num_hidden_layers", None), getattr(config, "sliding_window", None)
    if not number:
        return None
    kinds = list(getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * number)
    if set(kinds) - {"full_attention", "sliding_attention"}:
        return None
    sliding = kinds.count("sliding_attention")
    return tuple((far, times) for far, times in ((None, len(kinds) - sliding), (window, sliding)) if times)


@stopwatch.part("matrix ceiling")
def ceiling_of_all(accelerator, precision: str) -> float:
    """What the devices of all processes reach together, each measured at the same time; see :func:`measure_ceiling`."""
    import torch

    ours = torch.tensor(measure_ceiling(accelerator.device, precision), device=accelerator.device)
    return float(accelerator.reduce(ours, "sum"))


def measure_ceiling(device, precision: str, *, seconds: float = 0.3) -> float:
    """Operations a second of a square matrix product on ``device``, as it is now: the best rate seen.

    Args:
        device: a torch device or its name. On a CPU with as many threads as torch uses now.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        seconds: about how long to measure. The matrices grow to a size at which one product takes a fair part of it.
    """
    import torch

    device = torch.device(device)
    # Not zeros or ones, which a GPU multiplies at higher clocks; nor of the generator that training draws from.
    drawn = torch.Generator(device).manual_seed(0)
    best, ends = 0.0, time.perf_counter() + seconds
    for size in _SIZES:
        left, right = (torch.randn(size, size, device=device, generator=drawn).to(torch_dtype(precision))
                       for _ in range(2))
        out = torch.mm(left, right)
        while True:
            _wait_for(device)
            started = time.perf_counter()
            torch.mm(left, right, out=out)
            _wait_for(device)
            now = time.perf_counter()
            best = max(best, 2.0 * size**3 / (now - started))
            # Two products of twice the size take sixteen times as long: the next size only when they fit.
            larger_fits = size != _SIZES[-1] and now + 16 * (now - started) < ends
            if larger_fits or now + (now - started) > ends:
                break
        if not larger_fits:
            return best
    raise AssertionError("the last size ends the loop")


def _wait_for(device) -> None:
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)
