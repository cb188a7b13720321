"""auto-round W4: what is written loads again in a fresh process and is close to what went in."""

import json

import pytest

from lora_kit import certificate, delta, isolate, quantizers
from lora_kit.adapter_check import check_adapter
from lora_kit.errors import MachineError, ModelError, RecipeError
from lora_kit.types import Artifact
from tests import fake_run, tiny

quantizer = quantizers.load("auto_round")
needs_it = pytest.mark.skipif(quantizer.missing() is not None, reason=f"needs {quantizer.missing()}")
pytestmark = pytest.mark.filterwarnings("ignore")  # the package warns while it is imported


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, adapter, merged, quantized)."""
    from lora_kit import merge

    path = tmp_path_factory.mktemp("auto_round")
    base, _ = tiny.save_model(path / "base", dtype="bfloat16", hidden=256, initializer_range=0.1)
    adapter = fake_run.save_adapter(base, path / "adapter", size=0.1)
    for name in ("merged", "quantized"):
        (path / name).mkdir()
    merge.merge_to_folder(str(base), str(adapter), str(base), str(path / "merged"), "bf16")
    rows = [[3 + (7 * row + place) % 250 for place in range(150)] for row in range(6)]
    isolate.call("lora_kit.quantize:quantize_to_folder", {
        "method": "auto_round", "type": "w4", "merged_dir": str(path / "merged"), "out_dir": str(path / "quantized"),
        "data_dir": str(fake_run.save_token_rows(path / "data", rows))})
    return base, adapter, path / "merged", path / "quantized"


@needs_it
def test_it_is_close_to_what_went_in_and_smaller(made, tmp_path):
    base, adapter, merged, quantized = made
    rows = [{"tokens": list(range(3, 120)), "trained": [1] * 117, "origin": "r", "set": "rows"}]
    reference = certificate.record_reference(
        artifact=Artifact(name="merged", path=str(merged), kind="hf", size_bytes=1).as_dict(), rows=rows,
        path=str(tmp_path / "recording"))
    found = isolate.call("lora_kit.certificate:measure", {
        "reference": reference,
        "candidate": Artifact(name="q", path=str(quantized), kind="hf").as_dict()}).value
    assert 1e-5 < found["mean_kl"] < 1 and "auto-round" in found["engine"]
    size, before = ((folder / "model.safetensors").stat().st_size for folder in (quantized, merged))
    assert 4 / 16 < size / before < 9 / 16
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (quantized / name).read_bytes() == (merged / name).read_bytes()
    assert not list(quantized.glob(".*"))


@needs_it
def test_its_weights_hold_the_adapters_change(made):
    from lora_kit.engines.hf import load

    base, adapter, _, quantized = made
    with load(Artifact(name="q", path=str(quantized), kind="hf")) as engine:
        kept = delta.measure(check_adapter(base, adapter), delta.of_model(engine.model))
    assert kept["missing"] == [] and kept["projection"] == pytest.approx(1, abs=0.15)
    assert 0.1 < kept["noise"] < 3


def test_what_cannot_become_it():
    with pytest.raises(RecipeError, match="'int3' is not a type of auto_round"):
        quantizer.check({}, "int3")
    with pytest.raises(ModelError, match="quantized already"):
        quantizer.check({"quantization_config": {"quant_method": "gptq"}}, "w4")


def test_a_missing_package_names_its_install_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert quantizer.missing() == 'pip install "lora-kit[autoround]"'


@pytest.mark.parametrize(("config", "size"), [
    ({"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}, 128),
    ({"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}, 64),
    ({"hidden_size": 160, "intermediate_size": 320, "num_attention_heads": 5}, 32)])
def test_the_group_divides_every_row(config, size):
    assert quantizer.group_size(config) == size
    quantizer.check(config, "w4")


def test_a_width_that_no_group_divides():
    with pytest.raises(ModelError, match="rows of 100 weights are no multiple of 32"):
        quantizer.check({"hidden_size": 100, "intermediate_size": 320, "num_attention_heads": 5}, "w4")


@needs_it
def test_too_few_rows_to_tune_on(made, tmp_path):
    with pytest.raises(MachineError, match="needs 128 tokens of training rows"):
        quantizer.quantize(made[2], tmp_path, "w4", [[1, 2, 3]])


@needs_it
def test_config_says_how_it_is_packed(made):
    config = json.loads((made[3] / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "auto-round" and config["bits"] == 4 and config["group_size"] == 128
