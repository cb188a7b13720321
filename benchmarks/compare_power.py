"""How often `lora-kit bench compare` is right, with the noise of this machine.

    python benchmarks/compare_power.py [--quick] [--check] [--json PATH] [--seconds N] [--simulations N]

First the machine's noise is recorded: one small model answers the same shape again and again, as fast as it can, for
`--seconds`. Then comparisons are simulated: stretches of the recorded times, in their order, dealt out in turns to an A
and a B as the command does it; B as it is (A against A), or 5 % slower. Each is judged by `speed_ratio.of_pairs`.

Targets (`--check`): A against A "cannot tell" at least 95 times in 100, the planted slowdown found at least 80 times.
Which number of pairs that takes is printed: it is what `--seconds` of the command has to be enough for.
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

SLOWER, SAME, FOUND = 1.05, 0.95, 0.80
PAIRS = (20, 40, 80, 160)


def record(seconds: float) -> list[float]:
    """Times of one model answering one shape, back to back."""
    from lora_kit import bench
    from lora_kit.engines import open_engine
    from lora_kit.types import Artifact
    from tests import tiny

    with tempfile.TemporaryDirectory(prefix="compare-power-") as name:
        base = tiny.save_model(Path(name) / "model", hidden=256, layers=4)[0]
        with open_engine(Artifact(name="base", path=str(base), kind="hf"), threads=1) as engine:
            prompts = bench.random_prompts(engine.tokenizer, engine.num_tokens, num=2, length=32, seed=0)
            for _ in range(3):
                engine.time_once(prompts[:1], 4)
            times, ends = [], time.perf_counter() + seconds
            while time.perf_counter() < ends:
                taken = engine.time_once(prompts[1:], 4)
                times.append(taken["first_token_seconds"] + taken["decode_seconds"])
    return times


def simulate(times: list[float], num_pairs: int, slower: float, number: int) -> dict[str, float]:
    """Shares of the verdicts over ``number`` simulated comparisons."""
    import numpy as np

    from lora_kit import speed_ratio

    generator, recorded = np.random.default_rng(0), np.array(times)
    counts = {"faster": 0, "slower": 0, "cannot tell": 0}
    for seed in range(number):
        start = int(generator.integers(0, len(recorded)))
        stretch = np.take(recorded, range(start, start + 2 * num_pairs), mode="wrap").reshape(num_pairs, 2)
        stretch[1::2] = stretch[1::2, ::-1]  # each pair in the other order
        counts[speed_ratio.of_pairs(stretch[:, 0], stretch[:, 1] * slower, seed=seed).verdict] += 1
    return {name: count / number for name, count in counts.items()}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two seconds, ten simulations")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--simulations", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    arguments = parser.parse_args(given)
    if arguments.quick:
        arguments.seconds, arguments.simulations = 2.0, 10
    import numpy as np

    times = record(arguments.seconds)
    logs = np.log(times)
    print(f"{len(times)} times recorded, median {np.median(times) * 1e3:.2f} ms; the middle 90 % within "
          f"{np.quantile(times, 0.05) / np.median(times) - 1:+.0%} and "
          f"{np.quantile(times, 0.95) / np.median(times) - 1:+.0%}")
    rows: list[dict[str, Any]] = []
    print(f"{'pairs':>6} {'A/A cannot tell':>16} {'5 % slower found':>17}")
    for pairs in PAIRS[:2] if arguments.quick else PAIRS:
        same = simulate(times, pairs, 1.0, arguments.simulations)
        planted = simulate(times, pairs, SLOWER, arguments.simulations)
        rows.append({"pairs": pairs, "same": same, "planted": planted})
        print(f"{pairs:6} {same['cannot tell']:16.0%} {planted['slower']:17.0%}", flush=True)
    enough = next((row["pairs"] for row in rows if row["planted"]["slower"] >= FOUND), None)
    claims = [
        {"claim": f"A against A is 'cannot tell' at least {SAME:.0%}", "met": all(
            row["same"]["cannot tell"] >= SAME for row in rows)},
        {"claim": f"5 % slower is found at least {FOUND:.0%}" + (f" from {enough} pairs on" if enough else ""),
         "met": enough is not None},
    ]
    for entry in claims:
        print(f"{'met   ' if entry['met'] else 'missed'} {entry['claim']}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"num_times": len(times), "spread": float(logs.std()), "rows": rows,
                                              "claims": claims}, indent=1) + "\n", encoding="utf-8")
    return int(arguments.check and not all(entry["met"] for entry in claims))


if __name__ == "__main__":
    sys.exit(main())
