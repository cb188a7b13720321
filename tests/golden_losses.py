"""Golden losses: the first steps on SmolLM2-135M in fp32, which a neutral change does not move.

    python -m tests.golden_losses --write     measures them again and writes the file
    python -m tests.golden_losses             measures them and shows both

Sixteen conversations of our own in ``goldens/conversations.jsonl``; losses and settings in
``goldens/smollm2_losses.json``. Needs the default base, which ``python -m tests.fetch`` brings.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from lora_kit import pipeline
from lora_kit.recipe_file import read_recipe

FOLDER = Path(__file__).parent / "goldens"
ROWS, FILE = FOLDER / "conversations.jsonl", FOLDER / "smollm2_losses.json"
COMMAND = "python -m tests.golden_losses --write"
SETTINGS = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3, "warmup": 0.0, "rank": 16,
            "alpha": 32, "seed": 0}
"""Six steps of four: the second epoch begins inside."""


def measure(base: Path, folder: Path, **train: Any) -> list[float]:
    """Loss of each step by ``lora-kit train`` on the model folder ``base``, in nats per trained token."""
    lines = {"steps": SETTINGS["steps"], "batch_size": SETTINGS["batch_size"], "precision": "fp32",
             "micro_batch_size": SETTINGS["micro_batch_size"], "learning_rate": SETTINGS["learning_rate"],
             "warmup": SETTINGS["warmup"], **train}
    recipe = folder / "golden.yaml"
    recipe.write_text(json.dumps({
        "model": {"base": str(base)}, "data": {"train": str(ROWS), "held_out_rows": 0, "max_tokens": 256},
        "lora": {"rank": SETTINGS["rank"], "alpha": SETTINGS["alpha"]}, "train": lines, "seed": SETTINGS["seed"]}))
    run = pipeline.run_recipe(read_recipe(recipe), runs_dir=folder / "runs", until="train", fresh=True)
    metrics = (run.stage_dir("train") / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, metrics) if "loss" in entry]


def read() -> list[float]:
    """The losses in the file."""
    return json.loads(FILE.read_text())["losses"]


def main() -> None:
    from tests import fetch

    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    with tempfile.TemporaryDirectory() as folder:
        losses = measure(fetch.base(), Path(folder))
    if parser.parse_args().write:
        FILE.write_text(json.dumps({"command": COMMAND, "model": "SmolLM2-135M-Instruct, fp32", "unit":
                                    "nats per trained token", **SETTINGS, "losses": losses}, indent=1) + "\n")
    for step, loss in enumerate(losses, 1):
        print(f"step {step}  loss {loss:.6f}")


if __name__ == "__main__":
    main()
