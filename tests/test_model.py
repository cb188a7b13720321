"""The base: found, converted, loaded, and refused when they are not what they should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lora_kit import model, sources
from lora_kit.errors import MachineError, ModelError, RecipeError, RefusedError
from lora_kit.model import find_base, load_base
from lora_kit.recipe import ModelSection
from tests import tiny


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    """A copy of the tiny model that a test may break."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def find(base: Path | str, relative_to: Path = Path("/"), **fields):
    return find_base(ModelSection(base=str(base), **fields), relative_to)


# ---- finding the base ------------------------------------------------------------------


def test_a_folder_is_found_relative_to_the_recipe(folder):
    found = find("./model", folder.parent)
    artifact = found["artifact"]
    assert (artifact["name"], artifact["path"], artifact["kind"]) == ("base", str(folder), "hf")
    assert artifact["tokenizer"] == str(folder)
    assert artifact["size_bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["reference"] == "./model" and found["revision"] is None
    assert json.loads(json.dumps(found)) == found


def test_another_model_in_the_same_place_is_noticed(folder):
    before = find(folder)
    assert find(folder) == before
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert find(folder)["sha256"] != before["sha256"]
    assert find(folder)["content"] == before["content"], "the prepared data depends on the tokenizer alone"
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert find(folder)["content"] != before["content"]


@pytest.mark.parametrize(("damage", "kind", "told"), [
    ("missing", ModelError, "no such file or folder"),
    ("no config", ModelError, "has no config.json; name a folder in Hugging Face layout"),
    ("an adapter", ModelError, "is an adapter, not a model; name the base, and the adapter in train.from_adapter"),
    ("broken config", RefusedError, "config.json: is not a JSON object"),
    ("no weights", RefusedError, "has no safetensors weights, and pickled ones are not loaded"),
    ("quantized", ModelError, "is quantized already, and a merge into it would lose the adapter"),
    ("a file", ModelError, "is a file but not a .gguf"),
])
def test_what_is_no_base_is_told(folder, damage, kind, told):
    config = folder / "config.json"
    if damage == "missing":
        shutil.rmtree(folder)
    elif damage in ("no config", "an adapter"):
        config.unlink()
        if damage == "an adapter":
            (folder / "adapter_config.json").write_text("{}")
    elif damage == "broken config":
        config.write_text("[1, 2")
    elif damage == "no weights":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif damage == "quantized":
        config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"load_in_4bit": True}}))
    else:
        shutil.rmtree(folder)
        folder.write_text("weights")
    with pytest.raises(kind) as caught:
        find(folder)
    assert told in str(caught.value) and str(folder) in str(caught.value)


def test_a_template_by_name_goes_into_a_tokenizer_of_its_own(folder, cache):
    from lora_kit.chat import load_tokenizer, template_text

    (folder / "gguf_tokenizer.json").write_text("{}")
    found = find(folder, template="llama3")
    tokenizer = Path(found["artifact"]["tokenizer"])
    assert tokenizer.parent == cache / "tokenizers" and found["artifact"]["path"] == str(folder)
    assert load_tokenizer(tokenizer).chat_template == template_text("llama3", folder)
    assert (tokenizer / "gguf_tokenizer.json").exists()
    assert load_tokenizer(folder).chat_template == tiny.CHATML, "the model's own stays"
    assert found["content"] != find(folder)["content"]
    assert find(folder, template="llama3") == found


def test_an_unknown_template_is_a_recipe_error(folder):
    with pytest.raises(RecipeError, match="model.template: 'lama3' is neither a known template nor a file"):
        find(folder, template="lama3")


# ---- GGUF ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gguf_file(tiny_model, tmp_path_factory) -> Path:
    """The tiny model as a bf16 GGUF file, its tokenizer with a merge: transformers cannot read one without."""
    from lora_kit.quantizers import gguf

    folder = tmp_path_factory.mktemp("gguf")
    source = shutil.copytree(tiny_model, folder / "source")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["ab"] = 259
    tokenizer["model"]["merges"] = [["a", "b"]]
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    gguf.quantize(source, folder, "bf16")
    return folder / gguf.FILE_NAME


