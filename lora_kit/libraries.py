"""The libraries that training stands on, imported at once and for as little CPU time as they allow.

Most of a start is imports. Two things in them can be spared: Python's collector, which walks through the million
objects that imports make while they make them, and torch's compiler, which bitsandbytes has imported for functions that
a plain training never calls. Reads a model's config.json; writes nothing.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from lora_kit import stopwatch
from lora_kit.model import quiet_libraries
from lora_kit.recipe import Recipe

_NO_COMPILING = "TORCHDYNAMO_DISABLE"
"""torch's own switch, read each time something is compiled."""


def import_for_training(recipe: Recipe, folder: Path | str) -> None:
    """Import transformers, with what the model in ``folder`` is made of, and peft.

    In a command's own process, where nothing else lives, what is imported is put out of the collector's sight for good
    (0.3 s of CPU for each time that it would look), and where the recipe uses nothing of bitsandbytes, its functions
    are left uncompiled.
    """
    alone = stopwatch.is_of_process()
    needs_bitsandbytes = recipe.model.load_in != "16bit" or recipe.train.optimizer != "adamw"
    with stopwatch.importing(), nullcontext() if needs_bitsandbytes or not alone else _without_compiling():
        quiet_libraries()
        import peft  # noqa: F401 - and with it bitsandbytes
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM  # noqa: F401

        with suppress(OSError, ValueError, KeyError):  # whoever loads the model says what is wrong with it
            config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
            MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if alone:
        gc.freeze()


@contextmanager
def _without_compiling() -> Iterator[None]:
    """Let functions that are compiled in the block stay as they are.

    peft 0.21 imports bitsandbytes wherever it is installed, and bitsandbytes 0.50 wraps six functions in torch.compile
    while it is imported: a second of CPU for torch's compiler alone (measured: 1.1 s of 6.2 s of imports). Goes when
    either of them waits until it is asked.
    """
    before = os.environ.get(_NO_COMPILING)
    os.environ[_NO_COMPILING] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_NO_COMPILING]
        else:
            os.environ[_NO_COMPILING] = before
