"""Bytes of one forward and backward pass: what autograd keeps, and what stands beside it for a moment.

Counted from how each layer is computed: through plain peft and transformers, or through the parts of the
fast path (``lora_kit/fast``). Source: which tensors torch's autograd saves of each operation, seen with a counter of
live storages over whole passes. tests/test_activations.py repeats that: within 2 % for LoRA on all linear layers in
both precisions, with and without the fast path and checkpointing (attention by a CPU's matrix units
may hold less than is counted); within 12 % for padded rows, eager attention, fewer
targets, dropout and other architectures. Decoder models of ``memory.py``; experts are
counted as the tokens that go through them, which is an estimate. DoRA is not counted. Torch-free; reads and writes
nothing.

Letters as in ``memory.py``, and w bytes a value of the arithmetic (4 or 2), T tokens of a pass, N those that are
trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora_kit.errors import ModelError
from lora_kit.memory import BYTES_PER_VALUE, Shape, linear_sizes, times_of
from lora_kit.recipe import FAST_PARTS, LoraSection, Recipe

HEAD_SLICE = 256
"""Trained positions whose logits the fast path holds at a time (``fast/head.py``)."""
HEAD_BYTES = 2**26
"""Bytes of logits that it holds at a time with compiled kernels, at least of HEAD_SLICE positions."""
_BLOCK = 256
"""Queries of a block in the fast path's attention (``fast/attention.py``)."""
_MULTIPLE = 32
"""Rows are filled up to a multiple of it there."""
_INPUT_BYTES = 8 * 3
"""Token, label and position of a token, as 64-bit integers."""


@dataclass(frozen=True, kw_only=True)
class Path:
    """How a model computes: what decides which tensors are kept."""

    precision: str = "bf16"
    fast: tuple[str, ...] = ()
    checkpointing: bool = False
    packed: bool = True
    attention: str = "sdpa"

    @property
    def width(self) -> int:
        return BYTES_PER_VALUE[self.precision]


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass over rows of ``lengths`` tokens, ``num_trained`` of them trained on.

    Padded rows all count as the longest, and their logits are made at each position that some row trains on.
    """

    lengths: tuple[int, ...]
    num_trained: int
    num_padded: int = 0
    """Positions of padding, over all rows; 0 where the rows are packed."""
    num_logits: int | None = None
    """Positions that logits are made at; None: those that are trained on."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths) + self.num_padded

    @property
    def longest(self) -> int:
        return max(self.lengths)


def path_of(recipe: Recipe, precision: str, *, on_cpu: bool = True, sharded: bool = False) -> Path:
    """The path that training of ``recipe`` takes, as ``preparation.py`` and ``fast`` choose it.

    ``attention`` of the fast path counts only where it is asked for by name: with ``auto`` training measures whether it
    is the faster one, and without it more is kept. ``kernels`` is taken for granted: without a C compiler a little more
    is held.
    """
    wanted = set(FAST_PARTS if "auto" in recipe.train.fast else recipe.train.fast)
    plain = recipe.model.load_in != "16bit" or recipe.lora.dropout or recipe.lora.dora or sharded
    if plain:
        wanted -= {"linear", "mlp"}
    if recipe.lora.dropout:
        wanted.discard("prefix")
    if sharded:
        wanted -= {"norm", "loss"}
    packed = recipe.train.packing
    if not packed or recipe.model.attention != "sdpa":
        wanted -= {"attention", "prefix"}
    if not on_cpu or "auto" in recipe.train.fast:
        wanted.discard("attention")
    if not on_cpu or "linear" not in wanted:
        wanted.discard("kernels")
    return Path(precision=precision, fast=tuple(part for part in FAST_PARTS if part in wanted),
                checkpointing=recipe.train.gradient_checkpointing, packed=packed, attention=recipe.model.attention)


def targets_of(shape: Shape, lora: LoraSection) -> set[str]:
    """Names of the linear layers of a block that have a LoRA."""
    sizes = linear_sizes(shape)
    if lora.targets == ["all-linear"]:
        return set(sizes)
    return {target.rpartition(".")[2] for target in lora.targets} & set(sizes)


