"""The benchmark's matching rules: each rule by a case, and all of them against its own checker."""

from __future__ import annotations

import copy
import importlib.util
import json
import random
import sys
import types
from pathlib import Path

import pytest

from lora_kit.errors import DataError
from lora_kit.metrics import tool_call
from tests.metrics.checks import check_build

FUNCTION = {"name": "plan.trip", "parameters": {"type": "dict", "required": ["city", "days"], "properties": {
    "city": {"type": "string"}, "days": {"type": "integer"}, "budget": {"type": "float"},
    "stops": {"type": "array", "items": {"type": "string"}}, "prefs": {"type": "dict"},
    "rooms": {"type": "array", "items": {"type": "dict"}}, "point": {"type": "tuple", "items": {"type": "float"}},
    "extra": {"type": "any"}, "guide": {"type": "boolean"}}}}
ACCEPTED = {
    "city": ["New York, NY", "NYC"], "days": [3], "budget": [100.0, ""], "stops": [["Soho", "Harlem"], ""],
    "prefs": [{"food": ["Thai"], "view": ["river", ""]}, ""], "rooms": [[{"beds": [2]}, {"beds": [1, 3]}], ""],
    "point": [[1.5, 2.0], ""], "extra": [7, ""], "guide": [True, ""],
}
RIGHT = {"city": "NYC", "days": 3}


def verdict(arguments, name="plan.trip", accepted=ACCEPTED):
    text = json.dumps({"name": name, "arguments": arguments})
    return tool_call.score(text, [{"plan.trip": accepted}], functions=[FUNCTION])


@pytest.mark.parametrize("arguments", [
    RIGHT,
    {**RIGHT, "city": "new york ny"},  # case, blanks and punctuation do not count
    {**RIGHT, "budget": 100},  # an integer does for a float
    {**RIGHT, "stops": ["soho.", "HARLEM"]},
    {**RIGHT, "prefs": {"food": "thai"}},  # an optional key left out
    {**RIGHT, "rooms": [{"beds": 2}, {"beds": 3}]},
    {**RIGHT, "point": [1.5, 2.0]},
    {**RIGHT, "extra": 7},  # any: the type of the accepted values
    {**RIGHT, "stops": []},  # the mark of an optional parameter accepts an empty list
])
def test_right_calls(arguments):
    assert verdict(arguments) == (1.0, "")


@pytest.mark.parametrize("arguments, reason", [
    ({"city": "NYC"}, "days is required and missing"),
    ({**RIGHT, "colour": "red"}, "colour is not expected"),
    ({**RIGHT, "days": 3.0}, "days is a float, not a integer"),
    ({**RIGHT, "days": "3"}, "days is a str, not a integer"),
    ({**RIGHT, "days": True}, "days is a bool, not a integer"),
    ({**RIGHT, "days": 4}, "days is 4, not one of [3]"),
    ({**RIGHT, "city": "Boston"}, 'city is "Boston", not one of ["New York, NY", "NYC"]'),
    ({**RIGHT, "guide": False}, 'guide is false, not one of [true, ""]'),
    ({**RIGHT, "stops": ["Harlem", "Soho"]}, 'stops is ["Harlem", "Soho"], not one of [["Soho", "Harlem"], ""]'),
])
def test_wrong_calls_say_why(arguments, reason):
    assert verdict(arguments) == (0.0, reason)


@pytest.mark.parametrize("arguments", [
    {**RIGHT, "prefs": {"view": "river"}}, {**RIGHT, "prefs": {"food": "Thai", "price": 3}},
    {**RIGHT, "rooms": [{"beds": 2}]}, {**RIGHT, "rooms": [{"beds": 1}, {"beds": 2}]}, {**RIGHT, "point": [1.5]},
    {**RIGHT, "budget": "100"}, {**RIGHT, "extra": 8},
])
def test_wrong_nested_values(arguments):
    assert verdict(arguments)[0] == 0.0


def test_the_name_counts_and_a_parameter_that_is_not_optional_may_not_be_left_out():
    assert verdict(RIGHT, name="plan_trip") == (0.0, "calls plan_trip, not plan.trip")
    assert verdict(RIGHT, accepted={**ACCEPTED, "guide": [True]}) == (0.0, "guide is missing")
    assert verdict({**RIGHT, "guide": True}, accepted={**ACCEPTED, "guide": [True]})[0] == 1.0


def test_a_variable_stands_where_the_target_has_text():
    accepted = {**ACCEPTED, "days": ["num_days"]}
    assert verdict({**RIGHT, "days": "num_days"}, accepted=accepted)[0] == 1.0
    assert verdict({**RIGHT, "days": "numdays"}, accepted=accepted)[0] == 0.0  # a name is compared exactly


