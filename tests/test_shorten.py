"""Long examples: cut at either end, or split at their turns."""

from __future__ import annotations

import numpy as np
import pytest

from lora_kit import shorten
from lora_kit.types import Conversation, Example, Message


def encode(conversation: Conversation) -> list[Example]:
    """A token for every character, an opening token before each message; the assistant's are trained on."""
    tokens, mask = [], []
    for message in conversation.messages:
        tokens += [0, *map(ord, message.content)]
        mask += [0, *[int(message.role == "assistant")] * len(message.content)]
    return [Example(tokens_T=np.array(tokens, np.int32), loss_mask_T=np.array(mask, np.uint8),
                    origin=conversation.origin)]


def talk(*contents: str, system: str = "") -> Conversation:
    messages = [Message(role="system", content=system)] if system else []
    messages += [Message(role=("user", "assistant")[index % 2], content=text) for index, text in enumerate(contents)]
    return Conversation(messages=tuple(messages), origin="a:1")


def pieces(conversation: Conversation, most: int) -> list[list[str]]:
    made = shorten.split(conversation, encode(conversation), encode, most, lambda ids: "".join(map(chr, ids)))
    for said, example in made:
        assert example.origin == said.origin == "a:1"
    return [[message.content for message in said.messages] for said, _ in made]


@pytest.mark.parametrize(("policy", "kept"), [("cut_end", [1, 2, 3]), ("cut_start", [3, 4, 5])])
def test_a_cut_takes_tokens_and_mask_alike(policy, kept):
    whole = Example(tokens_T=np.arange(1, 6), loss_mask_T=np.array([0, 1, 0, 1, 1], np.uint8), origin="a:1",
                    stops=(1, 4))
    short = shorten.cut(whole, policy, 3)
    assert short.tokens_T.tolist() == kept
    assert short.loss_mask_T.tolist() == [whole.loss_mask_T[token - 1] for token in kept]
    assert [short.tokens_T[stop] for stop in short.stops] == [token for token in kept if token in (2, 5)]


def test_pieces_hold_as_many_exchanges_as_fit():
    assert pieces(talk("q1", "a1", "q2", "a2", "q3", "a3"), 12) == [["q1", "a1", "q2", "a2"], ["q3", "a3"]]
    assert pieces(talk("q1", "a1", "q2", "a2", "q3", "a3"), 11) == [["q1", "a1"], ["q2", "a2"], ["q3", "a3"]]


def test_every_piece_begins_with_the_system_message_and_a_user_s_turn():
    assert pieces(talk("q1", "a1", "q2", "a2", system="sys"), 10) == [["sys", "q1", "a1"], ["sys", "q2", "a2"]]


def test_an_exchange_that_does_not_fit_is_a_piece_of_its_own():
    assert pieces(talk("q1", "a1", "q2", "a" * 50, "q3", "a3"), 12) == [["q1", "a1"], ["q2", "a" * 50], ["q3", "a3"]]


def test_a_tool_s_answer_stays_with_the_turn_that_asked():
    roles = ["user", "assistant", "tool", "assistant", "user", "assistant"]
    conversation = Conversation(messages=tuple(Message(role=role, content=role[0]) for role in roles), origin="a:1")
    assert pieces(conversation, 8) == [["u", "a", "t", "a"], ["u", "a"]]


def test_text_is_cut_into_stretches_that_lose_nothing():
    conversation = Conversation(messages=(Message(role="assistant", content="abcdefgh"),), origin="a:1",
                                trains_all=True)
    assert "".join(text for [text] in pieces(conversation, 4)) == "\0abcdefgh"
