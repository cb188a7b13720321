"""A recipe of one's own: a shipped recipe copied, with the user's model and data in it.

What ``lora-kit init`` does. Only the lines that change are rewritten, so that every
comment and every other line of the shipped recipe arrives as it was written. Nothing
that exists is overwritten. The JSON Schema is laid beside the recipe, where the
recipe's first line points editors to it.

Torch-free. Reads the shipped recipes; writes ``<name>.yaml`` and ``recipe.schema.json``.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lora_kit import shipped
from lora_kit.errors import RecipeError
from lora_kit.recipe_file import parse_recipe
from lora_kit.rundir import writing
from lora_kit.yaml_file import load_tree

SCHEMA_FILE = "recipe.schema.json"

_BOUND_TO_DATA = ("sha256", "format", "split", "subset", "weight", "limit", "max_turns")
"""Keys of a data source that describe the rows it was written for, not the user's."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What ``init`` asks: the answer's ``key``, the ``text`` to show, and the answer that leaves all as shipped."""

    key: str
    text: str
    default: str


def names() -> list[str]:
    """Names of the shipped recipes."""
    return shipped.recipe_names()


def description(name: str) -> str:
    """The sentence in which the recipe ``name`` says what it is for; RecipeError when there is no such recipe."""
    return str(_Page(_shipped_text(name), name).tree.get("description", ""))


def questions(name: str) -> list[Question]:
    """What to ask before the recipe ``name`` is copied: base model, data, name of the new recipe.

    Raises:
        RecipeError: no such recipe is shipped.
    """
    tree = _Page(_shipped_text(name), name).tree
    return [
        Question(key="base", default=str(tree["model"]["base"]),
                 text="Base model: a hub id such as org/name, a model folder, or a .gguf file"),
        Question(key="data", default=str(_first_source(tree)["source"]),
                 text="Training data: a .jsonl, .json, .csv or .parquet file, or hub:org/name"),
        Question(key="name", default=name, text="Name of the recipe: its file, and its folder under runs/"),
    ]


def copy_recipe(name: str, target: Path, answers: Mapping[str, str]) -> Path:
    """Copy the shipped recipe ``name`` with the answers to its questions filled in.

    Args:
        name: one of :func:`names`.
        target: the folder to write ``<answers["name"]>.yaml`` into, or the .yaml file to write (whose
            name is then the recipe's).
        answers: by ``Question.key``; a missing, empty or default answer changes nothing. A path is meant
            from the current folder, and is written relative to the recipe.

    Returns:
        Path of the recipe that was written.

    Raises:
        RecipeError: no such recipe, an answer that no recipe can hold, or the file exists.
        MachineError: it cannot be written.
    """
    text = _shipped_text(name)
    defaults = {question.key: question.default for question in questions(name)}
    unknown = sorted(set(answers) - set(defaults))
    if unknown:
        raise RecipeError(f"init {name}", f"asks nothing called '{unknown[0]}'", f"it asks: {', '.join(defaults)}")
    given = {key: answer.strip() for key, answer in answers.items() if answer.strip() not in ("", defaults[key])}
    if target.suffix in (".yaml", ".yml"):
        path = target
    else:
        path = target / f"{given.get('name', name)}.yaml"
        if path.parent != target:
            raise RecipeError(f"init {name}", f"'{given['name']}' names no recipe", "use letters, digits, . _ -")
    if path.exists():
        raise RecipeError(str(path), "exists already, and is left as it is", "choose another name, or remove it")
    page = _Page(text, name)
    if "name" in page.tree:
        page.put(("name",), path.stem)
    if "base" in given:
        page.put(("model", "base"), _as_seen_from(path.parent, given["base"]))
        page.drop(("model", "sha256"))
    if "data" in given:
        _replace_data(page, _as_seen_from(path.parent, given["data"]))
    parse_recipe(page.text, path.absolute(), shown_as=str(path))
    _write_new(path, page.text)
    schema = path.parent / SCHEMA_FILE
    if not schema.exists():
        _write_new(schema, (shipped.folder("recipes") / SCHEMA_FILE).read_text(encoding="utf-8"))
    return path


def _shipped_text(name: str) -> str:
    path = shipped.recipe_path(name)
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        todo = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names())}"
        raise RecipeError(f"init {name}", "no such recipe is shipped", todo)
    return path.read_text(encoding="utf-8")


def _first_source(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    sources = tree["data"]["train"]
    return sources[0] if isinstance(sources, list) else sources


def _replace_data(page: _Page, reference: str) -> None:
    """Make ``reference`` the only source. Held-out sources of other data go: rows are split off instead."""
    sources = page.tree["data"]["train"]
    first: tuple = ("data", "train")
    if isinstance(sources, list):
        for index in range(len(sources) - 1, 0, -1):
            page.drop(("data", "train", index))
        first = ("data", "train", 0)
    for key in _BOUND_TO_DATA:
        page.drop((*first, key))
    page.put((*first, "source"), reference)
    page.drop(("data", "held_out"))


def _as_seen_from(folder: Path, answer: str) -> str:
    """A path that exists here, relative to ``folder``; anything else as it was given."""
    path = Path(answer)
    if not answer or path.is_absolute() or not path.exists():
        return answer
    relative = Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    return relative if relative.startswith(".") else f"./{relative}"


def _write_new(path: Path, text: str) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise RecipeError(str(path), "exists already, and is left as it is", "choose another name") from None


class _Page:
    """The recipe's text, changed a line at a time; ``tree`` knows where each key stands in it."""

    def __init__(self, text: str, shown: str) -> None:
        self.shown = shown
        self._set_lines(text.splitlines())

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def _set_lines(self, lines: list[str]) -> None:
        self.lines = lines
        self.tree = load_tree(self.text, self.shown, parts="sections", needed="write model.base and data.train")

    def _find(self, loc: tuple) -> tuple[Any, Any]:
        """The mapping or list that holds ``loc``, and the last part of it; None when there is no such key."""
        node: Any = self.tree
        for part in loc[:-1]:
            if not _holds(node, part):
                return None, None
            node = node[part]
        return (node, loc[-1]) if _holds(node, loc[-1]) else (None, None)

    def put(self, loc: tuple, value: str) -> None:
        """Set the text at ``loc``, which is in the file, on its line; a comment behind it stays."""
        node, key = self._find(loc)
        line, column = node.lc.value(key)
        before, after = self.lines[line][:column], self.lines[line][column:]
        comment = re.search(r"\s+#.*$", after)
        lines = list(self.lines)
        lines[line] = before + _scalar(value) + (comment.group() if comment else "")
        self._set_lines(lines)

    def drop(self, loc: tuple) -> None:
        """Remove ``loc``, if it is there, with the comment lines right above it."""
        node, key = self._find(loc)
        if node is None:
            return
        first, column = node.lc.item(key) if isinstance(node, list) else node.lc.key(key)
        last = _last_line(node, key)
        indent = " " * (self.lines[first].index("-") if isinstance(node, list) else column)
        while first and self.lines[first - 1].startswith(indent + "#"):
            first -= 1
        self._set_lines(self.lines[:first] + self.lines[last + 1:])


def _holds(node: Any, part: Any) -> bool:
    return part in node if isinstance(node, dict) else isinstance(node, list) and part < len(node)


def _last_line(node: Any, key: Any) -> int:
    """The last line that the value of ``key`` reaches; values are on one line each."""
    value = node[key]
    own = node.lc.item(key)[0] if isinstance(node, list) else node.lc.value(key)[0]
    if isinstance(value, dict):
        return max([own, *(_last_line(value, inner) for inner in value)])
    if isinstance(value, list):
        return max([own, *(_last_line(value, inner) for inner in range(len(value)))])
    return own


def _scalar(value: str) -> str:
    """``value`` as YAML on one line, quoted where it has to be."""
    try:
        if YAML(typ="safe", pure=True).load(f"- {value}\n") == [value]:
            return value
    except YAMLError:
        pass
    return json.dumps(value, ensure_ascii=False)
