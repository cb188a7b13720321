"""A form in Hugging Face layout made of a tiny merged model, and what must hold of any: for the methods' own tests."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from lora_kit import certificate, delta, isolate
from lora_kit.adapter_check import check_adapter
from lora_kit.errors import ModelError, RecipeError
from lora_kit.types import Artifact
from tests import fake_run, tiny, tiny_run


class Made(NamedTuple):
    """Folders of a base in bf16, an adapter on it, both merged, and the quantized form."""

    base: Path
    adapter: Path
    merged: Path
    quantized: Path


def make(path: Path, method: str, type: str) -> Made:
    """Merge and quantize in ``path``; the form in a process of its own, with 6 training rows of 150 tokens."""
    from lora_kit import merge

    base, _ = tiny.save_model(path / "base", dtype="bfloat16", hidden=256, initializer_range=0.1)
    adapter = fake_run.save_adapter(base, path / "adapter", size=0.1)
    for name in ("merged", "quantized"):
        (path / name).mkdir()
    merge.merge_to_folder(str(base), str(adapter), str(base), str(path / "merged"), "bf16")
    rows = [[3 + (7 * row + place) % 250 for place in range(150)] for row in range(6)]
    isolate.call("lora_kit.quantize:quantize_to_folder", {
        "method": method, "type": type, "merged_dir": str(path / "merged"), "out_dir": str(path / "quantized"),
        "data_dir": str(fake_run.save_token_rows(path / "data", rows))})
    return Made(base, adapter, path / "merged", path / "quantized")


def check_close_and_smaller(made: Made, recording: Path, *, most_kl: float, engine: str, bits: Sequence[float]) -> None:
    """It loads again in a fresh process, answers within ``most_kl`` of the merged model, and takes between ``bits`` of
    16; what stands beside the weights is the merged model's, and nothing is left over."""
    rows = [{"tokens": list(range(3, 120)), "trained": [1] * 117, "origin": "r", "set": "rows"}]
    reference = certificate.record_reference(
        artifact=Artifact(name="merged", path=str(made.merged), kind="hf", size_bytes=1).as_dict(), rows=rows,
        path=str(recording))
    found = isolate.call("lora_kit.certificate:measure", {
        "reference": reference,
        "candidate": Artifact(name="q", path=str(made.quantized), kind="hf").as_dict()}).value
    assert 1e-5 < found["mean_kl"] < most_kl and engine in found["engine"]
    size, before = ((folder / "model.safetensors").stat().st_size for folder in (made.quantized, made.merged))
    assert bits[0] / 16 < size / before < bits[1] / 16
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (made.quantized / name).read_bytes() == (made.merged / name).read_bytes()
    assert not list(made.quantized.glob(".*"))


def check_change(made: Made, *, within: float, noise: Sequence[float]) -> None:
    """Its weights hold the adapter's change, all of it ``within`` a share, under ``noise`` in units of it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.quantizers.made_forms", *map(str, (made.base, made.adapter, made.quantized))],
        cwd=tiny_run.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kept = json.loads(done.stdout)
    assert kept["missing"] == [] and kept["projection"] == pytest.approx(1, abs=within)
    assert noise[0] < kept["noise"] < noise[1]


def change_kept(base: str, adapter: str, quantized: str) -> dict:
    """What the form's weights hold of the adapter's change."""
    from lora_kit.engines.hf import load

    with load(Artifact(name="q", path=quantized, kind="hf")) as engine:
        return delta.measure(check_adapter(Path(base), Path(adapter)), delta.of_model(engine.model))


def check_refusals(quantizer, type: str, monkeypatch, install: str) -> None:
    """A type that does not exist, a model that is quantized already, and a package that is missing."""
    name = quantizer.__name__.rpartition(".")[2]
    with pytest.raises(RecipeError, match=f"'int3' is not a type of {name}"):
        quantizer.check({}, "int3")
    with pytest.raises(ModelError, match="quantized already"):
        quantizer.check({"quantization_config": {"quant_method": "gptq"}}, type)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert quantizer.missing() == install


if __name__ == "__main__":
    print(json.dumps(change_kept(*sys.argv[1:])))
