"""Macro-averaged F1 as scikit-learn gives it."""

import random

import pytest

from lora_kit.metrics import f1
from tests.metrics.checks import check_build


def value(predicted, wanted):
    return f1.corpus([f1.outcome(*pair) for pair in zip(predicted, wanted, strict=True)])


def test_the_example_of_scikit_learn():
    assert value("021001", "012012") == pytest.approx(0.8 / 3)  # printed there as 0.267


def test_labels_that_only_the_model_has_count():
    from sklearn.metrics import f1_score

    generator = random.Random(1)
    wanted = [generator.choice(["cat", "dog", "bird"]) for _ in range(60)]
    predicted = [each if generator.random() < 0.6 else generator.choice(["cat", "dog", "fish"]) for each in wanted]
    assert value(predicted, wanted) == pytest.approx(f1_score(wanted, predicted, average="macro", zero_division=0.0))


def test_items():
    assert f1.score(" cat ", "cat") == (1.0, "")
    assert f1.score("dog", "cat") == (0.0, "labels 'dog', not 'cat'")


def test_build():
    check_build(f1, "f1", ["a", "b", "b", "a"], ["a", "b", "a", "a"])
