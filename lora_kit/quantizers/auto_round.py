"""auto-round: 4-bit weights whose rounding was tuned, in a form that transformers and vLLM read (an extra).

Rounding up or down is learnt, layer by layer, on training rows of the run (SignRound: Cheng et al. 2023,
arXiv:2309.05516). Linear layers are quantized, embeddings and the head stay in 16 bits. Reads the merged folder; writes
a folder in Hugging Face layout with ``quantization_config`` in config.json; reading it needs auto-round too.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_kit.errors import MachineError, ModelError, RecipeError
from lora_kit.model import load_base
from lora_kit.model_files import copy_tokenizer

KIND = "hf"
TYPES = {"w4": "4-bit weights in groups of 128 or 64, 16-bit activations: 4.25 or 4.5 bits a weight"}
GROUPS = (128, 64, 32)
"""Sizes of a group of weights with a scale of its own; the largest that divides every row is taken."""
_ITERATIONS = 50
_MOST_ROWS = 64
_ROW_TOKENS = 128


def missing(type: str | None = None) -> str | None:
    """None when auto-round is installed, else the command that installs it."""
    from importlib.util import find_spec

    return None if find_spec("auto_round") else 'pip install "lora-kit[autoround]"'


def check(config: dict[str, Any], type: str) -> None:
    """Raise when a model of this config.json cannot be quantized to ``type``.

    Raises:
        RecipeError: there is no such type.
        ModelError: the model is quantized already, or its width is no multiple of the smallest group.
    """
    if type not in TYPES:
        raise RecipeError("quantize.type", f"'{type}' is not a type of auto_round", f"there are: {', '.join(TYPES)}")
    if config.get("quantization_config"):
        raise ModelError("quantize", "the model is quantized already", "quantize the merged 16-bit model")
    group_size(config)


def group_size(config: dict[str, Any]) -> int:
    """The largest group that divides the rows of every linear layer."""
    heads = config.get("num_attention_heads") or 1
    hidden = config.get("hidden_size") or GROUPS[-1]
    widths = [hidden, config.get("intermediate_size") or hidden, (config.get("head_dim") or hidden // heads) * heads]
    for size in GROUPS:
        if not any(width % size for width in widths):
            return size
    raise ModelError("quantize auto_round", f"rows of {min(widths)} weights are no multiple of {GROUPS[-1]}",
                     "leave out the form")


def quantize(merged_dir: Path, out_dir: Path, type: str, rows: Sequence[Sequence[int]] = ()) -> str:
    """Write the model in ``merged_dir``, quantized to ``type``, to ``out_dir``; returns what it was tuned on.

    Args:
        rows: token ids of training rows; stretches of 128 tokens of them are what the rounding is tuned on.

    Raises:
        MachineError: there are not 128 tokens to tune on.
    """
    import torch
    from auto_round import AutoRound

    from lora_kit.chat import load_tokenizer
    from lora_kit.model import read_config

    size, tokens = group_size(read_config(merged_dir)), [token for row in rows for token in row]
    stretches = [torch.tensor([tokens[first : first + _ROW_TOKENS]])
                 for first in range(0, len(tokens) - _ROW_TOKENS + 1, _ROW_TOKENS)][:_MOST_ROWS]
    if not stretches:
        raise MachineError("quantize auto_round", f"needs {_ROW_TOKENS} tokens of training rows to tune on",
                           "add training rows, or leave out the form")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    model = load_base(merged_dir, dtype="bf16", device=device)
    rounder = AutoRound(model, load_tokenizer(merged_dir), scheme="W4A16", group_size=size, iters=_ITERATIONS,
                        nsamples=len(stretches), seqlen=_ROW_TOKENS, dataset=stretches, device_map=device,
                        batch_size=min(8, len(stretches)), enable_torch_compile=False)
    scratch = out_dir / ".made"
    rounder.quantize_and_save(str(scratch), format="auto_round")
    written = [path.parent for path in scratch.rglob("config.json")]  # it makes a folder of its own name
    for path in written[0].iterdir():
        if path.suffix == ".safetensors" or path.name in ("config.json", "quantization_config.json",
                                                         "model.safetensors.index.json"):
            os.replace(path, out_dir / path.name)
    shutil.rmtree(scratch)
    if (merged_dir / "generation_config.json").exists():
        shutil.copyfile(merged_dir / "generation_config.json", out_dir / "generation_config.json")
    copy_tokenizer(merged_dir, out_dir)
    return f"rounding tuned on {len(stretches) * _ROW_TOKENS} training tokens, groups of {size}"
