"""Events reach every listener, in order, while it listens."""

from __future__ import annotations

import pytest

from lora_kit.events import Caution, Note, Progress, listening, tell


def test_every_listener_hears_every_event_in_order():
    first, second = [], []
    with listening(first.append):
        tell(Note(text="one"))
        with listening(second.append):
            tell(Caution(text="two"))
        tell(Progress(stage="train", done=1, total=2))
    tell(Note(text="to nobody"))
    assert first == [Note(text="one"), Caution(text="two"), Progress(stage="train", done=1, total=2)]
    assert second == [Caution(text="two")]


def test_a_listener_goes_when_its_block_fails():
    heard = []
    with pytest.raises(RuntimeError), listening(heard.append):
        raise RuntimeError
    tell(Note(text="after"))
    assert heard == []


def test_a_listener_may_come_while_an_event_is_told():
    heard = []

    def nosy(event):
        with listening(heard.append):
            pass
        heard.append(event)

    with listening(nosy):
        tell(Note(text="x"))
    assert heard == [Note(text="x")]
