"""chrF is sacrebleu's score over 100, of a sentence and of the corpus."""

import pytest

from lora_kit.metrics import chrf
from tests.metrics.checks import check_build

# The example of sacrebleu's README, for which it prints chrF2 = 59.73.
PREDICTIONS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [["The dog bit the man.", "The dog had bit the man."], ["It was not unexpected.", "No one was surprised."],
              ["The man bit him first.", "The man had bitten the dog."]]


def test_value_by_hand():
    # "ab" against "ac": 1-grams 1/2 and 1/2, 2-grams 0/1 and 0/1; no higher ones. sacrebleu averages
    # precision and recall over the orders that both have: 1/4 each, so F2 = 1/4.
    assert chrf.score("ab", "ac")[0] == pytest.approx(0.25)
    assert chrf.score("abc", "abc")[0] == pytest.approx(1.0)
    assert chrf.score("xyz", "abc")[0] == 0.0


def test_recall_counts_more_than_precision():
    assert chrf.score("the cat", "the cat sat on the mat")[0] < chrf.score("the cat sat on the mat", "the cat")[0]


def test_the_corpus_value_is_sacrebleus_own():
    from sacrebleu.metrics import CHRF

    outcomes = [chrf.outcome(*pair) for pair in zip(PREDICTIONS, REFERENCES, strict=True)]
    assert 100 * chrf.corpus(outcomes) == pytest.approx(59.73, abs=0.005)
    streams = [list(stream) for stream in zip(*REFERENCES, strict=True)]
    assert 100 * chrf.corpus(outcomes) == pytest.approx(CHRF().corpus_score(PREDICTIONS, streams).score)
    # A selection of items has the value that sacrebleu gives these alone.
    assert 100 * chrf.corpus(outcomes[1:]) == pytest.approx(
        CHRF().corpus_score(PREDICTIONS[1:], [stream[1:] for stream in streams]).score)


def test_build():
    check_build(chrf, "chrf", ["ab", "the cat"], ["ac", "the dog"])
