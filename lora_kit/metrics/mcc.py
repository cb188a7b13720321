"""Matthews correlation of labels, through scikit-learn: -1 to 1, and 0 for guessing, however uneven the labels are.

The answer as a whole, without outer blanks, is the label that was predicted; one that no item has as its target is a
label of its own. The value is of all items together: an item's score only says whether its label is right. Sources:
Matthews, Biochimica et Biophysica Acta 405 (1975); Gorodkin, Computational Biology and Chemistry 28 (2004), for more
than two labels. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_kit import labels, metrics

HIGHER_IS_BETTER = True
SEVERAL = True
UNIT = "-1 to 1"


def score(prediction: str, target: str | list[str]) -> tuple[float, str]:
    """1.0 when the label is right, else 0.0."""
    return labels.score_of(outcome(prediction, target))


def outcome(prediction: str, target: str | list[str]) -> list[str]:
    """The label that was predicted, and the right one."""
    return labels.outcome_of("mcc", prediction, target)


def corpus(outcomes: Sequence[Sequence[str]]) -> float:
    """The correlation; 0 where all predictions, or all targets, are one label."""
    from sklearn.metrics import matthews_corrcoef

    wanted, predicted = labels.numbered(outcomes)
    return float(matthews_corrcoef(wanted, predicted)) if len({*wanted, *predicted}) > 1 else 0.0


def build():
    """The metric as an ``evaluate.Metric``."""
    return metrics.as_evaluate("mcc")
