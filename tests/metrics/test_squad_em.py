"""SQuAD's exact match on the cases of evaluate's page of that metric, with token F1 beside it."""

import pytest

from lora_kit import metrics
from lora_kit.metrics import squad_em, token_f1
from tests.metrics.checks import check_build


@pytest.mark.parametrize("prediction, references, expected", [
    ("1976", ["1976"], 1.0), ("1999", ["1976"], 0.0), ("Beyonce", ["Beyoncé and Bruno Mars"], 0.0),
    ("climate change", ["climate change"], 1.0)])
def test_published_cases(prediction, references, expected):
    assert metrics.score_item(squad_em, prediction, references)[0] == expected
    assert metrics.score_item(token_f1, prediction, references)[0] == expected


@pytest.mark.parametrize("prediction, target, expected", [
    ("The Denver  Broncos!", "denver broncos", 1.0), ("an answer", "answer", 1.0), ("theory", "ory", 0.0),
    ("don't", "dont", 1.0), ("", "the", 1.0), ("a b", "b c", 0.0)])
def test_what_is_taken_out(prediction, target, expected):
    assert squad_em.score(prediction, target)[0] == expected


def test_build():
    check_build(squad_em, "squad_em", ["The cat", "dog"], ["cat", "cat"])
