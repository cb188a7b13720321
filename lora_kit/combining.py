"""Several adapters of one base made one: weighted sum, concatenation, TIES or DARE, through peft.

Only concatenation is exact: its product is the weighted sum of the adapters' own changes. A weighted sum of the factors
has cross terms, TIES and DARE throw parts of them away on purpose. So what the combination does to the weights is held
against the weighted sum of what the adapters do, and said. Reads the base and the adapters; writes one in PEFT layout,
with ``lora_kit_combined.json`` beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_kit.errors import ModelError, RecipeError
from lora_kit.rundir import write_json
from lora_kit.units import number_text

METHODS = {
    "cat": ("cat", "factors side by side, ranks added: exactly the weighted sum of the changes"),
    "linear": ("linear", "weighted sum of the factors, which adds cross terms; all ranks must be one"),
    "svd": ("svd", "the weighted sum of the changes, cut to a rank"),
    "ties": ("ties", "TIES: small values dropped, signs elected, the rest averaged (factors)"),
    "dare_linear": ("dare_linear", "DARE: values dropped at random and the rest scaled up, then summed (factors)"),
    "dare_ties": ("dare_ties", "DARE, then TIES (factors)"),
}
"""Method -> peft's name for it, and what it does."""
EXACT = ("cat",)
_WITH_DENSITY = ("ties", "dare_linear", "dare_ties")


def combine_adapters(base_dir: Path, adapters: Sequence[Path], weights: Sequence[float], out_dir: Path, *,
                     method: str = "cat", density: float = 0.5, rank: int | None = None, seed: int = 0
                     ) -> dict[str, Any]:
    """Write one adapter that stands for several.

    Args:
        weights: one for each adapter.
        density: share of the values that TIES and DARE keep.
        rank: of the result, for ``svd``; the largest of the adapters' when None.
        seed: of what DARE drops.

    Returns:
        ``method``, ``exact`` (whether it is so by construction), and against the weighted sum of the adapters' changes:
        ``projection`` (1: all of it), ``noise`` (in units of it) and ``largest_difference`` of a weight.

    Raises:
        RecipeError: another number of weights than adapters, no such method, or a share out of range.
        ModelError: an adapter is not of this base, or peft cannot combine them so.
    """
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    from lora_kit.adapter import load_adapter, save_adapter
    from lora_kit.adapter_check import check_adapter, read_adapter_config
    from lora_kit.model import load_base

    if len(adapters) < 2 or len(adapters) != len(weights):
        raise RecipeError("combine", f"{len(adapters)} adapters and {len(weights)} weights", "give one weight for each "
                          "of at least two adapters")
    if method not in METHODS:
        raise RecipeError("combine", f"'{method}' is not a method", f"there are: {', '.join(METHODS)}")
    if not 0 < density <= 1:
        raise RecipeError("combine", f"a density of {density}", "give a share of at most 1")
    for folder in adapters:
        check_adapter(base_dir, folder)
        odd = [key for key in ("use_dora", "modules_to_save", "trainable_token_indices")
               if read_adapter_config(folder).get(key)]
        if odd:
            raise ModelError(str(folder), f"({odd[0]}) is more than a product of two factors, and peft combines those "
                             "alone", "merge it by itself")
    net: PeftModel = load_adapter(load_base(base_dir, dtype="fp32"), adapters[0])
    names = ["default"]
    for number, folder in enumerate(adapters[1:], 1):
        names.append(f"adapter{number}")
        net.load_adapter(str(folder), adapter_name=names[-1])
    torch.manual_seed(seed)
    options: dict[str, Any] = {"density": density} if method in _WITH_DENSITY else {}
    if method == "svd":
        options["svd_rank"] = rank or max(config.r for config in net.peft_config.values())
    try:
        net.add_weighted_adapter(names, list(weights), "combined", combination_type=METHODS[method][0], **options)
    except ValueError as error:
        raise ModelError("combine", f"peft cannot ({' '.join(str(error).split())[:200]})", "use method cat") from None
    common = squares = found = largest = 0.0
    with torch.no_grad():
        for module in net.modules():
            if not isinstance(module, LoraLayer):
                continue
            wanted = sum(weight * module.get_delta_weight(name) for weight, name in zip(weights, names, strict=True)
                         if name in module.scaling)
            made = module.get_delta_weight("combined")
            common += float((wanted.double() * made).sum())
            squares += float(wanted.double().square().sum())
            found += float(made.double().square().sum())
            largest = max(largest, float((wanted - made).abs().max()))
    net.peft_config["default"] = net.peft_config["combined"]
    named = read_adapter_config(adapters[0]).get("base_model_name_or_path")
    save_adapter(net, out_dir, str(named or base_dir), _tensors_of(net, "combined"))
    projection = common / squares
    figures = {"method": method, "exact": method in EXACT, "projection": projection,
               "noise": (max(0.0, found - projection**2 * squares) / squares) ** 0.5, "largest_difference": largest}
    write_json(out_dir / "lora_kit_combined.json", {
        "adapters": [str(folder) for folder in adapters], "weights": list(weights), **figures})
    return figures


def combine_to_folder(base_dir: str, adapters: list[str], out_dir: str, **options: Any) -> dict[str, Any]:
    """:func:`combine_adapters` with names in place of paths; to be called in a fresh process."""
    return combine_adapters(Path(base_dir), [Path(folder) for folder in adapters], out_dir=Path(out_dir), **options)


def in_words(told: dict[str, Any], number: int) -> str:
    """What :func:`combine_adapters` returned, as a sentence; ``number`` adapters were combined."""
    largest = number_text(told["largest_difference"], 2)
    if told["exact"]:
        return (f"{told['method']} of {number} adapters: exactly the weighted sum of their changes (largest difference "
                f"of a weight in fp32 {largest})")
    return (f"{told['method']} of {number} adapters, which is not exact: {told['projection']:.1%} of the weighted sum "
            f"of their changes, with {number_text(told['noise'], 2)} of its size besides (largest difference of a "
            f"weight {largest})")


def _tensors_of(net, name: str) -> dict[str, Any]:
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(net, adapter_name=name, save_embedding_layers=False)
