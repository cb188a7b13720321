"""Whether an adapter can be merged rightly into a base, told before any weights of the base are read.

peft merges some adapters wrongly without a word, and loads one of another base as far as names and
shapes happen to fit. Reads the adapter's folder and the base's config.json; writes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_kit.adapter import is_zero, refuse_changed_base
from lora_kit.errors import ModelError, RefusedError
from lora_kit.model import read_config

_TOKENS = ".token_adapter.trainable_tokens_delta"
"""End of the name under which peft saves trained rows of an embedding."""


def check_adapter(base_dir: Path, adapter_dir: Path) -> None:
    """Refuse, before any weights of the base are read, an adapter that cannot be merged rightly into this base.

    Raises:
        ModelError: it is no LoRA, is of another base (names or shapes), adapts an end of a tied model, repeats
            layers, holds values that are not finite, or changes nothing.
        RefusedError: its weights are not safetensors.
    """
    import torch
    from safetensors.torch import load_file

    where = str(adapter_dir)
    try:
        config = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(where, "is not a PEFT adapter (no adapter_config.json)", "name an adapter folder") from None
    except ValueError:
        raise RefusedError(f"{where}/adapter_config.json", "is not JSON", "train the adapter again") from None
    refuse_changed_base(adapter_dir)
    path = adapter_dir / "adapter_model.safetensors"
    if not path.exists():
        raise RefusedError(where, "has no safetensors weights, and pickled ones are not loaded",
                           "save it with safe_serialization=True")
    if config.get("peft_type") != "LORA":
        raise ModelError(where, f"is {config.get('peft_type')}, not LoRA", "merge it with peft")
    if config.get("layer_replication"):
        # Measured: peft 0.21.2 merges these wrongly, off by 11, without a warning.
        raise ModelError(where, "repeats layers (layer_replication), which peft merges wrongly", "train without it")
    weights = load_file(path)
    _check_places(where, weights, config, base_dir)
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(where, f"holds values that are not finite ({name})",
                             "train again with a lower learning rate")
    if is_zero(weights):
        raise ModelError(where, "changes nothing: A or B of every pair is zero", "train for more steps")


def _check_places(where: str, weights: dict[str, Any], config: dict[str, Any], base_dir: Path) -> None:
    """Every tensor of the adapter belongs to a module of the base, with its shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(
            base_dir, local_files_only=True, trust_remote_code=False))
    modules = dict(model.named_modules())
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = bool(read_config(base_dir).get("tie_word_embeddings"))
    for name, tensor in weights.items():
        path, part = _split_name(name)
        module = modules.get(path)
        if module is None:
            raise ModelError(where, f"adapts {path}, which this base does not have", "name the adapter's own base")
        if tied and module in ends:
            # Measured with peft 0.21.2: off by 10 to 2,662 after the merge.
            raise ModelError(where, f"adapts {path}, which is tied to the other end of this model, and cannot be "
                             "merged", "train without lm_head and embed_tokens as targets")
        expected = _expected_size(part, module.weight.shape, bool(config.get("fan_in_fan_out")))
        if expected is not None and tensor.shape[expected[0]] != expected[1]:
            raise ModelError(where, f"is of another base: {name} is {'x'.join(map(str, tensor.shape))} and {path} "
                             f"{'x'.join(map(str, module.weight.shape))}", "name the adapter's own base")


def _split_name(name: str) -> tuple[str, str]:
    """``base_model.model.PATH.lora_A.weight`` as (PATH, lora_A)."""
    path = name.removeprefix("base_model.model.")
    if path.endswith(_TOKENS):
        return path.removesuffix(_TOKENS), "rows"
    for part in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
        if f".{part}" in path:
            return path[: path.index(f".{part}")], part
    return path.removesuffix(".weight").removesuffix(".bias"), "weight"


def _expected_size(part: str, shape, transposed: bool) -> tuple[int, int] | None:
    """(dimension, size) that the adapter's tensor must have for a base weight of ``shape`` (out, in)."""
    if part == "rows":
        return 1, shape[1]
    if part not in ("lora_A", "lora_B", "lora_magnitude_vector"):
        return None
    num_out, num_in = reversed(shape) if transposed else shape
    return (1, num_in) if part == "lora_A" else (0, num_out)
