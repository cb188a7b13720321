"""Scored items written by hand, as the eval stage leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def line(item: int | str, score: float | None, *, task: str = "answers", metric: str = "exact_match",
         **fields: Any) -> dict[str, Any]:
    """A line of items.jsonl; an item without a score has failed."""
    return {"task": task, "metric": metric, "item_id": f"rows.jsonl:{item}", "score": score,
            "cluster": f"rows.jsonl:{item}", "prompt": f"say {item}", "prediction": f"answer to {item}",
            "target": f"target {item}", "reason": "" if score == 1 else "not the target",
            "error": None if score is not None else "it is too long", "weight": 1, "stopped": True, **fields}


def write(folder: Path, lines: list[dict[str, Any]], *, higher: bool = True) -> Path:
    """``folder/items.jsonl`` with the scores.json that belongs to it; the items file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "items.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    keys = dict.fromkeys((each["task"], each["metric"]) for each in lines)
    (folder / "scores.json").write_text(json.dumps({"format": 1, "artifact": folder.name, "scores": [
        {"task": task, "metric": metric, "higher_is_better": higher and metric != "loss"} for task, metric in keys]}))
    return folder / "items.jsonl"


def write_run(folder: Path, **subjects: list[dict[str, Any]]) -> Path:
    """A folder that looks like a run, with these subjects' items under ``eval/``."""
    folder.mkdir(parents=True)
    for name in ("recipe.yaml", "lock.json"):
        (folder / name).write_text("{}")
    for name, lines in subjects.items():
        write(folder / "eval" / name.replace("_", "-"), lines)
    return folder
