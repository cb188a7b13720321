"""The transformers engine: its log-probabilities, greedy answers, batches and counts."""

import functools
import json
import shutil

import numpy as np
import pytest

from lora_kit.engines import Engine, hf, open_engine
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


@pytest.mark.parametrize("by_itself", [True, False])
def test_each_answer_of_a_batch_has_its_own_stop_strings(engine, monkeypatch, by_itself):
    monkeypatch.setattr(engine, "_decodes_itself", by_itself)
    free = engine.generate(prompts(), max_new_tokens=8)
    texts = [answer.text for answer in free]
    until = [[text[3:5], "never"] if len(text) > 5 and number % 2 else [] for number, text in enumerate(texts)]
    found = engine.generate(prompts(), max_new_tokens=8, until=until)
    assert sum(map(bool, until)) > 2
    for answer, before, strings in zip(found, free, until, strict=True):
        if not strings:
            assert answer == before
            continue
        assert answer.stopped and answer.text == before.text[:before.text.index(strings[0])]
        # It ended with the token in which the string came to its end, not later.
        number = len(answer.tokens)
        assert answer.tokens == before.tokens[:number]
        assert strings[0] not in engine.tokenizer.decode(answer.tokens[:-1], skip_special_tokens=True)
    ignored = engine.generate(prompts(), max_new_tokens=8, until=until, ignore_stop=True)
    assert [answer.tokens[:len(before.tokens)] for answer, before in zip(ignored, free, strict=True)] == [
        before.tokens for before in free]
    with pytest.raises(ValueError, match="1 lists of stop strings for 10 prompts"):
        engine.generate(prompts(), max_new_tokens=1, until=[["a"]])


def alone(model, prompt, count, stop_ids=None):
    """transformers' own greedy tokens after one prompt, without the stop token."""
    import torch
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig()
    settings = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=2, eos_token_id=stop_ids)
    with torch.inference_mode():
        tokens_1T = torch.tensor([prompt])  # with a mask: without one transformers takes each 2 for padding
        out = model.generate(input_ids=tokens_1T, attention_mask=torch.ones_like(tokens_1T), generation_config=settings)
        out = out[0, len(prompt):].tolist()
    return tuple(out[:-1] if out[-1] in (stop_ids or ()) else out)


def shapes_of_calls(engine, monkeypatch):
    seen = []
    plain = type(engine.model).forward

    @functools.wraps(plain)  # the engine reads what forward takes
    def counting(self, *arguments, **options):
        out = plain(self, *arguments, **options)
        seen.append((*options["input_ids"].shape, out.logits.shape[1]))
        return out

    monkeypatch.setattr(type(engine.model), "forward", counting)
    return seen


def test_a_shared_beginning_is_read_once_and_stopped_rows_leave(engine, monkeypatch):
    beginning = np.random.default_rng(1).integers(3, 250, 40).tolist()
    asked = [beginning, *(beginning + prompt for prompt in prompts())]  # one of them is what they share
    free = [alone(engine.model, prompt, 8) for prompt in asked]
    stop = free[4][2]
    expected = [alone(engine.model, prompt, 8, [stop]) for prompt in asked]
    assert len({len(tokens) for tokens in expected}) > 1
    seen = shapes_of_calls(engine, monkeypatch)
    found = HfEngine(engine.model, engine.tokenizer, stop_ids=(stop,)).generate(asked, max_new_tokens=8)
    assert [answer.tokens for answer in found] == expected
    assert [answer.stopped for answer in found] == [stop in tokens for tokens in free]
    # 39 tokens once (the last one must predict something), then one batch; the head only at each row's end.
    assert seen[:2] == [(1, 39, 1), (11, max(map(len, asked)) - 39, 1)]
    going = [sum(len(tokens) > step for tokens in expected) for step in range(7)]
    assert seen[2:] == [(rows, 1, 1) for rows in going if rows]
    del seen[:]
    assert [answer.tokens for answer in engine.generate(asked, max_new_tokens=8, ignore_stop=True)] == free
    assert [rows for rows, *_ in seen] == [1, *[11] * 8]


