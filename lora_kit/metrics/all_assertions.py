"""All assertions: 1 when everything that a task or a row asserts of the answer holds.

The reason has a part for each assertion that does not hold, and says of the others how many do. (What can be asserted:
``assertions`` of a task.) The target is not read. Reads and writes nothing.
"""

from __future__ import annotations

import json
from typing import Any

from lora_kit import assertions as asserted
from lora_kit import metrics

HIGHER_IS_BETTER = True


def score(prediction: str, target: Any = None, *, assertions: list | str) -> tuple[float, str]:
    """1.0 or 0.0 for one answer.

    Args:
        prediction: what the model wrote.
        target: not used; every metric has one.
        assertions: mappings, each an assertion, or their JSON.

    Raises:
        DataError: one of them is none, or refers to a schema elsewhere.
    """
    wanted = asserted.read(json.loads(assertions) if isinstance(assertions, str) else assertions, "all_assertions")
    checked = [each.check(prediction) for each in wanted]
    failed = [reason for holds, reason in checked if not holds]
    holding = len(checked) - len(failed)
    return float(not failed), "; ".join(failed + ([f"{holding} of {len(checked)} hold"] if failed else []))


def build():
    """The metric as an ``evaluate.Metric``; ``assertions`` are JSON texts."""
    return metrics.as_evaluate("all_assertions")
