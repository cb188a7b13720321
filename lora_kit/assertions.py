"""Assertions: what must hold of an answer that has no single right text, each with its reason.

An assertion has one key that says what must hold, e.g. ``{contains: "42"}``; a task has some for all of its items, a
row may have its own. The metric ``all_assertions`` holds answers to them. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, field_validator, model_validator

from lora_kit.errors import DataError
from lora_kit.recipe import Section


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Assertion(Section):
    """One thing that must hold of an answer. It has exactly one of the keys below, and may have `ignore_case`."""

    contains: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    """Texts that the answer has, all of them."""
    contains_any: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    """Texts of which it has one at least."""
    not_contains: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    """Texts that it has none of."""
    equals: Annotated[list[str] | None, BeforeValidator(_as_list)] = None
    """Texts of which it is one, outer blanks aside."""
    starts_with: str | None = None
    """How it begins, outer blanks aside."""
    ends_with: str | None = None
    """How it ends, outer blanks aside."""
    regex: str | None = None
    """A regular expression (Python's) that is found in it."""
    not_regex: str | None = None
    """One that is not."""
    min_words: Annotated[int, Field(ge=1)] | None = None
    """Fewest words."""
    max_words: Annotated[int, Field(ge=0)] | None = None
    """Most words."""
    max_chars: Annotated[int, Field(ge=0)] | None = None
    """Most characters."""
    json_schema: dict[str, Any] | bool | None = None
    """A JSON Schema that it fits, as one JSON value; `true`: any JSON value."""
    ignore_case: bool = False
    """Whether `a` is `A` to the texts and expressions above."""

    @field_validator("regex", "not_regex")
    @classmethod
    def _is_expression(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"no regular expression ({error})") from None
        return value

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, value: dict[str, Any] | bool | None) -> dict[str, Any] | bool | None:
        if isinstance(value, dict):
            from jsonschema import SchemaError
            from jsonschema.validators import validator_for

            try:
                validator_for(value).check_schema(value)
            except SchemaError as error:
                raise ValueError(f"no JSON Schema ({error.message})") from None
        return value

    @model_validator(mode="after")
    def _has_one_form(self) -> Assertion:
        given = [name for name in _FORMS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"an assertion has one of {', '.join(_FORMS)}")
        if self.ignore_case and given[0] not in _TEXTS:
            raise ValueError(f"'ignore_case' has no effect on {given[0]}")
        return self

    @property
    def form(self) -> str:
        return next(name for name in _FORMS if getattr(self, name) is not None)

    def check(self, answer: str) -> tuple[bool, str]:
        """Whether it holds of ``answer``, and what was found, in words that begin with the assertion."""
        holds, found = getattr(self, f"_{self.form}")(answer.strip())
        return holds, f"{self.form} {_shown(getattr(self, self.form))}: {found}"

    def _contains(self, answer: str) -> tuple[bool, str]:
        missing = [text for text in self.contains or () if self._cased(text) not in self._cased(answer)]
        return not missing, f"lacks {_shown(missing)}" if missing else "yes"

    def _contains_any(self, answer: str) -> tuple[bool, str]:
        found = [text for text in self.contains_any or () if self._cased(text) in self._cased(answer)]
        return bool(found), f"has {_shown(found[0])}" if found else "has none"

    def _not_contains(self, answer: str) -> tuple[bool, str]:
        found = [text for text in self.not_contains or () if self._cased(text) in self._cased(answer)]
        return not found, f"has {_shown(found)}" if found else "has none"

    def _equals(self, answer: str) -> tuple[bool, str]:
        holds = self._cased(answer) in [self._cased(text.strip()) for text in self.equals or ()]
        return holds, "yes" if holds else f"is {_shown(answer)}"

    def _starts_with(self, answer: str) -> tuple[bool, str]:
        holds = self._cased(answer).startswith(self._cased(self.starts_with or ""))
        return holds, "yes" if holds else f"starts with {_shown(answer[:len(self.starts_with or '')])}"

    def _ends_with(self, answer: str) -> tuple[bool, str]:
        holds = self._cased(answer).endswith(self._cased(self.ends_with or ""))
        return holds, "yes" if holds else f"ends with {_shown(answer[-len(self.ends_with or ''):])}"

    def _regex(self, answer: str) -> tuple[bool, str]:
        found = re.search(self.regex or "", answer, re.IGNORECASE if self.ignore_case else 0)
        return found is not None, f"found {_shown(found[0])}" if found else "not found"

    def _not_regex(self, answer: str) -> tuple[bool, str]:
        found = re.search(self.not_regex or "", answer, re.IGNORECASE if self.ignore_case else 0)
        return found is None, f"found {_shown(found[0])}" if found else "not found"

    def _min_words(self, answer: str) -> tuple[bool, str]:
        return len(answer.split()) >= (self.min_words or 0), f"has {len(answer.split())}"

    def _max_words(self, answer: str) -> tuple[bool, str]:
        return len(answer.split()) <= (self.max_words or 0), f"has {len(answer.split())}"

    def _max_chars(self, answer: str) -> tuple[bool, str]:
        return len(answer) <= (self.max_chars or 0), f"has {len(answer)}"

    def _json_schema(self, answer: str) -> tuple[bool, str]:
        from jsonschema.exceptions import best_match
        from jsonschema.validators import validator_for
        from referencing import Registry
        from referencing.exceptions import Unresolvable

        try:
            value = json.loads(answer)
        except (ValueError, RecursionError) as error:
            return False, f"no JSON ({error})"
        schema = {} if self.json_schema is True else self.json_schema
        # Without a registry of its own the library would fetch what a $ref names.
        validator = validator_for(schema)(schema, registry=Registry())
        try:
            error = best_match(validator.iter_errors(value))
        except Unresolvable as problem:
            raise DataError("an assertion's json_schema", f"refers to what is not in it ({problem})",
                            "put it under $defs") from None
        return error is None, "fits" if error is None else f"{error.json_path}: {error.message[:200]}"

    def _cased(self, text: str) -> str:
        return text.casefold() if self.ignore_case else text


_FORMS = tuple(name for name in Assertion.model_fields if name != "ignore_case")
_TEXTS = ("contains", "contains_any", "not_contains", "equals", "starts_with", "ends_with", "regex", "not_regex")
_MANY = TypeAdapter(list[Assertion])


def read(value: Any, where: str) -> list[Assertion]:
    """Assertions from a row: a list of mappings, or one.

    Raises:
        DataError: one of them is none, with the place in the list.
    """
    try:
        return _MANY.validate_python([value] if isinstance(value, dict) else value)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        raise DataError(where, f"assertion {at or 'list'}: {first['msg'].removeprefix('Value error, ')}",
                        f"an assertion has one of {', '.join(_FORMS)}") from None


def as_json(assertions: Sequence[Assertion]) -> str:
    """``assertions`` as a metric gets them."""
    return json.dumps([each.model_dump(mode="json", exclude_defaults=True) for each in assertions], ensure_ascii=False)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
