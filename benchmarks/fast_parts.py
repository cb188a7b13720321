"""What each part of the fast path gains: time and memory of the same steps with more and more of them.

    python benchmarks/fast_parts.py [--threads 1 2] [--rounds 3] [--json PATH]
    python benchmarks/fast_parts.py --quick         a tiny random model

One process, one model (SmolLM2-135M with a LoRA of rank 16 on all linear layers), the same batches of eight real rows
(those of benchmarks/train_speed.py). Settings take turns within a round, so that they share whatever else the machine
does; of every step the fastest round counts. A line is the step with the parts named so far: forward, loss and
backward, without the optimizer, which is the same for all.

Printed: useful tokens/s, its ratio to padded rows and to the line before, and how far the process's resident memory
rises over what it held before the step. Every setting's loss is compared with the first one's: over 1e-3 (2e-2 in
16 bits) it is said, and with ``--check`` the exit code is 1. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

BATCH_SIZE, LORA = 8, {"rank": 16, "alpha": 32}
STEADY = "+ memory is kept"
"""The line that has, besides all parts, what ``lora_kit/fast/steady.py`` does in the training loop."""
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}


def settings() -> list[tuple[str, bool, tuple[str, ...]]]:
    """(name, packed, parts) of each line: padded, packed, then one part more at a time."""
    order = ("attention", "linear", "mlp", "norm", "loss", "prefix", "kernels")
    lines = [("padded, plain peft", False, ()), ("packed, plain peft", True, ())]
    lines += [(f"+ {part}", True, order[:number]) for number, part in enumerate(order, 1)]
    return [*lines, (STEADY, True, order)]


def rows_of(base: Path, folder: Path, num_rows: int, quick: bool) -> list[Any]:
    """The first examples that the data stage makes of the rows of benchmarks/train_speed.py."""
    from benchmarks import train_speed
    from lora_kit import pipeline, tokens
    from lora_kit.recipe_file import read_recipe

    train_speed.write_rows(folder / "rows.jsonl", train_speed.QUICK_CHARACTERS if quick else train_speed.CHARACTERS)
    recipe = folder / "rows.yaml"
    recipe.write_text(json.dumps({"model": {"base": str(base)}, "lora": LORA, "data": {
        "train": "rows.jsonl", "held_out_rows": 0, "max_tokens": train_speed.MAX_TOKENS}}))
    run = pipeline.run_recipe(read_recipe(recipe), runs_dir=folder / "runs", until="data", fresh=True)
    examples = tokens.read_examples(run.stage_dir("data"), "train")
    return [examples[row] for row in range(min(num_rows, len(examples)))]


def measure(net, batches: list[list[Any]], precision: str, packed: bool, parts: tuple[str, ...],
            times: int = 1) -> dict[str, Any]:
    """Seconds of each batch, the last of so many times, the summed loss, and bytes that memory rose by."""
    import torch

    from lora_kit import fast, packing
    from lora_kit.loss import loss_sum
    from lora_kit.tokens import batch_of

    if packed:
        packing.use_packing(net.get_base_model())
    fast.use_fast(net, parts)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier settings freed is not to serve this one
    Path("/proc/self/clear_refs").write_text("5")
    held = _memory("VmRSS")
    for _ in range(times):
        seconds, total = [], 0.0
        for rows in batches:
            started = time.perf_counter()
            batch = (packing.packed_batch_of(rows, "cpu", "prefix" in parts) if packed else batch_of(rows, 0, "cpu"))
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_sum(net, batch)
            (loss / batch.num_trained_tokens).backward()
            total += float(loss.detach())
            for parameter in net.parameters():
                parameter.grad = None
            seconds.append(time.perf_counter() - started)
    rose = _memory("VmHWM") - held
    fast.stop_fast(net)
    packing.stop_packing(net.get_base_model())
    return {"seconds": seconds, "loss": total, "memory_bytes": rose}


def _memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def run(arguments: argparse.Namespace, threads: int, folder: Path) -> list[dict[str, Any]]:
    import torch

    from lora_kit import adapter, model
    from lora_kit.fast.steady import steady
    from lora_kit.recipe import LoraSection
    from tests import fetch, tiny

    torch.set_num_threads(threads)
    base = tiny.save_model(folder / "tiny")[0] if arguments.quick else fetch.base()
    rows = rows_of(Path(base), folder, BATCH_SIZE * arguments.steps, arguments.quick)
    batches = [rows[start:start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    net = model.load_base(str(base), dtype=arguments.precision, device=torch.device("cpu"))
    net = adapter.add_adapter(net, LoraSection(**LORA), 0).train()
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds + 1):  # the first warms up
        for name, packed, parts in settings():
            with steady() if name == STEADY else nullcontext():
                # What is kept serves from the second time on.
                found.setdefault(name, []).append(
                    measure(net, batches, arguments.precision, packed, parts, 2 if name == STEADY else 1))
    num_tokens = sum(len(row.tokens_T) for row in rows)
    lines = []
    for name, rounds in found.items():
        best = sum(map(min, zip(*(one["seconds"] for one in rounds[1:]), strict=True)))
        lines.append({"setting": name, "threads": threads, "tokens_per_second": num_tokens / best,
                      "memory_bytes": max(one["memory_bytes"] for one in rounds[1:]), "loss": rounds[0]["loss"]})
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds after one that warms up")
    parser.add_argument("--steps", type=int, default=2, help="batches of eight rows in a round")
    parser.add_argument("--precision", choices=sorted(TOLERANCE), default="fp32")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, one round")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a loss is another one")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds, arguments.steps = 1, 1
    wrong, everything = 0, []
    for threads in arguments.threads:
        with tempfile.TemporaryDirectory() as folder:
            lines = run(arguments, threads, Path(folder))
        everything += lines
        print(f"\n{arguments.precision}, {threads} thread{'s' if threads > 1 else ''}, {arguments.steps} steps of "
              f"{BATCH_SIZE} rows\n{'':22s}{'tokens/s':>10s}{'to padded':>11s}{'to before':>11s}{'memory, MB':>12s}")
        for number, line in enumerate(lines):
            speed = line["tokens_per_second"]
            before = lines[max(number - 1, 0)]["tokens_per_second"]
            print(f"{line['setting']:22s}{speed:10.0f}{speed / lines[0]['tokens_per_second']:11.2f}"
                  f"{speed / before:11.2f}{line['memory_bytes'] / 1e6:12.0f}")
            if abs(line["loss"] / lines[0]["loss"] - 1) > TOLERANCE[arguments.precision]:
                print(f"  its loss {line['loss']:.4f} is not {lines[0]['loss']:.4f}", file=sys.stderr)
                wrong = 1
    if arguments.json:
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")
    return wrong if arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
