"""ROUGE-1, -2 and -Lsum on the cases of rouge_score's own tests."""

import pytest

from lora_kit import metrics
from lora_kit.metrics import rouge_1, rouge_2, rouge_l, rouge_lsum
from tests.metrics.checks import check_build


@pytest.mark.parametrize("metric, target, prediction, expected", [
    (rouge_1, "testing one two", "testing", 1 / 2),
    (rouge_1, "testing one two", "testing one", 4 / 5),
    (rouge_1, "testing one two", "", 0.0),
    (rouge_2, "testing one two", "testing one", 2 / 3),
    (rouge_2, "testing one two", "", 0.0),
    (rouge_l, "testing one two", "testing two", 4 / 5),
    (rouge_lsum, "w1 w2 w3 w4 w5", "w1 w2 w6 w7 w8\nw1 w3 w8 w9 w5", 0.64 / 1.2),  # precision 0.4, recall 0.8
    (rouge_lsum, "First sentence.\nSecond Sentence.", "Second sentence.\nFirst Sentence.", 1.0),
    (rouge_lsum, "w1 w2 w3 w4 w5", "/", 0.0),
])
def test_cases(metric, target, prediction, expected):
    assert metric.score(prediction, target)[0] == pytest.approx(expected)


def test_several_references_as_rouge_score_takes_them():
    values = [metrics.score_item(metric, "text first", ["first text", "first something"])[0]
              for metric in (rouge_1, rouge_2, rouge_l)]
    assert values == pytest.approx([1, 0, 0.5])


@pytest.mark.parametrize("name", ["rouge_1", "rouge_2", "rouge_lsum"])
def test_build(name):
    check_build(metrics.load(name), name, ["testing one", "a\nb"], ["testing one two", "b\na"])
