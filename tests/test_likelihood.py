"""Likelihoods of continuations: trees against every text by itself, in models of several kinds and odd shapes."""

import functools
import itertools

import numpy as np
import pytest

from lora_kit import likelihood, tree_attention
from lora_kit.engines import Engine, hf
from lora_kit.types import Question

SHAPE = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
             pad_token_id=0)
KINDS = {
    "llama": {}, "qwen2": {}, "qwen3": {"head_dim": 12}, "gemma": {"head_dim": 16}, "mistral": {"sliding_window": None},
    "mistral, window": {"sliding_window": 16},
    "gemma2": {"head_dim": 12, "sliding_window": 16, "final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 4.0, "tie_word_embeddings": True},
    "gpt_neox": {"rotary_pct": 0.5}, "gpt2": {"n_positions": 512, "n_embd": 48, "n_layer": 2, "n_head": 4},
    "bloom": {"n_layer": 2, "n_head": 4}, "mamba": {"state_size": 4},
}


def model_of(kind: str, attention: str | None = None):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(5)
    config = AutoConfig.for_model(kind.partition(",")[0], **{**SHAPE, **KINDS[kind]})
    chosen = {"attn_implementation": attention} if attention else {}
    return AutoModelForCausalLM.from_config(config, **chosen).float().eval()


class Tokenizer:
    pad_token_id = 0


def engine_of(model) -> hf.HfEngine:
    return hf.HfEngine(model, Tokenizer(), stop_ids=(2,))


def questions(seed=0, shared=0) -> list[Question]:
    """Contexts of 1 to 40 tokens and 1 to 5 continuations, some with a common start, equal, or one inside another."""
    generator = np.random.default_rng(seed)

    def tokens(number):
        return tuple(generator.integers(3, 97, number).tolist())

    beginning, made = tokens(shared), []
    for size in (1, 2, 7, 40, 13, 5, 28, 9):
        start = tokens(int(generator.integers(1, 9)))
        found = [tokens(int(generator.integers(1, 12))) for _ in range(int(generator.integers(0, 3)))]
        found += [start, start + tokens(3), (*start[:-1], 96)]
        made.append(Question(context=beginning + tokens(size), continuations=tuple(found[::-1])))
    return made


def one_by_one(model, asked):
    """Log-probability of each continuation from a forward pass of its own, in float64 from the logits on."""
    import torch

    found = []
    for question in asked:
        found.append([])
        for continuation in question.continuations:
            text = [*question.context, *continuation]
            with torch.inference_mode():
                logits = model(torch.tensor([text]), use_cache=False).logits[0].double().log_softmax(-1)
            rows = logits[len(question.context) - 1:-1]
            picked = torch.tensor(continuation)
            found[-1].append((float(rows.gather(1, picked[:, None]).sum()), bool((rows.argmax(1) == picked).all())))
    return found


def check(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        for one, (log_prob, greedy) in zip(ours, theirs, strict=True):
            assert abs(one.log_prob - log_prob) < 1e-4
            assert one.greedy is greedy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [0, 45])
def test_every_kind_of_model_gives_what_each_text_gives_by_itself(kind, shared):
    model = model_of(kind)
    engine, asked = engine_of(model), questions(shared=shared)
    assert len({len(question.continuations) for question in asked}) > 1
    check(engine.likelihoods(asked, greedy=True), one_by_one(model, asked))
    assert 0 < engine.likelihood_noise < 1e-3
    reads_plainly = kind in ("mistral, window", "gemma2", "bloom", "mamba")
    assert bool(engine.likelihood_note) == reads_plainly, engine.likelihood_note


def test_eager_attention_sees_the_same_tree():
    model = model_of("llama", "eager")
    engine, asked = engine_of(model), questions(3, shared=40)
    check(engine.likelihoods(asked, greedy=True), one_by_one(model, asked))
    assert not engine.likelihood_note


@pytest.mark.parametrize(("kind", "is_all"), [("llama", True), ("gpt2", True), ("granite", False), ("gemma2", False)])
def test_logits_that_are_more_than_the_heads_output_are_left_to_the_model(kind, is_all, monkeypatch):
    monkeypatch.setattr(likelihood, "_PART_ROWS", 7)
    monkeypatch.setattr(likelihood, "_PART_TOKENS", 40)
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 100)
    model = model_of(kind)
    engine, asked = engine_of(model), questions(6)
    check(engine.likelihoods(asked, greedy=True), one_by_one(model, asked))
    assert engine._reader.head._is_all is is_all
    check(engine.likelihoods(asked, greedy=True), one_by_one(model, asked))


