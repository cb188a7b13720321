"""The plan: counted, not guessed, and quick on a cached ledger."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit import data, devices, packing, prepared
from lora_kit.errors import RecipeError
from lora_kit.model import find_base, load_base
from lora_kit.plan import make_plan
from lora_kit.recipe_file import parse_recipe
from lora_kit.tokens import read_examples, stream_of_batches


@pytest.fixture
def recipes(tmp_path, tiny_model, monkeypatch) -> Path:
    """A folder with a recipe of the tiny model and 37 rows, and a cache of its own."""
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    rows = [{"messages": [{"role": "user", "content": "q" * (index % 7 + 1)},
                          {"role": "assistant", "content": "a" * (index % 11 + 1)}]} for index in range(37)]
    # Rows that say the same would be left out when one of them is held out.
    for index, row in enumerate(rows):
        row["messages"][0]["content"] += f" {index}"
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.yaml").write_text(
        f"model: {{base: {tiny_model}}}\ndata: {{train: rows.jsonl, held_out_rows: 7, max_tokens: 200}}\n")
    return folder


def plan_of(recipes: Path, *overrides: str):
    path = recipes / "mine.yaml"
    recipe_file = parse_recipe(path.read_text(), path, overrides)
    base = find_base(recipe_file.recipe.model, recipes)
    found = prepared.find(recipe_file.recipe, recipes, base)
    data.prepare(recipe_file.recipe, found, base)
    return make_plan(recipe_file.recipe, found, base), recipe_file.recipe, found


@pytest.mark.parametrize("overrides", [
    (), ("train.epochs=2.5", "train.batch_size=4"), ("train.steps=3",), ("train.steps=50", "train.batch_size=7"),
])
def test_tokens_are_those_of_the_very_batches_that_training_sees(recipes, overrides):
    plan, recipe, found = plan_of(recipes, *overrides)
    examples = read_examples(found.folder, "train")
    assert len(examples) == 30
    stream = stream_of_batches(30, recipe.train.batch_size, recipe.seed, 0)
    seen = [row for rows in itertools.islice(stream, plan.num_steps) for row in rows]
    assert plan.examples_seen == len(seen) == plan.num_steps * recipe.train.batch_size
    assert plan.tokens_seen == sum(len(examples[row].tokens_T) for row in seen)
    assert plan.tokens_trained == sum(int(examples[row].loss_mask_T[1:].sum()) for row in seen)
    assert plan.num_epochs == pytest.approx(plan.num_steps * recipe.train.batch_size / 30)
    assert plan.ledger["splits"]["train"]["rows_used"] == 30


def test_whole_epochs_see_what_the_ledger_counts(recipes):
    plan, _, found = plan_of(recipes, "train.epochs=2", "train.batch_size=5")
    counts = found.ledger()["splits"]["train"]
    assert plan.num_steps == 12
    assert plan.tokens_trained == 2 * counts["tokens_trained"]
    assert plan.tokens_seen == 2 * (counts["tokens_trained"] + counts["tokens_context"])


def test_parameters_are_those_of_the_model(recipes, tiny_model):
    from lora_kit.adapter import add_adapter

    plan, recipe, _ = plan_of(recipes, "lora.rank=4")
    net = load_base(tiny_model, dtype="fp32")
    assert plan.num_params == sum(parameter.numel() for parameter in net.parameters())
    net = add_adapter(net, recipe.lora, 0)
    assert plan.num_trainable_params == sum(
        parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    assert plan.base_bytes == (tiny_model / "model.safetensors").stat().st_size


def test_what_cannot_be_counted_is_not_guessed(recipes):
    for overrides in (("train.from_adapter=./adapter",), ("lora.targets=[layers.0.self_attn.q_proj]",)):
        plan, _, _ = plan_of(recipes, *overrides)
        assert plan.num_trainable_params is None and plan.num_params
        assert ("adapter", "trainable parameters not counted") in plan.rows()


def test_an_unknown_architecture_has_no_counts(recipes, tmp_path, tiny_model, monkeypatch):
    from lora_kit import plan as plan_module

    config = {**json.loads((tiny_model / "config.json").read_text()), "model_type": "unheard_of"}
    monkeypatch.setattr(plan_module.model, "read_config", lambda folder: config)
    plan, _, _ = plan_of(recipes)
    assert plan.num_params is None and plan.num_trainable_params is None and plan.tokens_seen > 0


def test_wrong_targets_are_told_before_training(recipes):
    with pytest.raises(RecipeError, match="lora.targets: 'q_prj' is no linear layer of a llama model"):
        plan_of(recipes, "lora.targets=[q_prj]")


def test_the_rows_of_the_table_hold_the_counts(recipes):
    plan, _, _ = plan_of(recipes, "train.steps=1000", "train.batch_size=30", "lora.rank=2")
    rows = dict(plan.rows())
    assert rows["base"] == f"{plan.num_params:,} parameters, {plan.base_bytes / 1000:.0f} kB on disk"
    share = plan.num_trainable_params / plan.num_params
    assert rows["adapter"] == f"{plan.num_trainable_params:,} trainable parameters ({share:.2%} of the base)"
    assert rows["training"] == "1,000 steps, 1,000 epochs, 30,000 examples"
    assert rows["tokens"] == f"{plan.tokens_seen:,} read, {plan.tokens_trained:,} of them trained"
    assert rows["checkpoints"] == "every 100 steps"
    assert dataclasses.asdict(plan)["num_steps"] == 1000


def test_memory_is_forecast_for_the_very_passes(recipes):
    plan, recipe, found = plan_of(recipes, "train.epochs=3", "train.batch_size=6", "train.pack_tokens=100")
    examples = read_examples(found.folder, "train")
    batches = itertools.islice(stream_of_batches(30, 6, recipe.seed, 0), plan.num_steps)
    micro = [rows for batch in batches for rows in packing.micro_batches(
        batch, examples.length, micro_batch_size=4, budget=100)]
    lengths = [sum(map(examples.length, rows)) for rows in micro]
    # What rows begin with comes once in a pass.
    assert 0.5 * max(lengths) < max(work.num_tokens for work in plan.passes) <= max(lengths)
    assert max(work.num_trained for work in plan.passes) == max(
        sum(map(examples.num_trained, rows)) for rows in micro)
    training = plan.footprints[0]
    assert training.name == "training" and training.of("weights") and training.of("activations")
    assert [name for name, *_ in plan.memory_rows()] == ["training", "merge", "merged"]
    assert plan.memory_lines()[0].startswith("fits: ")


def test_padded_passes_count_their_padding(recipes):
    plan, recipe, found = plan_of(recipes, "train.packing=false", "train.batch_size=6")
    largest = max(plan.passes, key=lambda work: work.num_tokens)
    assert largest.num_tokens == largest.longest * len(largest.lengths) and len(largest.lengths) == 4
    assert largest.num_logits >= largest.num_trained


def test_another_device_and_several_of_them(recipes):
    path = recipes / "mine.yaml"
    recipe_file = parse_recipe(path.read_text(), path, ("train.batch_size=8", "train.shard=fsdp"))
    base = find_base(recipe_file.recipe.model, recipes)
    found = prepared.find(recipe_file.recipe, recipes, base)
    data.prepare(recipe_file.recipe, found, base)
    plan = make_plan(recipe_file.recipe, found, base, device=devices.named("h100"), num_processes=4)
    assert plan.precision == "bf16" and plan.footprints[0].of("gathered layers")
    assert "on each device, h100 has 80 GB (https://" in plan.memory_lines()[0]
    with pytest.raises(RecipeError, match="--gpus: a batch of 8 examples cannot be shared by 3"):
        make_plan(recipe_file.recipe, found, base, device=devices.named("h100"), num_processes=3)
    small = dataclasses.replace(devices.named("h100"), memory_bytes=1e6)
    assert make_plan(recipe_file.recipe, found, base, device=small).memory_lines()[0].startswith("does not fit: ")


def test_what_is_not_forecast_says_why(recipes):
    plan, _, _ = plan_of(recipes, "lora.dora=true")
    assert not plan.footprints and plan.memory_lines() == [
        "memory is not forecast: what DoRA keeps of a pass is not counted"]


WITHOUT_TORCH = """
import sys
from lora_kit import cli
sys.argv = ["lora-kit", "plan", "mine.yaml"]
try:
    cli.main()
finally:
    heavy = {"torch", "transformers", "peft", "accelerate", "evaluate", "datasets"} & set(sys.modules)
    print("heavy:", sorted(heavy), file=sys.stderr)
"""


def test_plan_on_a_cached_ledger_never_imports_torch(recipes):
    plan, _, _ = plan_of(recipes)
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, cwd=recipes,
                          env={**os.environ, "PYTHONPATH": str(Path(data.__file__).parent.parent)})
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "heavy: []"
    assert f"{plan.tokens_seen:,} read, {plan.tokens_trained:,} of them trained" in done.stdout
    assert "next: lora-kit run mine.yaml" in done.stdout
