"""How much of what training gained an artifact keeps: (score - base) / (tuned - base), with its interval.

Rows are independent of each other and the tokens or items of one row are not, so rows are drawn whole. A tuned model
that is not surely better than its base has no gain to keep, and none is claimed. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    found: dict[str, Any] = {"value": None, "ci_low": None, "ci_high": None, "why_not": "", "num_rows": len(rows),
                             "num_weights": int(weights_G.sum())}
    if not rows:
        return {**found, "why_not": "nothing is scored"}
    found |= {name: float(each.sum() / weights_G.sum())
              for name, each in (("base", base_G), ("tuned", tuned_G), ("form", form_G))}
    whole = base_G - tuned_G
    members = [[index] for index in range(len(rows))]
    if not whole.sum():
        return {**found, "why_not": "the tuned model is as good as its base"}
    if len(rows) > 1:
        surely = intervals.bootstrap(lambda drawn: whole[drawn].sum() / weights_G[drawn].sum(), members)
        low, high = surely.limits(_LEVEL)
        if low <= 0 <= high:
            return {**found, "why_not": "the tuned model is not surely another than its base on these rows"}
    kept = intervals.bootstrap(lambda drawn: (base_G - form_G)[drawn].sum() / whole[drawn].sum(), members) \
        if len(rows) > 1 else None
    low, high = kept.limits(_LEVEL) if kept else (None, None)
    return {**found, "value": float((base_G - form_G).sum() / whole.sum()), "ci_low": low, "ci_high": high}