def test_16_bits_are_read_as_trees_too_and_round_visibly():
    import torch

    model, asked = model_of("llama"), questions(7)
    expected = one_by_one(model, asked)
    engine = engine_of(model.to(torch.bfloat16))
    found = engine.likelihoods(asked)
    assert not engine.likelihood_note and engine._reader.head._is_all and 1e-3 < engine.likelihood_noise < 0.5
    for ours, theirs in zip(found, expected, strict=True):
        assert all(abs(one.log_prob - log_prob) < 0.6 for one, (log_prob, _) in zip(ours, theirs, strict=True))


def test_small_batches_and_questions_apart_change_nothing(monkeypatch):
    model = model_of("llama")
    asked = questions(1, shared=33) + questions(2)
    expected = one_by_one(model, asked)
    for batch_tokens, logits in itertools.product((1, 60, 4000), (97, 97 * 20, 10**9)):
        monkeypatch.setattr(likelihood, "BATCH_TOKENS", batch_tokens)
        monkeypatch.setattr(likelihood, "LOGITS", logits)
        check(engine_of(model).likelihoods(asked, greedy=True), expected)
    check(engine_of(model).likelihoods(asked, greedy=True, apart=True), expected)


def test_the_head_is_asked_only_for_rows_that_something_is_predicted_from_and_tokens_are_read_once():
    model = model_of("llama")
    seen = {"tokens": 0, "rows": 0}
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, given: seen.update(tokens=seen["tokens"] + given[0].numel()))
    model.lm_head.register_forward_hook(
        lambda _module, _given, out: seen.update(rows=seen["rows"] + out.shape[0] * out.shape[1]))
    context = tuple(range(3, 23))
    asked = [Question(context=context, continuations=((30, 31, 32), (30, 31, 33), (40,), (41, 42)))] * 2
    head = likelihood.Head(model)
    likelihood.trees(head, asked, [([0, 1], 0)], greedy=False)
    # Behind the context 30, 31 and 41 are read; predictions are made after the context, 30, 31 and 41.
    assert seen == {"tokens": 2 * 23, "rows": 2 * 4}
    seen.update(tokens=0, rows=0)
    head._is_all = False
    likelihood.trees(head, asked, [([0, 1], 15)], greedy=False, cache_key="cache")
    assert seen == {"tokens": 15 + 2 * 8, "rows": 1 + 2 * 4}
    # Once the head is known to be all that makes the logits, the model's own is asked for nothing.
    seen.update(tokens=0, rows=0)
    head._is_all = True
    likelihood.trees(head, asked, [([0, 1], 0)], greedy=False)
    assert seen == {"tokens": 2 * 23, "rows": 0}


def deafen(model):
    """As a model that makes its own mask."""
    model.register_forward_pre_hook(lambda _model, given, options: (given, {**options, "attention_mask": None}),
                                    with_kwargs=True)


def test_trees_of_a_row_need_no_mask_and_where_they_cannot_be_taken_apart_a_mask_of_the_row_serves(monkeypatch):
    asked = questions(4) + questions(5, shared=40)
    for cannot in ("", "set", "softcap", "ignores", "wrong"):
        model = model_of("llama")
        expected = one_by_one(model, asked)
        with monkeypatch.context() as patch:
            if cannot == "set":
                patch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
            if cannot == "softcap":
                patch.setattr(tree_attention, "attend", functools.partial(tree_attention.attend, softcap=3.0))
            if cannot == "ignores":
                patch.setattr(tree_attention, "attend", transformers_sdpa())
            if cannot == "wrong":
                patch.setattr(tree_attention, "attend", attending_to_all)
            if not cannot:
                deafen(model)
            engine = engine_of(model)
            check(engine.likelihoods(asked, greedy=True), expected)
        assert engine._reader.head.packs is not bool(cannot) and not engine.likelihood_note, cannot
        assert model.config._attn_implementation == "sdpa"


