"""Exact match: 1 when the prediction is the target, letter by letter.

By default runs of whitespace count as one space and outer whitespace is dropped, since
how a template ends a turn is not the model's answer. Reads and writes nothing.
"""

from __future__ import annotations

import os.path

from lora_kit import metrics

HIGHER_IS_BETTER = True


def score(prediction: str, target: str, *, normalise_whitespace: bool = True) -> tuple[float, str]:
    """1.0 or 0.0 for one item.

    Args:
        prediction: what the model wrote.
        target: what it should have written.
        normalise_whitespace: whether whitespace is compared as single spaces; False compares every character.
    """
    if normalise_whitespace:
        prediction, target = " ".join(prediction.split()), " ".join(target.split())
    if prediction == target:
        return 1.0, ""
    position = len(os.path.commonprefix([prediction, target]))
    return 0.0, f"differs from character {position + 1} on"


def build():
    """The metric as an ``evaluate.Metric``."""
    return metrics.as_evaluate("exact_match")
