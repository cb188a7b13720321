"""What each gate of a suite can show, said before anything is computed (``lora-kit eval --dry-run``).

From the number of items, their clusters, and how much scores of the same item differ: told by earlier
scores (this run's, or a baseline.lock), else assumed and said to be. Of each gate it says the smallest
difference that is seen with 80 % chance at the 5 % level, with which chance an unchanged model passes, and with how
many items it would. No model is loaded, torch is not imported.
Reads the suite, its data sources, and what a run or a lock holds; writes nothing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit import baseline, items, power, rows, tokens
from lora_kit.claims import BASELINE, Gate, lock_subject
from lora_kit.comparison import Scored
from lora_kit.errors import DataError
from lora_kit.gates import ALPHA, claim_of, flips
from lora_kit.recipe import Recipe
from lora_kit.recipe_file import RecipeFile
from lora_kit.rundir import Run
from lora_kit.stats import mean_interval, paired_difference
from lora_kit.suite import LOSS, Suite, Task, suite_of
from lora_kit.units import count_text, number_text

COLUMNS = ("gate", "items", "worth", "smallest difference seen", "passes unchanged", "items for 80 %")
_BINARY = ("accuracy", "acc", "acc_norm", "exact_match", "squad_em", "json_match", "tool_call",
           "tool_call_valid", "all_assertions")
"""Metrics whose item scores are 0 or 1."""


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What one gate can show. Numbers are None where nobody can tell, and ``why`` says why.

    Args:
        num_items, worth: items, and independent items that they are worth in their clusters.
        smallest: the smallest difference (from zero, or from the floor) that is seen, in the metric's unit.
        passes: the chance that a model without any difference passes; None for a target, which has to differ.
        needed: items with which that chance is 80 %.
        unit: ``points`` (hundredths of a score from 0 to 1) or the metric's own.
        why: on what the figures rest, or why there are none.
    """

    gate: Gate
    num_items: int | None
    worth: float | None
    smallest: float | None
    passes: float | None
    needed: int | None
    unit: str
    why: str

    def line(self) -> str:
        """One sentence for people."""
        claim = claim_of(self.gate)
        if self.num_items is None:
            return f"{claim}: {self.why}"
        change = {"target": "an improvement", "retain": "a drop", "floor": "a distance from the floor"}[self.gate.role]
        if self.smallest is None:
            text = f"with {count_text(self.num_items)} items nothing can be said yet" if self.worth is None else \
                f"with {count_text(self.num_items)} items no difference can be seen"
            return f"{claim}: {text} ({self.why})"
        text = f"with {count_text(self.num_items)} items {change} under {self._amount(self.smallest)} cannot be seen"
        if self.passes is not None:
            text += f"; an unchanged model passes with {_percent(self.passes)}"
            if self.passes < power.POWER:
                text += "; no number of items lets it pass" if self.needed is None else \
                    f", with {count_text(self.needed)} items in four of five cases"
        return f"{claim}: {text} ({self.why})"

    def row(self) -> list[str]:
        return [claim_of(self.gate), count_text(self.num_items),
                "–" if self.worth is None else count_text(int(self.worth)),
                "–" if self.smallest is None else self._amount(self.smallest),
                "–" if self.passes is None else _percent(self.passes), count_text(self.needed)]

    def _amount(self, value: float) -> str:
        return f"{value * 100:.1f} points" if self.unit == "points" else f"{number_text(value, 2)} {self.unit}"


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """What all gates of a suite can show."""

    suite: str
    gates: tuple[Foreseen, ...]

    def rows(self) -> list[list[str]]:
        return [gate.row() for gate in self.gates]

    def lines(self) -> list[str]:
        if not self.gates:
            return ["the suite claims nothing: it has neither roles nor gates"]
        together = f", {len(self.gates)} gates together by Holm's correction" if len(self.gates) > 1 else ""
        return [*(gate.line() for gate in self.gates),
                f"(80 % power, 5 % level, half of it on each side{together}: the figures are for the strictest step)"]


def of_recipe(recipe_file: RecipeFile) -> Foresight:
    """What the gates of a recipe can show, with the held-out rows that it asks for.

    Raises:
        RecipeError, DataError: the suite has mistakes, or a source cannot be read.
    """
    recipe = recipe_file.recipe
    suite = suite_of(recipe, recipe_file.folder)
    lock = _read_lock(recipe, recipe_file.folder)
    return _foresee(suite, recipe, recipe_file.folder, None, _Earlier(lock, {}))


