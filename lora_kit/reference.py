"""The reference, generated from the code, so that it cannot say anything else than the code.

A setting is documented once, under its field in ``lora_kit/recipe.py``: from there come
``docs/recipe.md`` for people and ``recipes/recipe.schema.json`` for editors. A format, metric,
quantizer or engine is documented once, at the top of its file: from there comes
``docs/extensions.md``. ``python -m lora_kit.reference --write`` writes these files, ``--check``
ends with 1 when one of them is out of date. ``docs/build.py`` does so for the whole
documentation, the command line's pages included.

Torch-free. Reads the files of this package; writes the generated files in a checkout.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_kit import engines, errors, formats, metrics, quantizers
from lora_kit.recipe import json_schema

_ROOT = Path(__file__).parent.parent

_INTRODUCTION = """\
# Recipe reference

<!-- Generated from lora_kit/recipe.py by `make docs`. Change the fields there, not this page. -->

A recipe is one YAML file. Only `model.base` and `data.train` must be given. A key that does not exist, that stands
twice, or that would have no effect is an error with its line. Paths are relative to the recipe. Any key can be given
on the command line too: `--set train.steps=10`, `--set data.train.0.limit=100`.

With the line `# yaml-language-server: $schema=./recipe.schema.json` at its top, an editor that speaks YAML completes
and checks the keys while you write; the schema lies beside the shipped recipes, and `lora-kit init` lays it beside
yours.
"""

_EXTENSIONS = """\
# Formats, metrics, quantizers, engines

<!-- Generated from the files in lora_kit/ by `make docs`. Change their docstrings, not this page. -->

