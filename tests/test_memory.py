"""memory.py against what torch, peft and bitsandbytes really hold and do, on tiny models."""

import json

import pytest

from lora_kit import memory
from lora_kit.errors import ModelError
from lora_kit.recipe import LoraSection

# peft 0.21 asks transformers 5.23 for a property that the latter renamed; goes when peft asks for the new one.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SIZES = dict(vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, head_dim=24, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def build(model_type: str, **more):
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[model_type](**{**SIZES, **more})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    return model, memory.shape_of(json.loads(config.to_json_string()))


EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "mlp_only_layers": [1]},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}


@pytest.mark.parametrize("model_type", list(memory._FAMILIES))
@pytest.mark.parametrize("tied", [True, False])
def test_parameter_counts_equal_torchs(model_type, tied):
    more = {"head_dim": 16} if model_type in ("qwen2", "smollm3", "granite", "phi3") else {}  # these ignore head_dim
    more |= EXPERTS.get(model_type, {})
    model, shape = build(model_type, tie_word_embeddings=tied, **more)
    assert memory.num_params(shape) == sum(p.numel() for p in model.parameters())


def test_biases_are_counted():
    model, shape = build("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    assert memory.num_params(shape) == sum(p.numel() for p in model.parameters())


def test_a_config_that_leaves_out_defaults_is_read_like_transformers_does():
    config = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 3, "num_attention_heads": 4}
    shape = memory.shape_of(config)
    assert (shape.num_kv_heads, shape.head_dim, shape.tied) == (4, 16, False)
    assert memory.shape_of({**config, "model_type": "gemma"}).tied


@pytest.mark.parametrize("lora", [
    LoraSection(rank=4), LoraSection(rank=3, dora=True), LoraSection(rank=4, targets=["q_proj", "down_proj"]),
])
def test_trained_parameters_equal_pefts(lora):
    from peft import LoraConfig, get_peft_model

    model, shape = build("llama")
    targets = "all-linear" if lora.targets == ["all-linear"] else list(lora.targets)
    adapted = get_peft_model(model, LoraConfig(r=lora.rank, target_modules=targets, use_dora=lora.dora,
                                               task_type="CAUSAL_LM"))
    assert memory.num_lora_params(shape, lora) == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("model_type", "targets"), [
    ("phi3", ["all-linear"]), ("qwen3_moe", ["q_proj", "o_proj"]), ("mixtral", ["k_proj", "v_proj"])])
def test_trained_parameters_of_fused_and_expert_models_equal_pefts(model_type, targets):
    from peft import LoraConfig, get_peft_model

    model, shape = build(model_type, **EXPERTS.get(model_type, {"head_dim": 16}))
    names = "all-linear" if targets == ["all-linear"] else targets
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    assert memory.num_lora_params(shape, LoraSection(rank=4, targets=targets)) \
        == adapted.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_adapters_on_experts_are_not_guessed(targets):
    shape = memory.shape_of({**SIZES, "model_type": "mixtral", **EXPERTS["mixtral"]})
    with pytest.raises(ModelError, match="lora: its size does not follow"):
        memory.num_lora_params(shape, LoraSection(targets=targets))


def test_a_token_goes_through_some_experts_only():
    shape = memory.shape_of({**SIZES, "model_type": "mixtral", **EXPERTS["mixtral"]})
    expert = 3 * 64 * 96
    assert memory.num_expert_params(shape) == 3 * (4 * expert + 4 * 64)
    assert memory.num_expert_params(shape, active=True) == 3 * (2 * expert + 4 * 64)
    dense = memory.shape_of({**SIZES, "model_type": "mistral"})
    more = memory.inference_flops_per_token(shape, context=8) - memory.inference_flops_per_token(dense, context=8)
    assert more == 2 * 3 * (expert + 4 * 64)


def test_an_unknown_target_or_architecture_is_one_clear_error():
    _, shape = build("llama")
    with pytest.raises(ModelError, match="'attn' is no linear layer"):
        memory.num_lora_params(shape, LoraSection(targets=["attn"]))
    with pytest.raises(ModelError, match="model type 'gpt2'"):
        memory.shape_of({"model_type": "gpt2"})
    with pytest.raises(ModelError, match="hidden_size"):
        memory.shape_of({"model_type": "llama"})


@pytest.mark.parametrize("lora", [
    {"layers": [0]}, {"exclude": ["q_proj"]}, {"rank_pattern": {"q_proj": 2}}, {"modules_to_save": ["norm"]},
    {"trainable_tokens": [1]}, {"init": "eva"}, {"init": "mica"}])
