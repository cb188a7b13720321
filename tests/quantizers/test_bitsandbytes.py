"""int8 and nf4 folders: read back close to what went in, and not harmed by being run."""

import json

import numpy as np
import pytest

from lora_kit.engines import open_engine
from lora_kit.errors import ModelError
from lora_kit.model import load_base
from lora_kit.quantizers import bitsandbytes
from lora_kit.types import Artifact
from tests import tiny

TOKENS = np.random.default_rng(0).integers(3, 250, 60).tolist()


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bnb") / "model"
    return tiny.save_model(folder, dtype="bfloat16", hidden=128, initializer_range=0.1)[0]


@pytest.fixture(scope="module", params=["int8", "nf4"])
def quantized(request, merged, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    bitsandbytes.quantize(merged, folder, request.param)
    return request.param, folder


def log_probs(folder, dtype="auto"):
    with open_engine(Artifact(name="m", path=str(folder), kind="hf"), dtype=dtype) as engine:
        return engine.log_probs(TOKENS).astype(np.float64), engine.name


def test_reads_back_close_to_the_merged_model(quantized, merged):
    kind, folder = quantized
    expected, _ = log_probs(merged, "fp32")
    found, name = log_probs(folder)
    kl = (np.exp(expected) * (expected - found)).sum(axis=1).mean()
    shuffled = (np.exp(expected) * (expected - np.roll(found, 1, axis=0))).sum(axis=1).mean()
    assert 1e-6 < kl < {"int8": 0.01, "nf4": 0.15}[kind] < shuffled / 5
    assert name == "transformers bf16, bitsandbytes"


def test_folder_is_whole(quantized, merged):
    kind, folder = quantized
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["load_in_8bit"] == (kind == "int8") and config["load_in_4bit"] == (kind == "nf4")
    if kind == "nf4":
        assert config["bnb_4bit_quant_type"] == "nf4" and config["bnb_4bit_use_double_quant"]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (merged / name).read_bytes()
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert size < 0.8 * sum(path.stat().st_size for path in merged.glob("*.safetensors"))


@pytest.mark.parametrize("reloaded", [False, True])
def test_running_it_does_not_change_its_weights(reloaded, merged, tmp_path):
    """On a CPU with AVX512-BF16 this fails without the mend: the forward pass repacks the weights in place."""
    import torch

    if reloaded:
        bitsandbytes.quantize(merged, tmp_path, "nf4")
        model = open_engine(Artifact(name="m", path=str(tmp_path), kind="hf")).model
    else:
        model = load_base(merged, dtype="bf16", load_in="4bit")
    weights = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    assert sum(tensor.dtype == torch.uint8 for tensor in weights.values()) == 14
    with torch.inference_mode():
        first = model(torch.tensor([TOKENS])).logits
        second = model(torch.tensor([TOKENS])).logits
    assert torch.equal(first, second)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.data, weights[name]), name


def test_a_quantized_model_is_refused():
    with pytest.raises(ModelError, match="quantized already"):
        bitsandbytes.check({"quantization_config": {"quant_method": "gptq"}}, "nf4")
