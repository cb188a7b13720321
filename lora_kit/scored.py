"""Scored items as the eval stage leaves them, read back: who answered what, and with which score.

A *subject* is whoever answered: an artifact, or ``base-fewshot``. Its ``items.jsonl`` has a line
for each item and metric; ``scores.json`` beside it says which metrics are better when higher.
Torch-free. Reads run folders and items files; writes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kit import lm_eval_task, metrics, rundir
from lora_kit.errors import RecipeError, RefusedError
from lora_kit.suite import LOSS

Line = dict[str, Any]
"""A line of items.jsonl: task, metric, item_id, score (None with an error), cluster, weight, prompt, prediction ..."""
Key = tuple[str, str]
"""(task, metric)."""
ITEMS = "items.jsonl"
_DEFAULT = "merged"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What one subject answered: its lines by (task, metric), then by item, in the file's order."""

    label: str
    subject: str
    path: Path
    lines: dict[Key, dict[str, Line]]
    higher: dict[Key, bool] = field(default_factory=dict)

    def higher_is_better(self, key: Key) -> bool:
        """Whether more of the metric is better: as the evaluation said, or as the metric says by itself."""
        if key in self.higher:
            return self.higher[key]
        metric = key[1].partition(",")[0]
        if any(metric in names for names in lm_eval_task.METRICS.values()):
            return metric not in lm_eval_task.LOWER_IS_BETTER
        try:
            return key[1] != LOSS and metrics.load(key[1]).HIGHER_IS_BETTER
        except RecipeError:
            raise RecipeError(str(self.path), f"nothing says whether more of '{key[1]}' is better",
                              "keep scores.json beside items.jsonl") from None


def find(target: str) -> Scored:
    """The scored items that a user names.

    Args:
        target: an items file; a folder that has one; ``RUN/NAME``; or a run or its eval folder, which stands for the
            merged model there (or for its only subject).

    Raises:
        RecipeError: there are no scored items, or several subjects and none is the merged model.
        RefusedError: the file is not whole.
    """
    path = Path(target)
    if path.is_file():
        return read(path, target)
    if (path / ITEMS).is_file():
        return read(path / ITEMS, target)
    folder = path / "eval" if rundir.is_run(path) else path
    found = subjects_in(folder)
    if not found and rundir.is_run(path.parent):  # RUN/NAME
        found = {name: file for name, file in subjects_in(path.parent / "eval").items() if name == path.name}
        if not found:
            known = ", ".join(subjects_in(path.parent / "eval")) or "nobody yet; lora-kit eval RUN scores it"
            raise RecipeError(target, f"nobody called '{path.name}' was scored in this run", f"scored are: {known}")
    if not found:
        todo = f"lora-kit eval {target} scores it" if rundir.is_run(path) else \
            "name a run, RUN/ARTIFACT, or an items.jsonl"
        raise RecipeError(target, "has no scored items", todo)
    if _DEFAULT not in found and len(found) > 1:
        raise RecipeError(target, f"has several scored subjects and none is '{_DEFAULT}'",
                          f"name one: {', '.join(f'{target}/{name}' for name in found)}")
    return read(found.get(_DEFAULT) or next(iter(found.values())), target)


def subjects_in(folder: Path) -> dict[str, Path]:
    """Items files of the subjects under an eval folder: base and base-fewshot first, then merged, then by name."""
    names = sorted(path.parent.name for path in folder.glob(f"*/{ITEMS}"))
    first = [name for name in ("base", "base-fewshot", "adapter", _DEFAULT) if name in names]
    return {name: folder / name / ITEMS for name in dict.fromkeys([*first, *names])}


def read(path: Path, label: str | None = None) -> Scored:
    """Read one items file, with ``scores.json`` beside it where there is one.

    Args:
        label: how tables call it. Default: the subject's name.

    Raises:
        RefusedError: a line is not a scored item.
    """
    lines: dict[Key, dict[str, Line]] = {}
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
                lines.setdefault((line["task"], line["metric"]), {})[line["item_id"]] = {
                    **dict.fromkeys(("prompt", "prediction", "target", "reason"), ""), "cluster": line["item_id"],
                    "error": None, **line, "score": line["score"]}
            except (ValueError, KeyError, TypeError):
                raise RefusedError(f"{path}:{number}", "is not a scored item (task, metric, item_id, score)",
                                   "name an items.jsonl of lora-kit eval") from None
    subject, higher = path.parent.name, {}
    try:
        scores = json.loads((path.parent / "scores.json").read_text(encoding="utf-8"))
        subject = scores["artifact"]
        higher = {(score["task"], score["metric"]): score["higher_is_better"] for score in scores["scores"]}
    except (OSError, ValueError, KeyError, TypeError):
        pass  # an items file by itself is enough
    return Scored(label=label or subject, subject=subject, path=path, lines=lines, higher=higher)


def is_binary(scores: Iterable[float | None]) -> bool:
    """Whether every score is 0 or 1: items are then right or wrong."""
    return all(score in (0, 1, None) for score in scores)


def change_of(before: float | None, after: float | None, higher_is_better: bool) -> str:
    """``better``, ``worse`` or ``same``; ``unpaired`` where one of the two has no score."""
    if before is None or after is None:
        return "unpaired"
    # Scores are sums of floats: what differs in the ninth digit has not changed.
    if abs(after - before) <= 1e-9 * max(1.0, abs(before), abs(after)):
        return "same"
    return "better" if (after > before) == higher_is_better else "worse"
