"""lean_decoder.py against the models' own forward, token by token."""

from __future__ import annotations

import pytest
import torch

from lora_kit import lean_decoder
from lora_kit.engines.hf import HfEngine

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(model_type: str, dtype=torch.float32, **more):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**SIZES, **more})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    with torch.no_grad():  # norms and biases that are all ones or zero would hide that they are left out
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def own_logits(model, tokens_1T, start: int):
    with torch.inference_mode():
        return model(input_ids=tokens_1T, use_cache=False).logits[0, start:].float()


def lean_logits(model, decoder, tokens_1T, start: int):
    with torch.inference_mode():
        out = model(input_ids=tokens_1T[:, :start], use_cache=True)
        decoder.start(getattr(out, "cache", None) or out.past_key_values, tokens_1T.shape[1])
        return torch.cat([decoder.step(tokens_1T[:, place]) for place in range(start, tokens_1T.shape[1])]).float()


@pytest.mark.parametrize(("model_type", "more"), [
    ("llama", {}), ("llama", {"num_key_value_heads": 4, "attention_bias": True}), ("llama", {"head_dim": 24}),
    ("llama", {"mlp_bias": True, "tie_word_embeddings": True}), ("mistral", {"sliding_window": None}), ("qwen2", {}),
    ("qwen3", {"head_dim": 24}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}})])
def test_the_same_logits_as_the_models_own(model_type, more):
    model = build(model_type, **more)
    decoder = lean_decoder.make(model)
    assert decoder is not None
    tokens_1T = torch.randint(0, 320, (1, 40))
    assert torch.allclose(lean_logits(model, decoder, tokens_1T, 25), own_logits(model, tokens_1T, 25), atol=1e-4)
    pair_2T = torch.randint(0, 320, (2, 30))
    ours = lean_logits(model, decoder, pair_2T, 28)  # both rows' logits, place by place
    with torch.inference_mode():
        wanted = model(input_ids=pair_2T, use_cache=False).logits[:, 28:].float()
    assert torch.allclose(ours.view(2, 2, -1).transpose(0, 1), wanted, atol=1e-4)


@pytest.mark.parametrize(("model_type", "more"), [
    ("granite", {"residual_multiplier": 0.2, "logits_scaling": 4.0}), ("gemma", {"head_dim": 16}),
    ("phi3", {}), ("mixtral", {}), ("llama", {"hidden_act": "gelu"})])
def test_what_computes_otherwise_is_not_served(model_type, more):
    assert lean_decoder.make(build(model_type, **more)) is None


def test_the_engine_decodes_with_it_in_16_bits_alone(monkeypatch, tiny_model):
    from lora_kit.chat import load_tokenizer

    tokenizer, prompt = load_tokenizer(tiny_model), list(range(3, 30))
    for dtype, served in ((torch.float32, False), (torch.bfloat16, True)):
        engine = HfEngine(build("llama", dtype), tokenizer, stop_ids=(2,))
        assert (engine._lean_decoder(1) is not None) == served and engine._lean_decoder(2) is None
        tokens = list(engine.tokens_after(prompt, 6))
        assert len(tokens) == 6
        timed = engine.time_once([prompt], 6)
        assert timed["tokens_generated"] == 6 and timed["decode_seconds"] > 0
        monkeypatch.setattr(engine, "_lean_decoder", lambda number: None)
        plain = list(engine.tokens_after(prompt, 6))
        # Greedy answers part where two tokens are as likely but for rounding: up to there they are the same.
        apart = next((place for place in range(6) if tokens[place] != plain[place]), None)
        if apart is not None:
            logits_V = torch.from_numpy(engine.log_probs([*prompt, *plain[:apart]])[-1])
            assert abs(float(logits_V[tokens[apart]] - logits_V[plain[apart]])) < 0.1


def test_on_the_default_base_it_is_no_further_from_fp32_than_the_model_itself(smollm2_base):
    from lora_kit.model import load_base

    tokens_1T = torch.randint(0, 49152, (1, 160), generator=torch.Generator().manual_seed(1))
    exact = torch.log_softmax(own_logits(load_base(smollm2_base, dtype="fp32"), tokens_1T, 100), -1)
    model = load_base(smollm2_base, dtype="bf16")
    decoder = lean_decoder.make(model)
    assert decoder is not None
    kl = {}
    for name, logits in (("own", own_logits(model, tokens_1T, 100)),
                         ("lean", lean_logits(model, decoder, tokens_1T, 100))):
        kl[name] = float((exact.exp() * (exact - torch.log_softmax(logits, -1))).sum(-1).mean())
    assert kl["lean"] <= 1.1 * kl["own"] and kl["lean"] < 0.01, kl
