"""The adapter: made, continued, saved, loaded, and refused when it cannot be what the recipe says."""

from __future__ import annotations

import json

import pytest

from lora_kit.adapter import add_adapter, continue_adapter, load_adapter
from lora_kit.adapter import save_adapter as save_trained
from lora_kit.errors import ModelError, RecipeError, RefusedError
from lora_kit.model import load_base
from lora_kit.recipe import LoraSection
from tests import tiny
from tests.fake_run import save_adapter

# ---- a fresh adapter -------------------------------------------------------------------


def adapted(tiny_model, seed: int = 0, **section):
    return add_adapter(load_base(tiny_model, dtype="bf16"), LoraSection(**section), seed)


def lora_parameters(net) -> dict:
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def test_all_linear_adapts_every_layer_but_the_head(tiny_model):
    names = lora_parameters(adapted(tiny_model, rank=4))
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 2 * 2 * 7


def test_the_recipe_s_settings_reach_peft(tiny_model):
    net = adapted(tiny_model, rank=4, alpha=12, dropout=0.25, targets=["q_proj", "v_proj"], rslora=True, dora=True)
    config = net.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 12, 0.25)
    assert config.use_rslora and config.use_dora
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in lora_parameters(net)} == {"q_proj", "v_proj"}


def test_the_first_values_are_a_function_of_the_seed(tiny_model):
    import torch

    one, same, other = (lora_parameters(adapted(tiny_model, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "lora_A" in name)
    assert all(not parameter.any() for name, parameter in one.items() if "lora_B" in name), "it is not zero at first"


@pytest.mark.parametrize(("targets", "told"), [
    (["q_prj"], "'q_prj' matches no module that can be adapted; there are: down_proj, gate_proj, k_proj"),
    (["q_proj", "v_prj"], "'v_prj' matches no module that can be adapted"),
    (["self_attn"], "'self_attn' matches no module that can be adapted"),
    (["input_layernorm"], "'input_layernorm' matches no module that can be adapted"),
    (["all-linear", "q_proj"], "names all-linear beside others"),
    (["lm_head"], "'lm_head' is tied to the other end of this model and cannot be merged; leave it out"),
    (["embed_tokens"], "'embed_tokens' is tied"), (["model.embed_tokens"], "'model.embed_tokens' is tied"),
])
def test_wrong_targets_are_told_by_name(tiny_model, targets, told):
    with pytest.raises(RecipeError) as caught:
        adapted(tiny_model, targets=targets)
    assert told in str(caught.value) and str(caught.value).startswith("lora.targets: ")


def test_the_head_of_an_untied_model_may_be_adapted(tmp_path):
    folder, _ = tiny.save_model(tmp_path / "untied", tie_word_embeddings=False)
    names = lora_parameters(add_adapter(load_base(folder, dtype="fp32"), LoraSection(targets=["lm_head"]), 0))
    assert len(names) == 2 and all("lm_head" in name for name in names)


# ---- an adapter on disk ----------------------------------------------------------------


def test_an_adapter_is_saved_and_loaded_to_the_bit(tiny_model, tmp_path):
    import torch

    net = adapted(tiny_model, rank=4)
    for parameter in lora_parameters(net).values():
        torch.nn.init.normal_(parameter)
    folder = tmp_path / "adapter"
    save_trained(net, folder, "org/base@1")
    assert {path.name for path in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base@1"
    again = load_adapter(load_base(tiny_model, dtype="bf16"), folder)
    assert not again.training and not lora_parameters(again)
    ids = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, net.eval()(ids).logits)


def test_an_adapter_to_go_on_from_is_trainable(tiny_model, tmp_path):
    saved = save_adapter(tiny_model, tmp_path / "adapter")
    net = continue_adapter(load_base(tiny_model, dtype="fp32"), saved)
    assert len(lora_parameters(net)) == 2 * 2 * 7


@pytest.mark.parametrize(("shape", "told"), [
    ({"hidden": 32}, "does not fit the base model (Error(s) in loading state_dict"),
    ({"layers": 3}, "does not fit the base model (14 of its tensors find no place, the first is base_model.model.model."
                    "layers.2.mlp.down_proj.lora_A.weight); name the adapter's own base"),
])
def test_an_adapter_of_another_model_is_told(tiny_model, tmp_path, shape, told):
    other, _ = tiny.save_model(tmp_path / "other", **shape)
    saved = save_adapter(other, tmp_path / "adapter")
    with pytest.raises(ModelError) as caught:
        load_adapter(load_base(tiny_model, dtype="fp32"), saved)
    assert str(caught.value).startswith(f"{saved}: {told}")


@pytest.mark.parametrize(("damage", "kind", "told"), [
    ("no config", ModelError, "is not a PEFT adapter (no adapter_config.json)"),
    ("no weights", RefusedError, "has no safetensors weights, and pickled ones are not loaded"),
    ("cut off", RefusedError, "its weights are not whole"),
    ("broken config", ModelError, "does not fit the base model"), ("other config", ModelError, "does not fit the base"),
])
def test_a_broken_adapter_is_one_line(tiny_model, tmp_path, damage, kind, told):
    saved = save_adapter(tiny_model, tmp_path / "adapter")
    config, weights = saved / "adapter_config.json", saved / "adapter_model.safetensors"
    {
        "no config": config.unlink, "no weights": lambda: weights.rename(saved / "adapter_model.bin"),
        "cut off": lambda: weights.write_bytes(weights.read_bytes()[:-10]),
        "broken config": lambda: config.write_text("{"), "other config": lambda: config.write_text("[]"),
    }[damage]()
    with pytest.raises(kind) as caught:
        load_adapter(load_base(tiny_model, dtype="fp32"), saved)
    assert str(caught.value).startswith(f"{saved}: {told}") and len(str(caught.value)) < 500
