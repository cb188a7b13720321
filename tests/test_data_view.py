"""What `lora-kit data` shows: its tables, and any example by number or by row."""

from __future__ import annotations

import pytest

from lora_kit import data_view
from lora_kit.errors import RecipeError
from tests.data_place import talk


@pytest.fixture
def found(place):
    long = talk(*[f"turn {turn} " * 7 for turn in range(6)])
    place.write("rows.jsonl", [*[talk(f"q{row}", "a" * row) for row in range(1, 12)], long])
    return place.prepare("data.held_out_rows=0", "data.too_long=split_turns")


def test_the_tables_have_every_example_in_a_bar(found):
    shown = {title: rows for title, _, rows in data_view.tables(found.ledger(), None)}
    assert list(shown) == ["lengths"]
    assert sum(int(row[1]) for row in shown["lengths"]) == found.ledger()["splits"]["train"]["rows_used"]
    report = [{"against": "ask", "items": 1, "compared_by_ngram": 1, "same_question": 0, "rows": 0, "examples": [],
               "same_question_and_answer": 0, "over_threshold": 0, "overlapping_one_row": 0}]
    assert "overlap of training rows with" in [title for title, _, _ in data_view.tables(found.ledger(), report)]
    assert "No training row says the same" in data_view.lines(found.ledger(), found.folder)


def test_an_example_is_shown_by_number_and_by_row(found, place):
    [(title, spans)] = data_view.examples(found.folder, "train", ["3"], str(place.base_folder))
    assert title.startswith("train 3 of ") and "rows.jsonl:3, " in title and title.endswith(" 4 trained")
    assert [text for text, trained in spans if trained] == ["aaa<|im_end|>"]
    whole = "<|im_start|>user\nq3<|im_end|>\n<|im_start|>assistant\naaa<|im_end|>\n"
    assert "".join(text for text, _ in spans) == whole
    several = list(data_view.examples(found.folder, "train", ["rows.jsonl:12"], str(place.base_folder)))
    assert len(several) == 3, "the pieces of a row that was split"


@pytest.mark.parametrize("wanted", ["99", "rows.jsonl:99"])
def test_an_example_that_is_not_there_is_told(found, place, wanted):
    with pytest.raises(RecipeError, match=f"lora-kit data --show {wanted}: there is no such train example"):
        list(data_view.examples(found.folder, "train", [wanted], str(place.base_folder)))


def test_options_are_checked_before_anything_is_prepared():
    assert data_view.checked("held_out", ["1", "rows.jsonl:4"]) == ["1", "rows.jsonl:4"]
    with pytest.raises(RecipeError, match="there is no split 'test'; name train or held_out"):
        data_view.checked("test", [])
    with pytest.raises(RecipeError, match="numbered from 1"):
        data_view.checked("train", ["0"])
