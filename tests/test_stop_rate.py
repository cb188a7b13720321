"""The stop rate: which prompts are asked, and that an answer counts only when a stop token ends it."""

from __future__ import annotations

import pytest

from lora_kit import chat, stop_rate
from lora_kit.types import Conversation, Message


def talk(*contents: str) -> Conversation:
    roles = ("user", "assistant")
    return Conversation(origin="rows.jsonl:1", messages=tuple(
        Message(role=roles[index % 2], content=content) for index, content in enumerate(contents)))


@pytest.fixture
def tokenizer(tiny_model):
    return chat.load_tokenizer(tiny_model)


def test_prompts_end_before_the_last_answer_and_long_or_unasked_ones_are_passed_over(tokenizer):
    rows = [talk("a", "b", "c", "d"), Conversation(messages=(Message(role="user", content="text"),), origin="x",
                                                   trains_all=True), talk("long " * 50, "b"), talk("e", "f")]
    found = stop_rate.prompts_of(tokenizer, rows, 5, 80, "template")
    texts = [tokenizer.decode(ids) for ids in found]
    assert len(texts) == 2 and texts[0].count("<|im_start|>") == 4 and "d<|im_end|>" not in texts[0]
    assert texts[1].endswith("<|im_start|>assistant\n")
    assert len(stop_rate.prompts_of(tokenizer, rows, 1, 80, "template")) == 1


@pytest.mark.parametrize(("bias", "stopped"), [(1e4, 3), (-1e4, 0)])
def test_an_answer_counts_when_a_stop_token_ends_it(tiny_model, tokenizer, bias, stopped):
    import torch

    from lora_kit.model import load_base

    model = load_base(tiny_model, dtype="fp32", device="cpu").train()
    stops = list(chat.stop_token_ids(tokenizer))
    head = model.get_output_embeddings()

    def push(_, __, logits):
        pushed = logits.clone()
        pushed[..., torch.tensor(stops)] += bias
        return pushed

    head.register_forward_hook(push)
    prompts = stop_rate.prompts_of(tokenizer, [talk("a", "b"), talk("c", "d"), talk("ee", "f")], 3, 80, "template")
    found = stop_rate.measure_stop_rate(model, tokenizer, prompts, 4)
    assert (found["num_stopped"], found["num_prompts"]) == (stopped, 3) and model.training
    assert found["ci_low"] <= found["rate"] <= found["ci_high"]
    assert stop_rate.measure_stop_rate(model, tokenizer, [], 4) is None
