"""What saving costs: the share of a training's wall time that its checkpoints take at the default interval.

    python benchmarks/save_time.py               recipes/chat.yaml: SmolLM2-135M, rank 16 on every linear layer
    python benchmarks/save_time.py --quick       a tiny random model in its place

Trains ``--steps`` steps and writes ``--saves`` checkpoints on the way, as the run itself does: adapter, optimizer and
random states synced, sealed, read back, and older ones removed. The share is the median save over the median time of
as many steps as the default interval has (a tenth of the run, at least 20: 20 steps is the worst). ``--check`` exits
with 1 over 2 %; ``--json PATH`` writes the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

LIMIT = 0.02
_INTERVAL = 20


def main(arguments: list[str] | None = None) -> int:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12, help="steps to train")
    parser.add_argument("--saves", type=int, default=6, help="checkpoints on the way")
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    parser.add_argument("--check", action="store_true", help=f"exit 1 over {LIMIT:.0%}")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    args = parser.parse_args(arguments)

    from lora_kit import checkpoint, hardware, pipeline, rundir
    from lora_kit.recipe_file import read_recipe

    saves, save = [], checkpoint.save

    def timed(place: Path, *positional, **options):
        started = time.perf_counter()
        folder = save(place, *positional, **options)
        if place.name != ".rehearsal":
            saves.append((time.perf_counter() - started, checkpoint.size_bytes(folder)))
        return folder

    checkpoint.save = timed
    every = max(1, args.steps // args.saves)
    settings = [f"train.steps={args.steps}", f"train.save_every={every}", "train.stop_prompts=0", "train.prove=false",
                "data.held_out_rows=2"]
    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name), _ROOT / "recipes" / "chat.yaml"
        if args.quick:
            from tests import tiny, tiny_run

            os.environ["LORA_KIT_CACHE"] = str(folder / "cache")
            path = tiny_run.write_recipe(folder, tiny.save_model(folder / "model")[0])
        run = pipeline.run_recipe(read_recipe(path, settings), runs_dir=folder / "runs", until="train")
        run = rundir.open_run(run.path)
        lines = [json.loads(line) for line in (run.stage_dir("train") / "timings.jsonl").read_text().splitlines()]
    steps = [line["seconds"] for line in lines if "step" in line][1:]
    save_seconds, step_seconds = statistics.median(seconds for seconds, _ in saves), statistics.median(steps)
    figures = {
        "model": "tiny" if args.quick else "recipes/chat.yaml", "save_seconds": save_seconds,
        "slowest_save_seconds": max(seconds for seconds, _ in saves), "checkpoint_bytes": saves[-1][1],
        "saves": len(saves), "step_seconds": step_seconds, "interval_steps": _INTERVAL,
        "share": save_seconds / (save_seconds + _INTERVAL * step_seconds), "limit": LIMIT,
        "machine": hardware.describe(),
    }
    print(f"checkpoint     {figures['checkpoint_bytes'] / 1e6:8.1f} MB")
    print(f"save           {save_seconds:8.3f} s   (median of {len(saves)}; the slowest "
          f"{figures['slowest_save_seconds']:.3f} s)")
    print(f"step           {step_seconds:8.3f} s   (median of {len(steps)})")
    print(f"share of time  {figures['share']:8.2%}   (one save every {_INTERVAL} steps)")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(args.check and figures["share"] > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
