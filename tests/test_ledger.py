"""The ledger balances or fails, and the recount from the token files holds it to what lies there."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from lora_kit import ledger
from lora_kit.errors import InternalError, RefusedError
from lora_kit.ledger import Ledger, check_recount, lengths_of, padded_tokens, recount
from lora_kit.tokens import write_examples
from lora_kit.types import Example


def example(mask, origin="rows.jsonl:1") -> Example:
    return Example(tokens_T=np.arange(len(mask), dtype=np.int32), loss_mask_T=np.array(mask, np.uint8), origin=origin)


ROWS = [example([0, 1, 1, 0]), example([1, 1]), example([0, 0, 1])]


@pytest.fixture
def written(tmp_path):
    """Token files of three rows to train on and one held out, and the ledger's JSON that fits them."""
    write_examples(tmp_path, "train", ROWS)
    write_examples(tmp_path, "held_out", ROWS[:1])
    book = Ledger()
    book.count("train", "a.jsonl", rows_in=3, rows_used=3, tokens_in=9, tokens_trained=4, tokens_context=5)
    book.count("held_out", "a.jsonl", rows_in=1, rows_used=1, tokens_in=4, tokens_trained=2, tokens_context=2)
    book.check_balance()
    return tmp_path, book.as_dict()


# ---- the balance -----------------------------------------------------------------------


def test_rows_and_tokens_are_summed_by_source_and_split():
    book = Ledger()
    book.count("train", "a", rows_in=2, rows_used=1, tokens_in=9, tokens_trained=4, tokens_context=5)
    book.drop("train", "a", "too long", "a:2", 7)
    book.count("train", "a", tokens_in=7)
    book.count("train", "b", rows_in=5)
    book.leave_out("train", "b", "over the limit", ["b:1", "b:2", "b:3"], 5)
    book.leave_out("train", "b", "nothing", [], 0)
    book.check_balance()
    found = book.as_dict()
    assert found["splits"]["train"]["rows_in"] == 7 and found["splits"]["train"]["tokens_dropped"] == 7
    assert [(item["source"], item["rows_in"]) for item in found["sources"]] == [("a", 2), ("b", 5)]
    assert found["reasons"] == [
        {"split": "train", "source": "a", "reason": "too long", "rows": 1, "tokens": 7, "examples": ["a:2"]},
        {"split": "train", "source": "b", "reason": "over the limit", "rows": 5, "tokens": 0,
         "examples": ["b:1", "b:2", "b:3"]}]
    assert book.reasons_text("train") == "5 over the limit, 1 too long" and book.reasons_text("held_out") == ""


def test_a_reason_names_the_first_three_rows_only():
    book = Ledger()
    for number in range(1000):
        book.note("train", "a", "r", [f"a:{number}"])
    assert book.as_dict()["reasons"][0] == {
        "split": "train", "source": "a", "reason": "r", "rows": 1000, "tokens": 0, "examples": ["a:0", "a:1", "a:2"]}


@pytest.mark.parametrize("numbers", [
    {"rows_in": 2, "rows_used": 1}, {"rows_in": 1, "rows_used": 1, "tokens_in": 5, "tokens_trained": 4},
    {"rows_in": 1, "rows_used": 2, "rows_dropped": -1},
])
def test_what_does_not_balance_fails_by_source(numbers):
    book = Ledger()
    book.count("train", "a", **numbers)
    # Another source that errs the other way round does not make it good.
    book.count("train", "b", **{name: -number for name, number in numbers.items()})
    with pytest.raises(InternalError, match="data: a: the ledger of the train rows does not balance"):
        book.check_balance()


# ---- the recount -----------------------------------------------------------------------


def test_the_recount_agrees_with_the_files(written):
    folder, book = written
    assert recount(folder, "train", [2]) == {
        "rows_used": 3, "tokens_trained": 4, "tokens_context": 5, "rows_without_trained": 0, "stops_trained": 2}
    check_recount(folder, book)


