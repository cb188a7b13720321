"""Exact match: 1 when the prediction is the target, letter by letter.

By default runs of whitespace count as one space and outer whitespace is dropped, since
how a template ends a turn is not the model's answer. Reads and writes nothing.
"""

from __future__ import annotations

import os.path

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
    import datasets
    import evaluate

    class ExactMatch(evaluate.Metric):
        def _info(self):
            return evaluate.MetricInfo(
                description=__doc__, citation="", inputs_description=score.__doc__,
                features=datasets.Features({
                    "predictions": datasets.Value("string"), "references": datasets.Value("string")}))

        def _compute(self, predictions, references, normalise_whitespace=True):
            scored = [score(prediction, reference, normalise_whitespace=normalise_whitespace)
                      for prediction, reference in zip(predictions, references, strict=True)]
            values = [value for value, _ in scored]
            return {"exact_match": sum(values) / len(values), "item_scores": values,
                    "reasons": [reason for _, reason in scored]}

    return ExactMatch(keep_in_memory=True)