def attending_to_all(*given, attend=tree_attention.attend, **options):
    tree_attention._FOREST.get().mask_N1TT.zero_()
    return attend(*given, **options)


def transformers_sdpa():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def test_a_model_in_which_texts_that_are_read_together_mix_is_read_plainly_and_says_so(monkeypatch):
    model = model_of("llama")
    deafen(model)
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    engine, asked = engine_of(model), questions(4)
    check(engine.likelihoods(asked, greedy=True), one_by_one(model, asked))
    assert "influence each other" in engine.likelihood_note


def test_what_texts_begin_with_is_kept_for_the_next_call(monkeypatch):
    model, read = model_of("llama"), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _module, given: read.append(given[0].numel()))
    engine, first, second = engine_of(model), questions(1, shared=45), questions(1, shared=45)[2:]
    engine.likelihoods(first)
    longer = [Question(context=(*question.context[:45], 5, 6, 7, 8, *question.context[45:]),
                       continuations=question.continuations) for question in second]
    shorter = [Question(context=(*question.context[:40], 9, *question.context[45:]),
                        continuations=question.continuations) for question in second]
    for asked, num_read in ((second, None), (longer, 4), (shorter, 1), (shorter, None)):
        read.clear()
        expected = one_by_one(model, asked)
        del read[:]
        check([[type(one)(log_prob=one.log_prob, greedy=hit[1]) for one, hit in zip(ours, theirs, strict=True)]
               for ours, theirs in zip(engine.likelihoods(asked), expected, strict=True)], expected)
        assert read[0] == num_read if num_read else len(read) == 1, (read, num_read)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma", "mistral, window", "mamba", "bloom"])
def test_sums_over_some_tokens_of_many_texts_are_those_of_each_text_by_itself(kind, monkeypatch):
    monkeypatch.setattr(likelihood, "BATCH_TOKENS", 120)
    monkeypatch.setattr(tree_attention, "_SHORT", 20)
    model, generator = model_of(kind), np.random.default_rng(3)
    texts = []
    for size in (2, 70, 5, 30, 31, 12, 58, 3, 40, 1):  # 70: too long to share a row
        tokens = generator.integers(3, 97, size).tolist()
        texts.append((tokens, sorted(generator.choice(range(1, size), (size + 1) // 2, replace=False).tolist())
                      if size > 2 else list(range(1, size))))
    engine = engine_of(model)
    expected = Engine.summed_log_probs(engine, texts)
    read = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _module, given: read.append(given[0].shape))
    for _ in range(2):
        read.clear()
        assert np.allclose(engine.summed_log_probs(texts), expected, atol=1e-4) and expected[-1] == 0.0
    num_read, together = sum(int(np.prod(shape)) for shape in read), kind in ("llama", "gpt2", "gemma")
    assert (len(read) < len(texts) - 2) is together and num_read <= sum(len(tokens) for tokens, _ in texts)


def test_texts_that_disturb_each_other_in_a_row_are_read_alone(monkeypatch):
    model = model_of("llama")
    texts = [([5 * n, 7, 9 + n, 11, 4], [2, 3, 4]) for n in range(1, 6)]
    expected = Engine.summed_log_probs(engine_of(model), texts)
    monkeypatch.setattr(tree_attention, "attend", attending_to_all)
    assert np.allclose(engine_of(model).summed_log_probs(texts), expected, atol=1e-5)


class OneByOne(Engine):
    """An engine that has log-probabilities of a text and nothing quicker."""

    generate = tokens_after = time_once = close = Engine.stream

    def __init__(self, model):
        self.model = model

    def log_probs(self, tokens):
        import torch

        with torch.inference_mode():
            return self.model(torch.tensor([list(tokens)])).logits[0].log_softmax(-1).numpy()


def test_any_engine_gives_likelihoods():
    model = model_of("llama")
    asked = questions(2)
    check(OneByOne(model).likelihoods(asked), one_by_one(model, asked))


def test_nothing_asked_gives_nothing():
    assert engine_of(model_of("llama")).likelihoods([]) == []
