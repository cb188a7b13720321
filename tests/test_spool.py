"""Conversations on disk: read back as they were, with what they were cut from and a key of what they say."""

from __future__ import annotations

import os

import numpy as np

from lora_kit.spool import Spool, content_key
from lora_kit.types import Conversation, Message


def talk(text: str, origin: str = "a:1", **more) -> Conversation:
    return Conversation(messages=(Message(role="user", content=text), Message(role="assistant", content="é\n\t\\n")),
                        origin=origin, **more)


def test_rows_are_read_back_by_number(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "description": "half an emoji \ud83d"}}
    rows = [(talk("one"), None), (talk("two", tools=(tool,)), talk("two and\nmore")), (talk("three", "ü:3"), None)]
    with Spool(tmp_path) as spool:
        assert [spool.append(*row) for row in rows] == [0, 1, 2] and len(spool) == 3
        assert [spool.read(number) for number in (2, 0, 1)] == [rows[2], rows[0], rows[1]]
        spool.append(talk("four"))
        assert spool.read(3) == (talk("four"), None)
        assert spool.keys_of(np.array([1, 0])).tolist() == [content_key(rows[1][0]), content_key(rows[0][0])]


def test_the_file_goes_with_the_process(tmp_path):
    with Spool(tmp_path) as spool:
        spool.append(talk("one"))
        assert os.listdir(tmp_path) == []


def test_a_key_is_of_what_a_row_says_and_not_of_where_it_stands():
    assert content_key(talk("one", "a:1")) == content_key(talk("one", "b:2"))
    assert len({content_key(each) for each in (talk("one"), talk("two"), talk("one", trains_all=True))}) == 3
