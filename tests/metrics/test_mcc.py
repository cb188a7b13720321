"""Matthews correlation as scikit-learn gives it."""

import random

import pytest

from lora_kit.errors import DataError
from lora_kit.metrics import mcc
from tests.metrics.checks import check_build


def value(predicted, wanted):
    return mcc.corpus([mcc.outcome(*pair) for pair in zip(predicted, wanted, strict=True)])


def test_the_example_of_scikit_learn():
    assert value(["+1", "-1", "+1", "+1"], ["+1", "+1", "+1", "-1"]) == pytest.approx(-1 / 3)


def test_many_labels_as_scikit_learn():
    from sklearn.metrics import matthews_corrcoef

    generator = random.Random(0)
    wanted = [generator.choice(["cat", "dog", "bird"]) for _ in range(60)]
    predicted = [each if generator.random() < 0.6 else generator.choice(["cat", "dog", "fish"]) for each in wanted]
    assert value(predicted, wanted) == pytest.approx(matthews_corrcoef(wanted, predicted))


def test_guessing_one_label_is_worth_nothing_and_all_right_everything():
    assert value(["yes"] * 4, ["yes", "yes", "yes", "no"]) == 0.0
    assert value(["yes"] * 2, ["yes"] * 2) == 0.0
    assert value(["a", "b", "c"], ["a", "b", "c"]) == 1.0


def test_items():
    assert mcc.score(" yes\n", "yes") == (1.0, "")
    assert mcc.score("no", ["yes"]) == (0.0, "labels 'no', not 'yes'")
    with pytest.raises(DataError, match="takes one label an item, not 2"):
        mcc.score("no", ["yes", "no"])


def test_build():
    check_build(mcc, "mcc", ["a", "b", "b", "a"], ["a", "b", "a", "a"])
