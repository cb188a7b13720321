"""Well-formed tool call: 1 when the answer is exactly one call of an offered function.

Whether the call is the right one is ``tool_call``. Reads and writes nothing.
"""

from __future__ import annotations

import json
from typing import Any

from lora_kit import metrics
from lora_kit.tool_calls import Malformed, parse_calls

HIGHER_IS_BETTER = True
STRUCTURED = True


def score(prediction: str, target: Any = None, *, functions: list | str) -> tuple[float, str]:
    """1.0 or 0.0 for one answer.

    Args:
        prediction: what the model wrote.
        target: not used; every metric has one.
        functions: the functions offered, or their JSON, each with its ``name``, bare or under ``function``.
    """
    offered = json.loads(functions) if isinstance(functions, str) else functions
    names = [function.get("function", function)["name"] for function in offered]
    try:
        calls = parse_calls(prediction)
    except Malformed as problem:
        return 0.0, f"the answer {problem}"
    if len(calls) != 1:
        return 0.0, f"{len(calls)} calls, not one"
    if calls[0].name not in names:
        return 0.0, f"{calls[0].name} is not offered"
    return 1.0, ""


def build():
    """The metric as an ``evaluate.Metric``."""
    return metrics.as_evaluate("tool_call_valid")
