"""Answers side by side: where they part, what was a near tie, and who stopped."""

import numpy as np
import pytest

from lora_kit import greedy
from lora_kit.types import Generation
from tests.test_certificate import rows

STOP = 2


class Spoken:
    """Answers every prompt with what it was given; log-probabilities fall by ``step`` from the token it says on."""

    stop_ids, num_tokens, name = (STOP,), 40, "spoken"

    class tokenizer:
        decode = staticmethod(lambda tokens: " ".join(map(str, tokens)))

    def __init__(self, tokens, *, stopped=True, second=None, gap=1.0):
        self.tokens, self.stopped, self.second, self.gap = tokens, stopped, second or {}, gap

    def generate(self, prompts, *, max_new_tokens):
        return [Generation(tokens=tuple(self.tokens), stopped=self.stopped, text="text") for _ in prompts]

    def log_probs(self, tokens):
        """At the places of the answer: its token at 0, ``second`` of that place ``gap`` below, all others at -20."""
        values = np.full((len(tokens), self.num_tokens), -20.0, np.float32)
        start = len(tokens) - len(self.tokens) - 1
        for place, token in enumerate([*self.tokens, STOP]):
            values[start + place, self.second.get(place, token)] = -self.gap
            values[start + place, token] = 0
        return values


def compared(reference, candidate):
    return greedy.compare_answers(greedy.answer(reference, rows((9, 9))), candidate)


def test_equal_answers():
    found = compared(Spoken([5, 6, 7]), Spoken([5, 6, 7], stopped=False))
    assert (found["num_answers"], found["num_same"], found["num_near_ties"]) == (2, 2, 0)
    assert found["reference_stopped"]["share"] == 1 and found["stopped"]["share"] == 0
    assert found["stopped"]["ci_low"] == 0 < found["stopped"]["ci_high"] < 1
    assert found["samples"][0]["first_difference"] is None and found["samples"][0]["preference"] is None


@pytest.mark.parametrize(("gap", "near"), [(0.05, True), (0.5, False)])
def test_a_near_tie_is_what_the_reference_hardly_preferred(gap, near):
    found = compared(Spoken([5, 6, 7], second={1: 9}, gap=gap), Spoken([5, 9, 7]))
    sample = found["samples"][0]
    assert sample["first_difference"] == 1 and sample["preference"] == pytest.approx(gap)
    assert sample["near_tie"] is near and found["num_near_ties"] == 2 * near


def test_an_end_counts_as_a_stop_token():
    earlier = compared(Spoken([5, 6, 7], second={2: STOP}, gap=0.01), Spoken([5, 6]))
    assert earlier["samples"][0]["first_difference"] == 2 and earlier["samples"][0]["near_tie"]
    later = compared(Spoken([5, 6], second={2: 8}, gap=0.01), Spoken([5, 6, 8]))
    assert later["samples"][0]["preference"] == pytest.approx(0.01)


def test_a_token_that_the_reference_did_not_consider(monkeypatch):
    monkeypatch.setattr(greedy, "_KEPT", 2)
    found = compared(Spoken([5, 6, 7], second={1: 9}), Spoken([5, 33, 7]))
    assert found["samples"][0]["preference"] is None and not found["samples"][0]["near_tie"]


def test_no_prompt_is_no_share():
    found = greedy.compare_answers([], Spoken([1]))
    assert found["num_answers"] == 0 and found["stopped"] is None


def test_sample_prompts_end_where_the_answer_begins():
    chosen = greedy.sample_prompts(rows((9, 4, 9), trained_from=3), 2)
    assert chosen == [row["tokens"][:3] for row in rows((9, 4, 9))[:2]]
    assert greedy.sample_prompts(rows((9,), trained_from=0), 2) == []
    assert greedy.sample_prompts([{"tokens": [1, 2], "trained": None}], 2) == []


@pytest.mark.parametrize(("a", "b", "expected"), [
    ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1], [1, 2], 1), ([], [5], 0), ([], [], None)])
def test_first_difference(a, b, expected):
    assert greedy.first_difference(a, b) == expected
