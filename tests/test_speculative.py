"""speculative.py: the greedy answer, with every pass, draft and acceptance counted."""

import pytest
import torch

from lora_kit import speculative
from lora_kit.speculative import lookup
from tests.test_lean_decoder import build


@pytest.mark.parametrize(("tokens", "most", "expected"), [
    ([1, 2, 3, 4, 9, 2, 3], 2, [4, 9]),  # the longest match counts
    ([5, 7, 5, 8, 5], 2, [8, 5]),  # then the last occurrence
    ([5, 7, 5, 8, 5], 3, [7, 5, 8]),  # that enough tokens follow
    ([1, 2, 3], 4, []), ([1], 4, []), ([4, 4], 4, [4]), ([1, 2, 1], 0, [])])
def test_what_followed_the_newest_tokens(tokens, most, expected):
    assert lookup(tokens, most) == expected


def test_the_answer_is_the_greedy_one_in_fewer_passes():
    model = build("llama")
    generator = torch.Generator().manual_seed(0)
    found = {}
    for number in range(4):
        prompt = torch.randint(3, 320, (12,), generator=generator).tolist()
        plain = speculative.answer(model, prompt, new_tokens=60, drafted=0)
        quick = speculative.answer(model, prompt, new_tokens=60, drafted=4)
        assert plain.tokens == quick.tokens and len(quick.tokens) == 60
        assert plain.passes == 59 and plain.drafted == 0 and plain.acceptance is None
        # Each pass gives what it accepts and one token more.
        assert quick.accepted + quick.passes == 59 and quick.accepted <= quick.drafted <= 4 * quick.passes
        assert quick.tokens_per_pass == pytest.approx(59 / quick.passes)
        found[number] = quick.passes
    assert min(found.values()) < 59  # a small random model repeats itself


def test_a_repeating_answer_accepts_nearly_all():
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()  # the first token each time
    quick = speculative.answer(model, [5, 6, 7], new_tokens=41, drafted=4)
    assert set(quick.tokens) == {0} and quick.acceptance == 1.0
    assert quick.passes < 15


def test_where_answers_part():
    model = build("llama")
    assert speculative.parts_at_near_tie(model, [3, 4], [1, 2], [1, 2]) is None
    logits = model(input_ids=torch.tensor([[3, 4, 1]])).logits[0, -1].detach()
    gap = speculative.parts_at_near_tie(model, [3, 4], [1, 2, 9], [1, 5, 9])
    assert gap == pytest.approx(abs(float(logits[2] - logits[5])), abs=1e-5)