def test_odd_prompts_do_not_keep_the_others_from_sharing(engine, monkeypatch):
    draw = np.random.default_rng(2)
    few_shot, other = (draw.integers(3, 250, 90).tolist() for _ in range(2))
    asked = [few_shot + prompt for prompt in prompts()] + [other[:50] + prompt for prompt in prompts()[:3]]
    asked[4:4] = [prompts()[1], few_shot[:40] + [7, 5]]  # one begins otherwise, one leaves the others early
    expected = [alone(engine.model, prompt, 4) for prompt in asked]
    seen = shapes_of_calls(engine, monkeypatch)

    def read() -> int:
        found = engine.generate(asked, max_new_tokens=4, ignore_stop=True)
        assert [answer.tokens for answer in found] == expected
        computed = sum(rows * length for rows, length, _ in seen if length > 1)
        del seen[:]
        return computed

    apart = read()
    monkeypatch.setattr(hf, "SAVED_TOKENS", 100)  # three prompts that share 50 are then worth a batch too
    assert read() < apart
    monkeypatch.setattr(hf, "SHARED_TOKENS", 10**9)
    alone_each = read()
    assert apart < alone_each - 9 * 90


def test_prompts_are_grouped_by_what_saves_most(monkeypatch):
    monkeypatch.setattr(hf, "SHARED_TOKENS", 3)
    monkeypatch.setattr(hf, "SAVED_TOKENS", 8)
    ours, theirs = [1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 9, 9]
    assert hf._groups([[*ours, 7], [8], [*ours, 8, 8], [*ours, 9]]) == [([0, 2, 3], 6), ([1], 0)]
    assert hf._groups([[*ours, 7], [*theirs, 7], [*ours, 8]]) == [([0, 2, 1], 3)]  # 6 saved by all, 6 by two
    assert hf._groups([[*ours, 7], [*theirs, 7], [*ours, 8], [*theirs, 8], [*ours, 6], [*ours, 5]]) == [
        ([5, 4, 0, 2], 6), ([1, 3], 0)]  # 18 by four of them, 15 by all; the other two save 6, too few
    assert hf._groups([ours, ours]) == [([0, 1], 5)]  # the last token must predict something
    assert hf._groups([[1, 2], [1, 2]]) == [([0, 1], 0)] and hf._groups([]) == []


def test_batches_are_bounded_by_rows_and_tokens(engine, monkeypatch):
    expected = engine.generate(prompts(), max_new_tokens=3, ignore_stop=True)
    monkeypatch.setattr(hf, "BATCH_TOKENS", 30)
    monkeypatch.setattr(hf, "BATCH_ROWS", 3)
    seen = shapes_of_calls(engine, monkeypatch)
    assert engine.generate(prompts(), max_new_tokens=3, ignore_stop=True) == expected
    assert [rows for rows, length, _ in seen if length > 1] == [3, 2, 2, 1, 1, 1]  # 4 5 6 | 8 9 | 11 12 | 14 | 17 | 33
    assert engine.generate([], max_new_tokens=3) == []