def test_of_several_functions_the_targets_one_is_called():
    other = {"name": "fly", "parameters": {"type": "dict", "properties": {}, "required": []}}
    text = json.dumps({"name": "plan.trip", "arguments": RIGHT})
    assert tool_call.score(text, [{"plan.trip": ACCEPTED}], functions=[other, FUNCTION])[0] == 1.0
    assert tool_call.score(text, [{"fly": {}}], functions=[other, FUNCTION]) == (0.0, "calls plan.trip, not fly")


def test_json_schema_types_serve_too():
    function = {"type": "function", "function": {"name": "f", "parameters": {
        "type": "object", "properties": {"x": {"type": "number"}, "o": {"type": "object"}}}}}
    text = '{"name": "f", "arguments": {"x": 2, "o": {"k": "V"}}}'
    assert tool_call.score(text, [{"f": {"x": [2.0], "o": [{"k": ["v"]}]}}], functions=[function])[0] == 1.0


@pytest.mark.parametrize("target, functions", [
    ("no JSON", [FUNCTION]), ([], [FUNCTION]), ([{"other": {}}], [FUNCTION, FUNCTION]),
    ([{"plan.trip": {"days": 3}}], [FUNCTION]),
    ([{"f": {"x": [1]}}], [{"name": "f", "parameters": {"properties": {"x": {"type": "quaternion"}}}}]),
])
def test_a_target_that_cannot_be_scored_is_an_error_not_a_zero(target, functions):
    with pytest.raises(DataError):
        tool_call.score('{"name": "f", "arguments": {"x": 1}}', target, functions=functions)


def test_build():
    right = json.dumps({"name": "plan.trip", "arguments": RIGHT})
    check_build(tool_call, "tool_call", [right, "no"], [[{"plan.trip": ACCEPTED}]] * 2, functions=[[FUNCTION]] * 2)


# ---- against the benchmark's own checker ------------------------------------------------


