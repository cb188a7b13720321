"""GGUF files proven against llama.cpp's logits and tokens, and read back through transformers."""

import json

import numpy as np
import pytest

from lora_kit.engines import missing, open_engine
from lora_kit.errors import ModelError
from lora_kit.quantizers import gguf
from lora_kit.types import Artifact
from tests import tiny

TOKENS = np.random.default_rng(0).integers(3, 250, 200).tolist()
TEXTS = ["hi <|im_start|>user\n12 345  x", "ü€ don't\n\n\n ok<|im_end|>", "def f(a):\n    return a1"]
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
MODELS = {
    "llama": ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}}),
    "llama-untied-wide-heads": ("Llama", {"tie_word_embeddings": False, "head_dim": 32}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 32}),
}
needs_llamacpp = pytest.mark.skipif(missing("llamacpp") is not None, reason="llama-cpp-python is not installed")


def save(folder, family="Llama", **config):
    """A random model with wide weights, norms and biases: what is left out or misplaced shows in its logits."""
    import torch
    import transformers

    tiny.save_tokenizer(folder)
    fields = dict(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        tie_word_embeddings=True,
    )
    settings = getattr(transformers, f"{family}Config")(**{**fields, **config})
    torch.manual_seed(1)
    model = getattr(transformers, f"{family}ForCausalLM")(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def log_probs(folder):
    with open_engine(Artifact(name="m", path=str(folder), kind="hf"), dtype="fp32") as engine:
        return engine.log_probs(TOKENS).astype(np.float64)


def kl_of_file(folder, path, prefer):
    expected = log_probs(folder)
    with open_engine(Artifact(name="g", path=str(path), kind="gguf", tokenizer=str(folder)), prefer=prefer) as engine:
        found = engine.log_probs(TOKENS).astype(np.float64)
        differing = engine.same_tokens(TEXTS)
    return float((np.exp(expected) * (expected - found)).sum(axis=1).mean()), differing


@needs_llamacpp
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_transformers_does(name, tmp_path):
    family, config = MODELS[name]
    folder = save(tmp_path / "model", family, **config)
    gguf.quantize(folder, tmp_path, "f16")
    kl, differing = kl_of_file(folder, tmp_path / "model.gguf", "llamacpp")
    assert kl < 1e-5
    assert differing == []


@needs_llamacpp
def test_a_misplaced_rotary_row_would_show(tmp_path, monkeypatch):
    folder = save(tmp_path / "model")
    monkeypatch.setattr(gguf, "interleave_rotary_rows", lambda weights, num_heads: weights)
    gguf.quantize(folder, tmp_path, "f16")
    assert kl_of_file(folder, tmp_path / "model.gguf", "llamacpp")[0] > 1e-2


@needs_llamacpp
def test_a_forgotten_rope_scale_would_show(tmp_path, monkeypatch):
    folder = save(tmp_path / "model", rope_parameters=LLAMA3_ROPE)
    monkeypatch.setattr(gguf, "_rope_factors", lambda config: None)
    gguf.quantize(folder, tmp_path, "f16")
    assert kl_of_file(folder, tmp_path / "model.gguf", "llamacpp")[0] > 1e-3


@pytest.mark.parametrize(("kind", "bound"), [("f16", 1e-5), ("bf16", 1e-3), ("q8_0", 5e-3)])
def test_transformers_reads_it_back(kind, bound, tmp_path):
    folder = save(tmp_path / "model")
    gguf.quantize(folder, tmp_path, kind)
    kl, differing = kl_of_file(folder, tmp_path / "model.gguf", "hf")
    assert 0 <= kl < bound
    assert differing is None


def test_q8_0_weights_are_within_half_a_step(tmp_path):
    """Every weight of a block of 32 is within half of max|w| / 127 of the original, plus the fp16 of the scale."""
    from safetensors.numpy import load_file
    from transformers import AutoModelForCausalLM

    folder = save(tmp_path / "model")
    gguf.quantize(folder, tmp_path, "q8_0")
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype="float32").state_dict()
    original = load_file(folder / "model.safetensors")
    for name, weights in original.items():
        back = found[name].numpy()
        if weights.ndim == 1:
            assert np.array_equal(back, weights)
            continue
        blocks, back = weights.reshape(-1, 32), back.reshape(-1, 32)
        largest = np.abs(blocks).max(axis=1, keepdims=True)
        assert (np.abs(blocks - back) <= largest * (0.5 / 127 + 2**-11)).all(), name
        assert not np.array_equal(blocks, back)


