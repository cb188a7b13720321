"""Speculative decoding by prompt lookup beside plain decoding, on real prompts: what it accepts, and what it gains.

    python benchmarks/speculative.py [--quick] [--json PATH] [--prompts N] [--drafted N] [--recipe RECIPE]

Prompts are what stands before the trained tokens of the recipe's held-out rows. Both ways answer each prompt, one after
the other, each pair in the other order, with as many tokens and through the same code (`lora_kit/speculative.py`), so
that the passes are all that differs. Printed: the share of drafted tokens that is accepted, tokens a pass, the speed-up
that follows from them and the times of passes of one token and of several, and the one that was measured, with its 95 %
interval; and whether the answers are the same, or how near the two tokens were where they part first.

Needs the default base in the cache (`python -m tests.fetch`), and the recipe's data (`lora-kit data RECIPE`); with
--quick a tiny random model and random prompts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NEAR_TIE = 0.25
"""Logits of two tokens that are no further apart are as likely but for rounding in bf16."""


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


def pass_seconds(model: Any, prompt: list[int], number: int) -> float:
    """Best seconds of a pass over ``number`` tokens after ``prompt``."""
    import torch

    best = float("inf")
    for _ in range(3):
        with torch.inference_mode():
            out = model(input_ids=torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
            key = "cache" if hasattr(out, "cache") else "past_key_values"
            cache, inputs = getattr(out, key), torch.tensor([prompt[:1] * number])
            started = time.perf_counter()
            model(input_ids=inputs, use_cache=True, **{key: cache})
            best = min(best, time.perf_counter() - started)
    return best


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--drafted", type=int, default=4, help="tokens drafted for each pass")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "chat.yaml")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    arguments = parser.parse_args(given)
    from lora_kit import outlook, speculative, speed_ratio
    from lora_kit.model import load_base, quiet_libraries
    from tests import tiny

    quiet_libraries()
    import random

    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="speculative-") as name:
        if arguments.quick:
            base = str(tiny.save_model(Path(name) / "model")[0])
            drawn = random.Random(0)
            prompts, dtype = [[drawn.randrange(3, 250) for _ in range(12)] for _ in range(8)], "fp32"
        else:
            base, prompts = prompts_of(arguments.recipe, arguments.prompts)
            dtype = "bf16"
        model = load_base(base, dtype=dtype)
    options = {"new_tokens": arguments.new_tokens}
    speculative.answer(model, prompts[0], drafted=arguments.drafted, **options)
    answers: dict[int, list[speculative.Answer]] = {0: [], arguments.drafted: []}
    for number, prompt in enumerate(prompts):
        for drafted in ((0, arguments.drafted), (arguments.drafted, 0))[number % 2]:
            answers[drafted].append(speculative.answer(model, prompt, drafted=drafted, **options))
    plain, quick = answers[0], answers[arguments.drafted]
    apart = [speculative.parts_at_near_tie(model, prompt, one.tokens, other.tokens)
             for prompt, one, other in zip(prompts, plain, quick, strict=True)]
    drafted, accepted, passes = (sum(getattr(each, name) for each in quick)
                                 for name in ("drafted", "accepted", "passes"))
    per_pass = sum(len(each.tokens) - 1 for each in quick) / passes
    one, several = (pass_seconds(model, prompts[0], number) for number in (1, 1 + arguments.drafted))
    longer = one + (several - one) * drafted / (passes * arguments.drafted)  # not every pass has a draft
    ratio = speed_ratio.of_pairs([each.seconds for each in plain], [each.seconds for each in quick])
    acceptance = accepted / drafted if drafted else 0.0
    figures = {
        "prompts": len(prompts), "prompt_tokens": statistics.mean(map(len, prompts)), "drafted": drafted,
        "accepted": accepted, "acceptance": acceptance, "tokens_per_pass": per_pass,
        "tokens_per_pass_if_always_drafted": outlook.tokens_per_pass(acceptance, arguments.drafted),
        "pass_seconds": [one, several], "predicted": per_pass * one / longer, "measured": ratio.ratio, "low": ratio.low,
        "high": ratio.high, "same": apart.count(None), "apart": [each for each in apart if each is not None],
    }
    print(f"{len(prompts)} prompts of {figures['prompt_tokens']:.0f} tokens on average, {arguments.new_tokens} new "
          f"ones, {dtype}, 1 thread, {arguments.drafted} drafted a pass")
    print(f"accepted {acceptance:.0%} of {drafted} drafted tokens; {per_pass:.2f} tokens a pass (with a draft in every "
          f"pass it would be {figures['tokens_per_pass_if_always_drafted']:.2f})")
    print(f"a pass of 1 token {one * 1e3:.1f} ms, of {1 + arguments.drafted} {several * 1e3:.1f} ms; predicted "
          f"{figures['predicted']:.2f} times as fast, measured {ratio.ratio:.2f} (95 % interval {ratio.low:.2f} to "
          f"{ratio.high:.2f})")
    far = [each for each in figures["apart"] if each > NEAR_TIE]
    print(f"{figures['same']} of {len(prompts)} answers are the same; where others part, the two tokens are at most "
          f"{max(figures['apart'], default=0.0):.2f} apart in logits"
          + (f", {len(far)} by more than rounding" if far else ""))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(bool(far))


if __name__ == "__main__":
    sys.exit(main())
