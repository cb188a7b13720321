"""calibration.py and calibrate.py: what is measured is kept for this machine, and the plan uses it."""

import json

import pytest

from lora_kit import calibrate, calibration, isolate, memory, model, plan
from tests import tiny_run
from tests.test_plan import plan_of, recipes  # noqa: F401 - a fixture


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))


def test_values_are_laid_over_earlier_ones_of_the_same_machine_and_precision():
    assert calibration.load("bf16") == calibration.Calibration() and calibration.load("bf16").rates is None
    calibration.store("bf16", train_flops_per_second=1e9, read_flops_per_second=2e9)
    assert calibration.load("bf16").rates is None
    calibration.store("bf16", write_bytes_per_second=3e9, model="m")
    calibration.store("fp32", kept_share=0.4, kept_from=5)
    rates = calibration.load("bf16").rates
    assert (rates.train_flops_per_second, rates.write_bytes_per_second) == (1e9, 3e9)
    assert rates.source.startswith("measured here on 20") and rates.source.endswith("with m")
    assert calibration.load("fp32").kept_share == 0.4 and calibration.load("bf16").kept_share is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"MACHINE": {"bf16": {"unheard_of": 1}}}'])
def test_a_broken_file_is_no_calibration(text):
    calibration.path().parent.mkdir(parents=True)
    calibration.path().write_text(text.replace("MACHINE", calibration.machine()))
    assert calibration.load("bf16") == calibration.Calibration()
    calibration.store("bf16", floor_bytes=1.0)
    assert calibration.load("bf16").floor_bytes == 1.0


def test_another_machine_is_another_entry(monkeypatch):
    calibration.store("bf16", floor_bytes=1.0)
    monkeypatch.setattr(calibration.hardware, "usable_cores", lambda: 77)
    assert calibration.load("bf16").floor_bytes is None
    assert len(json.loads(calibration.path().read_text())) == 1


def test_five_steps_and_an_answering_base_make_rates(recipes, monkeypatch):  # noqa: F811
    monkeypatch.setattr(isolate, "call", tiny_run.call_here)
    recipe_file = tiny_run.read(recipes / "mine.yaml")
    found = calibrate.calibrate(recipe_file, "fp32")
    assert found == calibration.load("fp32") and found.rates is not None and found.floor_bytes > 100e6
    assert not (recipes / "runs").exists()
    made, recipe, prepared_data = plan_of(recipes, "train.precision=fp32", "train.steps=30")
    assert made.outlook.rates == found.rates
    shape = memory.shape_of(model.read_config(recipes.parent / "recipes" / recipe.model.base))
    expected = made.tokens_seen * memory.training_flops_per_token(
        shape, recipe.lora, context=sum(made.ledger["splits"]["train"][key] for key in (
            "tokens_trained", "tokens_context")) / 30 / 2, trained_share=made.tokens_trained / made.tokens_seen
    ) / found.train_flops_per_second
    assert made.outlook.train_seconds == pytest.approx(expected)
    assert made.footprints[0].of("floor") == found.floor_bytes
    text = dict(made.outlook.rows())
    assert text["rates"].startswith("measured here on") and text["disk"].count("merged") == 1


def test_without_a_calibration_nothing_is_said_of_time(recipes):  # noqa: F811
    made, _, _ = plan_of(recipes)
    assert made.outlook is None and any("--calibrate" in part for part in made.parts() if isinstance(part, str))
    assert plan.priced(made_recipe := plan_of(recipes)[1], 2.0).price_per_hour == 2.0
    assert plan.priced(made_recipe, None) is None
