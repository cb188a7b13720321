"""template_check.py: an artifact that is asked in another way than it was trained is found, and why."""

import json
import shutil

import pytest

from lora_kit import template_check
from lora_kit.model import tokenizer_sha256
from lora_kit.quantizers import gguf
from lora_kit.types import Artifact
from tests import tiny_run
from tests.tiny import CHATML, save_model, save_tokenizer

SWAPPED = CHATML.replace("<|im_start|>", "[")


def check(folder, training, *, kind="hf", path=None, content=None):
    artifact = Artifact(name="merged", path=str(path or folder), kind=kind, tokenizer=str(folder))
    return template_check.check(artifact, {"tokenizer": str(training), "content": content})


def test_a_copy_passes_and_says_what_is_the_same(tiny_model, tmp_path):
    save_tokenizer(tmp_path)
    found = check(tmp_path, tiny_model, content=tokenizer_sha256(tiny_model))
    assert found["outcome"] == "PASS" and "stops at ['2 <|im_end|>']" in found["evidence"], found


def test_another_template_fails_by_name(tiny_model, tmp_path):
    assert SWAPPED != CHATML
    save_tokenizer(tmp_path, template=SWAPPED)
    found = check(tmp_path, tiny_model)
    assert found["outcome"] == "FAIL"
    assert found["evidence"].startswith(f"the chat template of {tmp_path} differs from training's: ")
    assert "prompt" not in found["evidence"]  # one reason for one cause


@pytest.mark.parametrize(("key", "value", "named"), [
    ("bos_token", "<|endoftext|>", "the BOS token of"), ("eos_token", "<|endoftext|>", "the stop tokens of")])
def test_other_special_tokens_fail_by_name(tiny_model, tmp_path, key, value, named):
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    found = check(tmp_path, tiny_model)
    assert found["outcome"] == "FAIL" and named in found["evidence"]


def test_stop_tokens_of_the_generation_config_count(tiny_model, tmp_path):
    save_tokenizer(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    found = check(tmp_path, tiny_model)
    assert found["outcome"] == "FAIL"
    assert "the stop tokens of" in found["evidence"] and "1 <|im_start|>" in found["evidence"]
    # What the base that was trained says of itself counts as training's, and then must be there.
    base = Artifact(name="base", path=str(tmp_path), kind="hf", tokenizer=str(tiny_model))
    training = {"tokenizer": str(tiny_model), "content": None, "model": str(tmp_path)}
    assert template_check.check(base, training)["outcome"] == "PASS"
    merged = Artifact(name="merged", path=str(tiny_model), kind="hf", tokenizer=str(tiny_model))
    assert "the stop tokens of" in template_check.check(merged, training)["evidence"]


def test_another_vocabulary_fails(tiny_model, tmp_path):
    save_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    fields = json.loads(path.read_text())
    vocab = fields["model"]["vocab"]
    vocab["T"], vocab["x"] = vocab["x"], vocab["T"]
    path.write_text(json.dumps(fields))
    assert "the tokens of a text of" in check(tmp_path, tiny_model)["evidence"]


def test_no_template_is_another_template(tiny_model, tmp_path):
    save_tokenizer(tmp_path, template=None)
    assert "differs from training's: none, not " in check(tmp_path, tiny_model)["evidence"]


def test_training_itself_may_have_had_none(tmp_path):
    for name in ("a", "b"):
        save_tokenizer(tmp_path / name, template=None)
    assert check(tmp_path / "a", tmp_path / "b")["outcome"] == "PASS"


def test_a_tokenizer_that_changed_since_training_is_no_witness(tmp_path):
    save_tokenizer(tmp_path)
    content = tokenizer_sha256(tmp_path)
    assert check(tmp_path, tmp_path, content=content)["outcome"] == "PASS"
    save_tokenizer(tmp_path, template=SWAPPED)
    found = check(tmp_path, tmp_path, content=content)
    assert found["outcome"] == "FAIL" and "the tokenizer that training used has changed since" in found["evidence"]


def test_a_tokenizer_that_does_not_load_is_a_failure_and_no_crash(tiny_model, tmp_path):
    found = check(tmp_path / "nowhere", tiny_model)
    assert found["outcome"] == "FAIL" and "no such folder" in found["evidence"]


def test_a_gguf_file_is_read_itself(tmp_path):
    model, _ = save_model(tmp_path / "model", hidden=64)
    (tmp_path / "made").mkdir()
    gguf.quantize(model, tmp_path / "made", "f16")
    path = tmp_path / "made" / "model.gguf"
    assert check(model, model, kind="gguf", path=path)["outcome"] == "PASS"
    other, _ = save_model(tmp_path / "other", hidden=64)
    save_tokenizer(other, template=SWAPPED)
    path.unlink()
    gguf.quantize(other, tmp_path / "made", "f16")
    found = check(model, model, kind="gguf", path=path)
    assert found["outcome"] == "FAIL" and "the chat template in model.gguf differs" in found["evidence"]
    path.write_bytes(b"GGUF")
    assert "model.gguf is not a whole GGUF file" in check(model, model, kind="gguf", path=path)["evidence"]


def test_a_swapped_template_in_a_run_ends_it_with_1(tiny_model, tmp_path_factory, tmp_path):
    world = tiny_run.copy(tiny_run.finished(tiny_model, tmp_path_factory), tmp_path)
    scores = world.run / "eval" / "scores.json"
    checks = json.loads(scores.read_text())["checks"]
    assert {check["outcome"] for check in checks} == {"PASS"} and len(checks) == 5
    path = world.run / "merge" / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("im_start", "im_trats"))  # as long as it was
    shutil.rmtree(world.run / "bench")
    done = world.lora_kit("eval", world.run, "--again", "--junit", "junit.xml")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "merged: chat template, BOS and stop tokens are those of training: FAIL: the chat template of" in done.stderr
    found = {check["artifact"]: check["outcome"] for check in json.loads(scores.read_text())["checks"]}
    assert found["merged"] == "FAIL" and found["base"] == found["bitsandbytes-int8"] == "PASS"
    assert found["gguf-q8_0"] == "FAIL"  # asked through the merged model's tokenizer
    assert "merged: chat template, BOS and stop tokens" in (tmp_path / "junit.xml").read_text()
    done = world.lora_kit("report", world.run)
    assert done.returncode == 1
    page = (world.run / "report" / "index.html").read_text()
    assert "the chat template of" in page and "Items that overlap training rows" in page
