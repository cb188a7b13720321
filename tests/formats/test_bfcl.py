from __future__ import annotations

import json

import pytest

from lora_kit.errors import DataError
from lora_kit.formats import UnusableRow, bfcl, detect
from lora_kit.records import read_records


def answer(ground_truth, parameters=None) -> list[tuple[str, dict]]:
    return bfcl.first_answer(ground_truth, [{"name": "f", "parameters": parameters or {}}])


def question(identifier: str, **changes) -> dict:
    return {**{k: v for k, v in bfcl.EXAMPLE.items() if k != "ground_truth"}, "id": identifier, **changes}


def write(folder, questions, answers=None):
    path = folder / "BFCL_v4_x.json"
    path.write_text("\n".join(json.dumps(row) for row in questions))
    if answers is not None:
        (folder / "possible_answer").mkdir()
        (folder / "possible_answer" / path.name).write_text("\n".join(json.dumps(row) for row in answers))
    return path


def test_the_example_as_a_call_without_its_optional_parameter():
    read = bfcl.to_conversation(bfcl.EXAMPLE, "q.json:1")
    assert [message.role for message in read.messages] == ["user", "assistant"]
    assert read.messages[1].content is None
    assert read.messages[1].tool_calls == (
        {"type": "function", "function": {"name": "triangle_area", "arguments": {"base": 10, "height": 5}}},
    )
    parameters = read.tools[0]["function"]["parameters"]
    assert parameters["type"] == "object" and parameters["required"] == ["base", "height"]
    assert parameters["properties"]["base"] == {"type": "number", "description": "Its base."}


def test_type_names_are_mapped_all_the_way_down_and_nothing_else_is():
    schema = {
        "type": "dict",
        "properties": {
            "type": {"type": "any", "description": "dict", "default": "float", "enum": ["float"]},
            "points": {"type": "tuple", "items": {"type": "dict", "properties": {"x": {"type": "float"}}}},
            "names": {"type": "ArrayList", "items": {"type": "String"}},
        },
        "required": ["type"],
    }
    assert bfcl.json_schema_of(schema) == {
        "type": "object",
        "properties": {
            "type": {"type": "string", "description": "dict", "default": "float", "enum": ["float"]},
            "points": {"type": "array", "items": {"type": "object", "properties": {"x": {"type": "number"}}}},
            "names": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["type"],
    }
    assert schema["type"] == "dict", "the row itself is not changed"


@pytest.mark.parametrize(
    ("acceptable", "chosen"),
    [
        ({"a": [1, 2]}, {"a": 1}),
        ({"a": ["x", ""]}, {"a": "x"}),
        ({"a": ["", "x"]}, {}),
        ({"a": [""]}, {}),
        ({"a": [[1, 2], [3]]}, {"a": [1, 2]}),
        ({"a": [[]]}, {"a": []}),
        ({"a": [{"b": ["x", "y"], "c": ["", 1]}]}, {"a": {"b": "x"}}),
        ({"a": [[{"b": [5]}, {"b": [6, 7]}]]}, {"a": [{"b": 5}, {"b": 6}]}),
        ({"a": [{"b": [{"c": 1.5, "d": 2}]}]}, {"a": {"b": {"c": 1.5, "d": 2}}}),
        ({"a": [False]}, {"a": False}),
        ({"a": [0]}, {"a": 0}),
        ({"a": [None]}, {"a": None}),
    ],
)
def test_the_first_acceptable_value(acceptable, chosen):
    assert answer([{"f": acceptable}]) == [("f", chosen)]


def test_a_required_parameter_is_never_left_out():
    assert answer([{"f": {"a": ["", "x"], "b": [""]}}], {"required": ["a", "b"]}) == [("f", {"a": "x", "b": ""})]


def test_several_calls_keep_their_order():
    assert answer([{"f": {"a": [1]}}, {"f": {"a": [2]}}]) == [("f", {"a": 1}), ("f", {"a": 2})]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"ground_truth": None}, "no possible answer"),
        ({"ground_truth": ["Michael"]}, "answer is no function call"),
        ({"ground_truth": [["cd(x)"]]}, "answer is no function call"),
        ({"ground_truth": [{"g": {}}]}, "answer names no offered function"),
        ({"ground_truth": [{"triangle_area": {"base": [], "height": [5]}}]}, "no acceptable value"),
        ({"question": bfcl.EXAMPLE["question"] * 2}, "more than one turn"),
        ({"question": [[]]}, "roles out of order"),
        ({"function": None}, "broken tools"),
    ],
)
def test_unusable_rows_say_why(changes, reason):
    with pytest.raises(UnusableRow) as caught:
        bfcl.to_conversation({**bfcl.EXAMPLE, **changes}, "x")
    assert caught.value.reason == reason


def test_questions_are_joined_with_the_answers_beside_them(tmp_path):
    truth = bfcl.EXAMPLE["ground_truth"]
    path = write(
        tmp_path, [question("a"), question("b"), question("c")],
        [{"id": "c", "ground_truth": truth}, {"id": "a", "ground_truth": [{"triangle_area": {"base": [1]}}]}],
    )
    joined = list(bfcl.records(path, "data/BFCL_v4_x.json"))
    assert [origin for origin, _ in joined] == [f"data/BFCL_v4_x.json:{line}" for line in (1, 2, 3)]
    assert [row["ground_truth"] for _, row in joined] == [[{"triangle_area": {"base": [1]}}], None, truth]
    assert detect((row for _, row in read_records(path, "x")), "x") == "bfcl", "detected before it is joined"


def test_the_answers_that_are_missing_are_named(tmp_path):
    path = write(tmp_path, [question("a")])
    with pytest.raises(DataError) as caught:
        bfcl.records(path, "data/BFCL_v4_x.json")
    assert caught.value.where == "data/BFCL_v4_x.json"
    assert "data/possible_answer/BFCL_v4_x.json" in caught.value.todo
    assert bfcl.companions(path.name) == ("possible_answer/BFCL_v4_x.json",)


def test_a_broken_answers_file_is_named_with_its_line(tmp_path):
    path = write(tmp_path, [question("a")], [])
    (tmp_path / "possible_answer" / path.name).write_text('{"id": "a", "ground_truth": []}\n{"id": "b", "gr')
    with pytest.raises(DataError) as caught:
        list(bfcl.records(path))
    assert caught.value.where == "possible_answer/BFCL_v4_x.json:2"


@pytest.mark.archives
@pytest.mark.parametrize(
    ("category", "num_rows", "num_unusable"), [("simple_python", 400, 0), ("multiple", 200, 0), ("live_simple", 258, 2)]
)
def test_the_leaderboards_own_files(archive_member, category, num_rows, num_unusable):
    path = archive_member(f"pypi:bfcl-eval==2026.3.23/bfcl_eval/data/BFCL_v4_{category}.json")
    rows = list(bfcl.records(path))
    assert len(rows) == num_rows
    reasons = []
    for origin, row in rows:
        try:
            read = bfcl.to_conversation(row, origin)
        except UnusableRow as error:
            reasons.append(error.reason)
            continue
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in read.tools}
        assert len(read.messages[-1].tool_calls) == len(row["ground_truth"]) == 1
        call = read.messages[-1].tool_calls[0]["function"]
        acceptable = row["ground_truth"][0][call["name"]]
        assert set(call["arguments"]) <= set(offered[call["name"]]["properties"])
        assert all("" in acceptable[key] for key in set(acceptable) - set(call["arguments"]))
    assert reasons == ["no acceptable value"] * num_unusable
