"""BLEU through sacrebleu: n-grams of up to four tokens, times a penalty for short answers.

An item's score is sacrebleu's sentence score (over the lengths of n-gram that the answer has, as it recommends for
sentences); the task's value is its corpus score (13a tokens, exponential smoothing), made from the counts of all items
together. Both divided by 100. Sources: Papineni et al., "BLEU", 2002; Post, "A Call for Clarity in Reporting BLEU
Scores", 2018. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from lora_kit import metrics

HIGHER_IS_BETTER = True
SEVERAL = True


def score(prediction: str, target: str | list[str]) -> tuple[float, str]:
    """Sentence BLEU of one prediction, 0 to 1."""
    found = _sentence(prediction, target)
    return found.score / 100, f"{found.sys_len} tokens, the reference has {found.ref_len}"


def outcome(prediction: str, target: str | list[str]) -> list[list[int] | int]:
    """Matching n-grams and all n-grams of the prediction by length, its tokens, the reference's."""
    found = _sentence(prediction, target)
    return [list(found.counts), list(found.totals), found.sys_len, found.ref_len]


def corpus(outcomes: Sequence[Sequence]) -> float:
    """sacrebleu's corpus score, 0 to 1."""
    from sacrebleu.metrics import BLEU

    matching, everything, own, wanted = zip(*outcomes, strict=True)
    return BLEU.compute_bleu([sum(column) for column in zip(*matching, strict=True)],
                             [sum(column) for column in zip(*everything, strict=True)],
                             sum(own), sum(wanted), smooth_method="exp").score / 100


def _sentence(prediction: str, target: str | list[str]):
    return _bleu().sentence_score(prediction, target if isinstance(target, list) else [target])


@cache
def _bleu():
    from sacrebleu.metrics import BLEU

    return BLEU(effective_order=True)


def build():
    """The metric as an ``evaluate.Metric``."""
    return metrics.as_evaluate("sacrebleu")
