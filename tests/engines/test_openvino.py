"""The OpenVINO engine: greedy answers beside transformers', counted tokens, its own counters beside our clock.

In a process that sees the packages of tests/apart.py, as the commands of all other tests would load them too: skipped
where openvino-genai is neither there nor installed.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_kit import engines
from lora_kit.chat import load_tokenizer
from lora_kit.engines import openvino
from lora_kit.errors import MachineError, ModelError
from lora_kit.quantizers import gguf
from lora_kit.types import Artifact
from tests import apart, tiny_run

ROOT = Path(__file__).parent.parent.parent
THERE = importlib.util.find_spec("openvino_genai") is not None or (apart.FOLDER / "openvino_genai").is_dir()
installed = pytest.mark.skipif(not THERE, reason="openvino-genai is not installed")

_PROGRAM = """
import json, sys
from lora_kit.engines import open_engine
from lora_kit.errors import LoraKitError
from lora_kit.types import Artifact
artifact, prompts = Artifact(**json.loads(sys.argv[1])), json.loads(sys.argv[2])
said = {}
with open_engine(artifact, threads=1, prefer="openvino") as engine:
    said["num_tokens"] = engine.num_tokens
    said["answers"] = [list(one.tokens) for one in engine.generate(prompts, max_new_tokens=6, ignore_stop=True)]
    said["first"] = next(engine.tokens_after(prompts[0], 500))  # the others are not waited for
    said["time"] = engine.time_once(prompts[1:2], 6)
    said["counters"] = engine.counters()
    for call in (lambda: engine.time_once(prompts, 6), lambda: engine.log_probs(prompts[0])):
        try:
            call()
        except LoraKitError as error:
            said.setdefault("errors", []).append(error.what)
print(json.dumps(said))
"""


def test_a_missing_package_is_named_with_its_install_line(monkeypatch):
    monkeypatch.setattr(openvino.importlib.util, "find_spec", lambda name: None)
    assert engines.missing("openvino") == 'pip install "lora-kit[openvino]"'
    with pytest.raises(MachineError) as caught:
        engines.open_engine(Artifact(name="q", path="q.gguf", kind="gguf"), prefer="openvino")
    assert caught.value.todo == 'pip install "lora-kit[openvino]"'


def test_a_file_that_ends_its_process_is_refused(tiny_model, tmp_path):
    gguf.quantize(tiny_model, tmp_path, "f16")
    with pytest.raises(ModelError, match="weights in fp16"):
        openvino._vocabulary(str(tmp_path / "model.gguf"))
    gguf.quantize(tiny_model, tmp_path, "q8_0")
    assert openvino._vocabulary(str(tmp_path / "model.gguf")) == 320


@installed
@pytest.mark.real_model
def test_answers_times_and_counters(smollm2_base, tmp_path):
    gguf.quantize(smollm2_base, tmp_path, "q8_0")
    artifact = Artifact(name="q", path=str(tmp_path / "model.gguf"), kind="gguf", tokenizer=str(smollm2_base))
    tokenizer = load_tokenizer(smollm2_base)
    prompts = [tokenizer(text)["input_ids"] for text in (
        "The capital of France is", "One, two, three, four, five, six, seven,")]
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, json.dumps(artifact.as_dict()), json.dumps(prompts)], cwd=ROOT,
        capture_output=True, text=True, timeout=500, env=tiny_run.environment(**apart.environment()))
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["num_tokens"] == 49152 and said["first"] == said["answers"][0][0]
    with engines.open_engine(artifact, prefer="hf") as reference:
        for prompt, answer in zip(prompts, said["answers"], strict=True):
            rows_KV = reference.log_probs([*prompt, *answer])[len(prompt) - 1:-1]
            # The same weights in other types: its choice is the reference's, but for near ties.
            assert len(answer) == 6 and (rows_KV.max(1) - rows_KV[np.arange(6), answer]).max() < 0.3
    assert said["time"]["tokens_generated"] == 6 and said["time"]["decode_seconds"] > 0
    counted = said["counters"]
    assert counted["prompt_tokens"] == len(prompts[1]) and counted["generated_tokens"] == 6
    # One answer, two clocks: OpenVINO's begins later and ends earlier than ours.
    assert 0.5 < counted["first_token_seconds"] / said["time"]["first_token_seconds"] <= 1.01
    assert 0.5 < counted["per_token_seconds"] * 5 / said["time"]["decode_seconds"] < 1.5
    assert len(said["errors"]) == 2 and "one prompt at a time" in said["errors"][0]


def test_the_verb_takes_the_engine_for_gguf_files(finished_world):
    told = finished_world.lora_kit("bench", f"{finished_world.run}/gguf-q8_0", "--engine", "hf", "--threads", "1")
    assert told.returncode == 0 and "dequantized" in told.stdout, told.stderr
    refused = finished_world.lora_kit("bench", f"{finished_world.run}/merged", "--engine", "hf")
    assert refused.returncode == 2 and "--engine is for a GGUF file" in refused.stderr
    if importlib.util.find_spec("openvino_genai") is None:
        missing = finished_world.lora_kit("bench", f"{finished_world.run}/gguf-q8_0", "--engine", "openvino")
        assert missing.returncode == 6 and 'pip install "lora-kit[openvino]"' in missing.stderr
