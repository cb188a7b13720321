"""A YAML file that people write: read, with the line of every key, and checked against a model.

Recipes, suites and tasks are read through here, so that a mistake in any of them is told
the same way: all problems at once, each as ``file:line: what; what to do``, with the
nearest key that exists. Torch-free. Reads the file; writes nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from lora_kit.errors import LoraKitError, RecipeError

_MAX_BYTES = 1_000_000
_MAX_VALUES = 100_000


def read_text(path: Path, noun: str, hint: str) -> str:
    """The text of the file ``path``.

    Args:
        path: the file, at most 1 MB of UTF-8.
        noun: what the file is, for messages: ``recipe``.
        hint: what to do when there is no such file.

    Raises:
        RecipeError: it is missing, a folder, too large or no text.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(str(path), f"is over 1 MB, which no {noun} is", f"name a {noun} file")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(str(path), f"no such {noun}", hint) from None
    except IsADirectoryError:
        raise RecipeError(str(path), "is a folder", f"name the {noun} file in it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(str(path), f"cannot be read ({error})", "name a UTF-8 text file") from None


def load_tree(
    text: str, shown: str, *, parts: str, needed: str, start: str = "", problems: list[LoraKitError] | None = None
) -> dict:
    """The mapping that ``text`` holds, with line numbers kept for :class:`Places`.

    Args:
        text: YAML.
        shown: how messages call the file.
        parts: what it is a mapping of, for messages: ``sections``.
        needed: what to do when it is no mapping.
        start: what else to do when it is empty.
        problems: where keys that stand twice are put, to be told with all others; None: they are raised.

    Raises:
        RecipeError: not YAML, a key twice, empty, or no mapping.
    """
    yaml = YAML(typ="rt")
    yaml.allow_duplicate_keys = True  # found below, all of them and with their lines
    try:
        twice = list(_keys_that_stand_twice(YAML(typ="rt").compose(StringIO(text)), shown, set()))
        tree = yaml.load(StringIO(text))
        num_values = _count_values(tree, _MAX_VALUES)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{shown}:{mark.line + 1}" if mark else shown
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(where, f"is not valid YAML ({what})", "mend the line") from None
    except RecursionError:
        raise RecipeError(shown, "is nested too deeply, or refers to itself", "mend the file") from None
    except ValueError as error:
        raise RecipeError(shown, f"is not valid YAML ({error})", "mend the file") from None
    if num_values > _MAX_VALUES:
        raise RecipeError(shown, f"holds over {_MAX_VALUES:,} values", "write less, or fewer aliases of aliases")
    if tree is None:
        raise RecipeError(shown, "is empty", needed + start)
    if not isinstance(tree, dict):
        raise RecipeError(f"{shown}:1", f"is not a mapping of {parts}", needed)
    if problems is not None:
        problems += twice
    elif twice:
        raise RecipeError.of(twice)
    return tree


def _keys_that_stand_twice(node: Node | None, shown: str, seen: set[int]) -> Iterator[LoraKitError]:
    if id(node) in seen:  # an alias of what was looked at
        return
    seen.add(id(node))
    lines: dict[str, int] = {}
    if isinstance(node, MappingNode):
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if str(key.value) in lines:
                yield RecipeError(f"{shown}:{line}", f"key '{key.value}' stands twice, first on line "
                                  f"{lines[str(key.value)]}", "remove one of them")
            lines.setdefault(str(key.value), line)
    if isinstance(node, (MappingNode, SequenceNode)):
        for child in node.value:
            yield from _keys_that_stand_twice(child[1] if isinstance(child, tuple) else child, shown, seen)


def _count_values(node: Any, most: int) -> int:
    """Values under ``node``, those behind an alias each time; stops counting above ``most``."""
    count = 1
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        count += _count_values(value, most - count)
        if count > most:
            break
    return count


def plain(node: Any) -> Any:
    """``node`` as plain dicts, lists, numbers and texts, without the YAML reader's own types."""
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node


class Places:
    """Where a key stands: its line in the file, or the override on the command line that gave it."""

    def __init__(self, tree: dict, shown: str, overrides: Mapping[tuple, str] | None = None) -> None:
        self.tree, self.shown, self.overrides = tree, shown, overrides if overrides is not None else {}

    def of(self, loc: Sequence) -> str:
        """``file:line`` of the key at ``loc``, or of the nearest parent that is in the file."""
        for length in range(len(loc), 0, -1):
            if tuple(loc[:length]) in self.overrides:
                return self.overrides[tuple(loc[:length])]
        node, line = self.tree, 1
        for part in loc:
            try:
                position = node.lc.key(part) if isinstance(node, dict) else node.lc.item(part)
                line = position[0] + 1
                node = node[part]
            except (AttributeError, KeyError, IndexError, TypeError):
                # Not in the file: an override may have made it on the way to a key below.
                deeper = [text for key, text in self.overrides.items() if key[:len(loc)] == tuple(loc)]
                return deeper[0] if deeper else f"{self.shown}:{line}"
        return f"{self.shown}:{line}"


def explain(error: ValidationError, model: type[BaseModel], values: Any, places: Places) -> list[LoraKitError]:
    """Every problem that ``model`` found in ``values``, in the order of the file."""
    return in_order([_explain_one(detail, model, values, places) for detail in error.errors(include_url=False)])


def in_order(problems: Sequence[LoraKitError]) -> list[LoraKitError]:
    """``problems`` sorted by file and line."""
    return sorted(problems, key=lambda problem: _line_of(problem.where))


def _explain_one(detail: Any, model: type[BaseModel], values: Any, places: Places) -> LoraKitError:
    loc = list(detail["loc"])
    # A single mapping where a list is allowed gets a position 0 that is not in the file.
    in_file = _loc_in_file(loc, values)
    key = ".".join(str(part) for part in in_file)
    kind = detail["type"]
    if kind == "extra_forbidden":
        section, known = _section_at(model, loc[:-1]), _known_keys(model, loc[:-1])
        said = getattr(section, "not_here", {}).get(loc[-1])
        if said:
            return RecipeError(places.of(in_file), f"'{key}' {said[0]}", said[1])
        near = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        todo = f"did you mean '{near[0]}'?" if near else f"known keys here: {', '.join(known)}"
        return RecipeError(places.of(in_file), f"unknown key '{key}'", todo)
    if kind == "missing":
        return RecipeError(places.of(in_file), f"'{key}' is missing", "add it")
    given = detail.get("input")
    shown = {dict: "a section", list: "a list", type(None): "empty"}.get(type(given)) or repr(given)
    if kind == "model_type":
        message = f"write its keys below it: {', '.join(_known_keys(model, loc))}"
    elif kind == "value_error":
        message = str(detail["ctx"]["error"])
    else:
        message = detail["msg"][0].lower() + detail["msg"][1:]
    return RecipeError(places.of(in_file), f"'{key}' is {shown}", message)


def _loc_in_file(loc: list, values: Any) -> list:
    kept = []
    for part in loc:
        if isinstance(part, int) and not isinstance(values, list):
            continue
        kept.append(part)
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            values = None
    return kept


def _known_keys(model: type[BaseModel], loc: Sequence) -> list[str]:
    """Keys of the section at ``loc``."""
    return list(_section_at(model, loc).model_fields)


def _section_at(model: type[BaseModel], loc: Sequence) -> type[BaseModel]:
    """The section at ``loc``, following lists and optional sections."""
    for part in loc:
        if isinstance(part, int):
            continue
        model = _section_in(model.model_fields[part].annotation)
    return model


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _section_in(argument)
        if found is not None:
            return found
    return None


def _line_of(where: str) -> tuple[str, int]:
    head, _, tail = where.rpartition(":")
    return (head, int(tail)) if tail.isdigit() else (where, 0)
