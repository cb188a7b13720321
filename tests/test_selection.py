"""Duplicates and overlap: counted always, dropped when asked; left-out rows are named, sources told apart."""

from __future__ import annotations

import json

import pytest

from lora_kit import data, overlap
from lora_kit.errors import DataError
from lora_kit.events import Caution, listening
from tests.data_place import ROWS, counts_of, origins_of, reasons_of, talk

NONE_HELD_OUT = "data.held_out_rows=0"
WORDS = " ".join(f"word{number}" for number in range(20))


def prepare(place, *overrides, **options):
    """The prepared data, and the Cautions that were told."""
    told = []
    with listening(told.append):
        found = place.prepare(*overrides, **options)
    return found, [event.text for event in told if isinstance(event, Caution)]


def suite_with_items(place, rows: list[dict]) -> str:
    """The override that names a suite whose one task asks ``rows``."""
    place.write("eval/tasks/ask/items.jsonl", rows)
    (place.folder / "eval/tasks/ask/task.yaml").write_text(
        "kind: generate\ndata: items.jsonl\nmetrics: exact_match\n")
    (place.folder / "eval/suites").mkdir()
    (place.folder / "eval/suites/mine.yaml").write_text("tasks: [ask]\n")
    return "eval.suite=eval/suites/mine.yaml"


# ---- sources and reasons ---------------------------------------------------------------


def test_the_ledger_tells_sources_apart(place):
    place.write("more.jsonl", [talk("other", "x"), {"messages": []}, talk("x", "y" * 300)])
    found = place.prepare(NONE_HELD_OUT, "data.max_dropped=0.5", "data.too_long=drop",
                          train="[rows.jsonl, more.jsonl]")
    by_source = {item["source"]: item for item in found.ledger()["sources"]}
    assert (by_source["rows.jsonl"]["rows_in"], by_source["rows.jsonl"]["rows_used"]) == (20, 20)
    more = by_source["more.jsonl"]
    assert [more[name] for name in ("rows_in", "rows_used", "rows_unusable", "rows_dropped")] == [3, 1, 1, 1]
    assert more["tokens_in"] == more["tokens_trained"] + more["tokens_context"] + more["tokens_dropped"]
    for name, total in counts_of(found).items():
        assert total == sum(item[name] for item in found.ledger()["sources"] if item["split"] == "train")
    dropped = next(item for item in found.ledger()["reasons"] if item["reason"] == "over 200 tokens")
    assert (dropped["source"], dropped["examples"], dropped["tokens"]) == (
        "more.jsonl", ["more.jsonl:3"], more["tokens_dropped"])


def test_rows_that_are_left_out_are_named_too(place):
    found = place.prepare(NONE_HELD_OUT, train="[{source: rows.jsonl, limit: 15, weight: 0.5}]")
    reasons = {item["reason"]: item for item in found.ledger()["reasons"]}
    assert len(reasons["over the source's limit"]["examples"]) == len(
        reasons["not drawn (weight below 1)"]["examples"]) == 3
    used = set(origins_of(found))
    assert not used & {origin for item in reasons.values() for origin in item["examples"]}


# ---- duplicates ------------------------------------------------------------------------


def test_duplicates_are_counted_and_kept_with_a_caution(place):
    place.write("rows.jsonl", [*ROWS, ROWS[3], ROWS[3], ROWS[7]])
    found, cautions = prepare(place, NONE_HELD_OUT)
    assert found.ledger()["duplicates"] == {
        "rows": 3, "examples": 0, "origins": ["rows.jsonl:21", "rows.jsonl:22", "rows.jsonl:23"], "dropped": False}
    assert counts_of(found)["rows_used"] == 23
    assert [text for text in cautions if text.startswith("3 training rows say the same as an earlier one")]


def test_duplicates_are_dropped(place):
    place.write("rows.jsonl", [*ROWS, ROWS[3]])
    place.write("more.jsonl", [ROWS[0], talk("new", "row")])
    found, cautions = prepare(place, NONE_HELD_OUT, "data.duplicates=drop", train="[rows.jsonl, more.jsonl]")
    assert origins_of(found) == [f"rows.jsonl:{line}" for line in range(1, 21)] + ["more.jsonl:2"]
    assert reasons_of(found) == {("train", "same as an earlier row"): 1}  # one for each source
    assert counts_of(found)["rows_left_out"] == 2 and found.ledger()["duplicates"]["rows"] == 2
    assert not cautions


def test_other_words_with_the_same_tokens_are_duplicates(place):
    place.write("rows.jsonl", [*ROWS, *[talk("long", "x" * 300 + end) for end in "abc"]])
    options = (NONE_HELD_OUT, "data.too_long=cut_end")
    kept = place.prepare(*options)
    assert kept.ledger()["duplicates"] == {"rows": 0, "examples": 2, "origins": [], "dropped": False}
    assert counts_of(kept)["rows_used"] == 23
    dropped = place.prepare(*options, "data.duplicates=drop", train="[{source: rows.jsonl, weight: 2}]")
    assert counts_of(dropped)["rows_used"] == 42 and counts_of(dropped)["rows_dropped"] == 4
    assert reasons_of(dropped)["train", "same tokens as an earlier row"] == 4


