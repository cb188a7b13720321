"""torchao int8: what is written loads again in a fresh process and is close to what went in."""

import os
import subprocess
import sys

import pytest

from lora_kit import certificate, delta, isolate, quantizers
from lora_kit.adapter_check import check_adapter
from lora_kit.errors import ModelError, RecipeError
from lora_kit.types import Artifact
from tests import apart, fake_run, tiny, tiny_run

quantizer = quantizers.load("torchao")
needs_it = pytest.mark.skipif(quantizer.missing() is not None, reason=f"needs {quantizer.missing()}")
pytestmark = pytest.mark.filterwarnings("ignore")  # the package warns while it is imported


@pytest.fixture(scope="module", autouse=True)
def processes_see_it():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in apart.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, adapter, merged, quantized)."""
    from lora_kit import merge

    path = tmp_path_factory.mktemp("torchao")
    base, _ = tiny.save_model(path / "base", dtype="bfloat16", hidden=256, initializer_range=0.1)
    adapter = fake_run.save_adapter(base, path / "adapter", size=0.1)
    for name in ("merged", "quantized"):
        (path / name).mkdir()
    merge.merge_to_folder(str(base), str(adapter), str(base), str(path / "merged"), "bf16")
    rows = [[3 + (7 * row + place) % 250 for place in range(150)] for row in range(6)]
    isolate.call("lora_kit.quantize:quantize_to_folder", {
        "method": "torchao", "type": "int8", "merged_dir": str(path / "merged"), "out_dir": str(path / "quantized"),
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
    assert 1e-5 < found["mean_kl"] < 0.05 and "torchao" in found["engine"]
    size, before = ((folder / "model.safetensors").stat().st_size for folder in (quantized, merged))
    assert 8 / 16 < size / before < 12 / 16
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (quantized / name).read_bytes() == (merged / name).read_bytes()
    assert not list(quantized.glob(".*"))


@needs_it
def test_its_weights_hold_the_adapters_change(made):
    from lora_kit.engines.hf import load

    base, adapter, _, quantized = made
    with load(Artifact(name="q", path=str(quantized), kind="hf")) as engine:
        kept = delta.measure(check_adapter(base, adapter), delta.of_model(engine.model))
    assert kept["missing"] == [] and kept["projection"] == pytest.approx(1, abs=0.02)
    assert 0.005 < kept["noise"] < 0.2


def test_what_cannot_become_it():
    with pytest.raises(RecipeError, match="'int3' is not a type of torchao"):
        quantizer.check({}, "int3")
    with pytest.raises(ModelError, match="quantized already"):
        quantizer.check({"quantization_config": {"quant_method": "gptq"}}, "int8")


def test_a_missing_package_names_its_install_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert quantizer.missing() == 'pip install "lora-kit[torchao]"'


def test_four_bits_are_refused_by_name():
    with pytest.raises(RecipeError, match="'int4' is refused: torchao saves its 4-bit weights"):
        quantizer.check({}, "int4")


@needs_it
def test_where_it_is_installed_commands_stay_quiet():
    import_all = "from lora_kit.model import quiet_libraries as q; q(); import peft, transformers.quantizers, sys; " \
                 "print('torchao' in sys.modules)"
    environment = tiny_run.environment(PYTHONPATH=f"{tiny_run.ROOT}{os.pathsep}{apart.environment()['PYTHONPATH']}")
    done = subprocess.run([sys.executable, "-c", import_all], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("True\n", "")
