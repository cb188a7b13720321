"""Do verdicts keep their word? Simulated evaluations whose truth is known, 10,000 of each kind.

    python benchmarks/gate_power.py [--runs 10000] [--quick] [--check] [--json PATH]

Each run draws item scores of two models, and ``lora_kit/gates.py`` decides as it does after an evaluation.
Three promises are held to it:

* two equally good models (A/A) fail a gate at most at the stated level, 2.5 % (half of 5 % on each side), be the
  items alone or in clusters, be there one gate or several, looked at once or in batches; scores whose differences
  are skewed are harder, and 5 % on one side is all that is promised of them;
* a planted difference of the size that ``lora-kit eval --dry-run`` calls the smallest that can be seen is found
  with the stated power, 80 %;
* looking in batches (``lora_kit/sequential.py``) keeps the level, finds nearly as much, and saves items, also
  as ``eval.budget`` does it (``lora_kit/budget.py``), with several gates of which each stays as it was decided.

A share over 10,000 runs has a standard error of its own: ``--check`` exits with 1 where one misses its promise by more
than three of them. Only numpy and scipy work here; no model is loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy

from lora_kit import budget, gates, power, sequential
from lora_kit.claims import Gate
from lora_kit.stats import paired_difference

ITEMS = 200
TARGET = Gate(task="task", metric="metric", better_than="base")
RETAIN = Gate(task="task", metric="metric", no_worse_than="base", margin=0.05)
LEVEL = gates.ALPHA


def verdict_of(gate: Gate, a: Sequence[float], b: Sequence[float], clusters=None) -> str:
    """What the gate says of the scores ``a`` against ``b`` of the same items."""
    found = gates.Evidence(estimate=paired_difference(a, b, clusters))
    return gates.decide([gate], [found])[0].outcome


@cache
def evidence_of_counts(gained: int, lost: int, num_items: int) -> gates.Evidence:
    """Evidence from 0-1 scores: of items that stand alone, only the numbers of flips matter."""
    a = [1.0] * gained + [0.0] * (num_items - gained)
    b = [0.0] * gained + [1.0] * lost + [0.0] * (num_items - gained - lost)
    return gates.Evidence(estimate=paired_difference(a, b))


@cache
def verdict_of_counts(gate: Gate, gained: int, lost: int, num_items: int, alpha: float) -> str:
    return gates.decide([gate], [evidence_of_counts(gained, lost, num_items)], alpha)[0].outcome


def flips(generator, runs: int, difference: float, discordance: float, num_items: int = ITEMS):
    """(runs, 2) numbers of items gained and lost, of models with this true difference."""
    gain, loss = discordance / 2 + max(difference, 0.0), discordance / 2 + max(-difference, 0.0)
    return generator.multinomial(num_items, [gain, loss, 1 - gain - loss], size=runs)[:, :2]


def binary(generator, runs: int, gate: Gate, difference: float, discordance: float) -> Counter:
    return Counter(verdict_of_counts(gate, int(gained), int(lost), ITEMS, LEVEL)
                   for gained, lost in flips(generator, runs, difference, discordance))


def clustered(generator, runs: int) -> Counter:
    """A/A of 40 clusters of five 0-1 items that flip together more often than not."""
    found: Counter = Counter()
    names = [index // 5 for index in range(ITEMS)]
    for _ in range(runs):
        # In a fifth of the clusters each item is right with one of the models only, mostly the same one.
        lean = numpy.repeat(generator.choice([0, 1, -1], size=40, p=[0.8, 0.1, 0.1]), 5)
        own = numpy.where(generator.random(ITEMS) < 0.8, lean, -lean)
        found[verdict_of(TARGET, (own > 0).astype(float).tolist(), (own < 0).astype(float).tolist(), names)] += 1
    return found


def skewed(generator, runs: int, num_items: int) -> Counter:
    """A/A of scores whose differences are skewed (exponential) around a mean of zero."""
    found: Counter = Counter()
    for _ in range(runs):
        a = generator.exponential(size=num_items) - 1
        found[verdict_of(TARGET, a.tolist(), [0.0] * num_items)] += 1
    return found


def several(generator, runs: int, num_gates: int) -> Counter:
    """A/A of several gates at once: a run counts as FAIL (PASS) when any of them does."""
    found: Counter = Counter()
    drawn = [flips(generator, runs, 0.0, 0.1) for _ in range(num_gates)]
    for run in range(runs):
        evidence = [evidence_of_counts(int(one[run][0]), int(one[run][1]), ITEMS) for one in drawn]
        outcomes = {verdict.outcome for verdict in gates.decide([TARGET] * num_gates, evidence)}
        found.update(outcomes - {"INCONCLUSIVE"})
    return found


def batches(generator, runs: int, difference: float, discordance: float, num_looks: int) -> Counter:
    """Look after each batch and stop once the gate is decided; ``items`` counts what was evaluated in all."""
    ends = sequential.looks(ITEMS, num_looks)
    levels = sequential.levels([end / ITEMS for end in ends], LEVEL)
    steps = [flips(generator, runs, difference, discordance, end - before)
             for before, end in zip([0, *ends], ends, strict=False)]
    found: Counter = Counter()
    for run in range(runs):
        gained = lost = 0
        for step, end, level in zip(steps, ends, levels, strict=True):
            gained, lost = gained + int(step[run][0]), lost + int(step[run][1])
            outcome = verdict_of_counts(TARGET, gained, lost, end, level)
            if outcome != "INCONCLUSIVE":
                break
        found[outcome] += 1
        found["items"] += end
    return found


def budgeted(generator, runs: int, difference: float, num_gates: int) -> Counter:
    """Several gates under a time budget that is long enough, as ``lora_kit/budget.py`` spends it: batches, looks, stop.

    A run counts as FAIL (PASS) when any gate does; ``items`` counts what was evaluated of a gate, on average.
    """
    claims = [TARGET.model_copy(update={"task": f"task {place}"}) for place in range(num_gates)]
    ordered = {gate.task: [budget.Question(item_id=str(item), cluster=str(item)) for item in range(ITEMS)]
               for gate in claims}
    gain, loss = 0.05 + max(difference, 0.0), 0.05 + max(-difference, 0.0)
    found: Counter = Counter()
    for _ in range(runs):
        flipped = {gate.task: generator.choice([1, -1, 0], size=ITEMS, p=[gain, loss, 1 - gain - loss])
                   for gate in claims}
        scored = dict.fromkeys(ordered, 0)

        def score(batch: budget.Batch, scored=scored) -> budget.Cost:
            if batch.artifact == "merged":
                for task, items in batch.items.items():
                    scored[task] += len(items)
            return budget.Cost(fixed=0.0, tasks={})

        def decide(shares, decided, scored=scored, flipped=flipped):
            counts = [(flipped[gate.task][:scored[gate.task]], scored[gate.task]) for gate in claims]
            evidence = [evidence_of_counts(int((each > 0).sum()), int((each < 0).sum()), number)
                        for each, number in counts]
            return gates.decide(claims, evidence, shares=shares, decided=decided)

        spent = budget.spend(ordered, claims, 1.0, score, decide, started=0.0, clock=lambda: 0.0)
        found.update({verdict.outcome for verdict in spent.decided.values()})
        found["items"] += sum(scored.values()) / num_gates
    return found


def smallest(discordance: float, bound: float = 0.0) -> float:
    """The smallest improvement over ``bound`` that the dry run promises to be seen."""
    return power.smallest_detectable(
        lambda size: power.chance_paired(ITEMS, bound + size, bound=bound, discordance=discordance), 0.9)


def scenarios() -> list[tuple[str, str, str, float, Callable[[numpy.random.Generator, int], Counter]]]:
    """(what, which verdict is counted, at most or at least, the promise, the simulation)."""
    found: list = []
    for discordance in (0.02, 0.05, 0.1, 0.3):
        size, flipping = smallest(discordance), f"{discordance:.0%} flips"
        for what, gate in (("must improve", TARGET), ("may lose 5 points", RETAIN)):
            found.append((f"A/A, {flipping}, {what}", "FAIL", "most", LEVEL,
                          lambda g, n, gate=gate, d=discordance: binary(g, n, gate, 0.0, d)))
        found.append((f"A/A, {flipping}, must improve", "PASS", "most", LEVEL,
                      lambda g, n, d=discordance: binary(g, n, TARGET, 0.0, d)))
        found.append((f"drop of 5 points, the margin, {flipping}", "PASS", "most", LEVEL,
                      lambda g, n, d=discordance: binary(g, n, RETAIN, -0.05, d)))
        found.append((f"drop of {size * 100:.1f} points, {flipping}, must improve", "FAIL", "least", power.POWER,
                      lambda g, n, d=discordance, s=size: binary(g, n, TARGET, -s, d)))
        found.append((f"gain of {size * 100:.1f} points, {flipping}, must improve", "PASS", "least", power.POWER,
                      lambda g, n, d=discordance, s=size: binary(g, n, TARGET, s, d)))
    passing = power.chance_paired(ITEMS, 0.0, bound=-0.05, discordance=0.05)
    found.append((f"A/A, 5% flips, may lose 5 points: said to pass {passing:.0%}", "PASS", "least", passing,
                  lambda g, n: binary(g, n, RETAIN, 0.0, 0.05)))
    for verdict in ("FAIL", "PASS"):
        for number in (60, 200):
            found.append((f"A/A, {number} skewed differences", verdict, "most", 2 * LEVEL,
                          lambda g, n, k=number: skewed(g, n, k)))
        found.append(("A/A, 40 clusters of 5", verdict, "most", LEVEL, lambda g, n: clustered(g, n)))
        found.append(("A/A, five gates at once, any of them", verdict, "most", LEVEL, lambda g, n: several(g, n, 5)))
        for number in (1, 3):
            found.append((f"A/A, {number} gate{'s' * (number > 1)} under a time budget, any of them", verdict, "most",
                          LEVEL, lambda g, n, k=number: budgeted(g, n, 0.0, k)))
        for looks in (4, 10):
            found.append((f"A/A, {looks} looks", verdict, "most", LEVEL,
                          lambda g, n, k=looks: batches(g, n, 0.0, 0.1, k)))
    size = smallest(0.1)
    found.append((f"drop of {size * 100:.1f} points, 4 looks", "FAIL", "least", power.POWER - 0.02,
                  lambda g, n: batches(g, n, -size, 0.1, 4)))
    found.append((f"drop of {2 * size * 100:.1f} points, 4 looks", "FAIL", "least", 0.99,
                  lambda g, n: batches(g, n, -2 * size, 0.1, 4)))
    found.append((f"drop of {size * 100:.1f} points, a time budget", "FAIL", "least", power.POWER - 0.02,
                  lambda g, n: budgeted(g, n, -size, 1)))
    return found


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10_000, help="simulated runs of each kind")
    parser.add_argument("--quick", action="store_true", help="400 runs: does it work at all")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a promise is missed")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    arguments = parser.parse_args()
    runs = 400 if arguments.quick else arguments.runs
    # How many items would decide is not asked here, and is most of a verdict's work.
    gates.items_to_decide = lambda *_: None
    started, rows, missed = time.perf_counter(), [], []
    print(f"{runs:,} runs of each kind, {ITEMS} items, 95 % intervals\n")
    print(f"{'truth':62} {'verdict':8} {'share':>7}   promised")
    drawn: dict[str, Counter] = {}
    for number, (what, verdict, side, promise, simulate) in enumerate(scenarios()):
        counted = drawn.get(what)
        if counted is None:
            counted = drawn[what] = simulate(numpy.random.default_rng([20_261_123, number]), runs)
        share, error = counted[verdict] / runs, math.sqrt(promise * (1 - promise) / runs)
        kept = share <= promise + 3 * error if side == "most" else share >= promise - 3 * error
        missed += [] if kept else [what]
        items = counted["items"] / runs if counted["items"] else None
        saved = f", {items:.0f} of {ITEMS} items on average" if items else ""
        print(f"{what:62} {verdict:8} {share:7.2%}   at {side} {promise:.1%}{saved}{'' if kept else '   MISSED'}",
              flush=True)
        rows.append({"truth": what, "verdict": verdict, "share": share, "side": side, "promised": promise,
                     "kept": kept, "mean_items": items})
    figures = {"runs": runs, "num_items": ITEMS, "seconds": time.perf_counter() - started, "rows": rows}
    print(f"\n{figures['seconds']:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.check and missed:
        sys.exit(f"missed: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