def test_copies_by_weight_are_no_duplicates(place):
    found, cautions = prepare(place, NONE_HELD_OUT, train="[{source: rows.jsonl, weight: 2.5}]")
    assert found.ledger()["duplicates"] == {"rows": 0, "examples": 0, "origins": [], "dropped": False}
    assert counts_of(found)["rows_used"] == 50 and not cautions


# ---- overlap ---------------------------------------------------------------------------


@pytest.fixture
def leaking(place):
    """Held-out rows of their own, one of which training nearly repeats."""
    place.write("held.jsonl", [talk("what", WORDS), talk("unseen", "row")])
    place.write("rows.jsonl", [*ROWS, talk("say", WORDS + " and more"), ROWS[0]])
    return place


def test_overlap_with_held_out_rows_is_counted(leaking):
    found, cautions = prepare(leaking, "data.held_out=held.jsonl", "data.max_tokens=400")
    [overlap] = found.ledger()["overlap"]
    assert (overlap["against"], overlap["items"], overlap["rows"], overlap["over_threshold"]) == ("held_out", 2, 1, 1)
    assert overlap["examples"] == [{"item": "held.jsonl:1", "row": "rows.jsonl:21", "share": 1.0}]
    assert counts_of(found)["rows_used"] == 22
    assert "1 training rows overlap 1 of 2 items of held out, e.g. rows.jsonl:21 and held.jsonl:1: kept" in cautions[-1]


def test_overlapping_rows_are_dropped_the_training_row_not_the_item(leaking):
    found = leaking.prepare("data.held_out=held.jsonl", "data.max_tokens=400", "data.overlap=drop")
    assert "rows.jsonl:21" not in origins_of(found) and counts_of(found)["rows_used"] == 21
    assert origins_of(found, "held_out") == ["held.jsonl:1", "held.jsonl:2"]
    assert reasons_of(found)["train", "overlaps held out"] == 1
    [row] = overlap.rows(found.ledger()["overlap"])  # what was found, and what became of it
    assert row[4:] == ("1 of 1", "1, left out", "held.jsonl:1 in rows.jsonl:21")


def test_overlap_with_the_items_of_the_evaluation(place):
    suite = suite_with_items(place, [talk("question 3", "answer 3!!!"), talk("what", WORDS), talk("new", "item")])
    recipe, found, _ = place.find(NONE_HELD_OUT, suite)
    assert found.overlap(recipe) is None
    found, cautions = prepare(place, NONE_HELD_OUT, suite)
    [overlap] = found.overlap(recipe)
    assert (overlap["against"], overlap["items"], overlap["same_question_and_answer"]) == ("ask", 3, 1)
    assert overlap["rows"] == 1 and overlap["examples"][0]["row"] == "rows.jsonl:4"
    assert found.ledger()["overlap"] == []  # nothing of the evaluation is in what training depends on
    assert "of 3 items of ask" in cautions[-1]


def test_another_suite_is_counted_without_rendering_again(place, monkeypatch):
    place.prepare(NONE_HELD_OUT)
    suite = suite_with_items(place, [talk("question 3", "answer 3!!!")])
    recipe, found, base = place.find(NONE_HELD_OUT, suite)
    assert found.exists and found.overlap(recipe) is None
    monkeypatch.setattr(data.chat, "encode", lambda *_, **__: pytest.fail("rendered again"))
    data.prepare(recipe, found, base)
    assert found.overlap(recipe)[0]["same_question_and_answer"] == 1
    # An item that changed is another count; with rows dropped by the items it is other data.
    place.write("eval/tasks/ask/items.jsonl", [talk("new", "item")])
    assert found.overlap(recipe) is None


def test_rows_that_the_evaluation_asks_are_dropped_and_other_items_are_other_data(place):
    suite = suite_with_items(place, [talk("question 3", "answer 3!!!")])
    options = (NONE_HELD_OUT, suite, "data.overlap=drop")
    found = place.prepare(*options)
    assert "rows.jsonl:4" not in origins_of(found) and reasons_of(found) == {("train", "overlaps ask"): 1}
    place.write("eval/tasks/ask/items.jsonl", [talk("new", "item")])
    assert place.find(*options)[1].key != found.key


def test_items_that_cannot_be_read_are_told_and_stop_only_what_needs_them(place):
    suite = suite_with_items(place, [talk("a", "b")])
    (place.folder / "eval/tasks/ask/items.jsonl").unlink()
    found, cautions = prepare(place, NONE_HELD_OUT, suite)
    assert counts_of(found)["rows_used"] == 20
    assert [text for text in cautions if text.startswith("overlap with the items of suite mine is not counted")]
    with pytest.raises(DataError, match="items.jsonl"):
        place.prepare(NONE_HELD_OUT, suite, "data.overlap=drop")


def test_the_ledger_is_json_with_nothing_of_this_machine(place):
    found = place.prepare()
    assert str(place.folder) not in json.dumps(found.ledger())
