"""An evaluation with limited time: in which order items are scored, after how many to look, when to stop.

Each task's items come in an order that the recipe's seed draws: clusters as wholes, and of strata
(``stratify_by``) each its share of every batch. The first batch, a tenth, shows what an item costs; from that
follows how many the time is enough for, and so the looks: after the first batch and after each of three more. The
plan follows from the clock alone and never from scores, as the sequential rule (``sequential.py``) demands. A
gate that is decided at a look stays decided; its models are scored further only where another gate needs them.
Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_kit.claims import FEWSHOT, Gate, lock_subject
from lora_kit.types import Verdict
from lora_kit.units import seconds_text

FIRST = 0.1
"""Share of the items that the first batch has, which shows what they cost."""
FEWEST = 8
"""Items of a task that the first batch has at least."""
LOOKS = 3
"""Further batches."""
_SLACK = 0.9
"""Of the time left, what is planned with: the machine may get slower."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What the order needs to know of an item."""

    item_id: str
    cluster: str
    stratum: str = ""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one subject is to score: by task, ids of items. ``is_first``: it has not been loaded before."""

    artifact: str
    items: dict[str, list[str]]
    is_first: bool


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds that a batch took: what it takes whatever its size (loading), and by task."""

    fixed: float
    tasks: dict[str, float]


@dataclass
class Spent:
    """How the time was used: ``looks`` and ``stopped`` go into scores.json. ``left_out``: what no gate is about."""

    looks: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    decided: dict[int, Verdict] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    left_out: list[dict[str, str]] = field(default_factory=list)


def in_order(questions: Sequence[Question], seed: str) -> list[Question]:
    """The questions in the order in which they are scored: clusters whole, strata side by side, else by ``seed``."""
    clusters: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        clusters[question.cluster].append(question)
    strata: dict[str, list[list[Question]]] = defaultdict(list)
    for members in clusters.values():
        strata[members[0].stratum].append(members)
    generator, placed = random.Random(seed), []
    for name in sorted(strata):
        generator.shuffle(strata[name])
        # The k-th of n stands at (k + a draw) / n: every beginning of the order has each stratum's share.
        placed += [((rank + generator.random()) / len(strata[name]), members)
                   for rank, members in enumerate(strata[name])]
    placed.sort(key=lambda entry: entry[0])
    return [question for _, members in placed for question in members]


def up_to(ordered: Sequence[Question], share: float, fewest: int = 0) -> int:
    """How many of ``ordered`` a batch ends after: ``share`` of them, and the cluster whole."""
    end = min(len(ordered), max(math.ceil(share * len(ordered)), fewest))
    while 0 < end < len(ordered) and ordered[end].cluster == ordered[end - 1].cluster:
        end += 1
    return end


def needed(claims: Sequence[Gate], decided: Mapping[int, Verdict]) -> dict[str, list[str]]:
    """By artifact, the tasks that gates which are not decided need of it."""
    found: dict[str, list[str]] = defaultdict(list)
    for place, gate in enumerate(claims):
        if place in decided:
            continue
        other = gate.baseline if gate.baseline and lock_subject(gate.baseline, gate.artifact) is None else None
        for name in (gate.artifact, other):
            name = "base" if name == FEWSHOT else name
            if name and gate.task not in found[name]:
                found[name].append(gate.task)
    return dict(found)


def plan(seconds_left: float, first: float, fixed: float, per_share: float) -> list[float]:
    """Shares of the items after which to look, the first batch's included.

    Args:
        first: the first batch's share.
        fixed: seconds that each further batch takes whatever its size.
        per_share: seconds that all items take beside that.
    """
    left = seconds_left * _SLACK
    for number in (LOOKS, 1):
        more = min((left - number * fixed) / per_share if per_share > 0 else 1.0, 1.0 - first)
        if more > 0:
            last = first + more
            return [first, *(first + more * look / number for look in range(1, number)), 1.0 if last > 0.999 else last]
    return [first]


