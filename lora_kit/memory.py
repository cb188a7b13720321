"""Bytes and operations of training and inference, as arithmetic over ``config.json``.

Training holds weights, adapter, gradients, optimizer states and activations; inference
holds weights and KV cache. All of this page are exact counts of tensors;
activations are in ``activations.py``, and ``footprint.py`` puts a process together from both.
Decoder models of the Llama layout (grouped-query attention, tied or untied head, sliding windows), dense
or with experts. Torch-free; reads and writes nothing.

Letters in the formulas: V vocabulary, H hidden size, F feed-forward size, L layers,
A attention heads, K key-value heads, D head size, r LoRA rank, C tokens attended to,
E experts, M size of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_kit.errors import ModelError
from lora_kit.recipe import LoraSection

# model_type -> (norms of size H in a layer, norms on queries and keys, bias on q/k/v, bias on o, tied when config.json
# does not say). Read in transformers 5.24's modeling_<model_type>.py; a bias of None is the configuration's
# attention_bias; the norms are over a head, or over all heads together.
_FAMILIES: dict[str, tuple[int, str, bool | None, bool | None, bool]] = {
    "llama": (2, "", None, None, False),
    "mistral": (2, "", False, False, False),
    "granite": (2, "", None, None, False),
    "smollm3": (2, "", None, None, True),
    "qwen2": (2, "", True, False, False),
    "qwen3": (2, "head", None, None, False),
    "gemma": (2, "", None, None, True),
    "gemma2": (4, "", None, None, True),
    "gemma3_text": (4, "head", None, None, True),
    "phi3": (2, "", False, False, False),
    "mixtral": (2, "", False, False, False),
    "qwen3_moe": (2, "head", None, None, False),
    "olmoe": (2, "all", None, None, False),
}
_FUSED = ("phi3",)
"""Architectures whose q, k and v are one layer, and whose gate and up are."""
_WINDOW_EVERY = {"gemma2": 2, "gemma3_text": 6}
"""Architectures of which all layers but each n-th slide, when config.json has no layer_types."""

BYTES_PER_VALUE = {"fp32": 4, "bf16": 2, "fp16": 2}
ADAPTER_BYTES = 4  # the adapter, its gradients and its two AdamW moments are kept in fp32


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a decoder that its bytes and operations follow from."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tied: bool
    norms_per_layer: int
    qk_norm_size: int
    """Values of the norms on queries and keys of a layer; 0 without them."""
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    fused: bool = False
    """q, k and v are one linear layer, and gate and up are."""
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    num_expert_layers: int = 0
    """Layers with experts in place of one MLP."""
    windows: tuple[tuple[int | None, int], ...] = ()
    """(tokens that a position sees, None for all before it; number of such layers)."""


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape that a transformers ``config.json`` describes.

    Raises:
        ModelError: an architecture whose layout is not known here, or a config without its sizes.
    """
    model_type = str(config.get("model_type"))
    if model_type not in _FAMILIES:
        raise ModelError("config.json", f"no memory formulas for model type '{model_type}'",
                         f"known: {', '.join(_FAMILIES)}")
    norms, qk_norm, qkv_bias, out_bias, tied = _FAMILIES[model_type]
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        vocab, inner = int(config["vocab_size"]), int(config["intermediate_size"])
        layers = int(config["num_hidden_layers"])
    except (KeyError, TypeError) as error:
        raise ModelError("config.json", f"lacks a size of the model ({error})") from None
    bias = bool(config.get("attention_bias", False))
    kv_heads, head_dim = int(config.get("num_key_value_heads") or heads), int(config.get("head_dim") or hidden // heads)
    return Shape(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        tied=tied if config.get("tie_word_embeddings") is None else bool(config["tie_word_embeddings"]),
        norms_per_layer=norms,
        qk_norm_size={"": 0, "head": 2 * head_dim, "all": (heads + kv_heads) * head_dim}[qk_norm],
        qkv_bias=bias if qkv_bias is None else qkv_bias,
        out_bias=bias if out_bias is None else out_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        fused=model_type in _FUSED,
        windows=_windows(config, model_type, layers),
        **_experts(config, model_type, layers, inner),
    )


def _windows(config: dict[str, Any], model_type: str, layers: int) -> tuple[tuple[int | None, int], ...]:
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    if not window or (model_type.startswith("qwen") and not config.get("use_sliding_window")):
        return ((None, layers),)
    every = config.get("sliding_window_pattern") or _WINDOW_EVERY.get(model_type)
    sliding = (list(kinds).count("sliding_attention") if kinds else layers - layers // every if every else layers)
    return tuple((far, times) for far, times in ((None, layers - sliding), (int(window), sliding)) if times)


def _experts(config: dict[str, Any], model_type: str, layers: int, inner: int) -> dict[str, int]:
    number = int(config.get("num_local_experts") or config.get("num_experts") or 0)
    if not number or model_type not in ("mixtral", "qwen3_moe", "olmoe"):
        return {}
    every, dense = int(config.get("decoder_sparse_step") or 1), set(config.get("mlp_only_layers") or ())
    sparse = sum(layer not in dense and (layer + 1) % every == 0 for layer in range(layers))
    return {"num_experts": number, "experts_per_token": int(config.get("num_experts_per_tok") or 1),
            "expert_size": int(config.get("moe_intermediate_size") or inner), "num_expert_layers": sparse}


_MLP_NAMES = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


def linear_sizes(shape: Shape) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of each linear layer of one block, by the name it has in transformers.

    Experts are none: transformers 5 holds all of a layer in two bare tensors.
    """
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    if shape.fused:
        return {"qkv_proj": (queries + 2 * keys, hidden), "o_proj": (hidden, queries),
                "gate_up_proj": (2 * inner, hidden), "down_proj": (hidden, inner)}
    sizes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    return {name: size for name, size in sizes.items() if times_of(shape, name)}


def times_of(shape: Shape, name: str) -> int:
    """In how many blocks the linear layer ``name`` stands."""
    return shape.num_layers - (shape.num_expert_layers if name in _MLP_NAMES else 0)


def num_linear_params(shape: Shape) -> int:
    """Weights of the linear layers of all blocks; biases, experts and head left out."""
    return sum(times_of(shape, name) * outputs * inputs for name, (outputs, inputs) in linear_sizes(shape).items())


def num_expert_params(shape: Shape, *, active: bool = False) -> int:
    """Weights of the experts, 3·H·M each, with their routers, E·H a layer; ``active``: those a token goes through."""
    experts = shape.experts_per_token if active else shape.num_experts
    return shape.num_expert_layers * shape.hidden_size * (3 * shape.expert_size * experts + shape.num_experts)


def num_params(shape: Shape) -> int:
    """All parameters; a head that is tied to the embedding counts once.

    V·H (twice when untied) + L·(linear weights + biases + norms) + experts + H.
    """
    biased = {"q_proj": shape.qkv_bias, "k_proj": shape.qkv_bias, "v_proj": shape.qkv_bias, "o_proj": shape.out_bias,
              "gate_proj": shape.mlp_bias, "up_proj": shape.mlp_bias, "down_proj": shape.mlp_bias}
    biases = sum(times_of(shape, name) * outputs for name, (outputs, _) in linear_sizes(shape).items()
                 if biased.get(name))
    norms = shape.num_layers * (shape.norms_per_layer * shape.hidden_size + shape.qk_norm_size)
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2)
    return (embeddings + num_linear_params(shape) + num_expert_params(shape) + biases + norms + shape.hidden_size)


def is_counted(shape: Shape, lora: LoraSection) -> bool:
    """Whether :func:`num_lora_params` knows the adapter's size.

    In a model with experts that is so for attention's layers alone: peft 0.21 adapts routers and experts as well where
    the targets are all-linear or an MLP's, the experts' in another rank.
    """
    mixed = shape.num_experts and any(target == "all-linear" or target.rpartition(".")[2] in _MLP_NAMES
                                      for target in lora.targets)
    return lora.counted and not mixed


def num_lora_params(shape: Shape, lora: LoraSection) -> int:
    """Trained parameters: r·(inputs + outputs) a target, and its outputs once more for DoRA's magnitude.

    Source: Hu et al. 2021 (arXiv:2106.09685) section 4.1; Liu et al. 2024 (arXiv:2402.09353) equation 5.

    Raises:
        ModelError: a target that is no module of this layout, or an adapter whose size depends on more than rank and
            targets.
    """
    if not is_counted(shape, lora):
        raise ModelError("lora", "its size does not follow from rank and targets alone",
                         "the train stage counts what is trained")
    blocks, head = linear_sizes(shape), (shape.vocab_size, shape.hidden_size)
    names = list(blocks) if lora.targets == ["all-linear"] else [target.rpartition(".")[2] for target in lora.targets]
    total = 0
    for name in dict.fromkeys(names):
        if name in blocks:
            (outputs, inputs), times = blocks[name], times_of(shape, name)
        elif name in ("lm_head", "embed_tokens"):
            (outputs, inputs), times = head, 1
        else:
            raise ModelError("lora.targets", f"'{name}' is no linear layer of a {shape.model_type} model",
                             f"its layers: {', '.join(blocks)}, lm_head, embed_tokens")
        total += times * (lora.rank * (outputs + inputs) + (outputs if lora.dora else 0))
    return total


def weight_bytes(shape: Shape, *, precision: str = "bf16", load_in: str = "16bit") -> int:
    """Bytes of the base model's weights in memory.

    16bit: parameters times bytes per value. 8bit: a byte a weight of the linear layers and an fp32
    scale per output (Dettmers et al. 2022, arXiv:2208.07339). 4bit (nf4, double quantization): half a
    byte a weight, a byte per block of 64, four bytes per 256 blocks (Dettmers et al. 2023,
    arXiv:2305.14314 section 3). Embedding, head, norms, biases and experts stay at ``precision``.
    """
    width, linear = BYTES_PER_VALUE[precision], num_linear_params(shape)
    rest = (num_params(shape) - linear) * width
    if load_in == "4bit":
        return rest + linear // 2 + linear // 64 + linear // 64 // 256 * 4
    if load_in == "8bit":
        outputs = sum(times_of(shape, name) * outputs for name, (outputs, _) in linear_sizes(shape).items())
        return rest + linear + 4 * outputs
    return rest + linear * width


@dataclass(frozen=True, kw_only=True)
class TrainingBytes:
    """What LoRA training holds whatever the batch; activations come on top."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer


def training_bytes(
    shape: Shape, lora: LoraSection, *, precision: str = "bf16", load_in: str = "16bit", optimizer: str = "adamw"
) -> TrainingBytes:
    """Bytes held through a step: frozen weights, and for the adapter alone its values, gradients and AdamW states.

    Adapter and gradients 4 bytes a trained parameter, AdamW's two moments 8 (Loshchilov and Hutter 2019,
    arXiv:1711.05101 algorithm 2), or in 8 bits 2 and an fp32 scale each per 256 values (Dettmers et al. 2021,
    arXiv:2110.02861 section 2.1; factors of under 4,096 values stay in fp32, which this leaves out).
    """
    trained = num_lora_params(shape, lora)
    return TrainingBytes(
        weights=weight_bytes(shape, precision=precision, load_in=load_in),
        adapter=ADAPTER_BYTES * trained,
        gradients=ADAPTER_BYTES * trained,
        optimizer=2 * trained + 2 * 4 * trained // 256 if optimizer != "adamw" else 2 * ADAPTER_BYTES * trained,
    )


def kv_bytes_per_token(shape: Shape, *, bytes_per_value: float = 2) -> float:
    """Bytes of KV cache for each token of each sequence: 2·L·K·D values.

    Keys and values of the K grouped heads (Ainslie et al. 2023, arXiv:2305.13245). 2 bytes a value for
    bf16 and fp16 caches, which is also llama.cpp's default. Layers that slide hold no more than their window:
    :func:`kv_bytes`.
    """
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * bytes_per_value


def kv_bytes(shape: Shape, num_tokens: int, *, num_sequences: int = 1, bytes_per_value: float = 2) -> float:
    """Bytes of KV cache of ``num_sequences`` of ``num_tokens`` each: 2·K·D values a token and layer.

    A layer with a sliding window keeps the window less the token that is being read (Jiang et al. 2023,
    arXiv:2310.06825 section 2; so does transformers 5.24's DynamicSlidingWindowLayer).
    """
    held = sum(times * (num_tokens if window is None else min(num_tokens, window - 1))
               for window, times in shape.windows)
    return 2 * shape.num_kv_heads * shape.head_dim * bytes_per_value * held * num_sequences


def inference_flops_per_token(shape: Shape, *, context: float) -> float:
    """Operations of one token forward with the head: 2 a weight, and 4·L·A·D a token attended to.

    A product and a sum per weight; scores and their weighted sum (Kaplan et al. 2020, arXiv:2001.08361
    table 1). Norms, activations and softmax are left out.
    """
    products = num_linear_params(shape) + num_expert_params(shape, active=True) + shape.vocab_size * shape.hidden_size
    return 2.0 * products + 4.0 * shape.num_layers * shape.num_heads * shape.head_dim * context


def training_flops_per_token(
    shape: Shape, lora: LoraSection, *, context: float, trained_share: float = 1.0, checkpointing: bool = False
) -> float:
    """Operations of one token in a LoRA step.

    A frozen weight costs 4 (forward, and gradients to its input: none to itself), a trained one 6, the head
    4 where a token is trained on, attention three times its forward pass. Checkpointing adds the blocks'
    forward pass once more. Source: Kaplan et al. 2020 section 2.1 with the frozen weights' own gradients
    left out. (The first block's inputs need no gradient: a little less in a model of few layers.)
    """
    attention = 4.0 * shape.num_layers * shape.num_heads * shape.head_dim * context
    linear = 2.0 * (num_linear_params(shape) + num_expert_params(shape, active=True))
    trained = 2.0 * num_lora_params(shape, lora)
    head = 2.0 * shape.vocab_size * shape.hidden_size * trained_share
    again = linear + trained + attention if checkpointing else 0.0
    return 2 * linear + 3 * trained + 2 * head + 3 * attention + again
