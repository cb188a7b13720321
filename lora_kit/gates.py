"""From item scores to task scores, differences and verdicts.

Scores here are lists of items as ``items.jsonl`` holds them: dicts with item_id, score
(None with an error), cluster and weight. Two artifacts are compared on the items that
both have. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_kit.stats import mean_interval, paired_difference
from lora_kit.suite import Gate
from lora_kit.types import TaskScore, Verdict
from lora_kit.units import number_text

ScoredItems = Sequence[dict[str, Any]]


def task_score(items: ScoredItems, *, task: str, artifact: str, metric: str, higher_is_better: bool) -> TaskScore:
    """The mean over the items that have a score, with its 95 % interval; errors are counted, never zeros."""
    scored = [item for item in items if item["score"] is not None]
    found = mean_interval([item["score"] for item in scored], [item["cluster"] for item in scored],
                          weights=_weights(scored))
    return TaskScore(
        task=task, artifact=artifact, metric=metric, higher_is_better=higher_is_better, value=found.mean,
        ci_low=found.ci_low, ci_high=found.ci_high, num_items=len(scored), num_errors=len(items) - len(scored))


def difference(
    items: ScoredItems, baseline_items: ScoredItems, *, task: str, artifact: str, baseline: str, metric: str,
    higher_is_better: bool,
) -> dict[str, Any]:
    """The artifact's mean minus the baseline's over shared items, with its paired 95 % interval.

    Returns:
        task, metric, artifact, baseline, higher_is_better, difference, ci_low, ci_high (None where the items
        cannot tell), num_items, num_clusters, num_unpaired (items that only one of the two has a score for).
    """
    other = {item["item_id"]: item for item in baseline_items if item["score"] is not None}
    shared = [item for item in items if item["score"] is not None and item["item_id"] in other]
    found = paired_difference(
        [item["score"] for item in shared], [other[item["item_id"]]["score"] for item in shared],
        [item["cluster"] for item in shared], weights=_weights(shared))
    everything = {item["item_id"] for item in (*items, *baseline_items)}
    return {"task": task, "metric": metric, "artifact": artifact, "baseline": baseline,
            "higher_is_better": higher_is_better, "difference": found.mean, "ci_low": found.ci_low,
            "ci_high": found.ci_high, "num_items": found.num_items, "num_clusters": found.num_clusters,
            "num_unpaired": len(everything) - len(shared)}


def decide(gate: Gate, compared: dict[str, Any] | None, why_not: str = "") -> Verdict:
    """The verdict on ``gate`` from what :func:`difference` found, or from why there is nothing to compare."""
    wanted = f"better than {gate.better_than}" if gate.better_than else \
        f"no worse than {gate.no_worse_than} (margin {number_text(gate.margin)})"
    claim = f"{gate.task} {gate.metric}: {gate.artifact} {wanted}"
    if compared is None or compared["difference"] is None:
        return Verdict(outcome="INCONCLUSIVE", claim=claim, evidence=why_not or "no item has a score from both")
    sign = 1 if compared["higher_is_better"] else -1
    counted = f"{compared['num_items']} items in {compared['num_clusters']} clusters"
    text = f"difference {number_text(compared['difference'], 3)}"
    if compared["ci_low"] is None:
        return Verdict(outcome="INCONCLUSIVE", claim=claim, evidence=f"{text}, no interval: {counted}")
    low, high = sorted((sign * compared["ci_low"], sign * compared["ci_high"]))
    bound = 0.0 if gate.better_than else -gate.margin
    outcome = "PASS" if low > bound else "FAIL" if high <= bound else "INCONCLUSIVE"
    evidence = (f"{text} [{number_text(compared['ci_low'], 3)}, {number_text(compared['ci_high'], 3)}] at 95 %, "
                f"{'higher' if sign > 0 else 'lower'} is better, {counted}")
    return Verdict(outcome=outcome, claim=claim, evidence=evidence)


def _weights(items: ScoredItems) -> list[float] | None:
    weights = [item.get("weight", 1) for item in items]
    return None if all(weight == 1 for weight in weights) else weights
