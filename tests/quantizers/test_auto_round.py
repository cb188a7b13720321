"""auto-round W4: what is written loads again in a fresh process and is close to what went in."""

import json

import pytest

from lora_kit import quantizers
from lora_kit.errors import MachineError, ModelError
from tests.quantizers import made_forms

quantizer = quantizers.load("auto_round")
needs_it = pytest.mark.skipif(quantizer.missing() is not None, reason=f"needs {quantizer.missing()}")
pytestmark = pytest.mark.filterwarnings("ignore")  # the package warns while it is imported


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_forms.make(tmp_path_factory.mktemp("auto_round"), "auto_round", "w4")


@needs_it
def test_it_is_close_to_what_went_in_and_smaller(made, tmp_path):
    made_forms.check_close_and_smaller(made, tmp_path / "recording", most_kl=1, engine="auto-round", bits=(4, 9))


@needs_it
def test_its_weights_hold_the_adapters_change(made):
    made_forms.check_change(made, within=0.15, noise=(0.1, 3))


def test_what_cannot_become_it(monkeypatch):
    made_forms.check_refusals(quantizer, "w4", monkeypatch, 'pip install "lora-kit[autoround]"')


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
        quantizer.quantize(made.merged, tmp_path, "w4", [[1, 2, 3]])


@needs_it
def test_config_says_how_it_is_packed(made):
    config = json.loads((made.quantized / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "auto-round" and config["bits"] == 4 and config["group_size"] == 128
