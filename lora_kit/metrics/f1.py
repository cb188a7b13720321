"""F1 of labels, macro-averaged, through scikit-learn: every label counts the same, however rare it is.

The answer as a whole, without outer blanks, is the label that was predicted; one that no item has as its target is a
label of its own, with an F1 of 0. The value is of all items together: an item's score only says whether its label is
right. (For the overlap of words in answers see ``token_f1``.) Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_kit import labels, metrics

HIGHER_IS_BETTER = True
SEVERAL = True


def score(prediction: str, target: str | list[str]) -> tuple[float, str]:
    """1.0 when the label is right, else 0.0."""
    return labels.score_of(outcome(prediction, target))


def outcome(prediction: str, target: str | list[str]) -> list[str]:
    """The label that was predicted, and the right one."""
    return labels.outcome_of("f1", prediction, target)


def corpus(outcomes: Sequence[Sequence[str]]) -> float:
    """Macro-averaged F1 over the labels that occur."""
    from sklearn.metrics import f1_score

    return float(f1_score(*labels.numbered(outcomes), average="macro", zero_division=0.0))


def build():
    """The metric as an ``evaluate.Metric``."""
    return metrics.as_evaluate("f1")
