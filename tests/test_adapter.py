"""The adapter: made, continued, saved, loaded, and refused when it cannot be what the recipe says."""

from __future__ import annotations

import json

import pytest

from lora_kit.adapter import (
    adapter_tensors,
    add_adapter,
    check_trained,
    continue_adapter,
    load_adapter,
    sha256_of,
    token_ids_of,
)
from lora_kit.adapter import save_adapter as save_trained
from lora_kit.adapter_check import check_adapter
from lora_kit.chat import load_tokenizer
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
    (["q_prj"], "'q_prj' matches no module that can be adapted; did you mean 'q_proj'? there are: down_proj, gate"),
    (["q_proj", "v_prj"], "'v_prj' matches no module that can be adapted; did you mean 'v_proj'?"),
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


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("untied") / "model", tie_word_embeddings=False)[0]


@pytest.mark.parametrize(("section", "told"), [
    ({"exclude": ["down_prj"]}, "lora.exclude: 'down_prj' matches no module that can be adapted; did you mean 'd"),
    ({"layers": [0, 2]}, "lora.layers: no module of layer 2 is adapted; the layers are 0 to 1"),
    ({"layers": [0], "targets": ["model.layers.1.self_attn.q_proj", "v_proj"]},
     "lora.layers: model.layers.1.self_attn.q_proj is adapted, which is in none of them"),
    ({"rank_pattern": {"q_porj": 2}}, "lora.rank_pattern: 'q_porj' matches no module that is adapted; they end in: d"),
    ({"alpha_pattern": {"layers.5.*": 2}}, "lora.alpha_pattern: 'layers.5.*' matches no module that is adapted"),
    ({"rank_pattern": {"q_proj(": 2}}, "lora: the pattern 'q_proj(' is no regular expression ("),
    ({"modules_to_save": ["input_layernrm"]}, "lora.modules_to_save: 'input_layernrm' matches no module; did you"),
    ({"modules_to_save": ["embed_tokens"]}, "lora.modules_to_save: 'embed_tokens' is tied to the other end"),
    ({"modules_to_save": ["model"]}, "lora.modules_to_save: 'model' is tied to the other end"),
    ({"init": "orthogonal", "rank": 3}, "lora: peft refuses it (Orthogonal initialization requires"),
    ({"init": "pissa", "rank": 40}, "lora.rank: init pissa takes 40 directions of model.layers.0.self_attn.k"),
    ({"init": "mica", "rank": 4, "rank_pattern": {"v_proj": 50}},
     "lora.rank_pattern.v_proj: init mica takes 50 directions of model.layers.0.self_attn.v_proj, which has 32"),
])
def test_what_the_model_has_no_place_for_is_told_by_name(tiny_model, section, told):
    with pytest.raises(RecipeError) as caught:
        adapted(tiny_model, **section)
    assert str(caught.value).startswith(told)


def test_new_rows_of_a_tied_embedding_are_refused_and_ids_checked(tiny_model, untied_model):
    with pytest.raises(RecipeError, match="lora.trainable_tokens: the input embedding is tied"):
        add_adapter(load_base(tiny_model, dtype="fp32"), LoraSection(), 0, [5])
    with pytest.raises(RecipeError, match="lora.trainable_tokens: 320 is no token: the model has 320"):
        add_adapter(load_base(untied_model, dtype="fp32"), LoraSection(), 0, [5, 320])


def test_tokens_are_named_by_id_or_text(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    assert token_ids_of([7, "<|im_end|>", 7, "a"], tokenizer) == sorted({7, 2, tokenizer("a")["input_ids"][0]})
    with pytest.raises(RecipeError, match="'ab' is 2 tokens, not one"):
        token_ids_of(["ab"], tokenizer)


def test_layers_exclusions_and_patterns_reach_the_modules(tiny_model):
    parameters = lora_parameters(adapted(tiny_model, rank=4, layers=[1], exclude=["down_proj"],
                                         rank_pattern={"layers.1.self_attn.q_proj": 2}))
    ranks = {name.split(".lora_A")[0].removeprefix("base_model.model.model."): parameter.shape[0]
             for name, parameter in parameters.items() if "lora_A" in name}
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
             "mlp.up_proj"]
    assert ranks == {f"layers.1.{name}": 2 if "q_proj" in name else 4 for name in names}


def test_an_adapter_that_fits_a_changed_base_is_refused(tiny_model, tmp_path):
    saved = save_adapter(tiny_model, tmp_path / "adapter", init_lora_weights="pissa")
    for use in (lambda: load_adapter(load_base(tiny_model, dtype="fp32"), saved),
                lambda: check_adapter(tiny_model, saved)):
        with pytest.raises(ModelError, match="was made with pissa, and fits a base that was changed for it"):
            use()


@pytest.mark.parametrize(("change", "told"), [
    (lambda name, tensor: tensor, "is what it was before the first step"),
    (lambda name, tensor: tensor * 0 if "lora_A" in name else tensor, "changes nothing"),
    (lambda name, tensor: tensor * float("nan") if "k_proj.lora_B" in name else tensor, "values that are not finite"),
    (lambda name, tensor: tensor * 1.5, None),
])
@pytest.mark.parametrize("changed_base", [False, True])
def test_an_adapter_is_looked_at_when_training_ends(tiny_model, tmp_path, change, told, changed_base):
    net = adapted(tiny_model, rank=4)
    before = {name: tensor.clone().normal_() for name, tensor in adapter_tensors(net).items()}
    save_trained(net, tmp_path / "start", "base", before)
    start = tmp_path / "start" if changed_base else None
    save_trained(net, tmp_path / "end", "base", {name: change(name, tensor) for name, tensor in before.items()}, start)
    if told is None or changed_base and told == "changes nothing":  # A times 0 takes the first product away again
        return check_trained(tmp_path / "end", sha256_of(before), start)
    with pytest.raises(ModelError, match=told):
        check_trained(tmp_path / "end", sha256_of(before), start)


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
