"""bitsandbytes: int8 and nf4 weights that transformers loads by itself.

Linear layers are quantized, embeddings and the head stay in 16 bits. Reads the merged
folder; writes a folder in Hugging Face layout with ``quantization_config`` in config.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_kit.errors import ModelError, RecipeError
from lora_kit.model import load_base
from lora_kit.model_files import copy_tokenizer, save_weights

KIND = "hf"
TYPES = {
    "int8": "8-bit linear layers (LLM.int8), activations quantized as they come",
    "nf4": "4-bit NormalFloat linear layers in blocks of 64, their scales quantized too (double quantization)",
}
_LOAD_IN = {"int8": "8bit", "nf4": "4bit"}


def missing(type: str | None = None) -> str | None:
    """None when bitsandbytes is installed, else the command that installs it."""
    from importlib.util import find_spec

    return None if find_spec("bitsandbytes") else "pip install bitsandbytes"


def check(config: dict[str, Any], type: str) -> None:
    """Raise when a model of this config.json cannot be quantized to ``type``.

    Raises:
        RecipeError: there is no such type.
        ModelError: the model is quantized already.
    """
    if type not in TYPES:
        raise RecipeError("quantize.type", f"'{type}' is not a type of bitsandbytes", f"there are: {', '.join(TYPES)}")
    if config.get("quantization_config"):
        raise ModelError("quantize", "the model is quantized already", "quantize the merged 16-bit model")


def quantize(merged_dir: Path, out_dir: Path, type: str, rows: Sequence[Sequence[int]] = ()) -> str:
    """Write the model in ``merged_dir``, quantized to ``type``, to ``out_dir``; it computes in bf16."""
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    # load_base stops 4-bit modules from repacking their weights (lora_kit/bnb_mend.py); nothing may run before that.
    model = load_base(merged_dir, dtype="bf16", device=device, load_in=_LOAD_IN[type])
    save_weights(model, merged_dir, out_dir)
    copy_tokenizer(merged_dir, out_dir)
    return ""
