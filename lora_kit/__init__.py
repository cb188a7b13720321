"""lora-kit: one recipe in, a fine-tuned model you can trust out.

The Python API does what the verbs do::

    import lora_kit

    recipe = lora_kit.read_recipe("recipes/chat.yaml", ["train.steps=10"])
    run = lora_kit.run_recipe(recipe)                  # everything, skipping what is done
    run.artifact("merged")                             # something a model can be loaded from

Names are resolved when they are used: importing lora_kit imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "read_recipe": "recipe_file", "run_recipe": "pipeline", "continue_run": "pipeline", "open_run": "rundir",
    "open_engine": "engines", "listening": "events", "bench_artifact": "bench", "make_plan": "plan",
    "combine_adapters": "combining", "extract_lora": "extraction", "merge_adapter": "adapter_verbs",
    "merge_adapters": "adapter_verbs", "extract_adapter": "adapter_verbs",
    "LoraKitError": "errors", "Recipe": "recipe", "Run": "rundir", "Artifact": "types",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'lora_kit' has no attribute '{name}'")
    return getattr(importlib.import_module(f"lora_kit.{_HOME[name]}"), name)
