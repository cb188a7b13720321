"""Functions and their docstrings, from the standard library or any installed package.

No download: every Python has thousands of such pairs. Sources are parsed with ``ast`` and
never imported, so nothing of them runs. The question is the function without its
docstring, the answer the docstring. Standard library only; reads .py files, writes nothing.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_kit.errors import DataError
from lora_kit.formats import UnusableRow, conversation
from lora_kit.types import Conversation, Message

EXAMPLE: dict[str, Any] = {
    "name": "is_leap",
    "code": "def is_leap(year):\n    return year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)",
    "docstring": "Return True for leap years, False for non-leap years.",
}

MAX_LINES = 60
"""Longest function, in lines without its docstring; longer ones are left out."""
MIN_CHARACTERS = 20
"""Shortest docstring; shorter ones are left out."""

INSTRUCTION = "Write the docstring of this Python function."

_TEST_FOLDERS = {"test", "tests", "idle_test"}


def fits(record: dict[str, Any]) -> bool:
    """Whether ``code`` and ``docstring`` are both strings."""
    return isinstance(record.get("code"), str) and isinstance(record.get("docstring"), str)


def to_conversation(record: dict[str, Any], origin: str) -> Conversation:
    """The function in a Python code block after one line of instruction, then the docstring."""
    code, docstring = record.get("code"), record.get("docstring")
    if not isinstance(code, str) or not isinstance(docstring, str) or not code.strip():
        raise UnusableRow("empty content")
    question = f"{INSTRUCTION}\n\n```python\n{code}\n```"
    return conversation(
        [Message(role="user", content=question), Message(role="assistant", content=docstring)], origin=origin
    )


def records_of(reference: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Pairs of ``stdlib`` or of an installed package, in order of file and line.

    Args:
        reference: ``stdlib``, or the name a package is imported by (``requests``; a part of it: ``xml.dom``).

    Returns:
        (origin, row) with the keys name, code, docstring. origin is ``file:line`` of the
        def, the file relative to the folder that the package lies in. Folders of tests,
        files that do not parse and repeated pairs are passed over.

    Raises:
        DataError: there is no such package, it has no Python source, or no pairs.
    """
    folder, files = _stdlib_files() if reference == "stdlib" else _package_files(reference)
    if not files:
        raise DataError(f"python:{reference}", "has no Python source on this machine", "name a package that has")
    return _pairs(reference, folder, files)


def _pairs(reference: str, folder: Path, files: list[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    seen: set[tuple[str, str]] = set()
    for path in files:
        for line, row in _pairs_of_file(path):
            pair = (row["code"], row["docstring"])
            if pair not in seen:  # copies would stand on both sides of a held-out split
                seen.add(pair)
                yield f"{path.relative_to(folder).as_posix()}:{line}", row
    if not seen:
        raise DataError(f"python:{reference}", "has no function with a docstring", "name another package")


def _stdlib_files() -> tuple[Path, list[Path]]:
    folder = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for name in sorted(sys.stdlib_module_names - {"test"}):
        files += _sources(folder / name) if (folder / name).is_dir() else [folder / f"{name}.py"]
    return folder, sorted(path for path in files if path.is_file())


def _package_files(reference: str) -> tuple[Path, list[Path]]:
    top, *rest = reference.split(".")
    try:
        # Only of the first name: find_spec of a dotted one imports its parents.
        spec = importlib.util.find_spec(top) if top.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise DataError(
            f"python:{reference}", f"there is no package {top!r} here",
            "install it, or use python:stdlib; it is the name it is imported by",
        )
    if spec.submodule_search_locations:
        places = [Path(place) for place in spec.submodule_search_locations]
    else:
        places = [Path(spec.origin)] if spec.has_location and spec.origin and not rest else []
    for root in places:
        target = root.joinpath(*rest)
        files = _sources(target) if target.is_dir() else []
        single = target if target.suffix == ".py" else target.with_name(f"{target.name}.py")
        if not files and single.is_file():
            files = [single]
        if files:
            return root.parent, files
    return Path(), []


def _sources(folder: Path) -> list[Path]:
    """The .py files under ``folder`` outside folders of tests, sorted."""
    return sorted(
        path for path in folder.rglob("*.py")
        if not _TEST_FOLDERS.intersection(path.relative_to(folder).parts)
    )


def _pairs_of_file(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the source that is read: "\d" in a plain string and the like
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    lines = source.splitlines()
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for node in sorted(functions, key=lambda node: node.lineno):
        docstring = ast.get_docstring(node, clean=False)
        docstring = inspect.cleandoc(docstring).strip() if docstring else ""
        code = _without_docstring(node, lines)
        if len(docstring) >= MIN_CHARACTERS and code and code.count("\n") < MAX_LINES:
            yield node.lineno, {"name": node.name, "code": code, "docstring": docstring}


def _without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The source of a function that begins with a docstring, without it; "" where no other statement is left."""
    if len(node.body) < 2:
        return ""
    first, second = node.body[0], node.body[1]
    if first.lineno == node.lineno or first.end_lineno == second.lineno:
        return ""  # docstring and code share a line: too rare to take apart
    end = node.end_lineno or node.lineno
    rest = lines[first.end_lineno or first.lineno : end]
    while rest and not rest[0].strip():
        rest.pop(0)
    kept = lines[node.lineno - 1 : first.lineno - 1] + rest
    indent = node.col_offset
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in kept)
