"""How much of what training gained an artifact keeps: (score - base) / (tuned - base), with its interval.

Of losses on held-out rows, and of the scores of an evaluation. Rows (clusters of items) are independent of each other
and what stands in one of them is not, so they are drawn whole. A tuned model that is not surely better than its base
has no gain to keep, and none is claimed. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_kit import intervals

_LEVEL = 0.95


def retained(base: Sequence[float], tuned: Sequence[float], form: Sequence[float], weights: Sequence[float]
             ) -> dict[str, Any]:
    """Share of the gain that ``form`` keeps.

    Args:
        base, tuned, form: of each row, the sum of what is scored (losses, or hits) over its tokens or items.
        weights: how many tokens or items each row has; rows with none are left out.

    Returns:
        ``value`` with ``ci_low`` and ``ci_high`` (95 %, BCa bootstrap over rows; None with fewer than two rows), the
        means ``base``, ``tuned``, ``form``, ``num_rows``, ``num_weights``, and ``why_not``: why there is no value.
    """
    import numpy

    rows = [index for index, weight in enumerate(weights) if weight]
    base_G, tuned_G, form_G, weights_G = (numpy.asarray(each, dtype=float)[rows]
                                          for each in (base, tuned, form, weights))
    return {"num_rows": len(rows), "num_weights": int(weights_G.sum()),
            **_of_sums(base_G, tuned_G, form_G, weights_G)}


def of_items(base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]], form: Sequence[Mapping[str, Any]],
             *, higher_is_better: bool, corpus: Callable[[Sequence[Any]], float] | None = None) -> dict[str, Any]:
    """Share of the gain in an evaluation's score that ``form`` keeps, over the items that all three have a score for.

    Args:
        base, tuned, form: items as ``items.jsonl`` holds them: item_id, score (None with an error), cluster, weight,
            and of a corpus metric outcome.
        corpus: what makes the value of a corpus metric from items' outcomes.

    Returns:
        ``value``, ``ci_low``, ``ci_high`` (95 %, BCa bootstrap, clusters drawn whole; None with fewer than two), the
        values ``base``, ``tuned``, ``form``, ``num_items``, ``num_clusters``, and ``why_not``: why there is no value.
    """
    import numpy

    sides = [{item["item_id"]: item for item in side if item["score"] is not None} for side in (base, tuned, form)]
    shared = [name for name in sides[2] if name in sides[0] and name in sides[1]]
    by_cluster: dict[Any, list[int]] = {}
    for number, name in enumerate(shared):
        by_cluster.setdefault(sides[2][name]["cluster"], []).append(number)
    members = list(by_cluster.values())
    outcomes = [[side[name].get("outcome") for name in shared] for side in sides]
    if corpus is not None and all(outcome is not None for side in outcomes for outcome in side):
        found = _of_outcomes(outcomes, members, corpus)
    else:
        weights = [sides[2][name].get("weight") or 1 for name in shared]
        # Clusters are drawn whole, so their sums say all.
        sums = [numpy.asarray([sum(weights[number] * side[shared[number]]["score"] for number in numbers)
                               for numbers in members], dtype=float) for side in sides]
        found = _of_sums(*sums, numpy.asarray([sum(weights[number] for number in numbers) for numbers in members],
                                              dtype=float))
    if found["value"] is not None and (found["tuned"] > found["base"]) != higher_is_better:
        found |= {"value": None, "ci_low": None, "ci_high": None,
                  "why_not": "the tuned model is worse than its base"}
    return {**found, "num_items": len(shared), "num_clusters": len(members)}


def _of_sums(base_G, tuned_G, form_G, weights_G) -> dict[str, Any]:
    """Of values that are means: sums of each row or cluster, and its weight."""
    if not len(weights_G):
        return _share(None, 0, lambda: None, lambda: None)
    return _share(tuple(float(each.sum() / weights_G.sum()) for each in (base_G, tuned_G, form_G)), len(weights_G),
                  lambda: intervals.bootstrap_mean(tuned_G - base_G, weights_G),
                  lambda: intervals.bootstrap_mean(form_G - base_G, tuned_G - base_G))


def _of_outcomes(outcomes: Sequence[Sequence[Any]], members: Sequence[Sequence[int]], corpus) -> dict[str, Any]:
    """Of a corpus metric: outcomes of base, tuned model and form by item, and the items of each cluster."""
    if not members:
        return _share(None, 0, lambda: None, lambda: None)

    def value(side: int, drawn) -> float:
        return corpus([outcomes[side][number] for number in drawn])

    def gained(drawn) -> float:
        return value(1, drawn) - value(0, drawn)

    def kept(drawn) -> float:
        of_base, whole = value(0, drawn), gained(drawn)
        return (value(2, drawn) - of_base) / whole if whole else math.inf

    everything = range(len(outcomes[0]))
    return _share(tuple(value(side, everything) for side in range(3)), len(members),
                  lambda: intervals.bootstrap(gained, members), lambda: intervals.bootstrap(kept, members))


def _share(values: tuple[float, ...] | None, num_clusters: int, gained: Callable[[], Any], kept: Callable[[], Any]
           ) -> dict[str, Any]:
    """What both say of the ``values`` of base, tuned model and form; the bootstraps are made where they are needed."""
    found: dict[str, Any] = {"value": None, "ci_low": None, "ci_high": None, "why_not": ""}
    if values is None:
        return {**found, "why_not": "nothing is scored"}
    base, tuned, form = values
    found |= {"base": base, "tuned": tuned, "form": form}
    if tuned == base:
        return {**found, "why_not": "the tuned model is as good as its base"}
    share = (form - base) / (tuned - base)
    if num_clusters < 2:
        return {**found, "value": share}
    low, high = gained().limits(_LEVEL)
    if low <= 0 <= high:
        return {**found, "why_not": "the tuned model is not surely another than its base on these rows"}
    low, high = kept().limits(_LEVEL)
    if not (math.isfinite(low) and math.isfinite(high)):
        return {**found, "why_not": "too few rows hold what was gained"}
    return {**found, "value": share, "ci_low": low, "ci_high": high}
