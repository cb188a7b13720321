"""Seconds from `lora-kit train` to the first forward pass of training, in parts.

    python benchmarks/train_start.py             recipes/chat.yaml, its data in the cache
    python benchmarks/train_start.py --quick     a tiny random model and a few rows in its place

Starts `lora-kit train` once, so that data and base are in the cache, and then ``--times`` times afresh; each start is
stopped after a few steps. CPU seconds are user and system together, of all threads and of child processes that ended;
they bear a busy machine better than the clock does. Beside the start stand the proof, the measurement of the
machine's matrix ceiling, the held-out loss before the first step, and warm-up: what the first step took over the later
ones' pace. Printed are medians. ``--check`` exits with 1 when the start took over 8 s of CPU; ``--json PATH`` writes
the figures. What the program counts of itself is checked from outside: ``outside_cpu_seconds`` is the process's CPU
time by the system's count when its first step began, all parts together.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

LIMIT_CPU_SECONDS = 8.0
_STEPS_SEEN = 4
_SECONDS_AT_MOST = 1800.0


def start_once(command: list[str], runs: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Start ``command``, a training with its run under ``runs``, and stop it after a few steps.

    Returns:
        ``parts`` (name to seconds and cpu_seconds), ``steps`` (lines of timings.jsonl), ``outside_cpu_seconds``.
    """
    import psutil

    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, env=environment, cwd=_ROOT, stdout=output, stderr=subprocess.STDOUT)
        outside, ends = None, time.monotonic() + _SECONDS_AT_MOST
        try:
            watched = psutil.Process(process.pid)
            while True:
                ended = process.poll() is not None
                lines = _lines(runs)
                if lines and outside is None and not ended:
                    outside = sum(watched.cpu_times()[:4])
                steps = [line for line in lines if "step" in line]
                if len(steps) >= _STEPS_SEEN or ended or time.monotonic() > ends:
                    break
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        if len(steps) < 2:
            output.seek(0)
            sys.exit(f"{' '.join(command)} did not come to its second step:\n{output.read()[-4000:]}")
    parts = {line["part"]: {key: line[key] for key in ("seconds", "cpu_seconds")} for line in lines if "part" in line}
    return {"parts": parts, "steps": steps, "outside_cpu_seconds": outside}


def _lines(runs: Path) -> list[dict[str, Any]]:
    """The whole lines of the only run's timings.jsonl so far."""
    found = list(runs.glob("*/*/train/timings.jsonl"))
    return [json.loads(line) for line in found[0].read_text().splitlines(True) if line.endswith("\n")] if found else []


def warm_up_seconds(steps: list[dict[str, Any]]) -> float:
    """Seconds that the first step took more than its tokens take at the later steps' median pace."""
    pace = statistics.median(step["seconds"] / step["tokens"] for step in steps[1:])
    return steps[0]["seconds"] - steps[0]["tokens"] * pace


def medians(starts: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over ``starts`` of what :func:`start_once` returned, parts apart and together."""
    from lora_kit.stopwatch import BESIDE

    names = list(dict.fromkeys(name for start in starts for name in start["parts"]))

    def median(of) -> dict[str, float]:
        return {key: statistics.median(of(start, key) for start in starts) for key in ("cpu_seconds", "seconds")}

    def total(start, key, beside: bool) -> float:
        return sum(spent[key] for name, spent in start["parts"].items() if beside or name not in BESIDE)

    parts = {name: median(lambda start, key, name=name: start["parts"].get(name, {key: 0.0})[key]) for name in names}
    seen = [start["outside_cpu_seconds"] for start in starts if start["outside_cpu_seconds"] is not None]
    return {
        "times": len(starts), "start": median(lambda start, key: total(start, key, False)),
        "parts": {name: spent for name, spent in parts.items() if name not in BESIDE},
        "beside": {name: spent for name, spent in parts.items() if name in BESIDE},
        "warm_up_seconds": statistics.median(warm_up_seconds(start["steps"]) for start in starts),
        "all_parts": median(lambda start, key: total(start, key, True)),
        "outside_cpu_seconds": statistics.median(seen) if seen else None,
    }


def show(figures: dict[str, Any]) -> None:
    """Print the figures as a table."""
    print(f"{figures['machine']['cpu']}, {figures['machine']['cores']} cores, "
          f"{figures['matrix_gflops']:.0f} GFLOP/s in fp32 (numpy); median of {figures['times']} starts")
    print(f"\n{'part':32} {'CPU s':>8} {'wall s':>8}")
    rows = [*figures["parts"].items(), ("to the first forward pass", figures["start"]), None,
            *figures["beside"].items()]
    for row in rows:
        print(f"{row[0]:32} {row[1]['cpu_seconds']:8.2f} {row[1]['seconds']:8.2f}" if row else "\nbeside it:")
    print(f"{'warm-up (first step)':32} {'':8} {figures['warm_up_seconds']:8.2f}")


def main(arguments: list[str] | None = None) -> int:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=_ROOT / "recipes" / "chat.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--times", type=int, default=3, help="how often to start")
    parser.add_argument("--quick", action="store_true", help="a tiny random model and a few rows")
    parser.add_argument("--check", action="store_true", help=f"exit 1 over {LIMIT_CPU_SECONDS:g} s of CPU")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    args = parser.parse_args(arguments)

    from lora_kit import hardware

    environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
    starts = []
    with tempfile.TemporaryDirectory() as name:
        folder, recipe = Path(name), args.recipe.resolve()
        if args.quick:
            from tests import tiny, tiny_run

            recipe = tiny_run.write_recipe(folder / "tiny", tiny.save_model(folder / "model")[0])
            environment |= {"LORA_KIT_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        for number in range(args.times + 1):
            runs = folder / f"runs-{number}"
            # The steps of a run decide whether a proof is worth while: here it is always made, and told beside.
            settings = [f"train.steps={_STEPS_SEEN + 1}", "train.prove=true", *args.set]
            command = [sys.executable, "-m", "lora_kit.cli", "train", str(recipe), "--fresh", "--runs", str(runs),
                       *(part for setting in settings for part in ("--set", setting))]
            starts.append(start_once(command, runs, environment))
    figures = {"recipe": "tiny" if args.quick else args.recipe.name, **medians(starts[1:]), "starts": starts[1:],
               "machine": hardware.describe(), "matrix_gflops": hardware.measure_matrix_gflops(),
               "limit_cpu_seconds": LIMIT_CPU_SECONDS}
    show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    over = figures["start"]["cpu_seconds"] > LIMIT_CPU_SECONDS
    if over and args.check:
        print(f"over {LIMIT_CPU_SECONDS:g} s of CPU")
    return int(args.check and over)


if __name__ == "__main__":
    sys.exit(main())
