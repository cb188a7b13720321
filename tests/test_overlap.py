"""Overlap: exact and by 8-gram, of training rows with items; thresholds, roles, groups, limits."""

from __future__ import annotations

import numpy as np
import pytest

from lora_kit import overlap
from lora_kit.overlap import Probes, said_in
from lora_kit.types import Conversation, Message

WORDS = [f"word{number}" for number in range(100)]


def talk(*contents: str, origin: str = "a:1", system: str = "") -> Conversation:
    messages = [Message(role="system", content=system)] if system else []
    messages += [Message(role=("user", "assistant")[index % 2], content=text) for index, text in enumerate(contents)]
    return Conversation(messages=tuple(messages), origin=origin)


def text_row(text: str) -> Conversation:
    return Conversation(messages=(Message(role="assistant", content=text),), origin="t:1", trains_all=True)


def report_of(items: list[Conversation], rows: list[Conversation]) -> tuple[dict, list[tuple[str, ...]]]:
    probes = Probes()
    probes.add_conversations("held_out", items)
    looked = [probes.look(row) for row in rows]
    [found] = probes.report()
    return found, looked


LONG = " ".join(WORDS[:20])


def test_nothing_in_common_is_nothing():
    found, looked = report_of([talk("what is up", LONG)], [talk("something else", " ".join(WORDS[30:60]))])
    assert looked == [()]
    assert found == {"against": "held_out", "items": 1, "compared_by_ngram": 1, "same_question": 0,
                     "same_question_and_answer": 0, "over_threshold": 0, "overlapping_one_row": 0, "rows": 0,
                     "examples": [], "overlapping": []}


def test_a_question_and_its_answer_are_found_whatever_the_system_says():
    found, looked = report_of([talk("hi", "yo", origin="h:1")], [talk("hi", "yo", system="Be kind.", origin="a:7")])
    assert (found["same_question"], found["same_question_and_answer"], found["rows"]) == (1, 1, 1)
    assert looked == [("held_out",)] and found["examples"] == [{"item": "h:1", "row": "a:7", "share": 1.0}]
    assert found["overlapping"] == ["h:1"]


def test_a_short_question_with_another_answer_is_counted_and_no_overlap():
    found, looked = report_of([talk("hi", "yo")], [talk("hi", "hello")])
    assert (found["same_question"], found["overlapping_one_row"], looked) == (1, 0, [()])


def test_a_long_question_with_another_answer_is_an_overlap():
    question = " ".join(WORDS[:8])
    found, looked = report_of([talk(question, "yes")], [talk("before", "that", question, "no"), talk(question, "no")])
    assert found["same_question"] == 1 and looked == [(), ("held_out",)] or found["rows"] >= 1
    assert found["overlapping_one_row"] == 1


@pytest.mark.parametrize(("num_words", "over"), [(20, True), (17, True), (16, False), (12, False)])
def test_over_seventy_percent_of_the_8_grams_is_an_overlap(num_words, over):
    # 20 words have 13 8-grams; the first n words hold n - 7 of them: 10 of 13 is 77 %, 9 of 13 is 69 %.
    found, looked = report_of([talk("x", LONG)], [talk("y", " ".join(WORDS[:num_words]))])
    assert bool(looked[0]) == over and found["over_threshold"] == int(over)


def test_8_grams_of_several_rows_together_count_and_no_row_is_to_blame():
    found, looked = report_of([talk("x", LONG)], [talk("y", " ".join(WORDS[:14])), talk("y", " ".join(WORDS[6:20]))])
    assert looked == [(), ()] and (found["over_threshold"], found["rows"]) == (1, 0)
    assert found["overlapping"] == ["a:1"] and found["examples"] == []


def test_case_and_punctuation_do_not_hide_an_8_gram():
    shouted = ", ".join(WORDS[:20]).upper() + "!"
    assert report_of([talk("x", LONG)], [talk("y", shouted)])[0]["over_threshold"] == 1


def test_an_8_gram_does_not_run_over_two_messages():
    found, _ = report_of([talk(" ".join(WORDS[:10]), " ".join(WORDS[10:20]))], [talk("y", LONG)])
    assert found["over_threshold"] == 1  # its 6 8-grams are all there
    found, _ = report_of([talk("x", LONG)], [talk(" ".join(WORDS[:10]), " ".join(WORDS[10:20]))])
    assert found["over_threshold"] == 0  # of its 13 only 6 are


def test_a_script_without_spaces_has_words_too():
    text = "今日は天気がとても良いので公園まで散歩に行きましょう"
    assert report_of([talk("何", text)], [talk("え", "さて、" + text)])[0]["over_threshold"] == 1


def test_text_rows_are_compared_whole():
    found, looked = report_of([text_row("short text")], [text_row("short text"), text_row("other")])
    assert looked == [("held_out",), ()] and found["same_question_and_answer"] == 1


def test_calls_are_words_too():
    call = {"type": "function", "function": {"name": "area", "arguments": {"base": 10, "height": 5}}}
    said = said_in(Conversation(messages=(Message(role="system", content="s"), Message(role="user", content="q"),
                                          Message(role="assistant", tool_calls=(call,))), origin="a:1"))
    assert said == [("user", "q"), ("assistant", '["area", {"base": 10, "height": 5}]')]


def test_items_over_the_bound_are_compared_exactly_only(monkeypatch):
    monkeypatch.setattr(overlap, "MAX_NGRAMS", 20)
    items = [talk("one", " ".join(WORDS[:20])), talk("two", " ".join(WORDS[20:40]))]
    found, _ = report_of(items, [talk("y", " ".join(WORDS)), talk("two", " ".join(WORDS[20:40]))])
    assert (found["items"], found["compared_by_ngram"], found["over_threshold"]) == (2, 1, 1)
    assert found["same_question_and_answer"] == 1


def test_the_hashes_of_8_grams_do_not_change_and_tell_order():
    one, other = overlap._ngrams([LONG]), overlap._ngrams([" ".join(reversed(WORDS[:20]))])
    assert len(one) == 13 and one.dtype == np.uint64 and not np.isin(one, other).any()
    assert (overlap._ngrams([LONG, LONG]) == one).all() and len(overlap._ngrams(["too few words"])) == 0
    many = overlap._ngrams([" ".join(f"{number}" for number in range(20_000))])
    assert len(many) == 20_000 - 7


def test_groups_are_counted_apart():
    probes = Probes()
    probes.add_conversations("held_out", [talk("a", LONG)])
    probes.add("task", "item 1", [("user", " ".join(WORDS[50:60]))], "")
    assert probes.look(talk("b", LONG)) == ("held_out",)
    assert probes.look(talk(" ".join(WORDS[50:60]), "whatever")) == ("task",)
    assert [(each["against"], each["rows"]) for each in probes.report()] == [("held_out", 1), ("task", 1)]
    assert overlap.rows(probes.report())[1][:2] == ("task", "1")
