"""ROUGE-L: F-measure of the longest common subsequence of words, through rouge_score.

The library's own tokenizer (lower case, letters and digits), no stemming; one number an
item, and their mean. Source: Lin, "ROUGE: A Package for Automatic Evaluation of
Summaries", 2004, section 3.1. Reads and writes nothing.
"""

from __future__ import annotations

from functools import cache

HIGHER_IS_BETTER = True


def score(prediction: str, target: str) -> tuple[float, str]:
    """ROUGE-L F-measure of one prediction, 0 to 1."""
    found = _scorer().score(target=target, prediction=prediction)["rougeL"]
    return float(found.fmeasure), f"precision {found.precision:.2f}, recall {found.recall:.2f}"


@cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


def build():
    """The metric as an ``evaluate.Metric``."""
    import datasets
    import evaluate

    class RougeL(evaluate.Metric):
        def _info(self):
            return evaluate.MetricInfo(
                description=__doc__, citation="", inputs_description=score.__doc__,
                features=datasets.Features({
                    "predictions": datasets.Value("string"), "references": datasets.Value("string")}))

        def _compute(self, predictions, references):
            scored = [score(prediction, reference)
                      for prediction, reference in zip(predictions, references, strict=True)]
            values = [value for value, _ in scored]
            return {"rouge_l": sum(values) / len(values), "item_scores": values,
                    "reasons": [reason for _, reason in scored]}

    return RougeL(keep_in_memory=True)
