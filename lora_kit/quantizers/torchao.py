"""torchao: int8 weights that transformers loads by itself (an extra).

Weights of the linear layers in 8 bits with one scale a row, unpacked as they are used; embeddings and the head stay in
16 bits. Reads the merged folder; writes a folder in Hugging Face layout with ``quantization_config`` in config.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_kit.errors import ModelError, RecipeError
from lora_kit.model import quiet_libraries
from lora_kit.model_files import copy_tokenizer, save_weights

KIND = "hf"
TYPES = {"int8": "8-bit weights of linear layers, one scale a row, 16-bit activations (weight-only)"}
REFUSED = {"int4": "torchao saves its 4-bit weights in a form that does not load again as it was"}
"""Types that torchao has and that are not made here -> why."""


def missing(type: str | None = None) -> str | None:
    """None when torchao is installed, else the command that installs it."""
    from importlib.util import find_spec

    return None if find_spec("torchao") else 'pip install "lora-kit[torchao]"'


def check(config: dict[str, Any], type: str) -> None:
    """Raise when a model of this config.json cannot be quantized to ``type``.

    Raises:
        RecipeError: there is no such type, or it is refused.
        ModelError: the model is quantized already.
    """
    if type in REFUSED:
        raise RecipeError("quantize.type", f"'{type}' is refused: {REFUSED[type]}", f"there are: {', '.join(TYPES)}")
    if type not in TYPES:
        raise RecipeError("quantize.type", f"'{type}' is not a type of torchao", f"there are: {', '.join(TYPES)}")
    if config.get("quantization_config"):
        raise ModelError("quantize", "the model is quantized already", "quantize the merged 16-bit model")


def quantize(merged_dir: Path, out_dir: Path, type: str, rows: Sequence[Sequence[int]] = ()) -> str:
    """Write the model in ``merged_dir``, quantized to ``type``, to ``out_dir``; it computes in bf16."""
    quiet_libraries()
    import torch
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        str(merged_dir), dtype=torch.bfloat16, device_map={"": device}, local_files_only=True, trust_remote_code=False,
        use_safetensors=True, quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)))
    save_weights(model, merged_dir, out_dir)
    copy_tokenizer(merged_dir, out_dir)
    return ""