Each is one file, found by its name, which is also what a recipe or a task writes.
[CONTRIBUTING](../CONTRIBUTING.md#add-a-format-a-metric-a-quantizer-an-engine) says how to add one.
"""
# What a docstring says to a reader of the code and not to a user.
_FOR_DEVELOPERS = re.compile(
    r"\s*\b(Standard library only|Torch-free|Shape suffix|Reads and writes nothing).*", re.DOTALL)


def files() -> dict[str, str]:
    """The generated files: path from the checkout's root -> text."""
    schema = json_schema()
    return {
        "docs/recipe.md": markdown(schema),
        "docs/extensions.md": extensions(),
        "recipes/recipe.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
    }


def write(root: Path = _ROOT) -> list[Path]:
    """Write the generated files under ``root``; their paths."""
    written = []
    for name, text in files().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written.append(path)
    return written


def stale(root: Path = _ROOT) -> list[Path]:
    """The generated files under ``root`` that are missing or differ from what would be written."""
    paths = {root / name: text for name, text in files().items()}
    return [path for path, text in paths.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def markdown(schema: Mapping[str, Any]) -> str:
    """``docs/recipe.md``: one table of keys for each section of the JSON Schema ``schema``."""
    parts = [_INTRODUCTION]
    shown: dict[str, str] = {}
    for title, prefix, section, field in _sections(schema, schema, "", "The recipe", {}):
        about = [field.get("description", ""), section.get("description", "")]
        if section["title"] in shown:
            # Said once: held-out sources have the keys of training sources.
            about[1] = f"The keys are those of {shown[section['title']]}."
            parts.append(f"## {title}\n\n{' '.join(filter(None, about))}\n")
            continue
        shown[section["title"]] = title
        parts.append(f"## {title}\n\n{' '.join(filter(None, about))}\n\n{_table(section, prefix, schema)}\n")
    return "\n".join(parts)


def _table(section: Mapping[str, Any], prefix: str, schema: Mapping[str, Any]) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field in section["properties"].items():
        if _section_of(field, schema) is None:
            default = "*required*" if key in section.get("required", ()) else _default(field)
            meaning = _one_line(field.get("description", ""))
            rows.append(f"| `{prefix}{key}` | {_value(field)} | {default} | {meaning} |")
    return "\n".join(rows)


def _sections(
    section: Mapping[str, Any], schema: Mapping[str, Any], prefix: str, title: str, field: Mapping[str, Any]
) -> Iterator[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]:
    """``section`` and those inside it: title, prefix of the keys, its schema, the field that holds it.

    A list's entries are called ``name[]``.
    """
    yield title, prefix, section, field
    for key, inner in section["properties"].items():
        found = _section_of(inner, schema)
        if found is not None:
            many = "[]" if any(part.get("type") == "array" for part in _alternatives(inner)) else ""
            name = f"{prefix}{key}{many}"
            yield from _sections(found, schema, f"{name}.", f"`{name}`", inner)


def _section_of(field: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The schema of the section that ``field`` holds, alone or in a list; None when it holds a value."""
    for part in _alternatives(field):
        part = part.get("items", part)
        if "$ref" in part:
            return schema["$defs"][part["$ref"].rpartition("/")[2]]
    return None


def _alternatives(field: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [part for part in field.get("anyOf", [field]) if part.get("type") != "null"]


def _value(field: Mapping[str, Any]) -> str:
    return " or ".join(_one_value(part) for part in _alternatives(field))


def _one_value(part: Mapping[str, Any]) -> str:
    if "enum" in part:
        return " \\| ".join(f"`{choice}`" for choice in part["enum"])
    if "const" in part:
        return f"`{part['const']}`"
    if part.get("type") == "array":
        return f"list of {_value(part['items'])}"
    if part.get("type") == "object":
        return f"names, each with {_value(part['additionalProperties'])}"
    kind = {"string": "text", "integer": "integer", "number": "number", "boolean": "`true` \\| `false`"}[part["type"]]
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {part[key]:g}" for key, sign in bounds.items() if key in part]
    return " ".join([kind, ", ".join(limits)]).strip()


def _default(field: Mapping[str, Any]) -> str:
    default = field.get("default")
    if default is None or default in ("", [], {}):
        return "–"
    return f"`{json.dumps(default)}`" if not isinstance(default, str) else f"`{default}`"


def extensions() -> str:
    """``docs/extensions.md``: the files of formats, metrics, quantizers and engines, each by its docstring."""
    rows = [f"- [`{name}`](sources-and-formats.md#{name}): {about(module).splitlines()[0]}"
            for name, module in _modules(formats)]
    parts = [_EXTENSIONS, "## Formats\n\nWhat a row of a data file looks like: `data.train[].format` of a "
             "[recipe](recipe.md#datatrain).\n", "\n".join(rows) + "\n"]
    parts += ["## Metrics\n\nHow one answer is scored against its target: `metrics:` of a [task](eval.md).\n",
              _list_of(metrics)]
    parts += ["## Quantizers\n\nWhat `quantize[].method` and `quantize[].type` of a "
              "[recipe](recipe.md#quantize) may be.\n"]
    for name, module in _modules(quantizers):
        types = "\n".join(f"- `type: {key}`: {text}" for key, text in module.TYPES.items())
        parts.append(f"### `{name}`\n\n{about(module)}\n\n{types}\n")
    kinds = "; ".join(f"`{kind}` by {' or '.join(f'`{name}`' for name in names)}"
                      for kind, names in engines.ENGINE_OF_KIND.items())
    parts += [f"## Engines\n\nWhat runs an artifact. Which one follows from the artifact's kind: {kinds}.\n"]
    parts += [f"### `{name}`\n\n{about(module)}\n" for name, module in _modules(engines)]
    return "\n".join(parts)


def format_rows() -> str:
    """Every format as Markdown: what it is, and the example row that the tests hold it to."""
    return "\n".join(
        f"### `{name}`\n\n{about(module)}\n\n```json\n{json.dumps(module.EXAMPLE, indent=1, ensure_ascii=False)}\n```\n"
        for name, module in _modules(formats))


def exit_codes() -> list[tuple[int, str, str]]:
    """(code, class, meaning) of every way to end, as the docstring of ``errors.py`` has them, sorted."""
    found = [(int(code), name, meaning) for name, code, meaning
             in re.findall(r"[├└]── (\w+) +(\d+) +(.+)", errors.__doc__ or "")]
    return sorted([(0, "", "fine"), *found, (130, "", "interrupted")])


def exit_code_table() -> str:
    """:func:`exit_codes` as a Markdown table."""
    return "\n".join(["| code | meaning |", "|--:|---|", *(f"| {code} | {text} |" for code, _, text in exit_codes())])


def about(module: ModuleType) -> str:
    """The docstring of ``module`` as Markdown, without what is meant for readers of its code."""
    text = _FOR_DEVELOPERS.sub("", ast.get_docstring(ast.parse(Path(module.__file__).read_text("utf-8"))) or "")
    return re.sub(r":\w+:`", "`", text.replace("``", "`")).strip()


def _list_of(package: ModuleType) -> str:
    return "\n".join(f"### `{name}`\n\n{about(module)}\n" for name, module in _modules(package))


def _modules(package: ModuleType) -> list[tuple[str, ModuleType]]:
    return [(name, importlib.import_module(f"{package.__name__}.{name}")) for name in package.names()]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main(arguments: list[str]) -> None:
    """``--write`` or ``--check``; ends the process with 1 and the stale files' names, or 2 for anything else."""
    if arguments == ["--write"]:
        write()
    elif arguments == ["--check"]:
        found = stale()
        if found:
            sys.exit(f"{', '.join(str(path) for path in found)}: not what the code says; run make docs")
    else:
        sys.exit("python -m lora_kit.reference --write | --check")


if __name__ == "__main__":
    main(sys.argv[1:])
