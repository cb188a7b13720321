"""From item scores to task scores, differences, flips and verdicts.

Scores here are lists of items as ``items.jsonl`` holds them: dicts with item_id, score
(None with an error), cluster, weight and, where a scorer gives them, margin and (of a corpus metric) outcome. Two
artifacts are compared on the items that both have.

A verdict is PASS when the claim is shown, FAIL when its opposite is, INCONCLUSIVE when these items
show neither; then it says how many would, if the figures stay what they are. Each side may be
wrong with 2.5 %, which is what reading a 95 % interval means. Of several gates Holm's correction keeps
that for all of them together: that any PASS is wrong, and that any FAIL is. Reads and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_kit import sequential
from lora_kit.claims import Gate
from lora_kit.intervals import Finding
from lora_kit.power import LEVEL, POWER
from lora_kit.stats import (
    Difference,
    Estimate,
    corpus_difference,
    corpus_interval,
    holm,
    mean_interval,
    paired_difference,
)
from lora_kit.types import TaskScore, Verdict
from lora_kit.units import count_text, number_text

ScoredItems = Sequence[dict[str, Any]]
Corpus = Callable[[Sequence[Any]], float]
"""What makes the value of a corpus metric from items' outcomes; the value of any other is the mean of the scores."""

ALPHA = LEVEL / 2
"""Chance of a wrong PASS, and of a wrong FAIL, over all gates."""
NUMERIC_NATS = 2e-4
"""A flip whose margin moved by less is called numeric, where nothing tells how much the engines round:
log-probabilities of two fp32 implementations agree to 1e-4 (benchmarks/eval_parity.py), and a margin is a difference of
two."""
_MOST_TIMES = 1000
"""As many times the items are still worth naming as what would decide."""
_EXAMPLES = 10


def task_score(items: ScoredItems, *, task: str, artifact: str, metric: str, higher_is_better: bool,
               corpus: Corpus | None = None) -> TaskScore:
    """The value over the items that have a score, with its 95 % interval; errors are counted, never zeros."""
    found = _value(items, corpus)
    return TaskScore(
        task=task, artifact=artifact, metric=metric, higher_is_better=higher_is_better, value=found.mean,
        ci_low=found.ci_low, ci_high=found.ci_high, num_items=found.num_items,
        num_errors=len(items) - found.num_items)


def difference(
    items: ScoredItems, baseline_items: ScoredItems, *, task: str, artifact: str, baseline: str, metric: str,
    higher_is_better: bool, corpus: Corpus | None = None,
) -> dict[str, Any]:
    """The artifact's value minus the baseline's over shared items, with its paired 95 % interval.

    Returns:
        task, metric, artifact, baseline, higher_is_better, difference, ci_low, ci_high (None where the items
        cannot tell), method of the interval, num_items, num_clusters, num_unpaired (items that only one of the two
        has a score for).
    """
    found = _paired(items, baseline_items, corpus)
    everything = {item["item_id"] for item in (*items, *baseline_items)}
    return {"task": task, "metric": metric, "artifact": artifact, "baseline": baseline,
            "higher_is_better": higher_is_better, "difference": found.mean, "ci_low": found.ci_low,
            "ci_high": found.ci_high, "method": found.method, "num_items": found.num_items,
            "num_clusters": found.num_clusters, "num_unpaired": len(everything) - found.num_items}


