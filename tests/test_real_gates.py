"""Gates on the real model: what is broken fails, what is as good passes, and how many items that takes.

SmolLM2-135M as it comes, its 8-bit and 2-bit GGUF forms, a copy with noise in its weights, and one with another chat
template, all scored on 48 short texts of the standard library, in bits per byte. (Q2_K on this model: its width is no
multiple of 256, so that llama.cpp packs 180 of its 272 tensors in wider types, 5.1 bits a weight in all.)
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_kit import evaluation
from lora_kit.model import tokenizer_sha256
from lora_kit.quantizers import gguf
from lora_kit.recipe import Recipe
from lora_kit.types import Artifact
from tests.test_evaluation import FakeRun

pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1200)]

NUM_TEXTS = 48
MARGIN = 0.05
NOISE = 0.3
"""Of the noise in each matrix, relative to the matrix's own standard deviation."""
JUDGED = ("gguf-q8_0", "gguf-q2_k", "noised")
_TWO_BITS = """
import sys
import llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), params))
"""


def copied(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


def add_noise(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dim() == 2:
                noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std() * NOISE
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def evaluated(smollm2_base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gates")
    for kind in ("q8_0", "f16"):
        (folder / kind).mkdir()
        gguf.quantize(smollm2_base, folder / kind, kind)
    two_bits = folder / "q2_k.gguf"
    subprocess.run([sys.executable, "-c", _TWO_BITS, str(folder / "f16" / "model.gguf"), str(two_bits)], check=True,
                   capture_output=True)
    assert two_bits.stat().st_size < 0.9 * (folder / "q8_0" / "model.gguf").stat().st_size
    noised, swapped = (copied(smollm2_base, folder / name) for name in ("noised", "swapped"))
    add_noise(noised)
    template = swapped / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>", "### "))
    folders = {"base": smollm2_base, "noised": noised, "swapped": swapped}
    artifacts = {name: Artifact(name=name, path=str(path), kind="hf", tokenizer=str(path))
                 for name, path in folders.items()}
    for name, path in (("gguf-q8_0", folder / "q8_0" / "model.gguf"), ("gguf-q2_k", two_bits)):
        artifacts[name] = Artifact(name=name, path=str(path), kind="gguf", tokenizer=str(smollm2_base))
    run = FakeRun(folder, artifacts)
    run.resolved = {"base": {"artifact": artifacts["base"].as_dict(), "content": tokenizer_sha256(smollm2_base)}}
    run.work("eval").mkdir()
    run.stage_dir("data").mkdir()
    (folder / "suites").mkdir()
    (folder / "suites" / "real.yaml").write_text("tasks: [python_prose_quick]\ngates:\n" + "".join(
        f"  - {{task: python_prose_quick, artifact: {name}, no_worse_than: base, margin: {MARGIN}}}\n"
        for name in JUDGED))
    recipe = Recipe(name="r", model={"base": "b"}, data={"train": {"source": "none.jsonl"}},
                    eval={"suite": "suites/real.yaml", "samples": 0, "cache": False, "artifacts": list(artifacts)})
    result = evaluation.stage(recipe, run)
    for verdict in result.verdicts:  # what docs/eval.md shows; pytest -s shows it
        print(f"{verdict.outcome} {verdict.claim}: {verdict.evidence}")
    return SimpleNamespace(verdicts=dict(zip(JUDGED, result.verdicts, strict=False)), run=run,
                           scores=json.loads((run.work("eval") / "scores.json").read_text()), all=result.verdicts)


def values(evaluated) -> dict[str, float]:
    return {each["artifact"]: each["value"] for each in evaluated.scores["scores"]}


def test_the_8_bit_form_passes_at_48_items(evaluated):
    verdict = evaluated.verdicts["gguf-q8_0"]
    assert verdict.outcome == "PASS" and f"{NUM_TEXTS} items in" in verdict.evidence, verdict
    assert abs(values(evaluated)["gguf-q8_0"] - values(evaluated)["base"]) < MARGIN / 2


@pytest.mark.parametrize("name", ["gguf-q2_k", "noised"])
def test_a_broken_form_fails_at_48_items(evaluated, name):
    verdict = evaluated.verdicts[name]
    assert verdict.outcome == "FAIL" and f"{NUM_TEXTS} items in" in verdict.evidence, verdict
    assert values(evaluated)[name] > values(evaluated)["base"] + MARGIN


def test_a_swapped_template_is_caught_where_no_score_shows_it(evaluated):
    found = {check["artifact"]: check for check in evaluated.scores["checks"]}
    assert found["swapped"]["outcome"] == "FAIL" and "the chat template of" in found["swapped"]["evidence"]
    assert {name for name, check in found.items() if check["outcome"] == "PASS"} >= {"base", "noised"}
    assert values(evaluated)["swapped"] == values(evaluated)["base"]
    assert any(verdict.outcome == "FAIL" and verdict.claim.startswith("swapped: ") for verdict in evaluated.all)