@pytest.mark.parametrize("kind", ["gemma3", "mistral", "dynamic_rope"])
def test_a_cache_that_forgets_is_left_to_transformers(kind, engine, monkeypatch):
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fields = dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, initializer_range=0.15, pad_token_id=2, eos_token_id=2, bos_token_id=1)
    config = {
        "gemma3": lambda: CONFIG_MAPPING["gemma3_text"](**fields, head_dim=16, sliding_window=6,
                                                        layer_types=["sliding_attention", "full_attention"]),
        "mistral": lambda: CONFIG_MAPPING["mistral"](**fields, sliding_window=6),
        "dynamic_rope": lambda: CONFIG_MAPPING["llama"](
            **fields, max_position_embeddings=64,
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    }[kind]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    sliding = HfEngine(model, engine.tokenizer, stop_ids=(2,))
    asked = [[*range(50, 90), *prompt] for prompt in prompts()[:4]]
    monkeypatch.setattr(sliding, "_decode", lambda *_: pytest.fail("the cache does not keep what was read"))
    found = sliding.generate(asked, max_new_tokens=6, ignore_stop=True)
    assert [answer.tokens for answer in found] == [alone(model, prompt, 6) for prompt in asked]


def test_an_adapter_answers_as_transformers_says(folder, tmp_path):
    adapter = fake_run.save_adapter(folder, tmp_path / "adapter", size=0.3)
    with open_engine(Artifact(name="adapter", path=str(adapter), kind="adapter", base=str(folder))) as tuned:
        assert tuned._decodes_itself
        found = tuned.generate(prompts(), max_new_tokens=5, ignore_stop=True)
        assert [answer.tokens for answer in found] == [alone(tuned.model, prompt, 5) for prompt in prompts()]


def test_token_log_probs_are_those_of_all_positions(engine, monkeypatch):
    tokens, positions = prompts()[4], [7, 1, 20, 21]
    expected = Engine.token_log_probs(engine, tokens, positions)
    assert expected.tolist() == [engine.log_probs(tokens)[place - 1, tokens[place]] for place in positions]
    monkeypatch.setattr(hf, "_ROWS", 3)
    seen = shapes_of_calls(engine, monkeypatch)
    found = engine.token_log_probs(tokens, positions)
    assert found.dtype == np.float32 and np.abs(found - expected).max() < 1e-5
    assert seen == [(1, 21, 4)]  # what comes after the last one is not read, the head runs at the four alone
    assert engine.token_log_probs(tokens, []).shape == (0,)
    for wrong in (0, len(tokens), -1):
        with pytest.raises(ValueError, match="positions must lie in 1 to 32"):
            engine.token_log_probs(tokens, [3, wrong])


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


def test_fastest_is_fp32_on_a_cpu_without_16_bit_matrices(tmp_path, monkeypatch):
    import torch

    folder = tiny.save_model(tmp_path / "bf16", dtype="bfloat16")[0]
    artifact = Artifact(name="base", path=str(folder), kind="hf")
    monkeypatch.setattr(hf, "cpu_supports_bf16", lambda: False)
    with open_engine(artifact, device="cpu") as stored, open_engine(artifact, dtype="fastest", device="cpu") as wide:
        assert (stored.name, wide.name) == ("transformers bf16", "transformers fp32 (stored bf16)")
        for kept, upcast in zip(stored.model.parameters(), wide.model.parameters(), strict=True):
            assert upcast.dtype == torch.float32 and torch.equal(kept.float(), upcast)
    assert hf.fastest_dtype(folder, "cuda:0") == "bf16"
    monkeypatch.setattr(hf, "memory_bytes", lambda: (10**9, 1000))
    assert hf.fastest_dtype(folder, "cpu") == "bf16"
    monkeypatch.undo()
    monkeypatch.setattr(hf, "cpu_supports_bf16", lambda: True)
    with open_engine(artifact, dtype="fastest", device="cpu") as found:
        assert found.name == "transformers bf16"
    monkeypatch.setattr(hf, "cpu_supports_bf16", lambda: False)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "config.json").write_text(json.dumps(config))
    assert hf.fastest_dtype(folder, "cpu") == "bf16"


def test_a_gguf_without_its_tokenizer_is_an_error(tmp_path, folder):
    from lora_kit.quantizers import gguf

    gguf.quantize(folder, tmp_path, "f16")
    artifact = Artifact(name="q", path=str(tmp_path / "model.gguf"), kind="gguf")
    with pytest.raises(ModelError, match="names no tokenizer folder"):
        open_engine(artifact, prefer="hf")
