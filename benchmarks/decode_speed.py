"""Decoding one answer in bf16: our transformers engine against transformers' own `generate`, in turns.

    python benchmarks/decode_speed.py [--quick] [--check] [--json PATH] [--pairs N] [--threads N]

Both answer the same prompts of random tokens with as many tokens, one after the other, each pair in the other order.
`generate` is timed twice a pair, for one token and for all, and the difference is its decoding; ours is what the engine
reports as its decoding. Beside the speed stands how far the logits of either are from fp32 on the same tokens
(teacher-forced), as a mean KL divergence: a quicker loop must not be a coarser one.

Targets (`--check`): at least 1.3 times `generate` (the lower end of the interval above 1.2), and a KL no larger than
1.2 times its (over so few tokens it varies by about a tenth). Needs the default base in the cache (`python -m
tests.fetch`) but with --quick.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TIMES, LOWEST, KL_TIMES = 1.3, 1.2, 1.2


def measure(base: str, *, pairs: int, threads: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    import torch
    from transformers import GenerationConfig

    from lora_kit import bench, hardware, speed_ratio
    from lora_kit.engines import open_engine
    from lora_kit.types import Artifact

    torch.set_num_threads(threads)
    engine = open_engine(Artifact(name="base", path=base, kind="hf"), dtype="bf16", threads=threads)
    prompts = bench.random_prompts(engine.tokenizer, engine.num_tokens, num=pairs + 2, length=prompt_tokens, seed=0)

    def generate(prompt: list[int], number: int) -> float:
        tokens_1T = torch.tensor([prompt])
        options = GenerationConfig(do_sample=False, max_new_tokens=number, min_new_tokens=number,
                                   pad_token_id=engine.tokenizer.pad_token_id)
        started = time.perf_counter()
        with torch.inference_mode():
            engine.model.generate(input_ids=tokens_1T, attention_mask=torch.ones_like(tokens_1T),
                                  generation_config=options)
        return time.perf_counter() - started

    def theirs(prompt: list[int]) -> float:
        return generate(prompt, new_tokens) - generate(prompt, 1)

    def ours(prompt: list[int]) -> float:
        return engine.time_once([prompt], new_tokens)["decode_seconds"]

    for prompt in prompts[:2]:
        theirs(prompt), ours(prompt)
    taken: dict[Any, list[float]] = {theirs: [], ours: []}
    for number, prompt in enumerate(prompts[2:]):
        for one in ((theirs, ours), (ours, theirs))[number % 2]:
            taken[one].append(one(prompt))
    ratio = speed_ratio.of_pairs(taken[theirs], taken[ours])
    return {
        "ratio": ratio.ratio, "low": ratio.low, "high": ratio.high, "pairs": ratio.num_pairs,
        "generate_tokens_per_second": (new_tokens - 1) / min(taken[theirs]),
        "our_tokens_per_second": (new_tokens - 1) / min(taken[ours]), "seconds": [taken[theirs], taken[ours]],
        "served": engine._lean_decoder(1) is not None, "threads": threads, "cpu": hardware.cpu_model(),
        "kl": distances(base, engine, prompts[0]),
    }


def distances(base: str, engine: Any, prompt: list[int]) -> dict[str, float]:
    """Mean KL from fp32 to `generate`'s forward and to our decoding, over the second half of ``prompt``."""
    import torch

    from lora_kit.model import load_base

    start, tokens_1T = len(prompt) // 2, torch.tensor([prompt])
    with torch.inference_mode():
        exact = torch.log_softmax(load_base(base, dtype="fp32")(input_ids=tokens_1T).logits[0, start:].float(), -1)

        def step_by_step(step) -> float:
            logits = torch.cat([step(tokens_1T[:, place]) for place in range(start, len(prompt))])
            return float((exact.exp() * (exact - torch.log_softmax(logits.float(), -1))).sum(-1).mean())

        def read():
            out = engine.model(input_ids=tokens_1T[:, :start], use_cache=True)
            return getattr(out, engine._cache_key)

        cache = read()
        found = {"generate": step_by_step(lambda token: engine.model(
            input_ids=token[:, None], use_cache=True, **{engine._cache_key: cache}).logits[:, -1])}
        lean = engine._lean_decoder(1)
        if lean is not None:
            lean.start(read(), len(prompt))
            found["ours"] = step_by_step(lean.step)
    return found


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    arguments = parser.parse_args(given)
    from lora_kit.model import quiet_libraries
    from tests import fetch, tiny

    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="decode-speed-") as name:
        if arguments.quick:
            base, shape = str(tiny.save_model(Path(name) / "model", dtype="bfloat16")[0]), (16, 6)
        else:
            base, shape = str(fetch.base()), (128, 32)
        found = measure(base, pairs=8 if arguments.quick else arguments.pairs, threads=arguments.threads,
                        prompt_tokens=shape[0], new_tokens=shape[1])
    print(f"{found['cpu']}, {found['threads']} thread(s), {shape[0]} + {shape[1]} tokens, {found['pairs']} pairs")
    print(f"generate {found['generate_tokens_per_second']:.1f} tokens/s, ours {found['our_tokens_per_second']:.1f}, at "
          f"best; {found['ratio']:.2f} times as fast (95 % interval {found['low']:.2f} to {found['high']:.2f})")
    print("KL from fp32, teacher-forced: " + ", ".join(f"{name} {value:.2e}" for name, value in found["kl"].items()))
    kl_met = found["served"] and found["kl"]["ours"] <= KL_TIMES * found["kl"]["generate"]
    claims = [{"claim": f"at least {TIMES} times generate", "met": found["ratio"] >= TIMES and found["low"] > LOWEST},
              {"claim": f"KL from fp32 at most {KL_TIMES} times generate's", "met": kl_met}]
    for entry in claims:
        print(f"{'met   ' if entry['met'] else 'missed'} {entry['claim']}")
    if arguments.json:
        arguments.json.write_text(json.dumps({**found, "claims": claims}, indent=1) + "\n", encoding="utf-8")
    return int(arguments.check and not all(entry["met"] for entry in claims))


if __name__ == "__main__":
    sys.exit(main())
