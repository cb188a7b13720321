"""JSON match: 1 when the answer is the JSON value that was asked for.

The answer is one JSON value, alone or in a fenced block, with nothing around it. Objects are compared without
regard to the order of their keys, lists in order, numbers by value (1 and 1.0 are one number, true is none), texts
letter by letter. The reason names the first place that differs. Reads and writes nothing.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lora_kit import metrics
from lora_kit.errors import DataError

HIGHER_IS_BETTER = True
STRUCTURED = True

_FENCED = re.compile(r"```[A-Za-z]*\s*\n(.*?)\n?```", re.DOTALL)


def score(prediction: str, target: Any) -> tuple[float, str]:
    """1.0 or 0.0 for one answer.

    Args:
        prediction: what the model wrote.
        target: the value, or its JSON.
    """
    try:
        wanted = json.loads(target) if isinstance(target, str) else target
    except ValueError:
        raise DataError("json_match", "the target is no JSON", "mend the item") from None
    text = prediction.strip()
    fenced = _FENCED.fullmatch(text)
    try:
        found = json.loads(fenced[1] if fenced else text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        return 0.0, f"the answer is no JSON ({error})"
    problem = _difference(found, wanted, "$")
    return (0.0, problem) if problem else (1.0, "")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _difference(found: Any, wanted: Any, at: str) -> str:
    """Where and how the two values differ first; empty when they do not."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in wanted:
            if key not in found:
                return f"{at} has no {json.dumps(key)}"
        for key in found:
            if key not in wanted:
                return f"{at} has {json.dumps(key)[:80]}, which is not wanted"
        return next(filter(None, (_difference(found[key], wanted[key], f"{at}.{key}") for key in wanted)), "")
    if isinstance(wanted, list) and isinstance(found, list):
        if len(wanted) != len(found):
            return f"{at} has {len(found)} elements, not {len(wanted)}"
        return next(filter(None, (_difference(one, other, f"{at}[{place}]")
                                  for place, (one, other) in enumerate(zip(found, wanted, strict=True)))), "")
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in (found, wanted))
    if (numbers or type(found) is type(wanted)) and found == wanted:
        return ""
    return f"{at} is {json.dumps(found)[:80]}, not {json.dumps(wanted)[:80]}"


def build():
    """The metric as an ``evaluate.Metric``."""
    return metrics.as_evaluate("json_match")
