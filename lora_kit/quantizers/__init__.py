"""Quantizers: one file for each method that makes a smaller model of the merged one.

To add one, write ``lora_kit/quantizers/<method>.py``; the file's name is what a recipe calls
``method``, so it is found without being registered. It holds

* ``KIND``: ``hf`` (writes a folder in Hugging Face layout) or ``gguf`` (writes ``model.gguf``);
* ``TYPES``: the values of ``type`` that it knows, each with one sentence about it;
* ``missing(type) -> str | None``: None, or the command that installs what the type needs;
* ``check(config, type)``: raises RecipeError or ModelError when the model of that config.json
  cannot become that type, or this device is known to get it wrong; called before any work is done;
* ``quantize(merged_dir, out_dir, type, rows) -> str``: reads the merged 16-bit model from ``merged_dir``,
  writes the quantized one into the empty folder ``out_dir``. ``rows`` are token ids of training rows, for methods that
  look at data. Returns what a reader of the figures must know of it, or nothing. It runs in a process of its own,
  and what it wrote is measured in another one;
* where KIND is ``gguf``, ``reader(path, plan)``: how ``lora_kit.delta`` reads the weights back.

Kept libraries do the packing. Its test is ``tests/quantizers/test_<method>.py``: what was
written, read back in a fresh process, is close to what went in. Quantizers never import each
other. Torch-free itself; reads and writes nothing.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from lora_kit.errors import RecipeError


def names() -> list[str]:
    """Names of the methods: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str) -> ModuleType:
    """The quantizer called ``name``; RecipeError when there is none."""
    if name not in names():
        raise RecipeError("quantize.method", f"'{name}' is not a method", f"there are: {', '.join(names())}")
    return importlib.import_module(f"lora_kit.quantizers.{name}")
