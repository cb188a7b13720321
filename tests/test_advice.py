"""advice.py: the cheapest changes that make it fit, no more than are needed, and a recipe that has them."""

from __future__ import annotations

import dataclasses

import pytest

from lora_kit import advice, data, devices, memory, prepared
from lora_kit.advice import Change
from lora_kit.errors import RecipeError
from lora_kit.model import find_base
from lora_kit.plan import make_plan
from lora_kit.recipe_file import read_recipe
from tests.test_plan import recipes  # noqa: F401 - a fixture

SHAPE = memory.shape_of({"model_type": "llama", "vocab_size": 1000, "hidden_size": 100, "intermediate_size": 300,
                         "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True})


def recipe_of(tmp_path, *overrides: str):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {base: m}\ndata: {train: r.jsonl}\n")
    return read_recipe(path, overrides).recipe


def test_the_order_is_that_of_what_changes_cost(tmp_path):
    found = advice.candidates(recipe_of(tmp_path), SHAPE, devices.named("rtx4090"), 1, 500)
    assert [(change.key, change.value) for change in found] == [
        ("train.pack_tokens", 2048), ("train.pack_tokens", 1024), ("train.optimizer", "adamw_8bit"),
        ("train.gradient_checkpointing", True), ("model.load_in", "8bit"), ("model.load_in", "4bit"), ("lora.rank", 8)]
    assert found[3].cost.startswith("about ") and "more operations" in found[3].cost
    several = advice.candidates(recipe_of(tmp_path, "train.packing=false", "train.fast=[]", "train.precision=fp32"),
                                SHAPE, devices.named("h100"), 4, 500)
    assert [change.key for change in several][:4] == ["train.shard", "train.micro_batch_size", "train.fast",
                                                      "train.precision"]


def test_changes_are_taken_in_order_until_it_fits_and_unneeded_ones_are_taken_back(tmp_path):
    recipe = recipe_of(tmp_path)
    options = [Change(key="train.pack_tokens", value=1024, cost="a"), Change(key="train.optimizer", value="adamw_8bit",
               cost="b"), Change(key="train.gradient_checkpointing", value=True, cost="c")]

    def peak_of(tried):
        return (100 - 10 * (tried.train.pack_tokens == 1024) - 5 * (tried.train.optimizer == "adamw_8bit")
                - 40 * tried.train.gradient_checkpointing)

    few = advice.advise(recipe, options, peak_of, 92)
    assert few.fits and [(change.key, peak) for change, peak in few.steps] == [("train.pack_tokens", 90)]
    # Checkpointing alone is enough: what came before it is not needed.
    one = advice.advise(recipe, options, peak_of, 60)
    assert [change.key for change in one.changes] == ["train.gradient_checkpointing"] and one.fits
    three = advice.advise(recipe, options, peak_of, 46)
    assert [peak for _, peak in three.steps] == [90, 85, 45]
    never = advice.advise(recipe, options, peak_of, 10)
    assert not never.fits and len(never.steps) == 3
    assert one.rows() == [("train.gradient_checkpointing: true", "60 B", "c")]


def test_a_plan_that_does_not_fit_brings_its_advice_and_the_recipe_that_does(recipes):  # noqa: F811
    recipe_file = read_recipe(recipes / "mine.yaml", ["train.batch_size=20", "train.fast=[]", "lora.rank=64"])
    base = find_base(recipe_file.recipe.model, recipes)
    found = prepared.find(recipe_file.recipe, recipes, base)
    data.prepare(recipe_file.recipe, found, base)
    device = dataclasses.replace(devices.named("h100"), memory_bytes=505e6)
    made = make_plan(recipe_file.recipe, found, base, device=device)
    assert made.advice.fits and made.footprints[0].total > 505e6
    fitted = recipes / "fitted.yaml"
    (recipes / "mine.yaml").write_text("# mine\n" + (recipes / "mine.yaml").read_text())
    recipe_file = read_recipe(recipes / "mine.yaml", ["train.batch_size=20", "train.fast=[]", "lora.rank=64"])
    advice.write(recipe_file, made.advice.changes, fitted)
    assert fitted.read_text().startswith("# mine\n")
    again = read_recipe(fitted).recipe
    assert again.train.batch_size == 20 and again.model == recipe_file.recipe.model
    assert all(getattr(getattr(again, change.key.split(".")[0]), change.key.split(".")[1]) == change.value
               for change in made.advice.changes)
    fits = make_plan(again, found, base, device=device)
    assert fits.advice is None and fits.footprints[0].total <= 505e6
    with pytest.raises(RecipeError, match="is there already"):
        advice.write(recipe_file, [], fitted)
    with pytest.raises(RecipeError, match="stands in another folder"):
        advice.write(recipe_file, [], recipes.parent / "fitted.yaml")


def test_what_nothing_can_make_fit_is_said(recipes):  # noqa: F811
    recipe_file = read_recipe(recipes / "mine.yaml")
    base = find_base(recipe_file.recipe.model, recipes)
    found = prepared.find(recipe_file.recipe, recipes, base)
    data.prepare(recipe_file.recipe, found, base)
    made = make_plan(recipe_file.recipe, found, base, device=dataclasses.replace(
        devices.named("h100"), memory_bytes=1e6))
    assert not made.advice.fits and "no changes that are known here" in made.memory_lines()[-1]
