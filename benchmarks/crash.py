"""Trainings killed with kill -9 at chosen and random moments: how many end with the bytes of one that was not?

    python benchmarks/crash.py --kills 200 --tally crash.json

A tiny random model is trained for 2.6 epochs in two ways (plain peft with padding and dropout; packing and the fast
path, keeping the best adapter), each once to its end, and then again and again: killed, gone on with, compared. Equal
means: adapter, the last checkpoint's adapter and optimizer, and metrics.jsonl are the same to the byte. The kills are
spread over start, steps of the first and of the second epoch, evaluations, saves (at random, and before each file
operation of a save in turn), and what comes after the last step. ``--cold`` of them are whole `lora-kit train`
processes, killed at a random moment from their start on, imports included; ``--real`` of them train SmolLM2-135M on the
fast path (its base in the cache: python -m tests.fetch). The others are children forked of one process that has
imported everything.

``--tally PATH`` writes down each kill as it ends and goes on from there the next time. ``--check`` exits with 1 when a
training did not end equal, or lost more than the save interval; ``--json PATH`` writes the figures; ``--quick`` makes
7 kills, none cold or real.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from tests import killed_runs, tiny_run  # noqa: E402 - after the path is set

SHARES = {"start": 2, "step": 3, "second epoch": 3, "evaluation": 2, "save boundary": 6, "save": 2, "last step": 2}
"""How often each stratum comes in 20 kills."""
_SECONDS_AT_MOST = 900.0
_TRIES = 8


def order_of(kills: int) -> list[str]:
    """The stratum of each of ``kills``, all of them early on."""
    block = [stratum for stratum in SHARES for _ in range(SHARES[stratum])]
    spread = [block[place * 7 % len(block)] for place in range(len(block))]
    return [spread[number % len(spread)] for number in range(kills)]


def cold(folder: Path, recipe: Path, runs: Path, seconds: float | None, settings: list[str]) -> tuple[int, float]:
    """`lora-kit train` on ``recipe`` in a new process, killed after ``seconds``; its exit code and how long it took."""
    command = [sys.executable, "-m", "lora_kit.cli", "train", str(recipe), "--runs", str(runs),
               *(part for setting in settings for part in ("--set", setting))]
    runs.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with open(runs / "output.txt", "ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, env=tiny_run.environment(
            **({"LORA_KIT_CACHE": str(folder / "cache")} if not settings else {})))
        try:
            process.wait(timeout=_SECONDS_AT_MOST if seconds is None else seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    return process.returncode, time.monotonic() - started


class Contest:
    """The kills of one tally, in a folder of their own."""

    def __init__(self, folder: Path, tally: dict[str, Any], seed: int) -> None:
        self.folder, self.tally, self.seed = folder, tally, seed
        self.references: dict[str, killed_runs.Reference] = {}
        self.cold_references: dict[str, tuple[dict[str, str], float]] = {}

    def reference(self, kind: str) -> killed_runs.Reference:
        if kind not in self.references:
            self.references[kind] = killed_runs.make_reference(self.folder / kind, kind)
        return self.references[kind]

    def forked(self, number: int, stratum: str, nth: int) -> dict[str, Any]:
        kind = list(killed_runs.KINDS)[nth % 2]
        reference = self.reference(kind)
        rng = random.Random(f"{self.seed} {number}")
        cut = killed_runs.draw_cut(stratum, reference, nth, rng)
        for _ in range(_TRIES):
            found = killed_runs.kill_and_go_on(reference, self.folder / kind / f"kill-{number}", [cut])
            if found["codes"][0] == -signal.SIGKILL:
                break
            cut = replace(cut, seconds=cut.seconds * 0.6)  # it was done before; what is killed must be under way
        return {"kind": kind, "cut": f"{cut.after} + {cut.seconds:.3f} s" if cut.boundary is None
                else f"{cut.after}, operation {cut.boundary}", "save_every": killed_runs.SAVE_EVERY, **found}

    def cold_kill(self, number: int, name: str, recipe: Path, settings: list[str]) -> dict[str, Any]:
        place = self.folder / name
        place.mkdir(exist_ok=True)
        if name not in self.cold_references:
            shutil.rmtree(place / "reference", ignore_errors=True)
            code, seconds = cold(recipe.parent, recipe, place / "reference", None, settings)
            assert code == 0, (place / "reference" / "output.txt").read_text()[-3000:]
            self.cold_references[name] = killed_runs.ending(place / "reference"), seconds
        expected, took = self.cold_references[name]
        runs = place / f"kill-{number}"
        share = random.Random(f"{self.seed} {number}").uniform(0.02, 0.98)
        for _ in range(_TRIES):
            after = share * took
            shutil.rmtree(runs, ignore_errors=True)
            first, seconds = cold(recipe.parent, recipe, runs, after, settings)
            if first != 0:
                break
            took = seconds  # this time it was quicker: what is killed must be under way
        self.cold_references[name] = expected, took
        codes = [first, cold(recipe.parent, recipe, runs, None, settings)[0]]
        found = killed_runs.ending(runs) if list(runs.glob("*/*/train")) else {}
        differ = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
        if not differ and codes[-1] == 0:
            shutil.rmtree(runs)
        return {"kind": name, "cut": f"start + {after:.1f} s", "equal": not differ and codes[-1] == 0,
                "differ": differ, "codes": codes, "lost_steps": None}

    def cold_tiny(self, number: int, nth: int) -> dict[str, Any]:
        kind = list(killed_runs.KINDS)[nth % 2]
        recipe = killed_runs.make_place(self.folder / kind, kind)
        return self.cold_kill(number, f"cold-{kind}", recipe, [])

    def real(self, number: int) -> dict[str, Any]:
        settings = ["train.steps=5", "train.batch_size=2", "train.save_every=1", "train.eval_every=3",
                    "train.stop_prompts=0", "train.prove=false", "data.held_out_rows=2", "data.max_tokens=128",
                    "lora.dropout=0.05"]
        return self.cold_kill(number, "smollm2", _ROOT / "recipes" / "chat.yaml", settings)


def figures_of(kills: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts over ``kills``, in all and by stratum."""
    strata: dict[str, list[dict[str, Any]]] = {}
    for kill in kills:
        strata.setdefault(kill["stratum"], []).append(kill)
    lost = [kill["lost_steps"] for kill in kills if kill["lost_steps"] is not None]
    return {
        "kills": len(kills), "killed": sum(-signal.SIGKILL in kill["codes"] for kill in kills),
        "equal": sum(kill["equal"] for kill in kills), "most_lost_steps": max(lost, default=0),
        "strata": {name: {"kills": len(found), "killed": sum(-signal.SIGKILL in kill["codes"] for kill in found),
                          "equal": sum(kill["equal"] for kill in found)} for name, found in strata.items()},
        "unequal": [kill for kill in kills if not kill["equal"]],
    }


