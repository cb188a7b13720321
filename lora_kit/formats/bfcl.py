"""The Berkeley Function-Calling Leaderboard: questions joined with their possible answers.

A question file ``BFCL_v4_<category>.json`` (JSON lines: id, question, function) and the file
of the same name in the folder ``possible_answer`` beside it (id, ground_truth) become one row
for each question. The question's messages are the user's, its functions the tools, and the
assistant answers with calls made of the first acceptable value of each parameter.
Standard library only; reads those two files, writes nothing.

Source of the rules: bfcl_eval 2026.3.23, ``eval_checker/ast_eval/ast_checker.py`` (what is
acceptable) and ``constants/type_mappings.py`` (GORILLA_TO_OPENAPI, the type names).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_kit.errors import DataError
from lora_kit.formats import UnusableRow, conversation, message_of
from lora_kit.records import read_records
from lora_kit.types import Conversation, Message

EXAMPLE: dict[str, Any] = {
    "id": "simple_python_0",
    "question": [[{"role": "user", "content": "Find the area of a triangle of base 10 and height 5."}]],
    "function": [
        {
            "name": "triangle_area",
            "description": "The area of a triangle.",
            "parameters": {
                "type": "dict",
                "properties": {
                    "base": {"type": "float", "description": "Its base."},
                    "height": {"type": "float", "description": "Its height."},
                    "unit": {"type": "string", "description": "Unit of the result. Default: units."},
                },
                "required": ["base", "height"],
            },
        }
    ],
    "ground_truth": [{"triangle_area": {"base": [10], "height": [5], "unit": ["", "units"]}}],
}

ANSWERS_FOLDER = "possible_answer"

_JSON_SCHEMA_TYPES = {
    "integer": "integer", "number": "number", "float": "number", "string": "string", "boolean": "boolean",
    "bool": "boolean", "array": "array", "list": "array", "dict": "object", "object": "object", "tuple": "array",
    "any": "string", "byte": "integer", "short": "integer", "long": "integer", "double": "number", "char": "string",
    "arraylist": "array", "hashmap": "object", "hashtable": "object", "queue": "array", "stack": "array",
    "set": "array", "bigint": "integer", "null": "null",
}


def fits(record: dict[str, Any]) -> bool:
    """Whether ``question`` is a list of turns and ``function`` a list; the answers may not be joined yet."""
    question = record.get("question")
    return (
        isinstance(question, list) and bool(question) and isinstance(question[0], list)
        and isinstance(record.get("function"), list)
    )


def companions(name: str) -> tuple[str, ...]:
    """The files that are read with the question file ``name``, relative to its folder."""
    return (f"{ANSWERS_FOLDER}/{name}",)


def records(path: Path, shown: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The questions of ``path``, each with its ``ground_truth``, None where the answers lack its id.

    Raises:
        DataError: one of the two files is missing or broken.
    """
    shown = shown or path.name
    answers_path = path.parent / ANSWERS_FOLDER / path.name
    answers_shown = f"{shown.rpartition('/')[0] or '.'}/{ANSWERS_FOLDER}/{path.name}".removeprefix("./")
    questions = read_records(path, shown)
    if not answers_path.is_file():
        raise DataError(shown, "has no possible answers beside it", f"put them at {answers_shown}")
    return _joined(questions, read_records(answers_path, answers_shown))


