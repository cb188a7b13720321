"""memory_short.py: training that runs out of memory says what the plan says."""

from __future__ import annotations

import dataclasses

import pytest

from lora_kit import devices, memory_short, pipeline, train
from lora_kit.errors import MachineError
from tests import tiny_run


@pytest.mark.parametrize(("error", "is_one"), [
    (MemoryError(), True), (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
    (RuntimeError("sizes differ"), False), (ValueError("cannot allocate memory"), False)])
def test_ways_of_running_out(error, is_one):
    assert memory_short.is_out_of_memory(error) == is_one


def world_of(tiny_model, tmp_path, monkeypatch, **sections) -> tiny_run.World:
    world = tiny_run.World(folder=tmp_path)
    tiny_run.write_recipe(tmp_path, tiny_model, **sections)
    world.use(monkeypatch)
    return world


def test_the_message_has_the_forecast_and_the_change(tiny_model, tmp_path, monkeypatch):
    world = world_of(tiny_model, tmp_path, monkeypatch)

    def run_out(recipe, run):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(train, "stage", run_out)
    with pytest.raises(MachineError, match="train: out of memory; the plan forecasts .* MB at .*, and .* has ") as told:
        pipeline.run_recipe(tiny_run.read(world.recipe), runs_dir=world.runs, until="train")
    assert told.value.exit_code == 6 and isinstance(told.value.__cause__, RuntimeError)


def test_the_changes_are_those_of_the_plan(tiny_model, tmp_path, monkeypatch):
    world = world_of(tiny_model, tmp_path, monkeypatch, train={"steps": 3, "batch_size": 8, "fast": []})
    run = pipeline.run_recipe(tiny_run.read(world.recipe), runs_dir=world.runs, until="data")
    device = dataclasses.replace(devices.named("h100"), memory_bytes=501e6)
    told = memory_short.explained(run, device)
    assert "--set train." in told.todo and " comes to 50" in told.todo and "h100 has 501 MB" in told.what


def test_what_is_not_forecast_still_says_what_to_do(tiny_model, tmp_path, monkeypatch):
    world = world_of(tiny_model, tmp_path, monkeypatch, lora={"rank": 4, "dora": True})
    run = pipeline.run_recipe(tiny_run.read(world.recipe), runs_dir=world.runs, until="data")
    told = memory_short.explained(run)
    assert told.what == "out of memory" and "train.gradient_checkpointing" in told.todo


def test_other_errors_pass(tiny_model, tmp_path, monkeypatch):
    world = world_of(tiny_model, tmp_path, monkeypatch)

    def fail(recipe, run):
        raise RuntimeError("sizes differ")

    monkeypatch.setattr(train, "stage", fail)
    with pytest.raises(RuntimeError, match="sizes differ"):
        pipeline.run_recipe(tiny_run.read(world.recipe), runs_dir=world.runs, until="train")
