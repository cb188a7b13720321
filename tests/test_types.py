"""The nouns: frozen, keyword-only, as JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lora_kit import types
from lora_kit.types import Artifact, Message, TaskScore, Verdict

NOUNS = [kind for kind in vars(types).values() if dataclasses.is_dataclass(kind)]


@pytest.mark.parametrize("noun", NOUNS, ids=lambda noun: noun.__name__)
def test_every_noun_is_frozen_and_keyword_only(noun):
    assert noun.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(noun))


def test_a_message_leaves_out_what_it_lacks():
    assert Message(role="user", content="hi").as_dict() == {"role": "user", "content": "hi"}
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert Message(role="assistant", tool_calls=(call,)).as_dict() == {
        "role": "assistant", "content": None, "tool_calls": [call]}
    assert Message(role="tool", content="3", name="f", tool_call_id="c1").as_dict() == {
        "role": "tool", "content": "3", "name": "f", "tool_call_id": "c1"}


@pytest.mark.parametrize("noun", [
    Artifact(name="merged", path="merge/model", kind="hf", size_bytes=3),
    TaskScore(task="t", artifact="base", metric="m", higher_is_better=True, value=None, ci_low=None, ci_high=None,
              num_items=0, num_errors=2),
    Verdict(outcome="PASS", claim="better", evidence="by 0.1"),
], ids=lambda noun: type(noun).__name__)
def test_a_noun_comes_back_from_json(noun):
    assert type(noun)(**json.loads(json.dumps(noun.as_dict()))) == noun
