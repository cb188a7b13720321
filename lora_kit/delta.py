"""How much of an adapter's change is left in an artifact's weights.

A trained change is small: 0.3 % of a weight is usual, and 16-bit numbers step by 0.4 %. So the change D' that an
artifact's weights show against the base's is held against the change D that the adapter is, in float64, module by
module: how much of D is in D' (projection, 1 where all of it is), what else is in it (noise, in units of D), and in how
many of the weights that D moves most the sign is right. Rounding at random leaves the projection near 1 and adds noise;
an adapter that was lost, scaled wrongly or left out of a layer moves the projection.

Reads the base's and the adapter's files and the artifact's weights; writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_kit.merging import Plan, Target, Values
from lora_kit.tensor_files import Reader, blocks, list_tensors

Read = Callable[[Target, int, int], Any]
"""Rows of a tensor of an artifact in fp32; None where the artifact has no such tensor."""


class _Sums:
    """Sums over the elements of one group of tensors."""

    def __init__(self) -> None:
        self.of_change = self.of_found = self.common = self.of_base = 0.0
        self.num_moved = self.num_right = self.num_tensors = 0

    def add(self, other: _Sums) -> None:
        for key, value in vars(other).items():
            setattr(self, key, getattr(self, key) + value)

    def figures(self) -> dict[str, Any]:
        projection = self.common / self.of_change
        noise = max(0.0, self.of_found - projection**2 * self.of_change) / self.of_change
        return {"projection": projection, "noise": noise**0.5,
                "sign": self.num_right / self.num_moved if self.num_moved else None,
                "relative_norm": (self.of_change / self.of_base) ** 0.5 if self.of_base else None,
                "num_tensors": self.num_tensors}


def measure(plan: Plan, read: Read, most_blocks: int | None = None) -> dict[str, Any]:
    """Retention of the plan's change in the weights that ``read`` gives.

    Args:
        most_blocks: look at so many blocks of each tensor only.

    Returns:
        ``projection``, ``noise``, ``sign`` (share of the weights that the change moves by more than its own
        root mean square and that the artifact moves the same way), ``relative_norm`` (the change to the base) over all
        tensors that the adapter changes; ``by_layer``: the same by number of the layer, or name of a module outside
        them; ``missing``: tensors that the artifact does not have.
    """
    by_layer, missing = {}, []
    with Values(plan) as values:
        for target in plan.targets.values():
            if not (target.changes and target.is_float):
                continue
            sums = _of_tensor(values, target, read, most_blocks)
            if sums is None:
                missing.append(target.name)
            elif sums.of_change:
                by_layer.setdefault(layer_of(target.name), _Sums()).add(sums)
    total = _Sums()
    for sums in by_layer.values():
        total.add(sums)
    return {**(total.figures() if by_layer else {}), "by_layer": {name: sums.figures()
                                                                  for name, sums in by_layer.items()},
            "missing": missing}


def layer_of(name: str) -> str:
    """``model.layers.3.mlp.up_proj.weight`` as ``3``, ``lm_head.weight`` as ``lm_head``."""
    number = re.search(r"\.(\d+)\.", name)
    return number.group(1) if number else name.rpartition(".")[0]


def _of_tensor(values: Values, target: Target, read: Read, most_blocks: int | None) -> _Sums | None:
    import torch

    sums, square, count, parts = _Sums(), 0.0, 0, list(blocks(target.shape))[:most_blocks]
    for first, last in parts:  # the size of the change first: which weights it moves most
        change = (values.after(target, first, last) - values.before(target, first, last)).double()
        square += float(change.square().sum())
        count += change.numel()
    usual = (square / max(1, count)) ** 0.5
    for first, last in parts:
        found = read(target, first, last)
        if found is None:
            return None
        before = values.before(target, first, last).double()
        change = values.after(target, first, last).double() - before
        found = found.double() - before
        sums.of_change += float(change.square().sum())
        sums.of_found += float(found.square().sum())
        sums.common += float((change * found).sum())
        sums.of_base += float(before.square().sum())
        moved = change.abs() > usual
        sums.num_moved += int(moved.sum())
        sums.num_right += int((moved & (torch.sign(change) == torch.sign(found))).sum())
    sums.num_tensors = 1
    return sums


def of_folder(folder: Path) -> Read:
    """Reads the plain weights of a folder in Hugging Face layout."""
    stored, reader = list_tensors(folder), Reader()
    tied = "lm_head.weight" not in stored

    def read(target: Target, first: int, last: int):
        name = target.name
        if tied and name == "lm_head.weight":
            name = next((each for each in stored if each.endswith(("embed_tokens.weight", "wte.weight"))), name)
        if name not in stored or stored[name].shape != target.shape:
            return None
        return reader.rows(stored[name], first, last).float()

    return read


def of_model(model) -> Read:
    """Reads the weights that a loaded transformers model computes with, quantized ones taken out of their packing."""
    held: dict[str, Any] = {}

    def read(target: Target, first: int, last: int):
        if target.name not in held:
            held.clear()
            held[target.name] = _weight(model, target.name)
        weight = held[target.name]
        if weight is None or tuple(weight.shape) != target.shape:
            return None
        return weight[first:last].float().cpu() if weight.dim() else weight.float().cpu()

    return read


def _weight(model, name: str):
    import torch
    from peft.utils.integrations import dequantize_module_weight

    path, _, part = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    weight = getattr(module, part, None)
    with torch.no_grad():
        if weight is not None and not weight.is_floating_point() or "Linear4bit" in type(module).__name__:
            return dequantize_module_weight(module).detach()
        if weight is not None:
            return weight.dequantize() if hasattr(weight, "dequantize") and type(weight) is not torch.nn.Parameter \
                else weight.detach()
        num_in = getattr(module, "in_features", None) or getattr(module, "infeatures", None)
        if part != "weight" or not num_in:
            return None
        # A packing that only its own kernel reads: what the layer makes of the unit vectors is its weight.
        bias = getattr(module, "bias", None)
        units = torch.eye(num_in, dtype=next(iter(model.parameters())).dtype, device=model.device)
        rows = module(units) - (0 if bias is None else bias)
        return rows.T


def by_layer_text(measured: dict[str, Any], most: int = 3) -> str:
    """The layers that kept least, for one line."""
    worst = sorted(measured["by_layer"].items(), key=lambda each: abs(each[1]["projection"] - 1), reverse=True)
    return ", ".join(f"{name} {figures['projection']:.2f}" for name, figures in worst[:most])


def layers(measured: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(layer, figures) in order: numbers first."""
    yield from sorted(measured["by_layer"].items(), key=lambda each: (not each[0].isdigit(),
                                                                       int(each[0]) if each[0].isdigit() else 0))