def test_what_the_file_says_of_itself(tmp_path):
    from gguf import GGUFReader

    folder = save(tmp_path / "model", rope_parameters={"rope_type": "default", "rope_theta": 1000.0})
    (folder / "gguf_tokenizer.json").write_text(json.dumps({
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": False}))
    gguf.quantize(folder, tmp_path, "q8_0")
    reader = GGUFReader(tmp_path / "model.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert said["general.architecture"] == "llama" and said["llama.rope.freq_base"] == 1000.0
    assert said["tokenizer.ggml.pre"] == "smollm"  # the base's own, before what the structure would say
    assert said["tokenizer.ggml.add_bos_token"] is False
    assert (said["tokenizer.ggml.bos_token_id"], said["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert said["tokenizer.chat_template"] == tiny.CHATML
    assert said["tokenizer.ggml.tokens"][:3] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    kinds = said["tokenizer.ggml.token_type"]
    assert len(kinds) == 320 and kinds[:4] == [3, 3, 3, 1] and kinds[-1] == 5
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}  # tied: stored once
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"F32", "Q8_0"}


def test_interleaving_pairs_the_halves():
    rows = np.arange(8).reshape(8, 1)  # two heads of four rows: halves (0, 1) and (2, 3)
    assert gguf.interleave_rotary_rows(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(("config", "what"), [
    ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not written"),
    ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias"),
    ({"architectures": ["LlamaForCausalLM"], "hidden_act": "gelu"}, "activation gelu"),
    ({"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type yarn"),
    ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}, "sliding-window"),
    ({"architectures": ["LlamaForCausalLM"], "quantization_config": {"bits": 4}}, "quantized already"),
])
def test_what_is_not_proven_is_refused_by_name(config, what):
    with pytest.raises(ModelError, match=what) as error:
        gguf.check(config, "q8_0")
    assert "convert_hf_to_gguf.py" in error.value.todo


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
QUIET_BYTE_LEVEL = {**BYTE_LEVEL, "use_regex": False}


def spec(*parts, ignore_merges=False, normalizer=None):
    part = parts[0] if len(parts) == 1 else {"type": "Sequence", "pretokenizers": list(parts)}
    return {"pre_tokenizer": part, "normalizer": normalizer, "model": {"ignore_merges": ignore_merges}}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


LLAMA3 = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
          "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+")


@pytest.mark.parametrize(("tokenizer", "name"), [
    (spec(BYTE_LEVEL), "gpt-2"),
    (spec({"type": "Digits", "individual_digits": True}, BYTE_LEVEL), "smollm"),
    (spec(split(LLAMA3), QUIET_BYTE_LEVEL, ignore_merges=True), "llama-bpe"),
    (spec(split(LLAMA3.replace("{1,3}", "")), QUIET_BYTE_LEVEL, normalizer={"type": "NFC"}), "qwen2"),
])
def test_pre_tokenizers_that_are_known(tokenizer, name):
    assert gguf.pre_tokenizer_name(tokenizer) == name


@pytest.mark.parametrize("tokenizer", [
    {"pre_tokenizer": None, "model": {}},
    spec({**BYTE_LEVEL, "add_prefix_space": True}),
    spec(BYTE_LEVEL, normalizer={"type": "Lowercase"}),
    spec({"type": "Digits", "individual_digits": False}, BYTE_LEVEL),
    spec(split(LLAMA3), QUIET_BYTE_LEVEL),  # Llama 3 takes whole words before merges: without that it is another
    spec(split("\\w+"), QUIET_BYTE_LEVEL),
])
def test_pre_tokenizers_that_are_not_known_are_refused(tokenizer):
    with pytest.raises(ModelError, match="is not known to lora-kit"):
        gguf.pre_tokenizer_name(tokenizer)


def test_sentencepiece_and_oversized_tokenizers_are_refused(tmp_path):
    folder = save(tmp_path / "model")
    (folder / "gguf_tokenizer.json").write_text(json.dumps({"tokenizer.ggml.model": "llama"}))
    with pytest.raises(ModelError, match="only byte-level BPE"):
        gguf.quantize(folder, tmp_path, "f16")
    small = save(tmp_path / "small", vocab_size=100)
    with pytest.raises(ModelError, match="has token 258 and the embedding 100 rows"):
        gguf.quantize(small, tmp_path / "small", "f16")


PROSE = ("The city library opened in 1896 and holds about 45,000 books. On Mondays it's closed; children's hours are "
         "from 9 to 11. \"Don't run,\" said the clerk, who'd seen three accidents that week alone.\n\nRules:\n"
         "  1. Return what you borrow.\n  2. Be quiet: others are reading.\n")


@needs_llamacpp
@pytest.mark.real_model
def test_the_default_base_in_q8_0(smollm2_base, tmp_path):
    """A real tokenizer and real weights; measured: mean KL .007 to .009, 96 % of first choices kept."""
    from lora_kit import certificate, isolate
    from lora_kit.chat import load_tokenizer

    gguf.quantize(smollm2_base, tmp_path, "q8_0")
    tokens = load_tokenizer(smollm2_base)(PROSE)["input_ids"]
    rows = [{"tokens": tokens, "trained": [0] * len(tokens), "origin": "prose"}]
    base = Artifact(name="base", path=str(smollm2_base), kind="hf", size_bytes=1)
    reference = certificate.record_reference(artifact=base.as_dict(), rows=rows, path=str(tmp_path / "log_probs"))
    file = Artifact(name="q", path=str(tmp_path / "model.gguf"), kind="gguf", tokenizer=str(smollm2_base))
    # In a process of its own: where llama.cpp crashes on this CPU, that is an error and not the end of the tests.
    found = isolate.call("lora_kit.certificate:measure", {
        "reference": reference, "candidate": file.as_dict(), "prefer": ["llamacpp"]}).value
    assert found["engine"] == "llama.cpp" and found["tokenizer_differences"] == 0
    assert 1e-4 < found["mean_kl"] < 0.03 and found["top1_agreement"] > 0.9


# ---- types that llama.cpp makes itself ---------------------------------------------------

needs_llama_cpp = pytest.mark.skipif(gguf.missing("q4_k_m") is not None, reason="needs llama-cpp-python")


@needs_llama_cpp
def test_k_quants_are_in_order_and_an_importance_matrix_helps(tmp_path):
    """Of a model whose inputs differ much in size, which is where rounding by importance pays."""
    from safetensors.torch import load_file, save_file

    from lora_kit import certificate

    folder, _ = tiny.save_model(tmp_path / "model", dtype="bfloat16", hidden=256, initializer_range=0.1)
    weights = load_file(folder / "model.safetensors")
    for name, tensor in weights.items():
        if "layernorm" in name:
            tensor[::16] *= 8
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    rows = [[3 + (11 * row + 5 * place) % 250 for place in range(200)] for row in range(4)]
    asked = [{"tokens": [3 + (13 * place) % 250 for place in range(150)], "trained": [1] * 150, "origin": "r",
              "set": "rows"}]
    reference = certificate.record_reference(
        artifact=Artifact(name="m", path=str(folder), kind="hf", size_bytes=1).as_dict(), rows=asked,
        path=str(tmp_path / "recording"))
    kl, sizes = {}, {}
    for type, shown in (("q6_k", rows), ("q5_k_m", rows), ("q4_k_m", rows), ("q4_k_m", ())):
        out = tmp_path / f"{type}{len(shown)}"
        out.mkdir()
        note = gguf.quantize(folder, out, type, shown)
        assert [path.name for path in out.iterdir()] == ["model.gguf"] and "fell back" not in note
        assert note == ("importance matrix of 800 training tokens" if shown else "no importance matrix")
        file = Artifact(name="q", path=str(out / "model.gguf"), kind="gguf", tokenizer=str(folder))
        kl[type, bool(shown)] = certificate.measure(reference=reference, candidate=file.as_dict())["mean_kl"]
        sizes[type] = (out / "model.gguf").stat().st_size
    assert sizes["q6_k"] > sizes["q5_k_m"] > sizes["q4_k_m"]
    assert kl["q6_k", True] < kl["q5_k_m", True] < kl["q4_k_m", True] < kl["q4_k_m", False]


@needs_llama_cpp
def test_rows_that_no_block_of_256_divides_are_said(tmp_path):
    folder, _ = tiny.save_model(tmp_path / "model", dtype="bfloat16")
    assert "matrices whose rows are no multiple of 256 fell back" in gguf.quantize(folder, tmp_path, "q4_k_m")


def test_a_type_of_llama_cpp_names_its_install_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "llama_cpp" else name)
    assert gguf.missing("q4_k_m") == 'pip install "lora-kit[llamacpp]"' and gguf.missing("q8_0") is None


def test_the_importance_is_the_mean_square_of_the_inputs(tmp_path):
    """Of the first layer's queries: its inputs are the normalised embeddings, worked out by hand."""
    import torch

    folder, _ = tiny.save_model(tmp_path / "model", dtype="bfloat16", initializer_range=0.1)
    rows = [[5, 6, 7, 8], [9, 10]]
    found = gguf._importance(folder, rows)
    from safetensors.torch import load_file

    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].float()
    inputs = embedding[torch.tensor([token for row in rows for token in row])]
    inputs = inputs / inputs.square().mean(1, keepdim=True).sqrt()
    assert np.allclose(found["blk.0.attn_q.weight"], inputs.square().mean(0).numpy(), rtol=0.02)
    assert found["blk.1.ffn_down.weight"].shape == (128,) and "output.weight" not in found
