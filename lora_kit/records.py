"""Rows of a data file, one by one, each with where it stands.

Every reader gives ``(origin, row)`` with row a dict. The origin is ``file:line`` where
rows have lines (JSON lines, CSV) and ``file#key`` where they have not: the key of an object of
objects, else the row's number, from 0. JSON lines are streamed; JSON is read whole; CSV,
Parquet and hub datasets go through the ``datasets`` library and its cache.

Torch-free (``datasets`` imports no torch either, and is imported only when needed).
Reads the file; writes only ``datasets``' cache.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_kit.errors import DataError, LoraKitError, MachineError

Rows = Iterator[tuple[str, dict[str, Any]]]

_ENDINGS = ".jsonl, .ndjson, .json (each also with .gz), .csv or .parquet"
_FETCH_AGAIN = "fetch or write the file again"


def read_records(path: Path, shown: str, *, cache_dir: Path | None = None) -> Rows:
    """The rows of the file ``path``, in its order, as (origin, row).

    Args:
        path: a .jsonl, .ndjson or .json file (plain or .gz), a .csv or a .parquet file. JSON
            may be a list of objects, an object of objects, ``{"data": [...]}`` or one object to a line.
            In CSV every value is a string, as it stands in the file.
        shown: what errors and origins call the file.
        cache_dir: folder of ``datasets``' cache, for .csv and .parquet. Default: its own.

    Raises:
        DataError: missing, empty, unreadable or broken; on the call, or at the broken row.
        MachineError: the cache cannot be written.
    """
    _check_file(path, shown)
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    if plain.endswith((".jsonl", ".ndjson")):
        rows = _json_lines(path, shown)
    elif plain.endswith(".json"):
        rows = _json_lines(path, shown) if _has_json_lines(path, shown) else _json(path, shown)
    elif name.endswith(".csv"):
        rows = _csv(path, shown, cache_dir)
    elif name.endswith(".parquet"):
        rows = _parquet(path, shown, cache_dir)
    else:
        ending = path.suffix or "no ending"
        raise DataError(shown, f"is not a kind of data file that is read ({ending})", f"turn it into {_ENDINGS}")
    return _at_least_one(rows, shown)


def _check_file(path: Path, shown: str) -> None:
    try:
        if path.is_dir():
            raise DataError(shown, "is a folder", f"name a file in it: {_ENDINGS}")
        if not path.exists():
            raise DataError(shown, "no such file", "correct the path; it is relative to the recipe")
        if path.stat().st_size == 0:
            raise DataError(shown, "is empty (0 bytes)", _FETCH_AGAIN)
        with open(path, "rb"):
            pass
    except OSError as error:
        raise DataError(shown, f"cannot be read: {error.strerror}", "check its permissions") from None


def _at_least_one(rows: Rows, shown: str) -> Rows:
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(shown, "holds no rows", "name a file that has some")


# ---- JSON -------------------------------------------------------------------------------


def _lines(path: Path, shown: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a UTF-8 file, with its line end; a byte order mark is taken off."""
    number = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise DataError(
            f"{shown}:{number}", f"is not UTF-8 (byte 0x{bad:02x})", "save the file as UTF-8"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise DataError(f"{shown}:{number + 1}", "the compressed file is cut off or broken", _FETCH_AGAIN) from None
    except OSError as error:
        raise DataError(shown, f"cannot be read: {error.strerror or error}", _FETCH_AGAIN) from None


def _json_lines(path: Path, shown: str) -> Rows:
    for number, line in _lines(path, shown):
        if not line.strip():
            continue
        origin = f"{shown}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if _is_cut_off(error) and not line.endswith("\n"):
                raise DataError(
                    origin, "the file ends in the middle of this row", "fetch the file again, or delete the line"
                ) from None
            raise DataError(
                origin, f"is not valid JSON ({error.msg} at character {error.pos + 1})", "correct or delete the line"
            ) from None
        except (ValueError, RecursionError):
            raise DataError(origin, "is nested too deeply or has a number too long", "delete the line") from None
        yield origin, _object(row, origin)


def _has_json_lines(path: Path, shown: str) -> bool:
    """Whether a .json file has one object to a line: its first line is one and more follows."""
    lines = (line for _, line in _lines(path, shown) if line.strip())
    with contextlib.closing(lines):
        try:
            first = json.loads(next(lines, ""))
        except (ValueError, RecursionError):
            return False
        return isinstance(first, dict) and next(lines, None) is not None


def _json(path: Path, shown: str) -> Rows:
    text = "".join(line for _, line in _lines(path, shown))
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        origin = f"{shown}:{error.lineno}"
        if _is_cut_off(error):
            raise DataError(origin, "the file is cut off: its JSON has no end", _FETCH_AGAIN) from None
        raise DataError(
            origin, f"is not valid JSON ({error.msg} at column {error.colno})", "correct the file"
        ) from None
    except (ValueError, RecursionError):
        raise DataError(shown, "is nested too deeply or has a number too long", "correct the file") from None
    if isinstance(value, dict):
        if isinstance(value.get("data"), list):
            value = value["data"]
        elif not value or not all(isinstance(row, dict) for row in value.values()):
            value = [value] if value else []
    if not isinstance(value, (dict, list)):
        raise DataError(shown, f"holds {_kind(value)}, not rows", "make it a list of objects")
    for key, row in value.items() if isinstance(value, dict) else enumerate(value):
        origin = f"{shown}#{key}"
        yield origin, _object(row, origin)


def _is_cut_off(error: json.JSONDecodeError) -> bool:
    return error.msg.startswith("Unterminated string") or not error.doc[error.pos :].strip()


def _object(row: Any, origin: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(origin, f"is {_kind(row)}, not an object", "make every row an object with named keys")
    return row


def _kind(value: Any) -> str:
    kinds = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)


# ---- CSV and Parquet --------------------------------------------------------------------


def _csv(path: Path, shown: str, cache_dir: Path | None) -> Rows:
    columns, lines = _csv_shape(path, shown)
    if not lines:
        return
    from datasets import Features, Value

    # Strings throughout: by default "007" becomes 7 and the answer "None" becomes nothing.
    table = _load(
        shown, "csv", data_files=_literal(path), cache_dir=cache_dir, encoding="utf-8-sig",
        features=Features({column: Value("string") for column in columns}), na_filter=False,
    )
    origins = [f"{shown}:{line}" for line in lines]
    if len(table) != len(origins):  # a line of blanks that one reader counts and the other does not
        origins = [f"{shown}#{number}" for number in range(len(table))]
    yield from zip(origins, table, strict=True)


def _csv_shape(path: Path, shown: str) -> tuple[list[str], list[int]]:
    """Column names and the line on which each row starts.

    pandas, which ``datasets`` reads CSV with, takes a surplus first value for an index and shifts
    the columns in silence; so every row's width is checked here first.
    """
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 131,072 characters is short for a document
    text = (line for _, line in _lines(path, shown))
    reader = csv.reader(text, strict=True)
    columns: list[str] = []
    starts: list[int] = []
    line = 1
    try:
        for row in reader:
            if row and not columns:
                columns = row
                if len(set(columns)) < len(columns) or not all(column.strip() for column in columns):
                    raise DataError(f"{shown}:{line}", "two columns share a name, or one has none", "name each column")
            elif row and len(row) != len(columns):
                raise DataError(
                    f"{shown}:{line}", f"has {len(row)} values for {len(columns)} columns",
                    "correct the row; values with commas or line ends stand in double quotes",
                )
            elif row:
                starts.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        cut_off = "unexpected end of data" in str(error)
        what = "the file ends within quotes" if cut_off else f"is not valid CSV ({error})"
        raise DataError(f"{shown}:{line}", what, "close the quotes, or fetch the file again") from None
    return columns, starts


def _parquet(path: Path, shown: str, cache_dir: Path | None) -> Rows:
    import pyarrow.parquet

    try:
        num_rows = pyarrow.parquet.read_metadata(path).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(shown, f"cannot be read as parquet: {_reason(error)}", _FETCH_AGAIN) from error
    if num_rows:  # datasets fails on a file without rows
        yield from _numbered(_load(shown, "parquet", data_files=_literal(path), cache_dir=cache_dir), shown)


def _numbered(table: Any, origin: str) -> Rows:
    for number, row in enumerate(table):
        yield f"{origin}#{number}", row


def _literal(path: Path) -> str:
    """The path for ``data_files``, which reads brackets and stars as patterns."""
    return glob.escape(str(path.absolute()))


def _load(shown: str, kind: str, *, cache_dir: Path | None, **options: Any) -> Any:
    import datasets

    try:
        with _quiet():
            return datasets.load_dataset(
                kind, split="train", cache_dir=None if cache_dir is None else str(cache_dir), **options
            )
    except Exception as error:  # noqa: BLE001 - the library wraps what the parsers raise in many classes
        raise _machine_error(shown, error) or DataError(
            shown, f"cannot be read as {kind}: {_reason(error)}", _FETCH_AGAIN
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without ``datasets``' progress bars and log lines on local files: errors are told by us."""
    import datasets

    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, outermost first."""
    chain: list[BaseException] = []
    step: BaseException | None = error
    while step is not None and step not in chain:
        chain.append(step)
        step = step.__cause__ or (None if step.__suppress_context__ else step.__context__)
    return chain


def _reason(error: BaseException) -> str:
    """The first line of the innermost error's message."""
    lines = str(_chain(error)[-1]).strip().splitlines()
    return lines[0][:200] if lines else type(_chain(error)[-1]).__name__


def _machine_error(shown: str, error: BaseException) -> MachineError | None:
    """A MachineError where the disk or the cache folder is at fault, else None."""
    for step in _chain(error):
        if not isinstance(step, OSError):
            continue
        if step.errno in (errno.ENOSPC, errno.EDQUOT) or "Not enough disk space" in str(step):
            return MachineError(shown, "the disk of the dataset cache is full", "free space, or move the cache")
        if step.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            return MachineError(
                shown, f"the dataset cache cannot be written: {step.filename or step.strerror}",
                "make the folder writable, or move the cache",
            )
    return None


# ---- the hub ----------------------------------------------------------------------------


def read_hub_records(
    repo: str, revision: str | None = None, subset: str | None = None, split: str | None = None,
    cache_dir: Path | None = None,
) -> Rows:
    """The rows of the hub dataset ``repo`` (``org/name``), as (``hub:org/name/split#number``, row).

    Args:
        revision: commit, tag or branch. Default: main.
        subset: configuration, for datasets that have several.
        split: default train.
        cache_dir: folder of ``datasets``' cache. Default: its own.

    A token is taken from the environment (``HF_TOKEN``) by the hub's own client.

    Raises:
        DataError: there is no such dataset, revision, subset or split, it is gated, or it is broken.
        MachineError: the hub cannot be reached, or the cache cannot be written.
    """
    split = split or "train"
    shown = f"hub:{repo}" + (f"@{revision}" if revision else "")
    if os.path.isdir(repo):
        # load_dataset would take the folder in silence.
        raise DataError(shown, f"a local folder {repo} hides it", "run from another folder, or name a file in it")
    import datasets

    try:
        table = datasets.load_dataset(
            repo, name=subset, revision=revision, split=split,
            cache_dir=None if cache_dir is None else str(cache_dir),
        )
    except Exception as error:  # noqa: BLE001 - several libraries' errors, told apart in _hub_error
        raise _hub_error(shown, error) from error
    return _at_least_one(_numbered(table, f"hub:{repo}/{split}"), shown)


_UNREACHABLE = {
    "ConnectionError", "ConnectError", "TimeoutException", "OfflineModeIsEnabled", "LocalEntryNotFoundError",
}


def _hub_error(shown: str, error: Exception) -> LoraKitError:
    kinds = {kind.__name__ for step in _chain(error) for kind in type(step).__mro__}
    message = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
    if "GatedRepoError" in kinds or "gated dataset" in message:
        return DataError(
            shown, "is gated: its owner grants access to accounts",
            "ask for access on its page on the hub, then set HF_TOKEN to a token of that account",
        )
    if "RevisionNotFoundError" in kinds or message.startswith("Revision "):
        return DataError(shown, "the dataset has no such revision", "correct what follows the @")
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        return DataError(
            shown, "there is no such dataset on the hub, or it is private",
            "check the name; for a private one set HF_TOKEN",
        )
    if kinds & _UNREACHABLE:
        return MachineError(
            shown, "the hub cannot be reached and the dataset is not in the cache",
            "check the network and HF_HUB_OFFLINE, or use a local file",
        )
    machine = _machine_error(shown, error)
    if machine is not None:
        return machine
    lowered = message.lower()
    if "config name is missing" in lowered or "builderconfig" in lowered:
        return DataError(shown, message, "name one of them as subset:")
    if "split" in lowered:
        return DataError(shown, message, "name one of them as split:")
    return DataError(shown, f"cannot be loaded: {_reason(error)}", "check that it is a plain dataset (no script)")