def of_run(run: Run, lock_path: Path | None = None) -> Foresight:
    """What the gates of a run can show, with its held-out rows and what it has scored so far.

    Args:
        lock_path: a baseline.lock in place of the recipe's.
    """
    recipe, folder = run.recipe, run.recipe_file.folder
    if lock_path:
        recipe = recipe.model_copy(update={"eval": recipe.eval.model_copy(
            update={"baseline": str(lock_path.resolve())})})
    suite = suite_of(recipe, folder)
    scored: Scored = {}
    for path in sorted(run.stage_dir("eval").glob("*/items.jsonl")) if run.seal("eval") is not None else []:
        with open(path, encoding="utf-8") as file:
            for line in map(json.loads, file):
                scored.setdefault(path.parent.name, {}).setdefault((line["task"], line["metric"]), []).append(line)
    data_dir = run.stage_dir("data") if run.seal("data") is not None else None
    return _foresee(suite, recipe, folder, data_dir, _Earlier(_read_lock(recipe, folder), scored))


def _read_lock(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    named = recipe.eval.baseline
    return baseline.read(folder / Path(named).expanduser(), named) if named else None


class _Earlier:
    """Scores that tell how much two models differ on the same item: of this run, else of the lock."""

    def __init__(self, lock: dict[str, Any] | None, scored: Scored) -> None:
        self.scored, self.locked = scored, _without_ids(lock) if lock else {}

    def pair(self, gate: Gate) -> tuple[list[dict], list[dict], str] | None:
        """Lines of the gate's two sides, else of its artifact and the base, and what they are."""
        key, everything = (gate.task, gate.metric), self.scored | self.locked
        against = lock_subject(gate.baseline, gate.artifact) or gate.baseline
        for start, whose in (("", "this run's"), (f"{BASELINE}/", "the baseline's")):
            for other in (against, "base"):
                one, two = (everything.get(start + name, {}).get(key) for name in (gate.artifact, other))
                if other != gate.artifact and one and two:
                    return one, two, f"{whose} {gate.artifact} and {other}"
        return None

    def alone(self, gate: Gate) -> tuple[list[dict], str] | None:
        key = gate.task, gate.metric
        for name, where in ((gate.artifact, "this run's"), (f"{BASELINE}/{gate.artifact}", "the baseline's")):
            lines = (self.scored | self.locked).get(name, {}).get(key)
            if lines:
                return lines, f"{where} {gate.artifact}"
        return None


def _percent(share: float, digits: int = 0) -> str:
    return f"{share * 100:.{digits}f} %"


def _without_ids(lock: dict[str, Any]) -> Scored:
    """The lock's scores as lines whose ids are the items' hashes."""
    hashes = {task: {value: value for value in baseline.hashes_of(about)} for task, about in lock["tasks"].items()}
    lines = {"": {(task, ""): [{"item_id": value, "cluster": value} for value in ids]
                  for task, ids in hashes.items()}}
    return baseline.scored(lock, hashes, lines)


def _foresee(suite: Suite, recipe: Recipe, folder: Path, data_dir: Path | None, earlier: _Earlier) -> Foresight:
    alpha = ALPHA / max(len(suite.gates), 1)
    tasks = {task.name: task for task in suite.tasks}
    sizes: dict[str, Any] = {}
    found = []
    for gate in suite.gates:
        task = tasks[gate.task]
        if gate.task not in sizes:
            sizes[gate.task] = _cluster_sizes(task, recipe, folder, data_dir)
        found.append(_foresee_gate(gate, task, sizes[gate.task], recipe.eval.discordance, earlier, alpha))
    return Foresight(suite=suite.name, gates=tuple(found))


def _foresee_gate(gate: Gate, task: Task, sizes: list[int] | str, discordance: float, earlier: _Earlier,
                  alpha: float) -> Foreseen:
    nothing = {"gate": gate, "worth": None, "smallest": None, "passes": None, "needed": None}
    unit = "nats a token" if gate.metric == LOSS else "points"
    if isinstance(sizes, str):
        return Foreseen(num_items=None, unit=unit, why=sizes, **nothing)
    num_items, worth = sum(sizes), power.effective_items(sizes)
    if num_items == 0:
        return Foreseen(num_items=0, unit=unit, why="no item is left", **nothing)
    spread = _spread(gate, task, discordance, earlier)
    if isinstance(spread, str):
        return Foreseen(num_items=num_items, unit=unit, why=spread, **nothing)
    clusters = "" if worth == num_items else (
        f"; in {count_text(len(sizes))} clusters they are worth {count_text(int(worth))}, at an assumed correlation of "
        f"{power.CORRELATION}")
    # A cluster of the mean size goes with each further item.
    share = worth / num_items
    chance = spread.chance
    smallest = power.smallest_detectable(lambda size: chance(worth, size, 0.0, alpha), spread.most)
    passes = needed = None
    if gate.role == "retain":
        passes = chance(worth, 0.0, gate.margin, alpha)
        needed = power.items_needed(lambda number: chance(number * share, 0.0, gate.margin, alpha))
    return Foreseen(gate=gate, num_items=num_items, worth=worth, smallest=smallest, passes=passes, needed=needed,
                    unit=unit, why=spread.why + clusters)


@dataclass(frozen=True, kw_only=True)
class _Spread:
    """How scores differ: ``chance(items, difference, margin, alpha)`` to show a difference to lie above minus the
    margin, up to a difference of ``most``."""

    chance: Callable[[float, float, float, float], float]
    most: float
    why: str


def _spread(gate: Gate, task: Task, assumed: float, earlier: _Earlier) -> _Spread | str:
    if task.corpus(gate.metric) is not None:
        return f"{gate.metric} is no mean over items: no formula says what a number of them can show"
    if gate.baseline is None:
        return _spread_of_score(gate, task, earlier)
    pair = earlier.pair(gate)
    if pair is not None:
        counted = flips(pair[0], pair[1], task=gate.task, metric=gate.metric, artifact="", baseline="",
                        higher_is_better=True)
        if counted["is_binary"]:
            # No flip among n items is not never a flip.
            both = max(2 * min(counted["num_better"], counted["num_worse"]), 1) / counted["num_items"]
            return _of_flips(both, f"{_percent(both, 1)} of items flip either way, as between {pair[2]}")
        shared = {line["item_id"]: line for line in pair[1] if line["score"] is not None}
        ones = [line for line in pair[0] if line["score"] is not None and line["item_id"] in shared]
        found = paired_difference([line["score"] for line in ones],
                                  [shared[line["item_id"]]["score"] for line in ones])
        if found.num_items > 1:
            return _of_mean(_deviation(found, [line["score"] - shared[line["item_id"]]["score"] for line in ones]),
                            f"between {pair[2]}")
    if gate.metric in _BINARY:
        return _of_flips(assumed, f"{_percent(assumed)} of items are assumed to flip either way between equally good "
                         "models: eval.discordance")
    return f"how much {gate.metric} of an item differs between models is known after a first run, or from a baseline"


def _of_flips(discordance: float, why: str) -> _Spread:
    def chance(number: float, difference: float, margin: float, alpha: float) -> float:
        return power.chance_paired(number, difference, bound=-margin, discordance=discordance, alpha=alpha)

    return _Spread(chance=chance, most=1 - discordance / 2, why=why)


def _of_mean(deviation: float, why: str) -> _Spread:
    def chance(number: float, difference: float, margin: float, alpha: float) -> float:
        return power.chance_mean(number, difference + margin, spread=deviation, alpha=alpha)

    return _Spread(chance=chance, most=100 * deviation or 1.0,
                   why=f"differences of items had a standard deviation of {number_text(deviation, 2)} {why}")


def _deviation(found: Any, values: list[float]) -> float:
    return (sum((value - found.mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def _spread_of_score(gate: Gate, task: Task, earlier: _Earlier) -> _Spread | str:
    if gate.metric in _BINARY:
        def chance(number: float, difference: float, _: float, alpha: float) -> float:
            return power.chance_share(number, min(gate.bound + difference, 1.0), bound=gate.bound, alpha=alpha)

        return _Spread(chance=chance, most=1 - gate.bound, why=f"a share near {number_text(gate.bound)}")
    alone = earlier.alone(gate)
    values = [line["score"] for line in alone[0] if line["score"] is not None] if alone else []
    if len(values) < 2:
        return f"how much {gate.metric} differs from item to item is known after a first run, or from a baseline"
    deviation = _deviation(mean_interval(values), values)
    return _Spread(chance=lambda number, difference, _, alpha: power.chance_mean(
        number, difference, spread=deviation, alpha=alpha), most=100 * deviation or 1.0,
        why=f"items of {alone[1]} had a standard deviation of {number_text(deviation, 2)}")


def _cluster_sizes(task: Task, recipe: Recipe, folder: Path, data_dir: Path | None) -> list[int] | str:
    """How many items each cluster of the task has, or why nobody knows yet."""
    limit = recipe.eval.limit
    of_held_out = task.metrics == [LOSS] or getattr(getattr(task.spec, "data", None), "source", None) == "held_out"
    if of_held_out and data_dir is None:
        if recipe.data.held_out:
            return "how many rows are held out is known once they are prepared: lora-kit data"
        number = recipe.data.held_out_rows
        return [1] * (number if limit is None else min(limit, number))
    if task.metrics == [LOSS]:
        origins = tokens.read_examples(data_dir, "held_out").origins
        drawn = items.draw(list(range(len(origins))), limit, f"{recipe.seed} {task.name}")
        return list(Counter(origins[row] for row in drawn).values())
    try:
        held_out = rows.read_held_out(data_dir) if data_dir else []
        made = items.make_items(task, recipe, folder, held_out)
    except DataError as error:
        if of_held_out:
            return str(error)
        raise
    return list(Counter(item.cluster for item in made.items).values())