def load_original(path: Path):
    """The module ``ast_checker`` from its source, with stand-ins for what it imports and Python calls do not use."""
    class Anything(dict):
        def __missing__(self, key):
            return types.SimpleNamespace(underscore_to_dot=False)

    stand_ins = {
        "bfcl_eval.constants.enums": {"Language": types.SimpleNamespace(PYTHON="python", JAVA="java", JAVASCRIPT="js")},
        "bfcl_eval.constants.model_config": {"MODEL_CONFIG_MAPPING": Anything()},
        "bfcl_eval.constants.type_mappings": {"JAVA_TYPE_CONVERSION": {}, "JS_TYPE_CONVERSION": {}},
        "bfcl_eval.eval_checker.ast_eval.type_convertor.java_type_converter": {"java_type_converter": None},
        "bfcl_eval.eval_checker.ast_eval.type_convertor.js_type_converter": {"js_type_converter": None},
    }
    names = [name for full in stand_ins for name in
             (".".join(full.split(".")[:depth]) for depth in range(1, full.count(".") + 2))]
    kept = {name: sys.modules.get(name) for name in names}
    try:
        for name in names:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__dict__.update(stand_ins.get(name, {}))
        spec = importlib.util.spec_from_file_location("original_ast_checker", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        for name, module_before in kept.items():
            sys.modules.pop(name, None)
            if module_before is not None:
                sys.modules[name] = module_before


def first_right_call(item: dict, answers: dict, draw: random.Random) -> tuple[str, dict]:
    """A call that the answers accept, optional parameters present at random."""
    def pick(options):
        choices = [option for option in options if option != ""]
        return plain(draw.choice(choices)) if choices else None

    def plain(value):
        if isinstance(value, dict):
            return {key: pick(options) if isinstance(options, list) else options for key, options in value.items()
                    if not (isinstance(options, list) and "" in options and draw.random() < 0.5)}
        if isinstance(value, list):
            return [plain(element) for element in value]
        return value

    name, accepted = next(iter(answers["ground_truth"][0].items()))
    arguments = {}
    for parameter, options in accepted.items():
        value = pick(options)
        if value is None or ("" in options and draw.random() < 0.5):
            continue
        arguments[parameter] = value
    return name, arguments


def mutate(name: str, arguments: dict, item: dict, draw: random.Random) -> tuple[str, dict, str]:
    """The call with one change at a random depth, and the change's name."""
    arguments = copy.deepcopy(arguments)
    offered = [function["name"] for function in item["function"]]
    kind = draw.choice(["none", "name", "missing", "extra", "known_extra", "value", "value", "value", "value", "value"])
    if kind == "name":
        return draw.choice([*offered, name + "_x", name.upper(), name.replace(".", "_")]), arguments, kind
    if kind == "extra":
        return name, {**arguments, "unheard_of": 1}, kind
    if kind == "known_extra":
        known = [p for f in item["function"] for p in f["parameters"]["properties"] if p not in arguments]
        odd = draw.choice(["", "x", 0, 1, 2.5, [], {}, True, None])
        return name, {**arguments, **({draw.choice(known): odd} if known else {})}, kind
    if not arguments or kind == "none":
        return name, arguments, "none"
    parameter = draw.choice(sorted(arguments))
    if kind == "missing":
        del arguments[parameter]
        return name, arguments, kind
    arguments[parameter], change = changed(arguments[parameter], draw)
    return name, arguments, change


def changed(value, draw: random.Random):
    """``value`` with one change, often inside it."""
    if isinstance(value, (list, dict)) and value and draw.random() < 0.6:
        value = copy.deepcopy(value)
        key = draw.choice(range(len(value)) if isinstance(value, list) else sorted(value))
        value[key], change = changed(value[key], draw)
        return value, "inner_" + change
    changes = {
        "text": lambda: str(value), "in_list": lambda: [value],
        "other_type": lambda: draw.choice([0, 1.5, "x", "", [], {}, True, None, [1], ["x"]]),
    }
    if isinstance(value, bool):
        changes.update(negated=lambda: not value, number=lambda: int(value))
    elif isinstance(value, (int, float)):
        changes.update(plus=lambda: value + 1, as_int=lambda: int(value), as_float=lambda: float(value))
    elif isinstance(value, str):
        changes.update(
            case=lambda: value.swapcase(), punctuation=lambda: "-".join(value.split(" ")) + ".",
            ignored=lambda: value.replace(" ", "").replace(",", "^*_/"), quotes=lambda: value.replace("'", '"') + "'",
            kept=lambda: value + "!", emptied=lambda: "", newline=lambda: value + "\n")
    elif isinstance(value, list):
        changes.update(reverse=lambda: value[::-1], longer=lambda: value + value[:1], shorter=lambda: value[:-1],
                       none_left=lambda: [])
    elif isinstance(value, dict):
        changes.update(more=lambda: {**value, "unheard_of": 1}, fewer=lambda: dict(list(value.items())[1:]),
                       none_left=lambda: {})
    change = draw.choice(sorted(changes))
    return changes[change](), change


def json_lines(path: Path) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def compare_with_original(original, folder: Path, splits: list[str], per_item: int):
    """Count of verdicts compared, those that agree on a match, verdicts the original cannot give, and disagreements."""
    draw = random.Random(7)
    compared = matches = crashes = 0
    disagreements = []
    for split in splits:
        questions = json_lines(folder / f"BFCL_v4_{split}.json")
        answers = json_lines(folder / "possible_answer" / f"BFCL_v4_{split}.json")
        for item, answer in zip(questions, answers, strict=True):
            assert item["id"] == answer["id"]
            for repeat in range(per_item):
                name, arguments = first_right_call(item, answer, draw)
                if repeat:
                    name, arguments, change = mutate(name, arguments, item, draw)
                else:
                    change = "right"
                truth = answer["ground_truth"]
                ours = tool_call.score(
                    "<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>",
                    truth, functions=item["function"])[0] == 1.0
                try:
                    theirs = original.ast_checker(copy.deepcopy(item["function"]), [{name: copy.deepcopy(arguments)}],
                                                  copy.deepcopy(truth), "python", split, "model")["valid"]
                except Exception:  # noqa: BLE001 - it cannot judge this one
                    crashes += 1
                    assert not ours, (item["id"], change, arguments)
                    continue
                compared += 1
                matches += theirs
                if ours != theirs:
                    disagreements.append((item["id"], change, name, arguments, truth, ours, theirs))
    return compared, matches, crashes, disagreements


@pytest.mark.archives
def test_verdicts_equal_the_benchmarks_own(archive_member):
    package = "pypi:bfcl-eval==2026.3.23/bfcl_eval"
    original = load_original(archive_member(f"{package}/eval_checker/ast_eval/ast_checker.py"))
    splits = ["live_simple", "simple_python", "multiple"]
    for split in splits:
        archive_member(f"{package}/data/possible_answer/BFCL_v4_{split}.json")
        folder = archive_member(f"{package}/data/BFCL_v4_{split}.json").parent
    compared, matches, crashes, disagreements = compare_with_original(original, folder, splits, per_item=12)
    assert not disagreements, disagreements[:3]
    assert compared > 10_000 and 0.2 < matches / compared < 0.8
    assert crashes < compared / 100
