"""chrF: F-score of character n-grams, through sacrebleu.

sacrebleu's sentence score (chrF2: up to 6 characters, recall counted twice), divided by
100 to lie in 0 to 1 like every metric here; the task's value is the mean over items, not
sacrebleu's corpus score. Source: Popović, "chrF: character n-gram F-score for automatic
MT evaluation", 2015. Reads and writes nothing.
"""

from __future__ import annotations

from functools import cache

HIGHER_IS_BETTER = True


def score(prediction: str, target: str) -> tuple[float, str]:
    """chrF2 of one prediction, 0 to 1."""
    return _chrf().sentence_score(prediction, [target]).score / 100, ""


@cache
def _chrf():
    from sacrebleu.metrics import CHRF

    return CHRF()


def build():
    """The metric as an ``evaluate.Metric``."""
    import datasets
    import evaluate

    class ChrF(evaluate.Metric):
        def _info(self):
            return evaluate.MetricInfo(
                description=__doc__, citation="", inputs_description=score.__doc__,
                features=datasets.Features({
                    "predictions": datasets.Value("string"), "references": datasets.Value("string")}))

        def _compute(self, predictions, references):
            scored = [score(prediction, reference)
                      for prediction, reference in zip(predictions, references, strict=True)]
            values = [value for value, _ in scored]
            return {"chrf": sum(values) / len(values), "item_scores": values,
                    "reasons": [reason for _, reason in scored]}

    return ChrF(keep_in_memory=True)