def _joined(
    questions: Iterator[tuple[str, dict[str, Any]]], answers: Iterator[tuple[str, dict[str, Any]]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    ground_truths = {str(answer.get("id")): answer.get("ground_truth") for _, answer in answers}
    for origin, question in questions:
        yield origin, {**question, "ground_truth": ground_truths.get(str(question.get("id")))}


def to_conversation(record: dict[str, Any], origin: str) -> Conversation:
    """The question, and an assistant turn with one call for each entry of ``ground_truth``.

    Raises:
        UnusableRow: no possible answer, more than one turn, answer is no function call, answer
            names no offered function, no acceptable value; and what ``formats.conversation`` raises.
    """
    question, functions = record.get("question"), record.get("function")
    if not isinstance(question, list) or not question or not isinstance(question[0], list):
        raise UnusableRow("no messages")
    if len(question) > 1:
        raise UnusableRow("more than one turn")
    if not isinstance(functions, list) or not all(_is_function(function) for function in functions):
        raise UnusableRow("broken tools")
    if not record.get("ground_truth"):
        raise UnusableRow("no possible answer")
    tools = [tool_of(function) for function in functions]
    calls = tuple(
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in first_answer(record["ground_truth"], functions)
    )
    messages = [message_of(raw) for raw in question[0]]
    return conversation([*messages, Message(role="assistant", tool_calls=calls)], origin=origin, tools=tools)


def _is_function(function: Any) -> bool:
    return (
        isinstance(function, dict) and isinstance(function.get("name"), str)
        and isinstance(function.get("parameters") or {}, dict)
    )


def tool_of(function: dict[str, Any]) -> dict[str, Any]:
    """A BFCL function as OpenAI's tool object, its type names as JSON Schema has them."""
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function.get("description") or "",
            "parameters": json_schema_of(function.get("parameters") or {"type": "dict", "properties": {}}),
        },
    }


def json_schema_of(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` with every type name mapped (dict is object, float number, any string ...).

    Goes down into ``properties``, ``items`` and ``additionalProperties``; everything else is
    kept as it is, so that a parameter that is called "type" stays one.
    """
    mapped = dict(schema)
    if isinstance(schema.get("type"), str):
        mapped["type"] = _JSON_SCHEMA_TYPES.get(schema["type"].lower(), "string")
    if isinstance(schema.get("properties"), dict):
        mapped["properties"] = {
            name: json_schema_of(inner) if isinstance(inner, dict) else inner
            for name, inner in schema["properties"].items()
        }
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            mapped[key] = json_schema_of(schema[key])
    return mapped


def first_answer(ground_truth: Any, functions: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """The calls, as (name, arguments), that take the first acceptable value of each parameter.

    A parameter whose first acceptable value is "" is optional and left out, unless the function
    requires it. Values that are objects, or lists of objects, hold acceptable values for each key in turn
    (one level deep, as the benchmark's checker reads them).

    Raises:
        UnusableRow: answer is no function call, answer names no offered function, no
            acceptable value.
    """
    if not isinstance(ground_truth, list):
        raise UnusableRow("answer is no function call")
    required_of = {function["name"]: (function.get("parameters") or {}).get("required") or () for function in functions}
    calls = []
    for entry in ground_truth:
        if not isinstance(entry, dict) or len(entry) != 1:
            raise UnusableRow("answer is no function call")
        name, acceptable = next(iter(entry.items()))
        if name not in required_of:
            raise UnusableRow("answer names no offered function")
        if not isinstance(acceptable, dict):
            raise UnusableRow("answer is no function call")
        chosen = _first_of_each(acceptable, required_of[name])
        calls.append((name, {key: _resolved(value) for key, value in chosen.items()}))
    return calls


def _first_of_each(acceptable: dict[str, Any], required: Any = ()) -> dict[str, Any]:
    chosen = {}
    for key, values in acceptable.items():
        if not isinstance(values, list):
            chosen[key] = values  # a plain value where a list is usual: it is the only acceptable one
            continue
        if key in required:
            if not values:  # no answer can be right: two items of live_simple are like this
                raise UnusableRow("no acceptable value")
            values = [value for value in values if value != ""] or values
        elif not values or values[0] == "":
            continue
        chosen[key] = values[0]
    return chosen


def _resolved(value: Any) -> Any:
    if isinstance(value, dict):
        return _first_of_each(value)
    if isinstance(value, list):
        return [_first_of_each(item) if isinstance(item, dict) else item for item in value]
    return value
