"""The shipped recipes: each is read, and each hub recipe trains two random layers of its architecture.

No hub is reached. What a recipe asks for beyond model and data (adapter, batches, precision,
4-bit base, sharding, checkpointing) is what runs here, on a CPU and in one process.
"""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path

import pytest

from lora_kit import quantizers, shipped
from lora_kit.recipe_file import read_recipe
from tests import tiny

ROOT = Path(__file__).parent.parent
SHIPPED = shipped.recipe_names()

SIZES = dict(
    vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)
ATTENTION_AND_MLP = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

ARCHITECTURES = {
    "qwen3-0.6b-lora": ("Qwen3", dict(head_dim=16, tie_word_embeddings=True)),
    "qwen3-8b-qlora": ("Qwen3", dict(head_dim=16, tie_word_embeddings=False)),
    "llama-3.2-1b-lora": ("Llama", dict(tie_word_embeddings=True)),
    "llama-3.1-8b-fsdp": ("Llama", dict(tie_word_embeddings=False)),
    "gemma-3-1b-lora": ("Gemma3Text", dict(head_dim=16, sliding_window=32, query_pre_attn_scalar=16)),
    "smollm3-3b-lora": ("SmolLM3", dict(tie_word_embeddings=True)),
    "phi-4-mini-lora": ("Phi3", dict(tie_word_embeddings=True)),
    "mistral-7b-qlora": ("Mistral", dict(sliding_window=None, head_dim=16)),
}
"""Hub recipe -> transformers' configuration class, and what sets it apart from SIZES."""


def config_of(name):
    import transformers

    kind, own = ARCHITECTURES[name]
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **own})


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_is_a_recipe(name):
    recipe = read_recipe(shipped.recipe_path(name)).recipe
    assert recipe.name == name
    assert recipe.description
    lines = shipped.recipe_path(name).read_text().splitlines()
    assert lines[0] == "# yaml-language-server: $schema=./recipe.schema.json"
    assert len(lines) <= 80 and max(map(len, lines)) <= 120, "a recipe is one readable page"


def test_every_hub_recipe_has_its_architecture_here():
    hub = {name for name in SHIPPED if not read_recipe(shipped.recipe_path(name)).recipe.model.base.startswith("pypi:")}
    assert hub == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_its_quantized_forms_are_ones_that_this_architecture_can_take(name):
    import transformers

    config = config_of(name)
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    fields = {**config.to_dict(), "architectures": [model_class.__name__]}
    recipe = read_recipe(shipped.recipe_path(name)).recipe
    assert recipe.quantize
    for form in recipe.forms:
        quantizers.load(form.method).check(fields, form.type)


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    """Forty short conversations, every third with a second exchange."""
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    with open(path, "w") as file:
        for index in range(40):
            messages = [{"role": "user", "content": f"Count to {index}."}, {"role": "assistant", "content": "One."}]
            if index % 3 == 0:
                messages += [{"role": "user", "content": "On."}, {"role": "assistant", "content": f"Up to {index}."}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_hub_recipe_trains_its_architecture(name, rows, tmp_path, monkeypatch):
    import torch
    import transformers
    from safetensors.torch import load_file

    from lora_kit.pipeline import run_recipe

    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    torch.manual_seed(0)
    tiny.save_tokenizer(base)
    transformers.AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16).save_pretrained(base)
    recipe_file = read_recipe(shipped.recipe_path(name), [
        f"model.base={base}", f"data.train.0.source={rows}", "data.held_out_rows=4", "train.steps=2"])
    run = run_recipe(recipe_file, runs_dir=tmp_path / "runs", until="train")

    recipe, figures = recipe_file.recipe, run.seal("train")["figures"]
    assert figures["steps"] == 2
    assert math.isfinite(figures["held_out_before"]) and math.isfinite(figures["held_out_after"])
    if recipe.train.precision != "auto":
        assert figures["precision"] == recipe.train.precision
    adapter = Path(run.artifact("adapter").path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (
        recipe.lora.rank, recipe.lora.alpha, recipe.lora.dropout)
    weights = load_file(adapter / "adapter_model.safetensors")
    adapted = {key.split(".")[-3] for key in weights}
    fused = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert adapted == (fused if name.startswith("phi") else ATTENTION_AND_MLP)
    # B starts at zero: what is not zero was trained, and every layer was reached.
    assert all(weight.abs().max() > 0 for key, weight in weights.items() if "lora_B" in key)
    assert len(weights) == 2 * 2 * len(adapted)


def test_the_wheel_carries_what_shipped_looks_for():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    inside = Path(shipped.__file__).parent.name + "/shipped_data"
    assert wheel["force-include"] == {name: f"{inside}/{name}" for name in ("recipes", "eval")}
    assert all((ROOT / name).is_dir() for name in wheel["force-include"])
