"""Tool call, full match: 1 when the answer is the one right call, by the rules of BFCL.

The rules are those of the Berkeley Function Calling Leaderboard for single Python calls
(Patil et al., "The Berkeley Function Calling Leaderboard", 2025; bfcl-eval 2026.3.23,
``eval_checker/ast_eval/ast_checker.py``, re-derived here and compared with it verdict by
verdict in the tests). A target names, for each parameter, every value that is accepted:

* exactly one call, of the right function; every required parameter given; no parameter
  that the function or the target does not know;
* a parameter may be left out only where ``""`` is among its accepted values;
* a value has the type that the function's description says (an integer does for a float),
  or else the type of the accepted values: a variable's name where a number is meant;
* text is compared in lower case without blanks and ``, . / - _ * ^``, with ' as ";
* lists are compared in order, their texts as above; dicts key by key, each against its own
  list of accepted values; lists of dicts element by element; all else by equality.

Types are BFCL's own (``dict``, ``float``, ``tuple``, ``any``) or JSON Schema's.
Reads and writes nothing.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lora_kit import metrics
from lora_kit.errors import DataError
from lora_kit.tool_calls import Malformed, parse_calls

HIGHER_IS_BETTER = True
STRUCTURED = True

# "any" is read as text: whatever else a target accepts passes as the type of its accepted values.
_TYPES = {
    "string": str, "any": str, "integer": int, "float": float, "number": float, "boolean": bool,
    "array": list, "tuple": list, "dict": dict, "object": dict,
}
_IGNORED_IN_TEXT = re.compile(r"[ ,./\-_*^]")


def score(prediction: str, target: list | str, *, functions: list | str) -> tuple[float, str]:
    """1.0 or 0.0 for one answer.

    Args:
        prediction: what the model wrote; see ``lora_kit/tool_calls.py`` for the spellings that count.
        target: ``[{name: {parameter: [accepted values]}}]``, or its JSON.
        functions: the functions as the benchmark describes them (``name``, ``parameters`` with ``properties``
            and ``required``), bare or under ``function``, or their JSON.

    Raises:
        DataError: the target or a description has another form.
    """
    name, accepted, properties, required = _wanted(target, functions)
    try:
        calls = parse_calls(prediction)
    except Malformed as problem:
        return 0.0, f"the answer {problem}"
    if len(calls) != 1:
        return 0.0, f"{len(calls)} calls, not one"
    call = calls[0]
    if call.name != name:
        return 0.0, f"calls {call.name}, not {name}"
    for parameter in required:
        if parameter not in call.arguments:
            return 0.0, f"{parameter} is required and missing"
    for parameter, value in call.arguments.items():
        if parameter not in properties or parameter not in accepted:
            return 0.0, f"{parameter} is not expected"
        problem = _problem_with(value, properties[parameter], accepted[parameter], f"{name}.{parameter}")
        if problem:
            return 0.0, f"{parameter} {problem}"
    for parameter, values in accepted.items():
        if parameter not in call.arguments and "" not in values:
            return 0.0, f"{parameter} is missing"
    return 1.0, ""


def _wanted(target: list | str, functions: list | str) -> tuple[str, dict, dict, list]:
    """Name, accepted values, properties and required parameters of the one call that is right."""
    try:
        calls = json.loads(target) if isinstance(target, str) else target
        offered = json.loads(functions) if isinstance(functions, str) else functions
        offered = [function.get("function", function) for function in offered]
        (entry,) = calls
        ((called, accepted),) = entry.items()
        # With one function offered, its own description says the name, whatever the answer's key is.
        function = offered[0] if len(offered) == 1 else next(f for f in offered if f["name"] == called)
        parameters = function["parameters"]
        assert all(isinstance(values, list) for values in accepted.values())
        return function["name"], accepted, dict(parameters["properties"]), list(parameters.get("required") or ())
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration, AssertionError):
        raise DataError("tool_call", "the target is not one call [{name: {parameter: [accepted values]}}] of an "
                        "offered function", "mend the item") from None


def _problem_with(value: Any, description: dict, accepted: list, where: str) -> str:
    """Why ``value`` is not among ``accepted``, or nothing when it is."""
    kind = _type_of(description, where)
    inner = None
    if kind is list and isinstance(description.get("items"), dict) and "type" in description["items"]:
        inner = _type_of(description["items"], where)
    if description["type"] in ("float", "number") and type(value) is int:
        value = float(value)
    accepted_kind = _kind_of_first(accepted)
    if type(value) is kind:
        if inner is not None and not any(_elements_fit(value, candidate, inner) for candidate in accepted):
            return f"has elements that are no {inner.__name__}"
        compare_as = kind if accepted_kind in (None, kind) else None
    elif accepted_kind is not None and type(value) is accepted_kind:
        compare_as = None
    else:
        return f"is a {type(value).__name__}, not a {description['type']}"
    if compare_as is dict:
        fits = _fits_a_dict(value, accepted)
    elif compare_as is list and inner is dict:
        fits = any(_fits_dicts(value, candidate) for candidate in accepted)
    elif compare_as is list:
        fits = any(_fits_list(value, candidate) for candidate in accepted)
    elif compare_as is str:
        fits = _plain_text(value) in [_plain_text(candidate) for candidate in accepted if type(candidate) is str]
    else:
        fits = value in accepted
    return "" if fits else f"is {json.dumps(value)[:80]}, not one of {json.dumps(accepted)[:200]}"


def _type_of(description: dict, where: str) -> type:
    try:
        return _TYPES[description["type"]]
    except (KeyError, TypeError):
        raise DataError(f"tool_call {where}", "its description has no type that is known",
                        f"known: {', '.join(_TYPES)}") from None


def _kind_of_first(accepted: list) -> type | None:
    """The type of the first accepted value that is not the mark of an optional parameter."""
    return next((type(candidate) for candidate in accepted if candidate != ""), None)


def _elements_fit(value: list, candidate: Any, inner: type) -> bool:
    """Whether every element has the type ``inner``, or that of the candidate's first element."""
    if type(candidate) is not list:
        return True
    allowed = (inner, _kind_of_first(candidate))
    return all(type(element) in allowed for element in value)


def _plain_text(text: Any) -> Any:
    """Text as it is compared; anything else unchanged."""
    return _IGNORED_IN_TEXT.sub("", text).lower().replace("'", '"') if type(text) is str else text


def _fits_list(value: list, candidate: Any) -> bool:
    # The mark of an optional parameter accepts the empty list too: text is a sequence of its letters here.
    if type(candidate) not in (list, str):
        return False
    return [_plain_text(element) for element in value] == [_plain_text(element) for element in candidate]


def _fits_a_dict(value: Any, candidates: list) -> bool:
    return any(type(candidate) is dict and _fits_dict(value, candidate) for candidate in candidates)


def _fits_dict(value: Any, candidate: dict) -> bool:
    if type(value) is not dict:
        return False
    for key, given in value.items():
        if key not in candidate or _plain_text(given) not in [_plain_text(v) for v in _options(candidate[key])]:
            return False
    return all(key in value or "" in _options(options) for key, options in candidate.items())


def _options(options: Any) -> list:
    """Accepted values of one key; a lone value, which BFCL's own checker cannot read, stands for a list of one."""
    return options if type(options) is list else [options]


def _fits_dicts(value: list, candidate: Any) -> bool:
    if type(candidate) not in (list, str) or len(value) != len(candidate):
        return False
    return all(_fits_a_dict(element, [wanted]) for element, wanted in zip(value, candidate, strict=True))


def build():
    """The metric as an ``evaluate.Metric``."""
    return metrics.as_evaluate("tool_call")