def flips(
    items: ScoredItems, earlier: ScoredItems, *, task: str, metric: str, artifact: str, baseline: str,
    higher_is_better: bool,
) -> dict[str, Any]:
    """What became of the items from one stage (``earlier``, called ``baseline``) to the next.

    Returns:
        task, metric, artifact, baseline, num_items; is_binary (then worse is right to wrong, better is wrong to
        right); num_better, num_worse, num_same; num_numeric, the flips whose margin moved within rounding; the
        item_ids of the first ten better and worse.
    """
    sign, pairs = 1 if higher_is_better else -1, _pairs(items, earlier)
    changes = [(one["item_id"], sign * (one["score"] - other["score"]), _is_numeric(one, other))
               for one, other in pairs]
    better = [item_id for item_id, change, _ in changes if change > 0]
    worse = [item_id for item_id, change, _ in changes if change < 0]
    binary = bool(pairs) and all(side["score"] in (0, 1) for pair in pairs for side in pair)
    return {"task": task, "metric": metric, "artifact": artifact, "baseline": baseline, "num_items": len(pairs),
            "is_binary": binary, "num_better": len(better), "num_worse": len(worse),
            "num_same": len(pairs) - len(better) - len(worse),
            "num_numeric": sum(change != 0 and numeric for _, change, numeric in changes),
            "better": better[:_EXAMPLES], "worse": worse[:_EXAMPLES]}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What speaks on a gate: an estimate (a :class:`~lora_kit.stats.Difference`, or the score for a floor), or why
    there is none."""

    higher_is_better: bool = True
    estimate: Estimate | None = None
    why_not: str = ""

    @property
    def finding(self) -> Finding | None:
        return self.estimate.finding if self.estimate else None


def evidence(items: ScoredItems | None, baseline_items: ScoredItems | None, gate: Gate, *, higher_is_better: bool,
             why_not: str = "", corpus: Corpus | None = None) -> Evidence:
    """The evidence on ``gate`` from the items of its artifact and its baseline; None where there are none."""
    nothing = why_not or f"no item has a score{' from both' if gate.baseline else ''}"
    if items is None or (gate.baseline is not None and baseline_items is None):
        return Evidence(higher_is_better=higher_is_better, why_not=nothing)
    found = _value(items, corpus) if gate.baseline is None else _paired(items, baseline_items, corpus)
    return Evidence(higher_is_better=higher_is_better, estimate=found, why_not=nothing)


def decide(gates: Sequence[Gate], found: Sequence[Evidence], alpha: float = ALPHA, shares: Sequence[float] = (1.0,),
           decided: Mapping[int, Verdict] | None = None) -> list[Verdict]:
    """The verdicts on all gates of a suite together, in their order.

    Args:
        found: the evidence on each gate.
        alpha: one-sided level of all gates together, over all looks.
        shares: of the items, at each look so far, this one included (``sequential.py``).
        decided: by place, what an earlier look decided; it stays.
    """
    decided = decided or {}
    sides = [_p_values(gate, one) for gate, one in zip(gates, found, strict=True)]
    # What was claimed at an earlier look is out of the way of the others.
    kept = [tuple(0.0 if place in decided and decided[place].outcome == outcome else p
                  for outcome, p in zip(("PASS", "FAIL"), side, strict=True)) for place, side in enumerate(sides)]
    times = sequential.times(shares, alpha)
    shown, refuted = holm([above for above, _ in kept], times), holm([below for _, below in kept], times)
    return [decided.get(index) or _verdict(gate, one, tuple(min(1.0, times(1) * p) for p in side),
                                           (shown[index], refuted[index]), alpha, len(gates), shares)
            for index, (gate, one, side) in enumerate(zip(gates, found, sides, strict=True))]


def claim_of(gate: Gate) -> str:
    """The claim in words."""
    if gate.better_than:
        wanted = f"better than {gate.better_than}"
    elif gate.no_worse_than:
        wanted = f"no worse than {gate.no_worse_than} (margin {number_text(gate.margin)})"
    else:
        wanted = f"at {'least' if gate.at_most is None else 'most'} {number_text(gate.bound)}"
    return f"{gate.task} {gate.metric}: {gate.artifact} {wanted}"


def items_to_decide(finding: Finding, bound: float, num_items: int, alpha: float = ALPHA) -> int | None:
    """About how many items would put ``finding`` on one side of ``bound`` with 80 % chance, all else as it is.

    Two significant digits; None when a thousand times as many would not: it lies on the bound.
    """
    from scipy.special import ndtr, ndtri

    wanted = float(ndtr(ndtri(alpha) - ndtri(POWER)))

    def decided(factor: float) -> bool:
        more = finding.with_items(factor)
        return min(more.above(bound), more.below(bound)) <= wanted

    if not decided(_MOST_TIMES):
        return None
    low, high = 1.0, float(_MOST_TIMES)
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if decided(middle) else (middle, high)
    needed = max(high * num_items, num_items + 1)
    step = 10 ** max(math.floor(math.log10(needed)) - 1, 0)
    return math.ceil(needed / step) * step


def _verdict(gate: Gate, found: Evidence, sides: tuple[float, float], adjusted: tuple[float, float], alpha: float,
             num_gates: int, shares: Sequence[float] = (1.0,)) -> Verdict:
    about = {"claim": claim_of(gate), "role": gate.role, "artifact": gate.artifact}
    estimate = found.estimate
    if estimate is None or estimate.mean is None:
        return Verdict(outcome="INCONCLUSIVE", evidence=found.why_not, **about)
    text = f"{'difference ' if gate.baseline else 'score '}{number_text(estimate.mean, 3)}"
    counted = f"{estimate.num_items} items in {estimate.num_clusters} clusters"
    if estimate.finding is None:
        return Verdict(outcome="INCONCLUSIVE", evidence=f"{text}, no interval: {counted}", **about)
    text += (f" [{number_text(estimate.ci_low, 3)}, {number_text(estimate.ci_high, 3)}] at 95 %, "
             f"{'higher' if found.higher_is_better else 'lower'} is better, {counted}")
    if len(shares) > 1:
        text += f"; look {len(shares)}, at {shares[-1] * 100:.0f} % of the items planned"
    outcome = _outcome(adjusted, alpha)
    if num_gates > 1 and outcome != "INCONCLUSIVE":
        text += f"; p {number_text(min(adjusted), 2)} over {num_gates} gates (Holm)"
    if outcome != "INCONCLUSIVE":
        return Verdict(outcome=outcome, evidence=text, **about)
    alone = _outcome(sides, alpha)
    if alone != "INCONCLUSIVE":
        text += f"; alone it would {alone}, one of {num_gates} gates it does not (Holm)"
    bound = _signed_bound(gate, found)
    needed = items_to_decide(estimate.finding, bound, estimate.num_items, alpha / num_gates)
    if needed is None:
        text += f"; it lies so near {number_text(bound)} that more items would hardly decide"
    else:
        text += f"; about {count_text(needed)} items would decide, if it stays {number_text(estimate.mean, 3)}"
    return Verdict(outcome="INCONCLUSIVE", evidence=text, num_items_to_decide=needed, **about)


def _outcome(p_values: tuple[float, float], alpha: float) -> str:
    shown, refuted = p_values
    return "PASS" if shown < alpha else "FAIL" if refuted <= alpha else "INCONCLUSIVE"


def _signed_bound(gate: Gate, found: Evidence) -> float:
    """The bound in the metric's own direction: a loss may rise by its margin."""
    return gate.bound if found.higher_is_better or gate.baseline is None else -gate.bound


