"""Errors: one line each, DESIGN's exit codes, several problems at once."""

from __future__ import annotations

import pickle

import pytest

from lora_kit import errors
from lora_kit.errors import BY_EXIT_CODE, DataError, InternalError, LoraKitError, RecipeError, worst_exit_code


def test_an_error_says_where_what_and_what_to_do():
    error = DataError("rows.jsonl:3", "is not valid JSON", "correct or delete the line")
    assert str(error) == "rows.jsonl:3: is not valid JSON; correct or delete the line"
    assert error.lines() == [str(error)]
    assert str(DataError("rows.jsonl", "is empty")) == "rows.jsonl: is empty"


def test_an_error_is_one_line_whatever_was_put_into_it():
    error = DataError("a\nb", "first line\n  second\tline ", "do\r\nthis")
    assert str(error) == "a b: first line second line; do this"


def test_exit_codes_are_those_of_the_design():
    names = {code: kind.__name__ for code, kind in BY_EXIT_CODE.items()}
    assert names == {
        1: "GateFailed", 2: "RecipeError", 3: "GateInconclusive", 4: "DataError", 5: "ModelError", 6: "MachineError",
        7: "RefusedError", 8: "DivergedError", 70: "InternalError", 75: "StoppedError",
    }
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LoraKitError)]
    assert {kind.exit_code for kind in kinds} == set(BY_EXIT_CODE)


def test_a_recipe_error_carries_every_problem():
    problems = [RecipeError("r.yaml:2", "unknown key 'a'"), RecipeError("r.yaml:5", "'b' is missing", "add it")]
    error = RecipeError.of(problems)
    assert error.lines() == ["r.yaml:2: unknown key 'a'", "r.yaml:5: 'b' is missing; add it"]
    assert error.exit_code == 2
    assert RecipeError("r.yaml:2", "is empty").lines() == ["r.yaml:2: is empty"]


@pytest.mark.parametrize("kind", BY_EXIT_CODE.values())
def test_an_error_survives_the_way_between_processes(kind):
    error = pickle.loads(pickle.dumps(kind("here", "it broke", "mend it")))
    assert type(error) is kind and (error.where, error.what, error.todo) == ("here", "it broke", "mend it")


@pytest.mark.parametrize(("codes", "worst"), [
    ([0, 0], 0), ([], 0), ([75, 0], 75), ([75, 6, 2, 4, 5, 8, 7, 70], 70), ([6, 8, 7], 7), ([5, 8], 8), ([2, 4], 4),
    ([75, 6], 6), ([6, 2], 2), ([0, 130], 130), ([130, 5], 5),
])
def test_the_worst_of_several_ranks_speaks_for_all(codes, worst):
    assert worst_exit_code(codes) == worst


def test_an_unforeseen_error_is_a_bug_of_ours():
    assert LoraKitError("a", "b").exit_code == InternalError.exit_code == 70
