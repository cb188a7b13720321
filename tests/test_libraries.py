"""libraries.py: what a command's own process spares itself, and what is left alone elsewhere."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from lora_kit import libraries, stopwatch
from lora_kit.recipe import Recipe
from tests import tiny_run

IN_A_COMMAND = """
import gc, os, sys
from lora_kit import stopwatch
stopwatch.begin_with_process()
from lora_kit import libraries
from lora_kit.recipe import Recipe
recipe = Recipe.model_validate({"name": "r", "model": {"base": "b"}, "data": {"train": [{"source": "d.jsonl"}]},
                                "train": {"optimizer": sys.argv[2]}})
with stopwatch.one_start():
    libraries.import_for_training(recipe, sys.argv[1])
    parts = stopwatch.end()["parts"]
print("transformers.models.llama.modeling_llama" in sys.modules, "peft" in sys.modules,
      "torch._inductor.compile_fx" in sys.modules, gc.get_freeze_count() > 100_000, gc.isenabled(),
      "TORCHDYNAMO_DISABLE" in os.environ, parts["imports"]["cpu_seconds"] > 1)
"""


def recipe(**sections) -> Recipe:
    return Recipe.model_validate({"name": "r", "model": {"base": "b"}, "data": {"train": [{"source": "d.jsonl"}]},
                                  **sections})


@pytest.mark.parametrize(("optimizer", "compiled"), [("adamw", False), ("adamw_8bit", True)])
def test_a_command_imports_all_and_no_compiler_that_it_does_not_need(tiny_model, optimizer, compiled):
    done = subprocess.run([sys.executable, "-c", IN_A_COMMAND, tiny_model, optimizer], capture_output=True, text=True,
                          cwd=tiny_run.ROOT, env=tiny_run.environment())
    # On stderr nothing: no library's advice in between.
    assert (done.stdout.split(), done.stderr) == (["True", "True", str(compiled), "True", "True", "False", "True"], "")


def test_elsewhere_nothing_is_put_out_of_sight(tiny_model, tmp_path):
    before = gc.get_freeze_count()
    with stopwatch.one_start():
        libraries.import_for_training(recipe(), tiny_model)
        libraries.import_for_training(recipe(), tmp_path / "no model")  # is for the loader to tell
    assert gc.get_freeze_count() == before and gc.isenabled()


@pytest.mark.parametrize("before", [None, "0"])
def test_the_switch_is_put_back(monkeypatch, before):
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if before is not None:
        monkeypatch.setenv("TORCHDYNAMO_DISABLE", before)
    with pytest.raises(ValueError), libraries._without_compiling():
        assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
        raise ValueError
    assert os.environ.get("TORCHDYNAMO_DISABLE") == before
