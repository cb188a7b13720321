"""Token files: what is written is read, in an order that is a function of seed and epoch."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from lora_kit.errors import RefusedError
from lora_kit.tokens import IGNORED, batch_of, order_of_epoch, read_examples, stream_of_batches, write_examples
from lora_kit.types import Example


def example(tokens, mask, origin="rows.jsonl:1") -> Example:
    return Example(tokens_T=np.array(tokens, np.int32), loss_mask_T=np.array(mask, np.uint8), origin=origin)


ROWS = [example([5, 6, 7], [0, 1, 1], "a:1"), example([9], [1], "a:2"), example([2, 2, 2, 2], [1, 0, 0, 1], "ü:3")]


# ---- files -----------------------------------------------------------------------------


def test_examples_come_back_as_they_were_written(tmp_path):
    assert write_examples(tmp_path, "train", iter(ROWS)) == 3
    read = read_examples(tmp_path, "train")
    assert len(read) == 3 and [row.origin for row in read] == ["a:1", "a:2", "ü:3"]
    for written, again in zip(ROWS, read, strict=True):
        assert again.tokens_T.tolist() == written.tokens_T.tolist() and again.tokens_T.dtype == np.int32
        assert again.loss_mask_T.tolist() == written.loss_mask_T.tolist() and again.loss_mask_T.dtype == np.uint8
    assert [read.length(row) for row in range(3)] == [3, 1, 4]


@pytest.mark.parametrize("num_rows", [0, 1, 3, 5000])
def test_the_files_are_those_that_numpy_saves_whole(tmp_path, num_rows):
    rng = np.random.default_rng(num_rows)
    rows = [example(rng.integers(0, 9, n), rng.integers(0, 2, n), f"ü:{n}") for n in rng.integers(1, 99, num_rows)]
    write_examples(tmp_path, "train", rows)
    for name, dtype, arrays in (("tokens", np.int32, [row.tokens_T for row in rows]),
                                ("mask", np.uint8, [row.loss_mask_T for row in rows])):
        np.save(tmp_path / "whole.npy", np.concatenate([np.zeros(0, dtype), *arrays]))
        assert (tmp_path / f"train.{name}.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    assert (tmp_path / "train.origins.json").read_text() == json.dumps([row.origin for row in rows])


def test_the_first_token_is_never_in_the_loss(tmp_path):
    write_examples(tmp_path, "train", ROWS)
    read = read_examples(tmp_path, "train")
    assert [read.num_trained(row) for row in range(3)] == [2, 0, 1]


def test_a_split_without_rows_is_a_split(tmp_path):
    assert write_examples(tmp_path, "held_out", []) == 0
    assert len(read_examples(tmp_path, "held_out")) == 0
    with pytest.raises(IndexError):
        read_examples(tmp_path, "held_out")[0]


def test_splits_lie_side_by_side(tmp_path):
    write_examples(tmp_path, "train", ROWS)
    write_examples(tmp_path, "held_out", ROWS[:1])
    assert (len(read_examples(tmp_path, "train")), len(read_examples(tmp_path, "held_out"))) == (3, 1)


@pytest.mark.parametrize("name", ["tokens.npy", "mask.npy", "offsets.npy", "origins.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "of other rows"])
def test_files_that_are_not_whole_are_refused(tmp_path, name, damage):
    write_examples(tmp_path, "train", ROWS)
    path = tmp_path / f"train.{name}"
    if damage == "missing":
        path.unlink()
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut off":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        write_examples(tmp_path, "other", [*ROWS, example([1, 2], [0, 1])])
        (tmp_path / f"other.{name}").rename(path)
    with pytest.raises(RefusedError, match="the train token files are not whole .*; remove that folder and run again"):
        read_examples(tmp_path, "train")


def test_a_pickle_in_a_token_file_is_not_opened(tmp_path):
    write_examples(tmp_path, "train", ROWS)
    np.save(tmp_path / "train.offsets.npy", np.array([print], dtype=object), allow_pickle=True)
    with pytest.raises(RefusedError, match="allow_pickle=False"):
        read_examples(tmp_path, "train")


# ---- order -----------------------------------------------------------------------------


def test_the_order_is_a_function_of_seed_and_epoch():
    assert order_of_epoch(50, 3, 1).tolist() == order_of_epoch(50, 3, 1).tolist()
    assert sorted(order_of_epoch(50, 3, 1).tolist()) == list(range(50))
    orders = {tuple(order_of_epoch(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_the_order_does_not_change_between_versions():
    # numpy promises PCG64's stream; a change here would break every run that is to go on.
    assert order_of_epoch(8, 0, 0).tolist() == [2, 4, 3, 6, 5, 0, 1, 7]


def test_every_row_comes_once_an_epoch_and_no_batch_is_short():
    batches = list(itertools.islice(stream_of_batches(10, 4, 1, 0), 10))
    assert {len(batch) for batch in batches} == {4}
    rows = [row for batch in batches for row in batch]
    for epoch in range(4):
        assert rows[10 * epoch:10 * epoch + 10] == order_of_epoch(10, 1, epoch).tolist()


@pytest.mark.parametrize("step", [0, 1, 2, 3, 7, 24])
def test_a_stream_taken_up_at_a_step_goes_on_as_if_never_left(step):
    whole = list(itertools.islice(stream_of_batches(10, 4, 1, 0), 30))
    assert list(itertools.islice(stream_of_batches(10, 4, 1, step), 30 - step)) == whole[step:]


def test_a_batch_may_be_larger_than_the_data():
    first = next(stream_of_batches(3, 8, 0, 0))
    assert len(first) == 8 and sorted(first[:3]) == sorted(first[3:6]) == [0, 1, 2]


# ---- batches ---------------------------------------------------------------------------


def test_a_batch_is_padded_by_length_also_when_the_pad_id_is_a_real_token():
    batch = batch_of([ROWS[0], ROWS[2]], pad_id=2, device="cpu")
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 2], [2, 2, 2, 2]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.labels_BT.tolist() == [[IGNORED, 6, 7, IGNORED], [2, IGNORED, IGNORED, 2]]
    assert (batch.num_tokens, batch.num_trained_tokens) == (7, 3)


def test_a_batch_counts_what_the_files_count(tmp_path):
    write_examples(tmp_path, "train", ROWS)
    read = read_examples(tmp_path, "train")
    batch = batch_of(list(read), 0, "cpu")
    assert batch.num_trained_tokens == sum(read.num_trained(row) for row in range(3))
    assert batch.num_tokens == sum(read.length(row) for row in range(3))
