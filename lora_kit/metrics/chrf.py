"""chrF: F-score of character n-grams, through sacrebleu.

An item's score is sacrebleu's sentence score (chrF2: up to 6 characters, recall counted twice); the task's value is
its corpus score, made from the counts of all items together. Both divided by 100 to lie in 0 to 1 like every metric
here. Source: Popović, "chrF: character n-gram F-score for automatic MT evaluation", 2015. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from lora_kit import metrics

HIGHER_IS_BETTER = True
SEVERAL = True


def score(prediction: str, target: str | list[str]) -> tuple[float, str]:
    """chrF2 of one prediction, 0 to 1."""
    return _chrf().sentence_score(prediction, _references(target)).score / 100, ""


def outcome(prediction: str, target: str | list[str]) -> list[int]:
    """Counts of n-grams: of the prediction, of the best reference, and of both, for each length."""
    # sacrebleu has no public way to them; its own significance tests take this one.
    (counts,) = _chrf()._extract_corpus_statistics([prediction], [[each] for each in _references(target)])
    return [int(count) for count in counts]


def corpus(outcomes: Sequence[Sequence[int]]) -> float:
    """sacrebleu's corpus score, 0 to 1."""
    return _chrf()._compute_score_from_stats([sum(column) for column in zip(*outcomes, strict=True)]).score / 100


def _references(target: str | list[str]) -> list[str]:
    return target if isinstance(target, list) else [target]


@cache
def _chrf():
    from sacrebleu.metrics import CHRF

    return CHRF()


def build():
    """The metric as an ``evaluate.Metric``."""
    return metrics.as_evaluate("chrf")
