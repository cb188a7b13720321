"""The files of a model folder beside its weights, carried over byte for byte.

A merged or quantized model must tokenize and stop exactly as its base: loading and saving a
tokenizer or a generation_config.json may rewrite or refuse it, copying cannot. Torch-free
itself. Reads and writes model folders.
"""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

from lora_kit.errors import RefusedError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "gguf_tokenizer.json",
)
"""``gguf_tokenizer.json`` holds what a GGUF base says of its tokenizer and transformers does not keep."""
_FOLDERS = ("additional_chat_templates",)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer of the folder ``source`` into the folder ``target``; returns the names copied."""
    copied = []
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)
            copied.append(name)
    for name in _FOLDERS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name, dirs_exist_ok=True)
            copied.append(name)
    return copied


def save_weights(model, source: Path, target: Path) -> None:
    """Save ``model`` into ``target``, with the generation_config.json of the folder it came from, ``source``.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from transformers import GenerationConfig

    # transformers refuses to save some that it loaded (a temperature without do_sample, as published models have).
    model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(str(target))
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(errno.EIO, str(error), str(target)) from None
    if (source / "generation_config.json").exists():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")
    else:
        (target / "generation_config.json").unlink(missing_ok=True)


_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def copy_config(config: dict[str, Any], source: Path, target: Path, dtype: str) -> None:
    """Write ``config`` as config.json of ``target``, with its dtype, and carry over generation_config.json of
    ``source``."""
    for key in {"dtype", *(key for key in ("torch_dtype",) if key in config)}:  # older releases read torch_dtype
        config = {**config, key: _DTYPES[dtype]}
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if (source / "generation_config.json").exists():
        shutil.copyfile(source / "generation_config.json", target / "generation_config.json")


def configured_stop_ids(folder: Path) -> set[int]:
    """End-of-sequence ids in the generation_config.json of a model folder; empty without one."""
    try:
        ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except ValueError:
        raise RefusedError(str(folder / "generation_config.json"), "is not JSON", "download the model again") from None
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)
