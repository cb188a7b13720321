"""Adapters that cannot be merged rightly are refused, each for what is wrong with it."""

import json
from pathlib import Path

import pytest

from lora_kit.adapter_check import REFUSED, check_adapter
from lora_kit.errors import ModelError, RefusedError
from tests import fake_run, tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("check") / "base")[0]


@pytest.fixture
def adapter(base, tmp_path):
    return fake_run.save_adapter(base, tmp_path / "adapter")


def change_weights(adapter, change):
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: change(name, tensor).contiguous() for name, tensor in weights.items()}, path)


def change_config(adapter, **fields):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}, {"targets": ["q_proj", "down_proj"]}])
def test_a_good_adapter_passes(config, base, tmp_path):
    check_adapter(base, fake_run.save_adapter(base, tmp_path / "adapter", **config))


@pytest.mark.parametrize(("other", "what"), [
    ({"hidden": 32}, "is of another base: model.layers.*lora_"),
    ({"layers": 1}, "adapts model.layers.1.*which this base does not have"),
    ({"num_key_value_heads": 4}, "is of another base: .*k_proj"),
])
def test_another_base_is_refused_by_shape(other, what, adapter, tmp_path):
    folder = tiny.save_model(tmp_path / "other", **other)[0]
    with pytest.raises(ModelError, match=what.replace("base: model", "base: base_model.model.model")):
        check_adapter(folder, adapter)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.filterwarnings("ignore")  # peft warns of ends that are tied
def test_a_lora_on_an_end_of_a_tied_model_parts_the_two(target, base, tmp_path):
    plan = check_adapter(base, fake_run.save_adapter(base, tmp_path / "adapter", targets=["q_proj", target]))
    assert plan.untied and plan.config["tie_word_embeddings"] is False
    assert [name for name, each in plan.targets.items() if each.changes and "layers" not in name] == [
        {"lm_head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}[target]]
    assert "lm_head.weight" in plan.targets


def test_the_head_of_an_untied_model_is_fine(tmp_path):
    base = tiny.save_model(tmp_path / "base", tie_word_embeddings=False)[0]
    check_adapter(base, fake_run.save_adapter(base, tmp_path / "adapter", targets=["q_proj", "lm_head"]))


def test_values_that_are_not_finite_are_refused(base, adapter):
    import torch

    change_weights(adapter, lambda name, tensor: tensor.index_fill(0, torch.tensor([1]), float("nan"))
                   if "layers.1.mlp.up_proj.lora_A" in name else tensor)
    with pytest.raises(ModelError, match=r"not finite \(.*layers.1.mlp.up_proj.lora_A"):
        check_adapter(base, adapter)


def test_an_adapter_that_changes_nothing_is_refused(base, adapter):
    change_weights(adapter, lambda name, tensor: tensor * 0 if "lora_B" in name else tensor)
    with pytest.raises(ModelError, match="changes nothing"):
        check_adapter(base, adapter)


@pytest.mark.parametrize(("fields", "what"), [
    ({"peft_type": "IA3"}, "is IA3, not LoRA"), ({"init_lora_weights": "pissa"}, "was made with pissa"),
    *(({key: value}, rf"\({key}\) ") for key, value in {
        **dict.fromkeys(REFUSED, {"some": "setting"}), "layer_replication": [[0, 2], [0, 2]],
        "alora_invocation_tokens": [5, 6], "target_parameters": ["experts"], "use_qalora": True}.items())])
def test_kinds_that_peft_merges_wrongly_or_otherwise(fields, what, base, adapter):
    change_config(adapter, **fields)
    with pytest.raises(ModelError, match=what):
        check_adapter(base, adapter)


def test_folders_that_are_no_adapter(base, adapter, tmp_path):
    with pytest.raises(ModelError, match="is not a PEFT adapter"):
        check_adapter(base, tmp_path)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(RefusedError, match="pickled ones are not loaded"):
        check_adapter(base, adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(RefusedError, match="is not JSON"):
        check_adapter(base, adapter)


def test_the_page_lists_what_is_refused_and_why():
    page = (Path(__file__).parent.parent / "docs" / "merge.md").read_text(encoding="utf-8")
    for key, why in REFUSED.items():
        assert f"`{key}`" in page and why in " ".join(page.split()), key
