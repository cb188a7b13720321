"""Token F1 as SQuAD's own script gives it."""

import pytest

from lora_kit.metrics import token_f1
from tests.metrics.checks import check_build


@pytest.mark.parametrize("prediction, target, expected", [
    ("The Denver Broncos!", "denver broncos", 1.0),
    ("Denver Broncos won", "Denver Broncos", 0.8),  # precision 2/3, recall 1
    ("a a b", "a b b", 2 / 3),  # article a goes: [b] and [b, b]: precision 1, recall 1/2
    ("x y x", "x x z", 2 / 3),  # multiset: x twice
    ("Paris", "London", 0.0),
    ("the", "an", 1.0),  # nothing left on either side
    ("", "word", 0.0),
    ("don't", "dont", 1.0),
])
def test_values_by_hand(prediction, target, expected):
    assert token_f1.score(prediction, target)[0] == pytest.approx(expected)


def test_build():
    check_build(token_f1, "token_f1", ["Denver Broncos won", "Paris"], ["Denver Broncos", "London"])