def layer_bytes(shape: Shape, lora: LoraSection, path: Path, work: Pass) -> float:
    """Bytes that autograd keeps of one decoder layer until its backward pass.

    Fast: w·(4·H + 2·A·D + 2·K·D + 2·F + 7·r) + 4·(A + 2) a token: the layer's input, the input of its MLP, both
    normalised; queries, keys, values and what attention gives; what gate and up give; xAᵀ of seven layers; and in fp32
    a logarithm a head and a factor a norm. Plain: the activation and its product with up as well (2·F), attention's
    output in a second layout (A·D); in 16 bits a norm keeps its input in fp32, and each LoRA a copy of its input.
    """
    if lora.dora:
        raise ModelError("lora.dora", "what DoRA keeps of a pass is not counted", "the train stage measures it")
    w, targets = path.width, targets_of(shape, lora)
    hidden, heads = shape.hidden_size, shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    into_attention, into_mlp = targets & {"q_proj", "k_proj", "v_proj", "qkv_proj"}, targets & {
        "gate_proj", "up_proj", "gate_up_proj"}
    total = shape.norms_per_layer * _norm(path, hidden, 1)
    total += _inputs(path, hidden, len(into_attention), lora)
    if shape.qk_norm_size:
        total += _norm(path, heads + keys, shape.num_heads + shape.num_kv_heads
                       if shape.qk_norm_size == 2 * shape.head_dim else 2)
    total += _attention(shape, path, work)
    if "o_proj" in targets:
        in_place = "attention" in path.fast and ("linear" in path.fast or w == 4)
        total += 0 if in_place else w * heads
        total += _dropped(heads, w, lora)
    dense = (shape.num_layers - shape.num_expert_layers) / shape.num_layers
    total += dense * _mlp(shape, path, into_mlp, "down_proj" in targets, lora)
    if dense < 1:
        # Each of a token's experts: its input, gate and up, the activation, the product and its output.
        total += (1 - dense) * w * shape.experts_per_token * (2 * hidden + 4 * shape.expert_size)
    total += w * lora.rank * len(targets)
    return total * work.num_tokens


def _norm(path: Path, values: int, num_norms: int) -> float:
    """A norm's input (in fp32 where autograd made a copy) and a number for each of its rows."""
    return (path.width if "norm" in path.fast else 4) * values + 4 * num_norms


def _inputs(path: Path, values: int, num_layers: int, lora: LoraSection) -> float:
    """What ``num_layers`` LoRA layers keep of an input that they share."""
    if not num_layers:
        return 0
    shared = "linear" in path.fast or path.width == 4 and not lora.dropout
    return path.width * values * (1 if shared else num_layers) + num_layers * _dropped(values, path.width, lora)


def _dropped(values: int, width: int, lora: LoraSection) -> float:
    """Dropout on a LoRA's input keeps the factors that it was multiplied with, in fp32."""
    return 4 * values if lora.dropout else 0


def _attention(shape: Shape, path: Path, work: Pass) -> float:
    """Queries, keys, values, output and logarithms; without a fused kernel all scores and probabilities."""
    w, heads = path.width, shape.num_heads * shape.head_dim
    keys = shape.num_kv_heads * shape.head_dim
    if path.attention == "eager":
        # Repeated keys and values; softmax in fp32, its copy in the arithmetic's type where that is another one.
        length = work.num_tokens if path.packed else work.longest
        capped = 4 if shape.model_type == "gemma2" else 0  # the soft cap's tanh
        return w * 4 * heads + shape.num_heads * length * (4 + capped + (w if w != 4 else 0))
    repeated = 2 * heads if not path.packed and heads != keys else 2 * keys
    # Values are a part of the fused layer's output, which is kept whole.
    fused = heads + keys if shape.fused else 0
    return w * (2 * heads + repeated + fused) + 4 * shape.num_heads


def _mlp(shape: Shape, path: Path, into: set[str], down: bool, lora: LoraSection) -> float:
    w, inner = path.width, shape.intermediate_size
    kept = _inputs(path, shape.hidden_size, len(into), lora)
    if "mlp" in path.fast:
        return w * 2 * inner + (kept or w * shape.hidden_size)
    return kept + w * inner * (4 if down else 3) + (_dropped(inner, w, lora) if down else 0)


def kept_bytes(shape: Shape, lora: LoraSection, path: Path, work: Pass) -> float:
    """Bytes that autograd keeps of all layers when the forward pass is done; logits come on top.

    With checkpointing a layer's input, w·H a token, and nothing else (Chen et al. 2016, arXiv:1604.06174).
    """
    inputs, hidden = _INPUT_BYTES * work.num_tokens, shape.hidden_size
    # Rotary angles once for all layers; the last norm's input.
    ends = (2 * path.width * shape.head_dim + _norm(path, hidden, 1)) * work.num_tokens
    if path.width != 4 and "linear" not in path.fast:
        # Autocast's 16-bit copies of the adapter.
        sizes, targets = linear_sizes(shape), targets_of(shape, lora)
        ends += sum(path.width * lora.rank * sum(sizes[name]) * times_of(shape, name) for name in targets)
    if path.checkpointing:
        return inputs + ends + shape.num_layers * path.width * hidden * work.num_tokens
    # Nothing below the first layer learns, so its first norm keeps nothing.
    first = _norm(path, hidden, 1) * work.num_tokens
    return inputs + ends + shape.num_layers * layer_bytes(shape, lora, path, work) - first


