"""Token files: the examples of a split, one after another, and where each begins.

``<split>.tokens.npy`` int32, ``<split>.mask.npy`` uint8 (1 = trained on),
``<split>.offsets.npy`` int64 of length rows + 1, ``<split>.origins.json``. Written as the
examples come, memory-mapped when read: data may be larger than memory. The order of
training is here too: it is a function of (seed, epoch) and of nothing else.

Shape suffixes: T tokens of an example, B rows of a batch. Torch only inside `batch_of`.
Reads and writes the folder it is given.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy

from lora_kit.errors import RefusedError
from lora_kit.types import Batch, Example

IGNORED = -100
"""Label of a token that is not trained on (torch's cross_entropy default)."""


def write_examples(folder: Path, split: str, examples: Iterable[Example]) -> int:
    """Write ``examples`` in order; returns how many."""
    with ExampleWriter(folder, split) as writer:
        for example in examples:
            writer.append(example)
    return len(writer.offsets) - 1


class ExampleWriter:
    """Writes the files of one split as the examples come; use as a context. Eight bytes a row stay in memory.

    The files are those that ``numpy.save`` would write of the whole arrays, byte for byte: a header has room for
    any length, so it is written once as a place holder and once more, with the length, at the end.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = folder, split
        self.offsets = array("q", [0])

    def __enter__(self) -> ExampleWriter:
        self._tokens = open(self.folder / f"{self.split}.tokens.npy", "wb")  # noqa: SIM115 - closed in __exit__
        self._mask = open(self.folder / f"{self.split}.mask.npy", "wb")  # noqa: SIM115
        self._origins = open(self.folder / f"{self.split}.origins.json", "w", encoding="utf-8")  # noqa: SIM115
        _write_header(self._tokens, numpy.int32, 0)
        _write_header(self._mask, numpy.uint8, 0)
        self._origins.write("[")
        return self

    def append(self, example: Example) -> None:
        """Write one example behind the others."""
        self._tokens.write(numpy.ascontiguousarray(example.tokens_T, numpy.int32).data)
        self._mask.write(numpy.ascontiguousarray(example.loss_mask_T, numpy.uint8).data)
        self._origins.write((", " if len(self.offsets) > 1 else "") + json.dumps(example.origin))
        self.offsets.append(self.offsets[-1] + len(example.tokens_T))

    def __exit__(self, *_: object) -> None:
        with self._tokens, self._mask, self._origins:
            _write_header(self._tokens, numpy.int32, self.offsets[-1])
            _write_header(self._mask, numpy.uint8, self.offsets[-1])
            self._origins.write("]")
        numpy.save(self.folder / f"{self.split}.offsets.npy", numpy.array(self.offsets, numpy.int64))


def _write_header(file: BinaryIO, dtype: type, length: int) -> None:
    """The .npy header of an array (length,) at the start of ``file``, as long as that of any other length."""
    file.seek(0)
    described = numpy.lib.format.header_data_from_array_1_0(numpy.zeros(0, dtype))
    numpy.lib.format.write_array_header_1_0(file, {**described, "shape": (length,)})


class ExampleFile(Sequence):
    """Read-only sequence of Examples over the files of one split."""

    def __init__(self, folder: Path, split: str) -> None:
        try:
            self.offsets = numpy.load(folder / f"{split}.offsets.npy", allow_pickle=False)
            self.origins: list[str] = json.loads((folder / f"{split}.origins.json").read_text(encoding="utf-8"))
            mode = "r" if self.offsets[-1] else None  # a file without tokens cannot be mapped
            self.tokens = numpy.load(folder / f"{split}.tokens.npy", mmap_mode=mode, allow_pickle=False)
            self.mask = numpy.load(folder / f"{split}.mask.npy", mmap_mode=mode, allow_pickle=False)
            if len(self.origins) != len(self) or not self.offsets[-1] == len(self.tokens) == len(self.mask):
                raise ValueError("they do not fit each other")
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise RefusedError(str(folder), f"the {split} token files are not whole ({error})",
                               "remove that folder and run again") from None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Example:
        if not 0 <= row < len(self):
            raise IndexError(row)
        low, high = self.offsets[row], self.offsets[row + 1]
        return Example(tokens_T=self.tokens[low:high], loss_mask_T=self.mask[low:high], origin=self.origins[row])

    def num_trained(self, row: int) -> int:
        """Tokens of ``row`` that enter the loss: its mask, without the first token, which nothing predicts."""
        low, high = self.offsets[row], self.offsets[row + 1]
        return int(self.mask[low + 1:high].sum())

    def length(self, row: int) -> int:
        """Tokens of ``row``."""
        return int(self.offsets[row + 1] - self.offsets[row])


def read_examples(folder: Path, split: str) -> ExampleFile:
    """The examples of ``split`` (``train`` or ``held_out``) in ``folder``."""
    return ExampleFile(folder, split)


def order_of_epoch(num_rows: int, seed: int, epoch: int) -> numpy.ndarray:
    """Row numbers (num_rows,) in the order of ``epoch``: numpy's PCG64 seeded with [seed, epoch]."""
    return numpy.random.default_rng([seed, epoch]).permutation(num_rows)


def stream_of_batches(num_rows: int, batch_size: int, seed: int, first_step: int) -> Iterator[list[int]]:
    """Row numbers of one batch after another, without end, from ``first_step`` on.

    The epochs are laid end to end and cut into batches, so that no batch is short.
    """
    position, epoch, order = first_step * batch_size, -1, None
    while True:
        rows = []
        while len(rows) < batch_size:
            if position // num_rows != epoch:
                epoch = position // num_rows
                order = order_of_epoch(num_rows, seed, epoch)
            rows.append(int(order[position % num_rows]))
            position += 1
        yield rows


def batch_of(examples: Sequence[Example], pad_id: int, device) -> Batch:
    """Right-padded tensors of ``examples``: tokens_BT, labels_BT and attention_mask_BT, all int64 on ``device``."""
    import torch

    longest = max(len(example.tokens_T) for example in examples)
    shape = (len(examples), longest)
    tokens_BT = numpy.full(shape, pad_id, numpy.int64)
    labels_BT = numpy.full(shape, IGNORED, numpy.int64)
    mask_BT = numpy.zeros(shape, numpy.int64)
    for row, example in enumerate(examples):
        length = len(example.tokens_T)
        tokens_BT[row, :length] = example.tokens_T
        labels_BT[row, :length] = numpy.where(example.loss_mask_T == 1, example.tokens_T, IGNORED)
        mask_BT[row, :length] = 1
    return Batch(
        tokens_BT=torch.from_numpy(tokens_BT).to(device), labels_BT=torch.from_numpy(labels_BT).to(device),
        attention_mask_BT=torch.from_numpy(mask_BT).to(device),
        num_trained_tokens=int((labels_BT[:, 1:] != IGNORED).sum()), num_tokens=int(mask_BT.sum()),
    )
