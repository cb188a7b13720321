"""BLEU as sacrebleu gives it on the cases of its own tests."""

import pytest

from lora_kit.metrics import sacrebleu
from tests.metrics.checks import check_build

# The example of sacrebleu's README and tests: 48.530827 with its default settings.
PREDICTIONS = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
REFERENCES = [["The dog bit the man.", "The dog had bit the man."], ["It was not unexpected.", "No one was surprised."],
              ["The man bit him first.", "The man had bitten the dog."]]


def outcomes(predictions):
    return [sacrebleu.outcome(*pair) for pair in zip(predictions, REFERENCES, strict=True)]


def test_the_corpus_value_is_sacrebleus_own():
    assert 100 * sacrebleu.corpus(outcomes(PREDICTIONS)) == pytest.approx(48.530827, abs=1e-6)
    assert sacrebleu.corpus(outcomes(["", "", ""])) == 0.0


def test_any_selection_has_the_value_that_sacrebleu_gives_it():
    from sacrebleu.metrics import BLEU

    streams = [list(stream) for stream in zip(*REFERENCES, strict=True)]
    found = outcomes(PREDICTIONS)
    assert 100 * sacrebleu.corpus([found[2], found[0], found[2]]) == pytest.approx(BLEU().corpus_score(
        [PREDICTIONS[place] for place in (2, 0, 2)], [[stream[place] for place in (2, 0, 2)] for stream in streams]
    ).score)


@pytest.mark.parametrize("prediction, reference, expected", [
    # Cases of sacrebleu's tests of sentences: over the lengths of n-gram that the answer has.
    ("test", "a test", 0.3678794411714425), ("a test", "a test", 1.0)])
def test_sentences(prediction, reference, expected):
    assert sacrebleu.score(prediction, reference)[0] == pytest.approx(expected, abs=1e-8)


def test_statistics_of_a_sentence():
    counts, totals, *lengths = sacrebleu.outcome("am I am a character sequence", "I am a symbol string sequence a a")
    assert (counts, totals, lengths) == ([4, 2, 1, 0], [6, 5, 4, 3], [6, 8])


def test_build():
    check_build(sacrebleu, "sacrebleu", ["a test", "the cat"], ["a test", "the dog"])
