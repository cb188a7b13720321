"""Peak memory of each process of a run, term by term: training, merge, and each form at inference.

A process holds what it loaded for as long as it lives, and for a moment what a pass needs. Training's peak is that of
its worst part: loading, a step, held-out rows, or the answers after the last step. Every term is a formula
(``memory.py``, ``activations.py``, and here); two are measured and say so: the floor of a process, which is Python with
its libraries, and what the C library keeps of freed arrays. Torch-free; reads and writes nothing.

Letters as in ``memory.py`` and ``activations.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_kit import activations, memory
from lora_kit.activations import Pass, Path
from lora_kit.memory import BYTES_PER_VALUE, Shape
from lora_kit.recipe import LoraSection, Recipe

FLOOR_BYTES = {"training": 505e6, "inference": 470e6, "llama.cpp": 415e6}
"""Resident bytes of a process before a model is in it: Python, torch, transformers, peft, accelerate and bitsandbytes
imported, and a matrix product multiplied. Measured on Linux x86-64 with torch 2.13's CPU build (`benchmarks/
plan_accuracy.py` prints that of the imports); those of inference are what docs/bench.md's example leaves of measured
peaks. `lora-kit plan --calibrate` measures training's on the machine at hand."""
CUDA_CONTEXT_BYTES = 500e6
"""What a CUDA process holds on its device before the first tensor. An assumption: not measured here."""
KEPT_SHARE = {"fast": 0.17, "fast fp32": 0.38, "plain": 0.95}
"""Freed arrays that the C library keeps resident, to each byte of what all layers keep of a pass, whether at once or,
with checkpointing, one after the other: glibc 2.36 does not put an aligned array into the hole that one of the same
size left (glibc bug 14581), so that each layer leaves holes of its own. Measured by `benchmarks/plan_accuracy.py`:
KEPT_QUANTILE of eleven settings with the fast path in 16 bits (none above 0.24), of four in fp32 (0.31 to 0.62), and of
ten with the plain one, have less. Above the middle, since a plan that says too little is worse than one that says
too much."""
KEPT_QUANTILE = 0.7
KERNEL_BYTES = 65e6
"""What oneDNN holds in 16-bit training on a CPU: kernels that it compiles for each shape, and their scratch. Measured
as the resident bytes that stay after the first pass when every array goes back to the system at once."""
_MAPPED_AROUND = 65536
"""Bytes that a page fault of a mapped file brings in (Linux' fault_around_bytes)."""
ANSWER_ROWS = 16
"""Prompts that are answered together after training (``engines/hf.py``)."""


@dataclass(frozen=True, kw_only=True)
class Term:
    """One part of a peak: how many bytes, and by which formula."""

    name: str
    num_bytes: float
    formula: str = ""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What one process holds at its worst moment."""

    name: str
    terms: tuple[Term, ...]
    moment: str = ""
    layers_bytes: float = 0.0
    """What all layers keep of the pass, whether at once or one after the other: KEPT_SHARE is a share of it."""

    @property
    def total(self) -> float:
        return sum(term.num_bytes for term in self.terms)

    def of(self, *names: str) -> float:
        """Bytes of the terms of these names together."""
        return sum(term.num_bytes for term in self.terms if term.name in names)


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a process runs, as far as its memory depends on it."""

    kind: str = "cpu"
    """``cpu``, ``cuda`` or ``mps``."""
    precision: str = "bf16"
    stored: str = "bf16"
    """The type in which the base's file holds its weights."""
    num_processes: int = 1
    floor_bytes: float | None = None
    kept_share: float | None = None
    """In place of KEPT_SHARE: 0 where the allocator is not glibc's."""


def training(
    shape: Shape, recipe: Recipe, where: Where, *, passes: Sequence[Pass], held_out: Sequence[Pass] = (),
    num_passes: int = 1, answers: Pass | None = None, num_looked_up: int | None = None,
) -> Footprint:
    """Peak of the training process: of each process, where there are several.

    Args:
        passes: the forward passes of training that may be the largest.
        held_out: those of the held-out rows.
        num_passes: passes of one step; with one the gradients come while activations go.
        answers: the prompts that are answered after the last step, padded, in one batch.
        num_looked_up: different tokens in the data: of a mapped embedding only their rows are read.

    Raises:
        ModelError: the adapter's size or what its passes keep is not counted here.
    """
    lora, path = recipe.lora, path_of(recipe, where)
    held = _held(shape, recipe, where, path, num_looked_up)
    trained = memory.num_lora_params(shape, lora)
    gradients = memory.ADAPTER_BYTES * trained / _shards(recipe, where)
    moments = [_loading(shape, recipe, where)]
    for work in passes:
        moments.append(("a step", held + [
            Term(name="gradients", num_bytes=gradients if num_passes > 1 else gradients / max(1, shape.num_layers),
                 formula="4 bytes a trained parameter"),
            *_pass_terms(shape, lora, path, work, where, learns=True)]))
    for work in held_out:
        moments.append(("held-out rows", held + _pass_terms(shape, lora, path, work, where, learns=False)))
    if answers is not None:
        moments.append(("the answers after training", held + _answer_terms(shape, lora, path, answers, where, recipe)))
    moment, terms = max(moments, key=lambda each: sum(term.num_bytes for term in each[1]))
    largest = max(passes, key=lambda work: work.num_tokens)
    return Footprint(name="training", terms=tuple(terms), moment=moment,
                     layers_bytes=_layers_bytes(shape, lora, path, largest))


def path_of(recipe: Recipe, where: Where) -> Path:
    """The path of :func:`lora_kit.activations.path_of` there."""
    return activations.path_of(recipe, where.precision, on_cpu=where.kind == "cpu",
                               sharded=_shards(recipe, where) > 1)


def _shards(recipe: Recipe, where: Where) -> int:
    return where.num_processes if recipe.train.shard == "fsdp" else 1


def _floor(where: Where, kind: str) -> Term:
    if where.kind == "cuda":
        return Term(name="floor", num_bytes=CUDA_CONTEXT_BYTES, formula="the CUDA context (assumed)")
    return Term(name="floor", num_bytes=where.floor_bytes or FLOOR_BYTES[kind],
                formula="Python and its libraries (measured)")


def _loading(shape: Shape, recipe: Recipe, where: Where) -> tuple[str, list[Term]]:
    """While weights are cast, the file that they come from is mapped beside them."""
    weights = memory.weight_bytes(shape, precision=where.precision, load_in=recipe.model.load_in)
    file = memory.num_params(shape) * BYTES_PER_VALUE[where.stored]
    casts = where.stored != where.precision or recipe.model.load_in != "16bit"
    mapped = file if casts and where.kind == "cpu" else 0
    return "loading", [_floor(where, "training"), Term(name="weights", num_bytes=weights),
                       Term(name="mapped file", num_bytes=mapped, formula="the stored weights, while they are cast")]


def _held(shape: Shape, recipe: Recipe, where: Where, path: Path, num_looked_up: int | None) -> list[Term]:
    """What is held from the first step on: floor, weights, adapter and optimizer."""
    lora, shards = recipe.lora, _shards(recipe, where)
    trained = memory.num_lora_params(shape, lora)
    terms = [_floor(where, "training"), *_weights(shape, recipe, where, path, num_looked_up, shards)]
    copies = 0.0
    if "linear" in path.fast and path.width != 4:
        copies = path.width * lora.rank * sum(
            memory.linear_sizes(shape)[name][0] * memory.times_of(shape, name)
            for name in activations.targets_of(shape, lora))
    states = memory.training_bytes(shape, lora, optimizer=recipe.train.optimizer)
    terms += [
        Term(name="adapter", num_bytes=states.adapter / shards + copies,
             formula="4 bytes a trained parameter" + (", and B in 16 bits" if copies else "")),
        Term(name="optimizer", num_bytes=states.optimizer / shards,
             formula="two moments a trained parameter, " + ("8" if recipe.train.optimizer == "adamw" else "2")
             + " bytes together"),
    ]
    if where.kind == "cpu" and path.width != 4:
        terms.append(Term(name="kernels", num_bytes=KERNEL_BYTES, formula="oneDNN's kernels and scratch (measured)"))
    if where.num_processes > 1 and shards == 1:
        terms.append(Term(name="reduction", num_bytes=memory.ADAPTER_BYTES * trained,
                          formula="DDP's buckets, 4 bytes a trained parameter"))
    return terms


def _weights(shape: Shape, recipe: Recipe, where: Where, path: Path, num_looked_up: int | None, shards: int
             ) -> list[Term]:
    width, load_in = BYTES_PER_VALUE[where.precision], recipe.model.load_in
    if load_in != "16bit":
        linear = memory.weight_bytes(shape, precision="fp32", load_in=load_in)
        return [Term(name="weights", num_bytes=linear / shards,
                     formula=f"linear layers in {load_in}, the rest in fp32 (peft casts it)")]
    whole = memory.num_params(shape) * width
    joined = 0.0
    if "linear" in path.fast and width != 4:
        for name in activations.targets_of(shape, recipe.lora):
            outputs, inputs = memory.linear_sizes(shape)[name]
            joined += memory.times_of(shape, name) * width * (
                (outputs + recipe.lora.rank) * (inputs + recipe.lora.rank))
    if shards > 1:
        layer = memory.num_linear_params(shape) / shape.num_layers * width
        return [Term(name="weights", num_bytes=whole / shards, formula=f"an equal share of {shards}"),
                Term(name="gathered layers", num_bytes=2 * layer, formula="two whole layers: this and the next")]
    if where.kind == "cpu" and where.stored == where.precision:
        read = whole - _not_looked_up(shape, width, num_looked_up)
        terms = [Term(name="weights", num_bytes=read, formula="pages of the mapped file that are read")]
        if joined:
            terms.append(Term(name="joined weights", num_bytes=joined,
                              formula="w·(O+r)·(C+r) a layer: W, A and B in one array, beside the mapped file"))
        return terms
    if joined:
        linear = width * sum(memory.times_of(shape, name) * outputs * inputs for name, (outputs, inputs)
                             in memory.linear_sizes(shape).items()
                             if name in activations.targets_of(shape, recipe.lora))
        whole += joined - linear
    return [Term(name="weights", num_bytes=whole, formula="w bytes a parameter")]


def _not_looked_up(shape: Shape, width: int, num_looked_up: int | None) -> float:
    """Bytes of an untied embedding that nothing reads: the pages around ``num_looked_up`` rows are."""
    size = shape.vocab_size * shape.hidden_size * width
    if shape.tied or num_looked_up is None:
        return 0.0
    around = max(_MAPPED_AROUND, shape.hidden_size * width)
    return size * max(0.0, 1 - around / size) ** num_looked_up


def _pass_terms(shape: Shape, lora: LoraSection, path: Path, work: Pass, where: Where, *, learns: bool) -> list[Term]:
    if not learns:
        total = activations.forward_bytes(shape, path, work)
        head = activations.head_moment_bytes(shape, path, work, learns=False) if work.num_trained else 0.0
        return [Term(name="activations", num_bytes=max(0.0, total - head)), Term(name="logits", num_bytes=head)]
    kept = activations.kept_bytes(shape, lora, path, work)
    layer = activations.layer_moment_bytes(shape, lora, path, work)
    head = activations.head_moment_bytes(shape, path, work)
    terms = [Term(name="activations", num_bytes=kept + (layer if layer >= head else 0.0),
                  formula=f"kept of {work.num_tokens:,} tokens" + (", and a layer's backward pass"
                                                                   if layer >= head else "")),
             Term(name="logits", num_bytes=head if head > layer else 0.0,
                  formula="at the trained positions" + (", 256 at a time" if "loss" in path.fast else ""))]
    if where.kind == "cpu":
        share = where.kept_share if where.kept_share is not None else KEPT_SHARE[kind_of(path)]
        terms.append(Term(name="allocator", num_bytes=share * _layers_bytes(shape, lora, path, work),
                          formula=f"{share:.2f} of what the layers keep: freed arrays that stay resident (measured)"))
    return terms


def kind_of(path: Path) -> str:
    """Which of KEPT_SHARE is that of ``path``."""
    return "plain" if not path.fast else "fast fp32" if path.precision == "fp32" else "fast"


def _layers_bytes(shape: Shape, lora: LoraSection, path: Path, work: Pass) -> float:
    return shape.num_layers * activations.layer_bytes(shape, lora, replace(path, checkpointing=False), work)


def _answer_terms(shape: Shape, lora: LoraSection, path: Path, answers: Pass, where: Where, recipe: Recipe
                  ) -> list[Term]:
    plain = replace(path, fast=())
    tokens = answers.longest + recipe.train.stop_within
    cache = memory.kv_bytes(shape, tokens, num_sequences=len(answers.lengths), bytes_per_value=path.width)
    head = path.width * shape.vocab_size * shape.hidden_size if path.width != 4 and where.kind == "cpu" else 0
    return [Term(name="activations", num_bytes=activations.forward_bytes(shape, plain, answers)),
            Term(name="KV cache", num_bytes=cache),
            Term(name="logits", num_bytes=head, formula="the head, laid out for the product of a few rows")]


# ---- inference -------------------------------------------------------------------------

BITS_PER_WEIGHT = {
    "fp32": 32.0, "bf16": 16.0, "fp16": 16.0, "int8": 8.0, "nf4": 4.0 + 8 / 64 + 32 / 64 / 256,
    "f32": 32.0, "f16": 16.0, "q8_0": 8.5, "q6_k": 6.5625, "q5_k_m": 5.69, "q5_0": 5.5, "q5_1": 6.0, "q4_k_m": 4.85,
    "q4_k_s": 4.58, "q4_1": 5.0, "q4_0": 4.5, "iq4_nl": 4.5, "q3_k_m": 3.91, "q2_k": 3.0,
}
"""Bits a weight of a linear layer. Block types of GGUF by their layout (32 weights with an fp16 scale are 8.5, 6.5625
is q6_k's super-block of 210 bytes for 256): ggml-common.h. The k-quants of several types (_m, _s) as llama.cpp's
quantize prints them for Llama-3-8B: they depend on the model. nf4 as ``memory.weight_bytes``."""


def served_forms(recipe: Recipe) -> list[tuple[str, str, str]]:
    """(name, method, type) of the merged model and of each quantized form whose bits are known here.

    The merged model is taken for bf16 where ``merge.dtype`` is auto: it is fp16, and as large, where the adapter's
    change would not survive that.
    """
    dtype = recipe.merge.dtype if recipe.merge.dtype in BYTES_PER_VALUE else "bf16"
    known = [(form.name, form.method, form.type.lower()) for form in recipe.forms
             if form.method in ("bitsandbytes", "gguf") and form.type.lower() in BITS_PER_WEIGHT]
    return [("merged", "hf", dtype), *known]


def form_weight_bytes(shape: Shape, method: str, type_: str) -> float:
    """Bytes of one form's weights: ``hf`` and ``bitsandbytes`` quantize the linear layers, ``gguf`` every matrix."""
    if method == "gguf":
        bits = BITS_PER_WEIGHT[type_.lower()]
        vectors = memory.num_params(shape) - memory.num_linear_params(shape) - memory.num_expert_params(shape) - (
            shape.vocab_size * shape.hidden_size * (1 if shape.tied else 2))
        return (memory.num_params(shape) - vectors) * bits / 8 + 4 * vectors
    if method == "bitsandbytes":
        return memory.weight_bytes(shape, precision="bf16", load_in={"int8": "8bit", "nf4": "4bit"}[type_])
    return memory.num_params(shape) * BYTES_PER_VALUE[type_]


def inference(
    shape: Shape, name: str, method: str, type_: str, where: Where, *, prompt_tokens: int, new_tokens: int,
    batch_size: int = 1,
) -> Footprint:
    """Peak of answering ``batch_size`` prompts together: weights, KV cache, and a pass over the prompts."""
    kind = "llama.cpp" if method == "gguf" else "inference"
    precision = type_ if method == "hf" else "bf16"
    path = Path(precision=precision)
    work = Pass(lengths=(prompt_tokens,) * batch_size, num_trained=0)
    width = 2 if method == "gguf" else BYTES_PER_VALUE[precision]
    cache = memory.kv_bytes(shape, prompt_tokens + new_tokens, num_sequences=batch_size, bytes_per_value=width)
    vocabulary = 4 * shape.vocab_size * batch_size
    fast = replace(path, fast=("linear",))  # an artifact has no LoRA whose inputs are copied
    return Footprint(name=name, moment="reading the prompt", terms=(
        _floor(where, kind),
        Term(name="weights", num_bytes=form_weight_bytes(shape, method, type_),
             formula=f"{method} {type_}"),
        Term(name="KV cache", num_bytes=cache, formula="2·L·K·D values a token, in windows no more than these"),
        Term(name="activations", num_bytes=activations.forward_bytes(shape, fast, work)),
        Term(name="logits", num_bytes=vocabulary, formula="V a sequence, in fp32"),
    ))


def merging(shape: Shape, recipe: Recipe, where: Where) -> Footprint:
    """Peak of the merge stage: its certificate, which holds base and adapter in fp32 while the file is mapped.

    The merge itself holds a block of rows (``merging.py``), whatever the size of the model.
    """
    whole = memory.num_params(shape)
    return Footprint(name="merge", moment="its certificate", terms=(
        _floor(replace(where, kind="cpu", floor_bytes=None), "inference"),
        Term(name="weights", num_bytes=4.0 * whole, formula="fp32: 4 bytes a parameter"),
        Term(name="mapped file", num_bytes=whole * BYTES_PER_VALUE[where.stored] if where.stored != "fp32" else 0.0,
             formula="the stored weights, while they are cast"),
        Term(name="adapter", num_bytes=memory.ADAPTER_BYTES * memory.num_lora_params(shape, recipe.lora)),
    ))
