"""ROUGE-Lsum: ROUGE-L over the sentences of a summary, one a line, through rouge_score.

The library's own tokenizer (lower case, letters and digits), no stemming; one number an
item, and their mean. Source: Lin, "ROUGE: A Package for Automatic Evaluation of
Summaries", 2004, section 3.2. Reads and writes nothing.
"""

from __future__ import annotations

from functools import cache

from lora_kit import metrics

HIGHER_IS_BETTER = True


def score(prediction: str, target: str) -> tuple[float, str]:
    """F-measure of one prediction, 0 to 1."""
    found = _scorer().score(target=target, prediction=prediction)["rougeLsum"]
    return float(found.fmeasure), f"precision {found.precision:.2f}, recall {found.recall:.2f}"


@cache
def _scorer():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"], use_stemmer=False)


def build():
    """The metric as an ``evaluate.Metric``."""
    return metrics.as_evaluate("rouge_lsum")