def spend(
    ordered: Mapping[str, Sequence[Question]], claims: Sequence[Gate], seconds: float,
    score: Callable[[Batch], Cost], decide: Callable[[Sequence[float], Mapping[int, Verdict]], list[Verdict]],
    *, started: float, clock: Callable[[], float] = time.perf_counter,
    tell: Callable[[str], None] = lambda _: None,
) -> Spent:
    """Score batch after batch until every gate is decided, the items are used up, or the time is.

    Args:
        ordered: each task's questions, as :func:`in_order` gives them.
        seconds: the time, from ``started`` (as ``clock`` tells it).
        score: scores a batch.
        decide: the verdicts after what has been scored, given the shares of all looks and what is decided.
    """
    spent, ends = Spent(), dict.fromkeys(ordered, 0)
    first_ends = {task: up_to(questions, FIRST, FEWEST) for task, questions in ordered.items()}
    total = max(sum(map(len, ordered.values())), 1)
    costs: dict[str, Cost] = {}
    shares: list[float] = []
    looks = [sum(first_ends.values()) / total]
    while not spent.stopped:
        number = len(spent.looks)
        new_ends = first_ends if number == 0 else {
            task: max(up_to(questions, looks[number]), ends[task]) for task, questions in ordered.items()}
        for name, tasks in needed(claims, spent.decided).items():
            batch = {task: [each.item_id for each in ordered[task][ends[task]:new_ends[task]]] for task in tasks}
            cost = score(Batch(artifact=name, items=batch, is_first=name not in costs))
            costs.setdefault(name, cost)
        ends, num_scored = dict(new_ends), sum(new_ends.values())
        if number == 0:
            looks = _plan(ordered, claims, costs, ends, seconds - (clock() - started))
        is_last = number + 1 == len(looks) or num_scored >= total * looks[-1]
        shares.append(1.0 if is_last else num_scored / (total * looks[-1]))
        spent.verdicts = decide(shares, spent.decided)
        spent.decided |= {place: verdict for place, verdict in enumerate(spent.verdicts)
                          if verdict.outcome != "INCONCLUSIVE"}
        elapsed = clock() - started
        spent.looks.append({"num_items": dict(ends), "share_of_plan": shares[-1], "seconds": elapsed,
                            "num_decided": len(spent.decided)})
        tell(f"look {number + 1} of at most {len(looks)}: {num_scored} of {total} items, {len(spent.decided)} of "
             f"{len(claims)} gates decided, {seconds_text(elapsed)} of {seconds_text(seconds)}")
        if len(spent.decided) == len(claims):
            spent.stopped = "every gate is decided"
        elif num_scored == total:
            spent.stopped = "all items are scored"
        elif is_last:
            spent.stopped = "the time is used up"
        else:
            # A batch that adds no whole cluster would be no further look.
            while number + 2 < len(looks) and all(
                    up_to(questions, looks[number + 1]) <= ends[task] for task, questions in ordered.items()):
                del looks[number + 1]
            step = looks[number + 1] - num_scored / total
            if elapsed + _seconds(needed(claims, spent.decided), costs, first_ends, ordered, step) > seconds:
                spent.stopped = "the time is used up"
    return spent


def _plan(ordered: Mapping[str, Sequence[Question]], claims: Sequence[Gate], costs: Mapping[str, Cost],
          ends: Mapping[str, int], seconds_left: float) -> list[float]:
    total = max(sum(map(len, ordered.values())), 1)
    wanted = needed(claims, {})
    fixed = _seconds(wanted, costs, ends, ordered, 0.0)
    return plan(seconds_left, sum(ends.values()) / total, fixed, _seconds(wanted, costs, ends, ordered, 1.0) - fixed)


def _seconds(wanted: Mapping[str, Sequence[str]], costs: Mapping[str, Cost], first_ends: Mapping[str, int],
             ordered: Mapping[str, Sequence[Question]], share: float) -> float:
    """What a batch of ``share`` of all items would take, by what the first one took."""
    found = 0.0
    for name, tasks in wanted.items():
        found += costs[name].fixed
        for task in tasks:
            found += costs[name].tasks.get(task, 0.0) * share * len(ordered[task]) / max(first_ends[task], 1)
    return found
