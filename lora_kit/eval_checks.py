"""What an evaluation says of itself: how many of its items overlap training rows, and what the rest alone scores.

The data stage looks for every item in the training rows (``overlap.py``: exactly, and by word
8-grams) and names those that overlap. A model may have learned them by heart, so each score
stands beside that of the other items, the *clean* ones. Torch-free. Reads the data stage's folder;
writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_kit import gates
from lora_kit.overlap import HELD_OUT
from lora_kit.suite import Suite
from lora_kit.units import count_text, number_text

Scored = Mapping[str, Mapping[tuple[str, str], Sequence[dict[str, Any]]]]
"""Lines of items.jsonl by subject, then by (task, metric)."""
_NAMED = 3


def overlap_of(suite: Suite, scored: Scored, data_dir: Path, *, drops: bool) -> dict[str, dict[str, Any]]:
    """By task, which of its items overlap training rows.

    Args:
        drops: whether training left out the rows that overlap (``data.overlap: drop``); no item overlaps then.

    Returns:
        ``num_items``, ``num_overlapping``, ``items`` (the ids of those that overlap) and ``why_not`` (why it was not
        counted, empty where it was; the others are then None and an empty list).
    """
    groups, found = _groups(data_dir), {}
    own = {task.name for task in suite.own_items()}
    for task in suite.tasks:
        lines = next((by_metric[key] for by_metric in scored.values() for key in by_metric if key[0] == task.name), ())
        names = groups.get(task.name if task.name in own else HELD_OUT)
        if names is None:
            # Nothing in the group: the data stage had no such item to look for, which is only so without items.
            why = "" if not lines else "the data stage did not count it; lora-kit data does, in a new run"
            found[task.name] = {"num_items": len(lines) if not why else None, "num_overlapping": None if why else 0,
                                "items": [], "why_not": why}
            continue
        items = [] if drops else [line["item_id"] for line in lines if _is_among(line["item_id"], names)]
        found[task.name] = {"num_items": len(lines), "num_overlapping": len(items), "items": items, "why_not": ""}
    return found


def clean_scores(
    overlap: Mapping[str, Mapping[str, Any]], scored: Scored, higher_is_better: Mapping[tuple[str, str], bool],
    corpus: Mapping[tuple[str, str], gates.Corpus | None] | None = None,
) -> list[dict[str, Any]]:
    """The scores of the items that overlap no training row, for each task that has both kinds of items.

    Args:
        corpus: what makes the value of a corpus metric, by (task, metric).
    """
    corpus = corpus or {}
    return [gates.task_score(_clean(lines, overlap[task]), task=task, artifact=name, metric=metric,
                             corpus=corpus.get((task, metric)),
                             higher_is_better=higher_is_better[task, metric]).as_dict()
            for name, by_metric in scored.items() for (task, metric), lines in by_metric.items()
            if task in overlap and overlap[task]["items"]]


def clean_differences(
    overlap: Mapping[str, Mapping[str, Any]], scored: Scored, differences: Sequence[Mapping[str, Any]],
    corpus: Mapping[tuple[str, str], gates.Corpus | None] | None = None,
) -> list[dict[str, Any]]:
    """Each of ``differences`` over the items that overlap no training row, where the task has others too."""
    found = []
    for each in differences:
        key, about = (each["task"], each["metric"]), overlap.get(each["task"])
        if about and about["items"]:
            ones, others = (_clean(scored[each[side]][key], about) for side in ("artifact", "baseline"))
            found.append(gates.difference(
                ones, others, task=key[0], metric=key[1], artifact=each["artifact"], baseline=each["baseline"],
                higher_is_better=each["higher_is_better"], corpus=(corpus or {}).get(key)))
    return found


def _clean(lines: Sequence[dict[str, Any]], about: Mapping[str, Any]) -> list[dict[str, Any]]:
    alike = set(about["items"])
    return [line for line in lines if line["item_id"] not in alike]


DIFFERENCE_COLUMNS = ("task", "artifact", "against", "all items", "items", "clean items only", "95 % interval",
                      "clean items")
"""Columns of :func:`clean_difference_rows`."""


def clean_difference_rows(clean: Sequence[Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]
                          ) -> list[tuple[str, ...]]:
    """Rows of a table: each difference on clean items beside the whole."""
    def key(each: Mapping[str, Any]) -> tuple:
        return each["task"], each["metric"], each["artifact"], each["baseline"]

    whole = {key(each): each for each in differences}
    return [(f"{each['task']} {each['metric']}", each["artifact"], each["baseline"],
             number_text(whole[key(each)]["difference"], 3), count_text(whole[key(each)]["num_items"]),
             number_text(each["difference"], 3), _interval(each), count_text(each["num_items"])) for each in clean]


CLEAN_COLUMNS = ("task", "artifact", "all items", "items", "clean items only", "95 % interval", "clean items")
"""Columns of :func:`clean_rows`."""


def clean_rows(clean: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of a table: each clean score beside the whole."""
    whole = {(score["task"], score["metric"], score["artifact"]): score for score in scores}
    rows = []
    for each in clean:
        of = whole[each["task"], each["metric"], each["artifact"]]
        rows.append((f"{each['task']} {each['metric']}", each["artifact"], number_text(of["value"], 3),
                     count_text(of["num_items"]), number_text(each["value"], 3), _interval(each),
                     count_text(each["num_items"])))
    return rows


GAIN_COLUMNS = ("task", "artifact", "base", "merged", "artifact's", "gain kept", "95 % interval", "items")
"""Columns of :func:`gain_rows`."""


def gain_rows(gains: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of a table: what each form keeps of what training gained, or why that cannot be told."""
    rows = []
    for each in gains:
        low, high = each["ci_low"], each["ci_high"]
        kept = f"{100 * each['value']:.0f} %" if each["value"] is not None else f"cannot tell: {each['why_not']}"
        rows.append((f"{each['task']} {each['metric']}", each["artifact"],
                     *(number_text(each.get(side), 3) for side in ("base", "tuned", "form")), kept,
                     "–" if low is None else f"{100 * low:.0f} to {100 * high:.0f} %", count_text(each["num_items"])))
    return rows


def _interval(each: Mapping[str, Any]) -> str:
    low, high = each["ci_low"], each["ci_high"]
    return "–" if low is None else f"{number_text(low, 3)} to {number_text(high, 3)}"


def overlap_text(overlap: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence on all tasks."""
    counted = [f"{about['num_overlapping']} of {about['num_items']} items of {task}"
               + (f" (e.g. {', '.join(about['items'][:_NAMED])})" if about["items"] else "")
               for task, about in overlap.items() if not about["why_not"]]
    why_not = {task: about["why_not"] for task, about in overlap.items() if about["why_not"]}
    parts = [f"overlap with training rows: {'; '.join(counted)}"] if counted else []
    parts += [f"overlap of {task} with training rows is not known: {why}" for task, why in why_not.items()]
    return "; ".join(parts)


def _groups(data_dir: Path) -> dict[str, set[str]]:
    """Names of overlapping items by group, as the data stage left them; a group that it did not name is missing."""
    found: dict[str, set[str]] = {}
    for name in ("ledger.json", "overlap.json"):
        try:
            value = json.loads((data_dir / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for each in (value.get("overlap") or () if isinstance(value, dict) else value):
            if "overlapping" in each:
                found[each["against"]] = set(each["overlapping"])
    return found


def _is_among(item_id: str, names: set[str]) -> bool:
    """Whether an item is one of ``names``: a held-out row's item is called by its origin and what sets it apart."""
    return item_id in names or item_id.rpartition(" [")[0] in names or item_id.rpartition(" (")[0] in names