def test_a_gguf_file_becomes_a_plain_checkpoint_once(gguf_file, tiny_model, cache, monkeypatch):
    import torch

    from lora_kit.chat import load_tokenizer

    found = find(gguf_file)
    folder = Path(found["artifact"]["path"])
    assert folder.parent == cache / "models" and found["sha256"] == sources.file_sha256(gguf_file)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    expected = load_base(tiny_model, dtype="bf16").state_dict()
    again = load_base(folder, dtype="bf16").state_dict()
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.chat_template == tiny.CHATML and tokenizer.eos_token_id == 2
    assert tokenizer("ab")["input_ids"] == [259]
    assert json.loads((folder / "gguf_tokenizer.json").read_text())["tokenizer.ggml.model"] == "gpt2"
    monkeypatch.setattr(model.isolate, "call", lambda *_, **__: pytest.fail("converted again"))
    assert find(gguf_file) == found


@pytest.mark.parametrize("damage", ["cut off", "no gguf", "empty"])
def test_a_gguf_file_that_is_not_whole_is_one_line(gguf_file, tmp_path, damage):
    path = tmp_path / "broken.gguf"
    content = gguf_file.read_bytes()
    path.write_bytes({"cut off": content[:len(content) // 2], "no gguf": b"PK\3\4" + content[4:], "empty": b""}[damage])
    with pytest.raises((RefusedError, ModelError)) as caught:
        model.convert_gguf(str(path), str(tmp_path / "out"))
    assert str(caught.value).startswith("broken.gguf: ") and len(caught.value.lines()) == 1


# ---- loading ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_base_is_loaded_in_the_type_that_is_asked_for(tiny_model, dtype):
    loaded = load_base(tiny_model, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {model.torch_dtype(dtype)}
    assert not loaded.training


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_a_base_is_loaded_through_bitsandbytes(tiny_model, load_in):
    loaded = load_base(tiny_model, dtype="bf16", load_in=load_in)
    kinds = {type(module).__name__ for module in loaded.modules()}
    assert {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[load_in] in kinds
    if load_in == "4bit":  # see bnb_mend.py
        switched = [module for module in loaded.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
        assert switched and not any(module.support_avx512bf16_for_cpu for module in switched)


def change_tensors(folder: Path, change) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_missing_tensor_is_not_drawn_at_random(folder):
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(ModelError, match=r"1 of its tensors are missing .* model.layers.1.self_attn.q_proj.weight;"):
        load_base(folder, dtype="fp32")


def test_a_tensor_of_another_size_is_named(folder):
    def shrink(tensors):
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name][:10].contiguous()

    change_tensors(folder, shrink)
    with pytest.raises(ModelError, match="not of the size .* the first is model.layers.0.mlp.up_proj.weight;"):
        load_base(folder, dtype="fp32")


def test_cut_off_weights_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RefusedError, match="its weights are not whole .*; fetch the model again"):
        load_base(folder, dtype="fp32")


def test_an_unknown_architecture_is_one_line(folder):
    (folder / "config.json").write_text('{"model_type": "transmogrifier"}')
    with pytest.raises(ModelError, match="does not load .*transmogrifier"):
        load_base(folder, dtype="fp32")


def test_code_that_comes_with_a_model_is_not_run(folder, tmp_path):
    witness = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(f"open({str(witness)!r}, 'w')\n")
    (folder / "config.json").write_text(json.dumps({
        "model_type": "own", "auto_map": {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.M"}}))
    with pytest.raises(ModelError):
        load_base(folder, dtype="fp32")
    assert not witness.exists()


def test_a_missing_attention_implementation_is_the_machine_s(tiny_model):
    with pytest.raises(MachineError, match="model.attention: flash_attention_2 cannot be used .*; set model.attention"):
        load_base(tiny_model, dtype="bf16", attention="flash_attention_2")


# ---- the default base ------------------------------------------------------------------


@pytest.mark.real_model
def test_the_default_base_is_the_model_it_says(smollm2_base):
    config = model.read_config(smollm2_base)
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]) == (
        "llama", 30, 576, 49_152)
    assert config["tie_word_embeddings"] and config["dtype"] == "bfloat16"
    assert 265e6 < model.weight_bytes(smollm2_base) < 275e6
    loaded = load_base(smollm2_base, dtype="bf16")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == 134_515_008
