from __future__ import annotations

import pytest

from lora_kit.formats import UnusableRow, text
from lora_kit.types import Message


def test_a_text_is_trained_on_as_a_whole():
    read = text.to_conversation({"text": " Once\n", "url": "u"}, "a.jsonl:2")
    assert read.trains_all and read.origin == "a.jsonl:2"
    assert read.messages == (Message(role="assistant", content=" Once\n"),)


def test_keys_about_the_text_fit_and_others_do_not():
    assert text.fits({"text": "t", "source": "s", "meta": {"x": 1}})
    assert not text.fits({"text": "t", "label": 3})
    assert not text.fits({"text": "t", "summary": "s"})
    assert not text.fits({"text": ["t"]})


@pytest.mark.parametrize(
    ("record", "reason"),
    [({"text": " "}, "empty content"), ({"text": 3}, "empty content"), ({"text": "\udc80"}, "broken characters")],
)
def test_unusable_rows_say_why(record, reason):
    with pytest.raises(UnusableRow) as caught:
        text.to_conversation(record, "x")
    assert caught.value.reason == reason
