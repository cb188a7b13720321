"""LoRA+'s two rates, 8-bit moments and where they are refused; a stopped run goes on exactly with each."""

from __future__ import annotations

import pytest

from lora_kit import events, pipeline
from lora_kit.optimizer import make_optimizer, set_learning_rate
from lora_kit.recipe import TrainSection
from tests import tiny_run
from tests.test_train import metrics_of, recipe_for, write_rows


def named(size: int = 64):
    import torch

    return [(f"layer.{part}.default.weight", torch.nn.Parameter(torch.ones(size, size)))
            for part in ("lora_A", "lora_B", "lora_magnitude_vector")]


def test_lora_plus_gives_b_a_multiple_of_the_rate_at_every_step():
    pairs = named()
    optimizer = make_optimizer(pairs, TrainSection(lora_plus_ratio=16, learning_rate=1e-3), "cpu")
    assert [[id(parameter) for parameter in group["params"]] for group in optimizer.param_groups] == [
        [id(pairs[0][1])], [id(pairs[1][1]), id(pairs[2][1])]]
    set_learning_rate(optimizer, 5e-4)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 16 * 5e-4]


def test_plain_lora_is_one_group_in_the_order_of_the_parameters():
    import torch

    pairs = named()
    optimizer = make_optimizer(pairs, TrainSection(), "cpu")
    assert type(optimizer) is torch.optim.AdamW and len(optimizer.param_groups) == 1
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == [id(pair[1]) for pair in pairs]


def test_moments_are_in_8_bits_and_pages_are_for_cuda():
    import torch

    for kind in ("adamw_8bit", "paged_adamw_8bit"):
        told, pairs = [], named()
        with events.listening(told.append):
            optimizer = make_optimizer(pairs, TrainSection(optimizer=kind), "cpu")
        assert not optimizer.is_paged
        assert ["pages on a CUDA device only" in event.text for event in told] == ([True] if "paged" in kind else [])
        for _, parameter in pairs:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = optimizer.state[pairs[0][1]]
        assert state["state1"].dtype == torch.uint8
        # The formula that memory.training_bytes states: the quantization maps are shared.
        held = sum(state[key].nbytes for key in ("state1", "state2", "absmax1", "absmax2"))
        assert held == 2 * 64 * 64 + 2 * 4 * 64 * 64 // 256


@pytest.mark.parametrize("settings", [
    ["train.optimizer=adamw_8bit", "lora.rank=64"],  # factors of 4,096 values and more are kept in 8 bits
    ["train.lora_plus_ratio=8"], ["train.lora_plus_ratio=8", "train.optimizer=adamw_8bit", "lora.rank=64"],
])
def test_a_stopped_run_goes_on_exactly(settings, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    recipe_file = recipe_for(tiny_model, write_rows(tmp_path / "rows.jsonl"), *settings, learning_rate=0.003)

    def train(**options):
        return pipeline.run_recipe(recipe_file, runs_dir=tmp_path / "runs", until="train", **options)

    straight = train()
    with tiny_run.interrupted_at(3):
        train(fresh=True)
    again = train()
    assert again.path != straight.path and metrics_of(again) == metrics_of(straight)
    assert metrics_of(again, "held_out_loss")[-1] < metrics_of(again, "held_out_loss")[0]
    name = "adapter/adapter_model.safetensors"
    assert (again.stage_dir("train") / name).read_bytes() == (straight.stage_dir("train") / name).read_bytes()
