"""chrF is sacrebleu's sentence score over 100."""

import pytest

from lora_kit.metrics import chrf
from tests.metrics.checks import check_build


def test_value_by_hand():
    # "ab" against "ac": 1-grams 1/2 and 1/2, 2-grams 0/1 and 0/1; no higher ones. sacrebleu averages
    # precision and recall over the orders that both have: 1/4 each, so F2 = 1/4.
    assert chrf.score("ab", "ac")[0] == pytest.approx(0.25)
    assert chrf.score("abc", "abc")[0] == pytest.approx(1.0)
    assert chrf.score("xyz", "abc")[0] == 0.0


def test_recall_counts_more_than_precision():
    assert chrf.score("the cat", "the cat sat on the mat")[0] < chrf.score("the cat sat on the mat", "the cat")[0]


def test_build():
    check_build(chrf, "chrf", ["ab", "the cat"], ["ac", "the dog"])