def show(figures: dict[str, Any]) -> None:
    """Print ``figures`` as a table."""
    print(f"{'stratum':24} {'kills':>6} {'killed':>7} {'equal':>6}")
    for name, found in figures["strata"].items():
        print(f"{name:24} {found['kills']:6} {found['killed']:7} {found['equal']:6}")
    print(f"\n{figures['equal']} of {figures['kills']} ended byte-equal; {figures['killed']} were under way when they "
          f"were killed; the most that a kill has thrown back: {figures['most_lost_steps']} steps (a checkpoint every "
          f"{killed_runs.SAVE_EVERY})")


def main(arguments: list[str] | None = None) -> int:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="how many trainings to kill")
    parser.add_argument("--cold", type=int, default=20, help="of them: whole lora-kit train processes")
    parser.add_argument("--real", type=int, default=5, help="of them: SmolLM2-135M, whole processes too")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    parser.add_argument("--tally", type=Path, metavar="PATH", help="write down each kill there, and go on from it")
    parser.add_argument("--folder", type=Path, metavar="PATH", help="work there and leave what differs; else a "
                        "temporary folder")
    parser.add_argument("--quick", action="store_true", help="7 kills of forked processes")
    parser.add_argument("--check", action="store_true", help="exit 1 unless all ended byte-equal")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    args = parser.parse_args(arguments)
    if args.quick:
        args.kills, args.cold, args.real = 7, 0, 0

    os.environ.update(tiny_run.environment())
    strata = ["SmolLM2"] * args.real + ["cold"] * args.cold
    forked = order_of(max(0, args.kills - len(strata)))
    if args.quick:
        forked = list(SHARES)
    strata = forked + strata
    tally: dict[str, Any] = {"seed": args.seed, "kills": {}}
    if args.tally and args.tally.exists():
        tally = json.loads(args.tally.read_text(encoding="utf-8"))
        if tally["seed"] != args.seed:
            print(f"{args.tally}: is of seed {tally['seed']}; name another file or give --seed {tally['seed']}")
            return 2
    killed_runs.import_all()
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        contest = Contest(folder, tally, args.seed)
        for number, stratum in enumerate(strata):
            key = f"{number} {stratum}"
            if key in tally["kills"]:
                continue
            nth = strata[:number].count(stratum)
            if stratum == "SmolLM2":
                found = contest.real(number)
            elif stratum == "cold":
                found = contest.cold_tiny(number, nth)
            else:
                found = contest.forked(number, stratum, nth)
            tally["kills"][key] = {"stratum": stratum, **found}
            print(f"{number + 1}/{len(strata)} {stratum}, {found['kind']}, {found['cut']}: "
                  f"{'equal' if found['equal'] else 'DIFFERS: ' + ', '.join(found['differ'])}", flush=True)
            if args.tally:
                part = args.tally.with_suffix(".part")
                part.write_text(json.dumps(tally, indent=1) + "\n", encoding="utf-8")
                os.replace(part, args.tally)
    figures = figures_of([tally["kills"][f"{number} {stratum}"] for number, stratum in enumerate(strata)])
    show(figures)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    good = figures["equal"] == figures["killed"] == figures["kills"]
    return int(args.check and not (good and figures["most_lost_steps"] <= killed_runs.SAVE_EVERY))


if __name__ == "__main__":
    sys.exit(main())
