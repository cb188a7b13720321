"""Measure the machine at hand: five steps of a recipe's own training, and its base answering.

What comes out is not a time but rates (operations and bytes a second), so that it serves other recipes too. The steps
run in a process and a folder of their own, which goes away; nothing of the recipe's runs is touched.

Reads the recipe's base and data; writes ``calibration.json`` in the cache.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_kit import bench, calibration, isolate, memory, model, pipeline
from lora_kit.calibration import Calibration
from lora_kit.errors import MachineError
from lora_kit.recipe import BenchSection
from lora_kit.recipe_file import RecipeFile, parse_recipe
from lora_kit.types import Artifact

STEPS = 5
PROMPT_TOKENS, NEW_TOKENS = 512, 32


def calibrate(recipe_file: RecipeFile, precision: str) -> Calibration:
    """Measure and store.

    Raises:
        ModelError: the base has no formulas for its operations.
        MachineError: a process died, or the operations of a step are not known.
    """
    base = pipeline.check(recipe_file)
    artifact = Artifact(**base["artifact"])
    shape = memory.shape_of(model.read_config(Path(artifact.path)))
    request = {"text": recipe_file.text, "path": str(recipe_file.path), "overrides": list(recipe_file.overrides)}
    floor = isolate.call("lora_kit.calibrate:stand", {**request, "base_dir": artifact.path}, fresh=True).value
    with tempfile.TemporaryDirectory(prefix="lora-kit-calibrate-") as folder:
        taken = isolate.call("lora_kit.calibrate:train_steps", {**request, "runs_dir": folder}, fresh=True).value
    if not all(step["flops"] for step in taken):
        raise MachineError("--calibrate", "the operations of a step are not known for this model",
                           "calibrate with a recipe of a dense model")
    point = bench.bench_artifact(artifact, BenchSection(prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS))
    if point.why_not:
        raise MachineError("--calibrate", f"the base was not measured ({point.why_not})", "look at lora-kit doctor")
    cache = memory.kv_bytes(shape, PROMPT_TOKENS + NEW_TOKENS // 2)
    return calibration.store(
        precision,
        train_flops_per_second=sum(step["flops"] for step in taken) / sum(step["seconds"] for step in taken),
        read_flops_per_second=point.prefill_tokens_per_second * memory.inference_flops_per_token(
            shape, context=PROMPT_TOKENS / 2),
        write_bytes_per_second=point.decode_tokens_per_second * (artifact.size_bytes + cache),
        floor_bytes=float(floor), model=Path(recipe_file.recipe.model.base).name,
    )


def stand(text: str, path: str, overrides: list[str], base_dir: str) -> int:
    """Resident bytes of a process that has all that training needs but the model; to be called in a fresh one."""
    from lora_kit import flops, libraries

    recipe = parse_recipe(text, Path(path), overrides).recipe
    libraries.import_for_training(recipe, base_dir)
    flops.measure_ceiling("cpu", "fp32")
    return isolate.peak_memory_bytes()


def train_steps(text: str, path: str, overrides: list[str], runs_dir: str) -> list[dict[str, Any]]:
    """Train a few steps in this process; ``seconds`` and ``flops`` of each but the first, which warms up."""
    recipe_file = parse_recipe(text, Path(path), overrides)
    recipe = recipe_file.recipe
    short = recipe.train.model_copy(update={
        "steps": STEPS, "epochs": None, "stop_prompts": 0, "keep": "last", "prove": False, "track": [],
        "eval_every": None, "save_every": None})
    small = recipe.data.model_copy(update={"held_out": [], "held_out_rows": 0})
    recipe_file = replace(recipe_file, recipe=recipe.model_copy(update={"train": short, "data": small}))
    run = pipeline.run_recipe(recipe_file, runs_dir=runs_dir, until="train")
    lines = (run.stage_dir("train") / "timings.jsonl").read_text(encoding="utf-8").splitlines()
    return [{"seconds": step["seconds"], "flops": step["flops"]} for step in map(json.loads, lines)
            if "step" in step][1:]
