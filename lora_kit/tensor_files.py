"""The safetensors files of a model folder: listed by their headers, read in row blocks, written as a stream.

Nothing here holds a whole tensor: what is read is a view of the file that the system pages in and out, and what is
written goes to the file as it comes. The safetensors package reads; it has no writer that takes a tensor in pieces, so
the format is written here (8 bytes of length, a JSON header, then the values; github.com/huggingface/safetensors).

Reads and writes ``*.safetensors`` and ``model.safetensors.index.json``.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.errors import ModelError, RefusedError

INDEX = "model.safetensors.index.json"
TYPES = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64", "F16": "float16",
         "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""safetensors' names of the types that are read here -> torch's."""
FLOATS = ("F16", "BF16", "F32", "F64")
BLOCK_ELEMENTS = 4 * 1024 * 1024
"""Elements of one block: 16 MB in fp32."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor in a file, known from the file's header alone. ``kind`` is safetensors' name of its type."""

    name: str
    file: Path
    shape: tuple[int, ...]
    kind: str

    @property
    def num_elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def list_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the ``*.safetensors`` files in ``folder``, in the order of files and names.

    Raises:
        RefusedError: a file is cut off or broken, or a name stands in two files.
        ModelError: the index names a file that is not there.
    """
    found: dict[str, Stored] = {}
    paths = sorted(folder.glob("*.safetensors"))
    index = folder / INDEX
    if index.exists():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RefusedError(str(index), "is not a safetensors index", "fetch the model again") from None
        gone = named - {path.name for path in paths}
        if gone:
            raise ModelError(str(folder), f"lacks {min(gone)}, which its index names", "fetch the model again")
        paths = [path for path in paths if path.name in named]
    for path in paths:
        for stored in list_file(path):
            if stored.name in found:
                raise RefusedError(str(path), f"holds {stored.name}, as {found[stored.name].file.name} does",
                                   "fetch the model again")
            found[stored.name] = stored
    return found


def list_file(path: Path) -> list[Stored]:
    """The tensors of one file."""
    with _opened(path) as file:
        return [Stored(name=name, file=path, shape=tuple(file.get_slice(name).get_shape()),
                       kind=file.get_slice(name).get_dtype()) for name in file.keys()]  # noqa: SIM118 - no __iter__


@contextmanager
def _opened(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise RefusedError(str(path), f"is not whole ({' '.join(str(error).split())[:200]})",
                           "fetch the model again") from None
    with file:
        yield file


class Reader:
    """Row blocks of stored tensors; keeps the last file open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: Any = None
        self._closing: Any = None

    def rows(self, stored: Stored, first: int = 0, last: int | None = None):
        """Rows ``first`` to ``last`` of a tensor, as stored; a tensor without rows whole."""
        if stored.file != self._path:
            self.close()
            self._closing = _opened(stored.file)
            self._file, self._path = self._closing.__enter__(), stored.file
        if not stored.shape:
            return self._file.get_tensor(stored.name)
        return self._file.get_slice(stored.name)[first:stored.shape[0] if last is None else last]

    def whole(self, stored: Stored):
        """The whole tensor, as stored."""
        return self.rows(stored)

    def close(self) -> None:
        if self._closing is not None:
            self._closing.__exit__(None, None, None)
        self._path = self._file = self._closing = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def blocks(shape: Sequence[int], most: int = BLOCK_ELEMENTS) -> Iterator[tuple[int, int]]:
    """(first, last) of row blocks of at most ``most`` elements, of at least one row each."""
    if not shape:
        yield 0, 1
        return
    width = 1
    for size in shape[1:]:
        width *= size
    step = max(1, most // max(1, width))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    kind: str


def write_file(path: Path, entries: Sequence[Entry], pieces) -> str:
    """Write a safetensors file whose values come piece by piece; returns the SHA-256 of what was written.

    Args:
        entries: in any order; in the file the widest types come first, so that every value stands at a multiple of its
            size.
        pieces: called with an entry: the tensor in pieces, row block after row block, in the entry's type.

    Raises:
        OSError: it cannot be written.
        AssertionError: the pieces of a tensor are not of its size.
    """
    import torch

    def width(entry: Entry) -> int:
        return getattr(torch, TYPES[entry.kind]).itemsize

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered, offset = sorted(entries, key=lambda entry: (-width(entry), entry.name)), 0
    for entry in ordered:
        size = width(entry)
        for length in entry.shape:
            size *= length
        header[entry.name] = {"dtype": entry.kind, "shape": list(entry.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        def write(data) -> None:
            digest.update(data)
            file.write(data)

        write(struct.pack("<Q", len(text)) + text)
        for entry in ordered:
            begun = file.tell()
            for piece in pieces(entry):
                assert piece.dtype == getattr(torch, TYPES[entry.kind]), entry.name
                flat = piece.detach().contiguous().reshape(-1)
                if flat.numel():
                    write(memoryview(flat.view(torch.uint8).numpy()))
            first, last = header[entry.name]["data_offsets"]
            assert file.tell() - begun == last - first, f"{entry.name}: {file.tell() - begun} bytes, not {last - first}"
    return digest.hexdigest()


def write_index(folder: Path, file_of: dict[str, str], total_bytes: int) -> None:
    """The index of a folder with several files, as transformers reads it."""
    (folder / INDEX).write_text(json.dumps(
        {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(file_of.items()))}, indent=2) + "\n")
