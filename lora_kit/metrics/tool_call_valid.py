"""Well-formed tool call: 1 when the answer is exactly one call of an offered function.

Whether the call is the right one is ``tool_call``. Reads and writes nothing.
"""

from __future__ import annotations

import json
from typing import Any

from lora_kit.tool_calls import Malformed, parse_calls

HIGHER_IS_BETTER = True


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
    """The metric as an ``evaluate.Metric``; ``references`` and ``functions`` are JSON texts."""
    import datasets
    import evaluate

    class ToolCallValid(evaluate.Metric):
        def _info(self):
            return evaluate.MetricInfo(
                description=__doc__, citation="", inputs_description=score.__doc__,
                features=datasets.Features({
                    "predictions": datasets.Value("string"), "references": datasets.Value("string"),
                    "functions": datasets.Value("string")}))

        def _compute(self, predictions, references, functions):
            scored = [score(prediction, reference, functions=offered)
                      for prediction, reference, offered in zip(predictions, references, functions, strict=True)]
            values = [value for value, _ in scored]
            return {"tool_call_valid": sum(values) / len(values), "item_scores": values,
                    "reasons": [reason for _, reason in scored]}

    return ToolCallValid(keep_in_memory=True)
