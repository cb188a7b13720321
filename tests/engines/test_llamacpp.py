"""The llama.cpp engine against transformers on the same file: logits, answers, sequences side by side."""

import numpy as np
import pytest

from lora_kit.engines import Engine, open_engine
from lora_kit.errors import MachineError, ModelError
from lora_kit.quantizers import gguf
from lora_kit.types import Artifact, Question
from tests import tiny

pytest.importorskip("llama_cpp")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tiny.save_model(tmp_path_factory.mktemp("llamacpp") / "model", initializer_range=0.15)[0]
    gguf.quantize(folder, folder, "f16")
    return Artifact(name="q", path=str(folder / "model.gguf"), kind="gguf", tokenizer=str(folder))


@pytest.fixture(scope="module")
def engine(artifact):
    with open_engine(artifact, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(artifact):
    with open_engine(artifact, prefer="hf") as engine:
        yield engine


def tokens(length, seed=0):
    return np.random.default_rng(seed).integers(3, 250, length).tolist()


def test_log_probs_agree_with_transformers_past_one_batch(engine, reference):
    found, expected = engine.log_probs(tokens(600)), reference.log_probs(tokens(600))
    assert found.shape == expected.shape == (600, 320) and found.dtype == np.float32
    assert np.abs(np.exp(found).sum(axis=1) - 1).max() < 1e-4
    kl = (np.exp(expected) * (expected - found)).sum(axis=1)
    assert kl.mean() < 1e-4
    assert np.abs(expected - np.roll(found, 1, axis=0)).mean() > 0.1  # were rows shifted, it would show


def test_likelihoods_are_those_of_each_text_by_itself(engine, reference):
    questions = [Question(context=tuple(tokens(length, length)), continuations=tuple(
        tuple(tokens(1 + (length + k) % 7, k)) for k in range(number)))
        for length, number in ((1, 3), (40, 5), (600, 2))]
    questions.append(Question(context=tuple(tokens(5)), continuations=tuple((3 + k, 7) for k in range(70))))
    found = engine.likelihoods(questions, greedy=True)
    assert [len(each) for each in found] == [3, 5, 2, 70]
    assert Engine.likelihood_noise <= engine.likelihood_noise < 0.01
    assert engine.likelihoods(questions, apart=True) == Engine.likelihoods(engine, questions)
    for ours, alone, theirs in zip(found, engine.likelihoods(questions, apart=True), reference.likelihoods(questions),
                                   strict=True):
        for one, by_itself, other in zip(ours, alone, theirs, strict=True):
            # Keys and values are kept in 16 bits.
            assert one.log_prob == pytest.approx(by_itself.log_prob, abs=0.01) and one.greedy is by_itself.greedy
            assert one.log_prob == pytest.approx(other.log_prob, abs=0.05)


def test_answers_agree_with_transformers(engine, reference):
    prompts = [tokens(length, length) for length in (3, 40, 9)]
    found = engine.generate(prompts, max_new_tokens=6, ignore_stop=True)
    expected = reference.generate(prompts, max_new_tokens=6, ignore_stop=True)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in expected]
    assert [answer.text for answer in found] == [answer.text for answer in expected]


def test_stop_strings_end_an_answer_as_in_transformers(engine, reference):
    prompts = [tokens(length, length) for length in (3, 40, 9)]
    texts = [answer.text for answer in engine.generate(prompts, max_new_tokens=8)]
    until = [[text[2:4]] if len(text) > 4 else ["never"] for text in texts]
    assert until != [["never"]] * 3
    found = engine.generate(prompts, max_new_tokens=8, until=until)
    assert found == reference.generate(prompts, max_new_tokens=8, until=until)
    assert [answer.text for answer in found] == [
        text.partition(strings[0])[0] for text, strings in zip(texts, until, strict=True)]


def test_stop_tokens_are_the_tokenizers_and_end_an_answer(engine, reference):
    assert engine.stop_ids == reference.stop_ids == (2,)  # llama.cpp by itself adds <|endoftext|> for its name
    free = engine.generate([tokens(9)], max_new_tokens=6, ignore_stop=True)[0]
    engine.stop_ids = (free.tokens[2],)
    try:
        ended = engine.generate([tokens(9)], max_new_tokens=6)[0]
    finally:
        engine.stop_ids = (2,)
    assert ended.stopped and ended.tokens == free.tokens[: free.tokens.index(free.tokens[2])]


def test_prompts_side_by_side_do_not_read_each_other(engine):
    prompts = [tokens(300, 1), tokens(7, 2), tokens(290, 3)]
    engine._fresh_context(700, 3)
    together = engine._prefill(prompts)
    for row, prompt in enumerate(prompts):
        alone = engine.log_probs(prompt)[-1]
        side_by_side = together[row] - np.log(np.exp(together[row].astype(np.float64)).sum())
        assert np.abs(alone - side_by_side).max() < 0.05


def test_time_once_counts_every_token(engine):
    timed = engine.time_once([tokens(8, 1), tokens(8, 2)], 5)
    assert timed["tokens_generated"] == 10
    assert 0 < timed["prefill_seconds"] <= timed["first_token_seconds"] and timed["decode_seconds"] > 0


def test_texts_that_are_split_differently_are_found(engine, monkeypatch):
    texts = ["hello  12 <|im_start|>user\nü", "", "plain"]
    assert engine.same_tokens(texts) == []
    plain = engine.tokenizer

    def other(text, **options):
        return {"input_ids": plain(text, **options)["input_ids"] + ([7] if text == "plain" else [])}

    monkeypatch.setattr(engine, "tokenizer", other)
    assert engine.same_tokens(texts) == ["plain"]


def test_too_many_prompts_and_broken_files_are_errors(engine, tmp_path):
    with pytest.raises(MachineError, match="at most 64 prompts"):
        engine.time_once([[5]] * 65, 2)
    (tmp_path / "model.gguf").write_bytes(b"GGUF nonsense")
    broken = Artifact(name="q", path=str(tmp_path / "model.gguf"), kind="gguf", tokenizer=str(tmp_path))
    tiny.save_tokenizer(tmp_path)
    with pytest.raises(ModelError, match="llama.cpp cannot read this file"):
        open_engine(broken)
