"""The recipe's fields: defaults, fingerprints, what a value may be."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from lora_kit.recipe import IDENTITY, LoraSection, Recipe, TrainSection, json_schema

LEAST = {"name": "r", "model": {"base": "org/model"}, "data": {"train": [{"source": "rows.jsonl"}]}}


def recipe(**changes) -> Recipe:
    return Recipe.model_validate({**LEAST, **changes})


def test_model_and_data_are_all_that_must_be_given():
    made = recipe()
    assert made.lora.targets == ["all-linear"] and made.train.batch_size == 8 and made.quantize == []
    assert made.data.held_out_rows == 64 and made.data.train[0].weight == 1.0


def test_a_recipe_never_changes():
    with pytest.raises(ValidationError):
        recipe().train.steps = 3


@pytest.mark.parametrize("train", ["rows.jsonl", {"source": "rows.jsonl"}, [{"source": "rows.jsonl"}]])
def test_one_source_needs_no_list(train):
    assert recipe(data={"train": train}) == recipe()


@pytest.mark.parametrize("targets", ["q_proj", ["q_proj"]])
def test_one_target_needs_no_list(targets):
    assert LoraSection(targets=targets).targets == ["q_proj"]


@pytest.mark.parametrize(("key", "value"), [
    ("steps", True), ("steps", 0), ("steps", 1.5), ("epochs", float("inf")), ("learning_rate", float("nan")),
    ("learning_rate", 0), ("learning_rate", "fast"), ("warmup", 1), ("schedule", "linear"), ("batch_size", None),
])
def test_a_value_that_cannot_be_meant_is_refused(key, value):
    with pytest.raises(ValidationError):
        TrainSection(**{key: value})


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-x", "two words"])
def test_a_name_is_one_folder(name):
    with pytest.raises(ValidationError):
        recipe(name=name)


def test_a_fingerprint_follows_the_values_and_nothing_else():
    one, same = recipe(train={"steps": 3, "batch_size": 4}), recipe(train={"batch_size": 4, "steps": 3})
    assert one.fingerprint("train") == same.fingerprint("train")
    assert one.fingerprint("train") == recipe(train={"steps": 3, "batch_size": 4}, seed=1).fingerprint("train")
    assert one.fingerprint("train") != recipe(train={"steps": 4, "batch_size": 4}).fingerprint("train")
    # A default that is written down is the same recipe.
    written_down = recipe(train={"steps": 3, "batch_size": 4, "warmup": 0.05})
    assert one.fingerprint(*IDENTITY) == written_down.fingerprint(*IDENTITY)


def test_later_sections_do_not_change_what_a_run_is():
    changed = recipe(bench={"repeats": 5}, merge={"dtype": "fp32"}, eval={"samples": 0}, description="other")
    assert changed.fingerprint(*IDENTITY) == recipe().fingerprint(*IDENTITY)


def test_the_schema_lets_a_file_leave_out_its_name_and_no_other_needed_key():
    assert json_schema()["required"] == ["model", "data"]
    assert json_schema()["additionalProperties"] is False


def test_every_field_says_what_it_means():
    schema = json_schema()
    for title, section in {**schema["$defs"], "Recipe": schema}.items():
        for key, field in section["properties"].items():
            meant = field.get("description") or "$ref" in str(field)
            assert meant, f"{title}.{key} has no docstring"


def test_a_target_stands_for_its_forms_with_its_bounds():
    from pydantic import ValidationError

    from lora_kit.recipe import QuantizeForm, Recipe

    made = Recipe.model_validate({"name": "r", "model": {"base": "b"}, "data": {"train": "rows.jsonl"}, "quantize": [
        {"method": "gguf", "type": "q8_0", "max_kl": 0.1}, {"target": "ollama", "min_top1": 0.5}]})
    assert [(form.name, form.max_kl, form.min_top1) for form in made.forms] == [
        ("gguf-q8_0", 0.1, None), ("gguf-q4_k_m", None, 0.5)]
    for wrong in ({"target": "cpu", "type": "q8_0"}, {"method": "gguf"}, {"max_kl": 1}, {"target": "toaster"}):
        with pytest.raises(ValidationError):
            QuantizeForm.model_validate(wrong)