def _p_values(gate: Gate, found: Evidence) -> tuple[float, float]:
    """Against the claim's opposite, and against the claim; (1, 1) where nothing speaks."""
    if found.finding is None:
        return 1.0, 1.0
    bound = _signed_bound(gate, found)
    above, below = found.finding.above(bound), found.finding.below(bound)
    if not found.higher_is_better:
        above, below = below, above
        if found.estimate.mean == bound and min(above, below) == 0.0:
            above, below = below, above  # certain, and on the bound: not better than it
    return above, below


def _value(items: ScoredItems, corpus: Corpus | None) -> Estimate:
    scored = [item for item in items if item["score"] is not None]
    clusters = [item["cluster"] for item in scored]
    if corpus is not None and _have_outcomes(scored):
        return corpus_interval(corpus, [item["outcome"] for item in scored], clusters)
    return mean_interval([item["score"] for item in scored], clusters, weights=_weights(scored))


def _paired(items: ScoredItems, baseline_items: ScoredItems, corpus: Corpus | None) -> Difference:
    pairs = _pairs(items, baseline_items)
    clusters = [one["cluster"] for one, _ in pairs]
    if corpus is not None and _have_outcomes([side for pair in pairs for side in pair]):
        return corpus_difference(corpus, [one["outcome"] for one, _ in pairs], [other["outcome"] for _, other in pairs],
                                 clusters)
    return paired_difference([one["score"] for one, _ in pairs], [other["score"] for _, other in pairs], clusters,
                             weights=_weights([one for one, _ in pairs]))


def _pairs(items: ScoredItems, baseline_items: ScoredItems) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    other = {item["item_id"]: item for item in baseline_items if item["score"] is not None}
    return [(item, other[item["item_id"]]) for item in items
            if item["score"] is not None and item["item_id"] in other]


def _have_outcomes(items: ScoredItems) -> bool:
    """Whether the value is no mean of the scores: a user's module is known for a corpus metric once it has scored."""
    return any(item.get("outcome") is not None for item in items)


def _is_numeric(one: dict[str, Any], other: dict[str, Any]) -> bool:
    margins = one.get("margin"), other.get("margin")
    if None in margins:
        return False
    # What an engine measured of its own rounding; half of NUMERIC_NATS is what each side has by default.
    noise = sum(side.get("noise") or NUMERIC_NATS / 2 for side in (one, other))
    return abs(margins[0] - margins[1]) <= noise


def _weights(items: ScoredItems) -> list[float] | None:
    weights = [item.get("weight", 1) for item in items]
    return None if all(weight == 1 for weight in weights) else weights
