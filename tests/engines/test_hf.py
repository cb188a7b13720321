"""The transformers engine: its log-probabilities, greedy answers, batches and counts."""

import json
import shutil

import numpy as np
import pytest

from lora_kit.engines import open_engine
from lora_kit.engines.hf import HfEngine, stored_dtype
from lora_kit.errors import ModelError
from lora_kit.types import Artifact
from tests import fake_run, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    # Wide weights: the logits of a model of small ones are nearly equal, and greedy choices a matter of rounding.
    return tiny.save_model(tmp_path_factory.mktemp("hf") / "model", initializer_range=0.15)[0]


@pytest.fixture(scope="module")
def engine(folder):
    with open_engine(Artifact(name="base", path=str(folder), kind="hf")) as engine:
        yield engine


def prompts():
    generator = np.random.default_rng(0)
    # Token 2 is the pad token and the end of every turn: it stands inside chat prompts and is no padding.
    return [[2, *generator.integers(3, 250, length).tolist(), 2, 5] for length in (3, 11, 1, 6, 30, 2, 9, 14, 5, 8)]


def direct_logits(folder, tokens):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([tokens])).logits[0], -1).numpy()


def greedy(folder, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(direct_logits(folder, tokens)[-1].argmax()))
    return tuple(tokens[len(prompt):])


def test_log_probs_are_the_models(engine, folder):
    tokens = prompts()[4]
    found = engine.log_probs(tokens)
    assert found.dtype == np.float32 and found.shape == (len(tokens), engine.num_tokens) == (33, 320)
    assert np.abs(found - direct_logits(folder, tokens)).max() < 1e-4


def test_generation_is_greedy_and_a_batch_changes_nothing(engine, folder):
    together = engine.generate(prompts(), max_new_tokens=5, ignore_stop=True)
    assert [answer.tokens for answer in together] == [greedy(folder, prompt, 5) for prompt in prompts()]
    assert not any(answer.stopped for answer in together)
    assert len({answer.tokens for answer in together}) > 3


def test_stop_tokens_end_an_answer(engine):
    free = engine.generate(prompts(), max_new_tokens=8, ignore_stop=True)
    stop = free[1].tokens[3]
    ending = HfEngine(engine.model, engine.tokenizer, stop_ids=(stop,))
    for before, after in zip(free, ending.generate(prompts(), max_new_tokens=8), strict=True):
        if stop in before.tokens:
            assert after.stopped and after.tokens == before.tokens[: before.tokens.index(stop)]
        else:
            assert not after.stopped and after.tokens == before.tokens
        assert after.text == engine.tokenizer.decode(after.tokens, skip_special_tokens=True)
    assert ending.generate(prompts()[1:2], max_new_tokens=8, ignore_stop=True)[0].tokens == free[1].tokens


def test_stop_ids_are_the_templates_and_the_configured_ones(engine, folder, tmp_path):
    assert engine.stop_ids == (2,)
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 2]}))
    with open_engine(Artifact(name="base", path=str(other), kind="hf")) as found:
        assert found.stop_ids == (2, 9)


def test_a_models_own_generation_settings_do_not_bend_greedy(engine):
    before = engine.generate(prompts()[:3], max_new_tokens=8, ignore_stop=True)
    kept = engine.model.generation_config
    kept.repetition_penalty, kept.no_repeat_ngram_size = 9.0, 1
    try:
        assert engine.generate(prompts()[:3], max_new_tokens=8, ignore_stop=True) == before
        assert engine.model.generation_config is kept
    finally:
        kept.repetition_penalty, kept.no_repeat_ngram_size = 1.0, 0


def test_time_once_counts_every_token(engine, monkeypatch):
    seen = []
    plain = type(engine.model).forward

    def counting(self, *arguments, **options):
        seen.append(tuple(options["input_ids"].shape))
        return plain(self, *arguments, **options)

    monkeypatch.setattr(type(engine.model), "forward", counting)
    timed = engine.time_once([[5, 6, 7], [8, 9, 10]], 4)
    assert seen == [(2, 3), (2, 1), (2, 1), (2, 1)]
    assert timed["tokens_generated"] == 8
    assert 0 < timed["prefill_seconds"] <= timed["first_token_seconds"] and timed["decode_seconds"] > 0


def test_an_adapter_runs_on_its_base(folder, engine, tmp_path):
    adapter = fake_run.save_adapter(folder, tmp_path / "adapter", size=0.3)
    tokens = prompts()[4]
    artifact = Artifact(name="adapter", path=str(adapter), kind="adapter", base=str(folder))
    with open_engine(artifact) as tuned:
        difference = np.abs(tuned.log_probs(tokens) - engine.log_probs(tokens)).max()
        assert difference > 0.1
        assert tuned.tokenizer.chat_template == engine.tokenizer.chat_template


def test_dtype_is_as_stored_unless_asked(tmp_path):
    folder = tiny.save_model(tmp_path / "bf16", dtype="bfloat16")[0]
    artifact = Artifact(name="base", path=str(folder), kind="hf")
    assert stored_dtype(folder) == "bf16"
    with open_engine(artifact) as stored, open_engine(artifact, dtype="fp32") as wide:
        assert (stored.name, wide.name) == ("transformers bf16", "transformers fp32")
        assert str(next(stored.model.parameters()).dtype) == "torch.bfloat16"
        assert str(next(wide.model.parameters()).dtype) == "torch.float32"


def test_a_gguf_without_its_tokenizer_is_an_error(tmp_path, folder):
    from lora_kit.quantizers import gguf

    gguf.quantize(folder, tmp_path, "f16")
    artifact = Artifact(name="q", path=str(tmp_path / "model.gguf"), kind="gguf")
    with pytest.raises(ModelError, match="names no tokenizer folder"):
        open_engine(artifact, prefer="hf")
