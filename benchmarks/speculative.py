"""Speculative decoding beside plain decoding, on real prompts: what is accepted, what that should gain, what it gains.

    python benchmarks/speculative.py [--quick] [--json PATH] [--prompts N] [--drafted N] [--assistant MODEL]
                                     [--recipe RECIPE]

What `lora-kit bench --speculative` measures of a run, of a recipe's base without one. Prompts are what stands before
the trained tokens of the recipe's held-out rows. Exits 1 when answers part where no near tie is.

Needs the default base in the cache (`python -m tests.fetch`), and the recipe's data (`lora-kit data RECIPE`); with
--quick a tiny random model and random prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

def prompts_of(recipe: Path, number: int) -> tuple[str, list[list[int]]]:
    """(folder of the base, prompts) of a recipe."""
    import numpy

    from lora_kit import data, pipeline, prepared, tokens
    from lora_kit.recipe_file import read_recipe

    recipe_file = read_recipe(recipe)
    base = pipeline.check(recipe_file)
    found = prepared.find(recipe_file.recipe, recipe_file.folder, base)
    data.prepare(recipe_file.recipe, found, base)
    rows = tokens.read_examples(found.folder, "held_out")
    prompts = []
    for row in range(len(rows)):
        trained = numpy.flatnonzero(numpy.asarray(rows[row].loss_mask_T))
        if len(trained) and trained[0] > 8:
            prompts.append(rows[row].tokens_T[:trained[0]].tolist())
    return base["artifact"]["path"], prompts[:number]


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model, which is its own assistant")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--drafted", type=int, default=4, help="tokens drafted for each pass")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "chat.yaml")
    parser.add_argument("--assistant", metavar="MODEL", help="folder of a model with the same tokenizer that drafts; "
                        "base: the model itself")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    arguments = parser.parse_args(given)
    from lora_kit import bench_speculative, report_serving
    from lora_kit.model import load_base, quiet_libraries
    from tests import tiny

    quiet_libraries()
    import random

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="speculative-") as name:
        if arguments.quick:
            base = assistant = str(tiny.save_model(Path(name) / "model")[0])
            drawn = random.Random(0)
            prompts, dtype = [[drawn.randrange(3, 250) for _ in range(12)] for _ in range(8)], "fp32"
        else:
            base, prompts = prompts_of(arguments.recipe, arguments.prompts)
            dtype, assistant = "bf16", base if arguments.assistant == "base" else arguments.assistant
        if assistant:
            own, other = ({"name": folder, "path": folder, "tokenizer": None} for folder in (base, assistant))
            bench_speculative.check_tokenizers(own, other)
        model, drafts = load_base(base, dtype=dtype), load_base(assistant, dtype=dtype) if assistant else None
    found = bench_speculative.of_models(model, prompts, drafted=arguments.drafted, new_tokens=arguments.new_tokens,
                                        assistant=drafts)
    found |= {"artifact": f"{Path(base).name} in {dtype}", "assistant": arguments.assistant or "itself"}
    shown = report_serving.PARTS["speculative"]
    print(shown.title(found))
    rows = [shown.columns, *shown.rows(found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print("\n".join(shown.lines(found)))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(any(not place["near_tie"] for way in found["ways"] for place in way["apart"]))


if __name__ == "__main__":
    sys.exit(main())
