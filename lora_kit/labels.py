"""Answers that are labels: what was predicted and what is right, for metrics of all items together.

The answer as a whole, without outer blanks, is the label; one that no item has as its target is a label of its own.
Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_kit.errors import DataError


def outcome_of(metric: str, prediction: str, target: str | list[str]) -> list[str]:
    """The label that was predicted, and the right one.

    Raises:
        DataError: an item has several targets, or none; ``metric`` is named.
    """
    wanted = target if isinstance(target, list) else [target]
    if len(wanted) != 1:
        raise DataError(metric, f"takes one label an item, not {len(wanted)}", "mend the row")
    return [prediction.strip(), wanted[0].strip()]


def score_of(outcome: Sequence[str]) -> tuple[float, str]:
    """1.0 when the label is right, else 0.0 and why."""
    predicted, wanted = outcome
    return (1.0, "") if predicted == wanted else (0.0, f"labels {predicted[:80]!r}, not {wanted[:80]!r}")


def numbered(outcomes: Sequence[Sequence[str]]) -> tuple[list[int], list[int]]:
    """(right labels, predicted labels) of all items, each label as a number from 0, in order of first sight."""
    predicted, wanted = zip(*outcomes, strict=True)
    numbers: dict[str, int] = {label: number for number, label in enumerate(dict.fromkeys((*wanted, *predicted)))}
    return [numbers[label] for label in wanted], [numbers[label] for label in predicted]
