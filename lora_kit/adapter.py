"""The adapter on a base: made, continued, loaded, saved.

peft makes the LoRA and puts one from a folder on a base; what it would take in silence and get
wrong is refused here. Weights are safetensors only.

Reads and writes adapters (PEFT layout) where it is told.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kit.errors import ModelError, RecipeError, RefusedError
from lora_kit.model import short
from lora_kit.recipe import LoraSection


def add_adapter(model, section: LoraSection, seed: int):
    """``model`` with a fresh LoRA on it (peft), its parameters in fp32.

    Args:
        seed: of the adapter's initial values: torch is seeded with it right before they are drawn.

    Raises:
        RecipeError: a target matches nothing, or is the head or the embedding of a tied model.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    _check_targets(model, section)
    targets: Any = "all-linear" if section.targets == ["all-linear"] else list(section.targets)
    config = LoraConfig(
        r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, target_modules=targets,
        use_rslora=section.rslora, use_dora=section.dora, bias="none", task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # e.g. DoRA on a kind of layer that it does not know
        raise RecipeError("lora", f"peft refuses it ({short(error)})",
                          "change lora.targets or leave the option out") from None


def continue_adapter(model, adapter_dir: Path):
    """``model`` with the adapter in ``adapter_dir``, its parameters trainable."""
    return _with_adapter(model, adapter_dir, is_trainable=True)


def load_adapter(model, adapter_dir: Path | str):
    """``model`` with the adapter in ``adapter_dir`` on it, unmerged, in eval mode."""
    return _with_adapter(model, Path(adapter_dir), is_trainable=False).eval()


def _with_adapter(model, adapter_dir: Path, is_trainable: bool):
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    if not (adapter_dir / "adapter_config.json").exists():
        raise ModelError(str(adapter_dir), "is not a PEFT adapter (no adapter_config.json)", "name an adapter folder")
    if not (adapter_dir / "adapter_model.safetensors").exists():
        raise RefusedError(str(adapter_dir), "has no safetensors weights, and pickled ones are not loaded",
                           "save it with safe_serialization=True")
    try:
        adapted = PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=is_trainable)
        with safe_open(adapter_dir / "adapter_model.safetensors", framework="pt") as file:
            saved = set(file.keys())
    except SafetensorError as error:
        raise RefusedError(str(adapter_dir), f"its weights are not whole ({short(error)})",
                           "fetch or train it again") from None
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(str(adapter_dir), f"does not fit the base model ({short(error)})",
                         "name the adapter's own base") from None
    # peft leaves out in silence what finds no place, such as the upper layers of a deeper model's adapter.
    homeless = saved ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    homeless = {name for name in homeless if "lora_" in name}
    if homeless:
        raise ModelError(str(adapter_dir), f"does not fit the base model ({len(homeless)} of its tensors find no "
                         f"place, the first is {min(homeless)})", "name the adapter's own base")
    return adapted


def _check_targets(model, section: LoraSection) -> None:
    supported = {name: module for name, module in model.named_modules()
                 if any(kind in type(module).__name__ for kind in ("Linear", "Conv1D", "Embedding"))}
    tied = [model.get_input_embeddings(), model.get_output_embeddings()] if model.config.tie_word_embeddings else []
    for target in section.targets:
        if target == "all-linear":
            if len(section.targets) > 1:
                raise RecipeError("lora.targets", "names all-linear beside others", "keep one of the two")
            continue
        matched = [module for name, module in supported.items() if name == target or name.endswith("." + target)]
        if not matched:
            last = sorted({name.rsplit(".", 1)[-1] for name, module in supported.items()
                           if "Embedding" not in type(module).__name__})
            raise RecipeError("lora.targets", f"'{target}' matches no module that can be adapted",
                              f"there are: {', '.join(last)}")
        if any(module is end for module in matched for end in tied):
            # Measured: peft merges an adapter on a tied head wrongly, off by 10 and more.
            raise RecipeError("lora.targets", f"'{target}' is tied to the other end of this model and cannot be merged",
                              "leave it out")


def save_adapter(model, folder: Path, reference: str, state_dict=None) -> None:
    """Write the adapter of ``model`` to ``folder`` in PEFT layout, naming ``reference`` as its base."""
    model.peft_config["default"].base_model_name_or_path = reference
    model.save_pretrained(str(folder), safe_serialization=True, state_dict=state_dict, save_embedding_layers=False)
