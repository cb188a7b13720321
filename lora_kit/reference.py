"""The recipe's reference, generated from the fields of ``lora_kit/recipe.py``.

A setting is documented once, under its field. From there come ``docs/recipe.md`` for
people and ``recipes/recipe.schema.json`` for editors, so that neither can say anything
else than the code. ``python -m lora_kit.reference --write`` writes both, ``--check``
ends with 1 when one of them is out of date.

Torch-free. Reads nothing; writes the two files in a checkout.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def files() -> dict[str, str]:
    """The generated files: path from the checkout's root -> text."""
    schema = json_schema()
    return {
        "docs/recipe.md": markdown(schema),
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
        return f"list of {_one_value(part['items'])}"
    kind = {"string": "text", "integer": "integer", "number": "number", "boolean": "`true` \\| `false`"}[part["type"]]
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {part[key]:g}" for key, sign in bounds.items() if key in part]
    return " ".join([kind, ", ".join(limits)]).strip()


def _default(field: Mapping[str, Any]) -> str:
    default = field.get("default")
    if default is None or default == "" or default == []:
        return "–"
    return f"`{json.dumps(default)}`" if not isinstance(default, str) else f"`{default}`"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def main(arguments: list[str]) -> None:
    """``--write`` or ``--check``; ends the process with 1 and the stale files' names, or 2 for anything else."""
    if arguments == ["--write"]:
        write()
    elif arguments == ["--check"]:
        found = stale()
        if found:
            sys.exit(f"{', '.join(str(path) for path in found)}: not what lora_kit/recipe.py says; run make docs")
    else:
        sys.exit("python -m lora_kit.reference --write | --check")


if __name__ == "__main__":
    main(sys.argv[1:])
