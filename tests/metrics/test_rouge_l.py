"""ROUGE-L on the worked example of its paper."""

import pytest

from lora_kit.metrics import rouge_l
from tests.metrics.checks import check_build


def test_the_papers_example():
    # Lin 2004, section 3.1, with beta = 1: S1 "police killed the gunman".
    target = "police killed the gunman"
    assert rouge_l.score("police kill the gunman", target)[0] == pytest.approx(3 / 4)
    assert rouge_l.score("the gunman kill police", target)[0] == pytest.approx(2 / 4)
    assert rouge_l.score("the gunman police killed", target)[0] == pytest.approx(2 / 4)


def test_case_and_punctuation_do_not_count_and_length_does():
    value, reason = rouge_l.score("Police killed, the gunman. And then some", "police killed the gunman")
    assert value == pytest.approx(2 * 0.5714285 / 1.5714285, rel=1e-5)  # precision 4/7, recall 1
    assert reason == "precision 0.57, recall 1.00"
    assert rouge_l.score("", "police")[0] == 0.0


def test_build():
    check_build(rouge_l, "rouge_l", ["police kill the gunman", ""], ["police killed the gunman", "x"])