def test_an_adapter_of_many_shapes_is_not_guessed(lora):
    with pytest.raises(ModelError, match="lora: its size does not follow from rank and targets alone"):
        memory.num_lora_params(memory.shape_of({**SIZES, "model_type": "llama"}), LoraSection(**lora))


def test_training_bytes_equal_what_torch_holds():
    import torch
    from peft import LoraConfig, get_peft_model

    model, shape = build("llama", tie_word_embeddings=True)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    expected = memory.training_bytes(shape, LoraSection(rank=4), precision="fp32")
    moments = [t for state in optimizer.state.values() for key, t in state.items() if key != "step"]
    assert expected.optimizer == sum(t.nbytes for t in moments)
    assert expected.gradients == sum(p.grad.nbytes for p in trained)
    assert expected.adapter == sum(p.nbytes for p in trained)
    assert expected.weights == sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    assert expected.total == expected.weights + 4 * expected.adapter


def test_four_bit_bytes_equal_bitsandbytes():
    import bitsandbytes.functional as functional
    import torch

    weights, state = functional.quantize_4bit(torch.randn(512, 4096), quant_type="nf4", compress_statistics=True)
    measured = weights.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    shape = memory.shape_of({**SIZES, "model_type": "llama"})
    rest = 2 * (memory.num_params(shape) - memory.num_linear_params(shape))
    per_weight = (memory.weight_bytes(shape, load_in="4bit") - rest) / memory.num_linear_params(shape)
    assert per_weight == pytest.approx(measured / (512 * 4096), rel=1e-3)
    assert memory.weight_bytes(shape, load_in="8bit") < memory.weight_bytes(shape)


def test_kv_bytes_equal_transformers_cache():
    import torch

    model, shape = build("llama")
    cache = model(input_ids=torch.arange(7)[None], use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.kv_bytes_per_token(shape, bytes_per_value=4) * 7 == held


@pytest.mark.parametrize("num_tokens", [5, 23])
def test_a_sliding_window_holds_no_more_than_itself(num_tokens):
    import torch
    from transformers import DynamicCache

    model, shape = build("gemma2", num_hidden_layers=4, sliding_window=8, query_pre_attn_scalar=24)
    assert shape.windows == ((None, 2), (8, 2))
    cache = DynamicCache(config=model.config)
    for token in range(num_tokens):
        model(input_ids=torch.tensor([[token]]), cache=cache, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert memory.kv_bytes(shape, num_tokens, bytes_per_value=4) == held
    assert memory.kv_bytes(shape, num_tokens, num_sequences=3) == 3 * memory.kv_bytes(shape, num_tokens)


@pytest.mark.parametrize(("config", "windows"), [
    ({"model_type": "llama"}, ((None, 3),)), ({"model_type": "mistral", "sliding_window": 32}, ((32, 3),)),
    ({"model_type": "qwen3", "sliding_window": 32, "use_sliding_window": False}, ((None, 3),)),
    ({"model_type": "gemma3_text", "sliding_window": 16, "num_hidden_layers": 13}, ((None, 2), (16, 11))),
    ({"model_type": "gemma2", "sliding_window": 16, "layer_types": ["sliding_attention"] * 3}, ((16, 3),))])
def test_windows_are_read_like_transformers_does(config, windows):
    assert memory.shape_of({**SIZES, **config}).windows == windows


def test_operations_agree_with_torchs_counter():
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode

    model, shape = build("llama", num_hidden_layers=8)
    tokens = torch.arange(32)[None]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    assert memory.inference_flops_per_token(shape, context=32) * 32 == counter.get_total_flops()

    lora = LoraSection(rank=4)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    expected = memory.training_flops_per_token(shape, lora, context=32) * 32
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.03)  # the first block needs no input gradient
    assert memory.training_flops_per_token(shape, lora, context=32, checkpointing=True) > 1.25 * expected / 32


def test_smollm2_is_the_model_that_its_card_says():
    shape = memory.shape_of({"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                             "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                             "tie_word_embeddings": True})
    assert memory.num_params(shape) == 134_515_008
    assert memory.num_lora_params(shape, LoraSection(rank=16)) == 4_884_480
    assert memory.kv_bytes_per_token(shape) == 23_040
    trained = memory.training_flops_per_token(shape, LoraSection(rank=16), context=100, trained_share=0.51)
    assert trained == pytest.approx(0.51e9, rel=0.05)