def layer_moment_bytes(shape: Shape, lora: LoraSection, path: Path, work: Pass) -> float:
    """Bytes beside what is kept, at the worst moment of one layer's backward pass.

    Fast, a token: with kernels 4·w·F; without 5·w·F, in 16 bits 7·w·F; in 16 bits the largest weight once more, laid
    out for the product. Plain: 2·w·F in fp32; in 16 bits 3·w·F + 5·w·H. With
    checkpointing the whole layer is made again first. Long rows: the probabilities of a block of queries in attention's
    own backward pass and its filled-up copies of a row, by when the MLP's part is gone.
    """
    w, inner, hidden = path.width, shape.intermediate_size, shape.hidden_size
    if shape.num_expert_layers == shape.num_layers:
        inner = shape.experts_per_token * shape.expert_size
    tokens = work.num_tokens
    again = layer_bytes(shape, lora, path, work) - (w * hidden * tokens if w == 4 or "norm" in path.fast else 0) \
        if path.checkpointing else 0
    if "mlp" in path.fast:
        wide = {(True, 4): 4, (True, 2): 4, (False, 4): 5, (False, 2): 7}["kernels" in path.fast, w]
        mlp = tokens * w * (wide + shape.fused) * inner
    else:
        copies = 0 if w == 4 else 2 * hidden if "linear" in path.fast else inner + (
            hidden if path.checkpointing else 5 * hidden)
        mlp = tokens * w * (2 * inner + copies)
    scratch = w * inner * hidden if w != 4 else 0
    heads, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    attention = tokens * w * (2 * heads + 2 * keys)
    if path.attention == "eager":
        length = tokens if path.packed else work.longest
        attention += shape.num_heads * tokens * length * 4 * 2
    elif "attention" in path.fast:
        each = 2 * w if "kernels" in path.fast else 8 if w == 4 else 12
        padded = -(-work.longest // _MULTIPLE) * _MULTIPLE
        whole = padded // _BLOCK * _BLOCK
        scores = max(min(_BLOCK, whole) * whole, (padded - whole) * padded)
        attention += shape.num_heads * scores * each + padded * w * (3 * heads + 4 * keys)
        if padded > _BLOCK:  # a block's queries and gradients, copied
            attention += w * _BLOCK * 3 * heads
    freed = tokens * _mlp(shape, path, targets_of(shape, lora) & {"gate_proj", "up_proj", "gate_up_proj"},
                          "down_proj" in targets_of(shape, lora), lora)
    return again + max(mlp + scratch, attention - freed)


def head_moment_bytes(shape: Shape, path: Path, work: Pass, *, learns: bool = True) -> float:
    """Bytes of logits and loss at their worst moment.

    With kernels: slices of w·V a position, 64 MiB in all, and the gradients of their hidden states in fp32. Fast
    without: slices of 256 positions, 12·V each: a slice's logits in fp32, those of the slice before, and a copy
    inside of the logarithm of sums. Either way the trained positions' hidden states with their gradients. Plain: all N
    positions, (4 + 4 + 2)·V each in 16 bits (logits, in fp32, and their logarithms), (4 + 4)·V in fp32.
    """
    number = work.num_trained if work.num_logits is None else work.num_logits
    w, vocabulary = path.width, shape.vocab_size
    hidden = w * shape.hidden_size * number * (3 if learns else 1)
    if "loss" in path.fast and "kernels" in path.fast:
        held = min(work.num_trained, max(HEAD_SLICE, HEAD_BYTES // (w * vocabulary)))
        return hidden + held * (w * vocabulary + (8 * shape.hidden_size if learns else 0))
    if "loss" in path.fast:
        slices = min(-(-work.num_trained // HEAD_SLICE), 2)
        return hidden + min(HEAD_SLICE, work.num_trained) * vocabulary * (4 + 4 * slices)
    return hidden + number * vocabulary * (8 if w == 4 else 10)


def pass_bytes(shape: Shape, lora: LoraSection, path: Path, work: Pass) -> float:
    """Most bytes that a forward and backward pass holds at once, without weights and gradients."""
    return kept_bytes(shape, lora, path, work) + max(
        layer_moment_bytes(shape, lora, path, work), head_moment_bytes(shape, path, work))


def forward_bytes(shape: Shape, path: Path, work: Pass) -> float:
    """Most bytes of a pass that keeps nothing: a layer's hidden states, what its MLP makes, and the logits.

    Per token: 4·w·H (residual, normalised, and both after the layer) and 3·w·F (gate, up, and the activation), in 16
    bits without the fast path 4·(H + F) more, peft's fp32 copies of a LoRA's input.
    """
    w, inner = path.width, shape.intermediate_size
    if shape.num_expert_layers == shape.num_layers:
        inner = shape.experts_per_token * shape.expert_size
    token = w * (4 * shape.hidden_size + 3 * inner) + _INPUT_BYTES
    if w != 4 and "linear" not in path.fast:
        token += 4 * (shape.hidden_size + inner)
    logits = head_moment_bytes(shape, path, work, learns=False) if work.num_trained else 0
    return max(token * work.num_tokens, logits + w * shape.hidden_size * 2 * work.num_tokens)
