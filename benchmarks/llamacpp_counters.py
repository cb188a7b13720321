"""Our llama.cpp engine's times against llama.cpp's own counters, for the same tokens of the same process.

    python benchmarks/llamacpp_counters.py [--quick] [--check] [--json PATH] [--gguf FILE --tokenizer FOLDER]

The engine times whole calls from Python: building batches, llama.cpp's evaluation, copying logits, choosing a token.
llama.cpp counts its evaluation alone (`llama_perf_context` of its C API). What lies between them is what the engine
costs. Prompts of 512 random tokens and 128 generated ones (llama-bench's pp512 and tg128), medians over repeats.

Target (`--check`): the engine's tokens/s within 3 % of the counters', for both. Needs llama-cpp-python and the default
base in the cache (`python -m tests.fetch`); with --quick a tiny model, whose single tokens take so little that nothing
is claimed of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WITHIN = 0.03


def measure(gguf: str, tokenizer_dir: str, *, prompt_tokens: int, new_tokens: int, repeats: int, threads: int
            ) -> dict[str, Any]:
    from lora_kit import bench, hardware
    from lora_kit.chat import load_tokenizer
    from lora_kit.engines.llamacpp import LlamaCppEngine

    tokenizer = load_tokenizer(tokenizer_dir)
    with LlamaCppEngine(gguf, tokenizer, stop_ids=(), threads=threads, counts=True) as engine:
        prompts = bench.random_prompts(tokenizer, engine.num_tokens, num=repeats + 1, length=prompt_tokens, seed=0)
        engine.time_once([prompts[0]], new_tokens)
        engine.counters()
        ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
        rates: dict[str, list[float]] = {"prefill": [], "decode": []}
        for prompt in prompts[1:]:
            ours = engine.time_once([prompt], new_tokens)
            counted = engine.counters()
            assert counted["prefill_tokens"] == prompt_tokens and counted["decode_tokens"] == new_tokens - 1, counted
            for part, number in (("prefill", prompt_tokens), ("decode", new_tokens - 1)):
                ratios[part].append(counted[f"{part}_seconds"] / ours[f"{part}_seconds"])
                rates[part].append(number / ours[f"{part}_seconds"])
    return {"share": {part: statistics.median(values) for part, values in ratios.items()},
            "tokens_per_second": {part: statistics.median(values) for part, values in rates.items()},
            "threads": threads, "repeats": repeats, "cpu": hardware.cpu_model(), "gguf": Path(gguf).name,
            "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model, few tokens")
    parser.add_argument("--check", action="store_true", help="exit 1 when the target is missed")
    parser.add_argument("--gguf", type=Path, help="another file; default: the default base in Q8_0")
    parser.add_argument("--tokenizer", type=Path, help="folder of its tokenizer")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    arguments = parser.parse_args(given)
    if (arguments.gguf is None) != (arguments.tokenizer is None):
        parser.error("--gguf and --tokenizer go together")
    from lora_kit import quantizers
    from tests import fetch, tiny

    with tempfile.TemporaryDirectory(prefix="llamacpp-counters-") as name:
        if arguments.gguf:
            gguf, tokenizer = arguments.gguf, arguments.tokenizer
        else:
            tokenizer = tiny.save_model(Path(name) / "model", dtype="bfloat16")[0] if arguments.quick else fetch.base()
            gguf = convert(quantizers, tokenizer, Path(name) / "gguf")
        shape = {"prompt_tokens": 32, "new_tokens": 8} if arguments.quick else {"prompt_tokens": 512, "new_tokens": 128}
        found = measure(str(gguf), str(tokenizer), repeats=arguments.repeats, threads=arguments.threads, **shape)
    print(f"{found['cpu']}, {found['threads']} thread(s), {found['gguf']}, {found['repeats']} repeats")
    for part, tokens in (("prefill", shape["prompt_tokens"]), ("decode", shape["new_tokens"])):
        print(f"{part} {tokens}: {found['tokens_per_second'][part]:.1f} tokens/s, {found['share'][part]:.1%} of what "
              "llama.cpp counts")
    met = all(abs(share - 1) <= WITHIN for share in found["share"].values())
    if not arguments.quick:
        print(f"{'met   ' if met else 'missed'} within {WITHIN:.0%} of llama.cpp's own counters")
    if arguments.json:
        arguments.json.write_text(json.dumps({**found, "met": met}, indent=1) + "\n", encoding="utf-8")
    return int(arguments.check and not arguments.quick and not met)


def convert(quantizers: Any, folder: Path, target: Path) -> Path:
    """The model in ``folder`` as a Q8_0 file under ``target``."""
    target.mkdir()
    quantizers.load("gguf").quantize(Path(folder), target, "q8_0")
    return next(target.glob("*.gguf"))


if __name__ == "__main__":
    sys.exit(main())