@pytest.mark.parametrize("at_once", [1, 7, 20, 10**6])
def test_the_recount_goes_over_the_rows_in_stretches(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(ledger, "_TOKENS_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    rows = [example([0, 1, *rng.integers(0, 2, rng.integers(0, 9))]) for _ in range(23)]
    write_examples(tmp_path, "train", rows)
    trained = sum(int(row.loss_mask_T[1:].sum()) for row in rows)
    stops = sum(int(row.loss_mask_T[token]) for row in rows for token in (3, 5) if token < len(row.tokens_T))
    assert recount(tmp_path, "train", [3, 5]) == {
        "rows_used": 23, "tokens_trained": trained, "rows_without_trained": 0, "stops_trained": stops,
        "tokens_context": sum(len(row.tokens_T) for row in rows) - trained}


def test_a_split_without_rows_is_counted(tmp_path):
    write_examples(tmp_path, "held_out", [])
    assert set(recount(tmp_path, "held_out").values()) == {0}


def rewritten(folder, rows) -> None:
    write_examples(folder, "train", rows)


@pytest.mark.parametrize(("rows", "told"), [
    (ROWS[:2], "hold 2 rows used by recount, the ledger says 3"),
    ([ROWS[0], ROWS[1], example([0, 1, 1])], "hold 5 tokens trained by recount, the ledger says 4"),
    ([ROWS[0], ROWS[1], example([0, 0, 1, 0])], "hold 6 tokens context by recount, the ledger says 5"),
    ([example([0, 1, 1, 0, 1]), ROWS[1], example([0, 0])], "1 rows have no trained token"),
])
def test_files_that_are_not_what_the_ledger_says_are_refused(written, rows, told):
    folder, book = written
    rewritten(folder, rows)
    with pytest.raises(RefusedError) as caught:
        check_recount(folder, book)
    assert told in str(caught.value) and str(caught.value).endswith("remove that folder and run again")


@pytest.mark.parametrize("name", ["tokens", "mask", "offsets"])
def test_a_silent_cut_is_caught(written, name):
    folder, book = written
    path = folder / f"train.{name}.npy"
    np.save(path, np.load(path)[:-1])
    with pytest.raises(RefusedError, match=r"train\.\*: (the token files are not whole|hold 2 rows)"):
        check_recount(folder, book)


@pytest.mark.parametrize(("turns", "told"), [(2, None), (3, "train 2 stop tokens by recount, the ledger says 3 turns")])
def test_a_turn_whose_stop_token_is_not_trained_is_refused(written, turns, told):
    folder, book = written
    book["stop_ids"] = [2]  # trained in two of the three rows
    book["splits"]["train"]["turns_trained"] = turns
    if told is None:
        check_recount(folder, book)
        return
    with pytest.raises(RefusedError, match=told):
        check_recount(folder, book)


def batch_of_rows(**changes):
    from lora_kit.tokens import batch_of

    return dataclasses.replace(batch_of(ROWS, 0, "cpu"), **changes)


def test_a_batch_is_counted_from_its_tensors(written):
    import torch

    batch = batch_of_rows()
    counts = {"num_trained": 4, "num_tokens": 9, "origins": ["a:1", "a:2"]}
    ledger.check_batch(batch, **counts)
    lost = batch.labels_BT.clone()
    lost[0, 2] = -100
    hidden = batch.attention_mask_BT.clone()
    hidden[1, 0] = 0
    for planted, told in (({"labels_BT": lost}, "3 trained tokens of 9"),
                          ({"attention_mask_BT": hidden}, "4 trained tokens of 8"),
                          ({"attention_mask_BT": torch.ones_like(hidden)}, "4 trained tokens of 12")):
        with pytest.raises(InternalError, match=f"batch of a:1, a:2: holds {told} by recount, its rows in the token "
                                                "files 4 of 9; report it as a bug"):
            ledger.check_batch(batch_of_rows(**planted), **counts)


def test_a_mask_that_is_none_is_refused(written):
    folder, _ = written
    mask = np.load(folder / "train.mask.npy")
    mask[1] = 7
    np.save(folder / "train.mask.npy", mask)
    with pytest.raises(RefusedError, match="more than 0 and 1"):
        recount(folder, "train")


def test_padding_fills_rows_up_to_the_longest_of_their_micro_batch():
    assert padded_tokens([3, 5, 2, 7], [[0, 1], [2, 3], [], [1]]) == 2 + 5
    assert padded_tokens([4, 4], [[0, 1]]) == 0


# ---- lengths and tables ----------------------------------------------------------------


@pytest.mark.parametrize("longest", [1, 15, 16, 17, 100, 385, 1024, 12_345])
def test_every_length_has_its_bar(longest):
    rng = np.random.default_rng(longest)
    lengths = np.append(rng.integers(1, longest + 1, 50), longest)
    found = lengths_of({"train": np.append(0, lengths.cumsum()), "held_out": np.array([0, longest])})
    bars = found["histogram"]
    assert sum(bars["train"]) == 51 and sum(bars["held_out"]) == 1
    assert len(bars["edges"]) == len(bars["train"]) + 1 <= 18
    for low, high, count in zip(bars["edges"], bars["edges"][1:], bars["train"], strict=False):
        assert count == ((lengths >= low) & (lengths < high)).sum()
    assert found["lengths"]["max"] == longest


def test_tables_leave_out_what_is_zero_everywhere(written):
    _, book = written
    assert ledger.split_rows(book) == [
        ("rows in", "3", "1"), ("rows used", "3", "1"), ("tokens in", "9", "4"), ("tokens trained", "4", "2"),
        ("tokens context", "5", "2")]
    assert ledger.source_rows(book)[0] == ("train", "a.jsonl", "3", "3", "9", "4", "5", "0", "0")
    json.dumps(book)


def test_a_bar_is_as_long_as_its_share():
    rows = ledger.histogram_rows({"histogram": {"edges": [0, 8, 16, 24], "train": [10, 1, 0], "held_out": [10, 0, 0]}},
                                 width=10)
    assert rows == [("0 to 7", "10", "10", "█" * 10), ("8 to 15", "1", "0", "█"), ("16 to 23", "0", "0", "")]


def test_duplicates_in_words():
    none = {"duplicates": {"rows": 0, "examples": 0, "origins": [], "dropped": False}}
    assert ledger.duplicate_text(none).startswith("No training row says the same")
    some = {"duplicates": {"rows": 2, "examples": 1, "origins": ["a:3", "a:9"], "dropped": True}}
    assert ledger.duplicate_text(some) == (
        "2 training rows say the same as an earlier one, 1 more have the same tokens as one; left out (the first: a:3, "
        "a:9).")
