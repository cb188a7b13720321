"""The nouns that the stages share. Frozen, keyword-only, torch-free.

Shape suffixes: T tokens of one example, B examples of a batch. Reads and writes nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn. ``content`` may be None for an assistant turn that only calls tools.

    ``weight`` 0 marks an assistant turn that is not trained on; on other roles it has no effect.
    """

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    name: str | None = None
    tool_call_id: str | None = None
    weight: Literal[0, 1] = 1

    def as_dict(self) -> dict[str, Any]:
        """The message as chat templates read it: keys without a value, and the weight, are left out."""
        fields: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            fields["tool_calls"] = list(self.tool_calls)
        if self.name is not None:
            fields["name"] = self.name
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        return fields


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages in order, the tools offered, and where they came from.

    ``origin`` is ``file:line``, or ``file#key`` where a file has no lines of its own.
    ``trains_all`` marks plain text, where every token is trained on and no chat
    template is applied (format ``text``).
    """

    messages: tuple[Message, ...]
    origin: str
    tools: tuple[dict[str, Any], ...] = ()
    trains_all: bool = False


@dataclass(frozen=True, kw_only=True)
class Example:
    """Token ids (T,) and a mask (T,) that is 1 where the token is trained on.

    ``stops`` are the positions of the tokens that end its trained turns, known when it is made and not read back
    from files.
    """

    tokens_T: Any
    loss_mask_T: Any
    origin: str
    stops: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples of one forward pass, padded or packed. ``labels_BT`` is -100 where nothing is trained on.

    Padded: ``attention_mask_BT`` is 1 on real tokens; padding is known by length, never by id. Packed: B is 1,
    ``document_lengths`` are the examples' tokens, ``positions_BT`` starts anew with each, and there is no mask. With
    ``prefix_length`` each example but the first goes on from that many tokens at the sequence's start, which it
    shares with all others: they are neither repeated nor counted in its length.
    """

    tokens_BT: Any
    labels_BT: Any
    attention_mask_BT: Any
    num_trained_tokens: int
    num_tokens: int
    positions_BT: Any = None
    document_lengths: tuple[int, ...] = ()
    prefix_length: int = 0


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """Something that a model can be loaded from; the one noun that bench and eval accept.

    Args:
        name: how tables call it: base, adapter, merged, bitsandbytes-nf4 ...
        path: folder in Hugging Face layout, folder of a PEFT adapter, or a .gguf file.
        kind: ``hf`` (a folder), ``adapter`` (a PEFT folder, needs ``base``) or ``gguf``.
        base: the base model's folder, for an adapter; else None.
        tokenizer: the folder whose tokenizer and template serve this artifact.
        size_bytes: of the weight files.
    """

    name: str
    path: str
    kind: Literal["hf", "adapter", "gguf"]
    base: str | None = None
    tokenizer: str | None = None
    adapter_sha256: str | None = None
    template_sha256: str | None = None
    num_params: int | None = None
    size_bytes: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One answer: its token ids, whether a stop token ended it, and its text."""

    tokens: tuple[int, ...]
    stopped: bool
    text: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """Token ids of a context and of its continuations, each of one token at least, whose likelihoods are asked."""

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Natural log-probability of a continuation, and whether each of its tokens was the most likely one (None: not
    asked)."""

    log_prob: float
    greedy: bool | None = None


@dataclass(frozen=True, kw_only=True)
class BenchPoint:
    """One artifact's speed at one shape; every figure measured, None where it was not.

    Rates are tokens per second summed over the batch; seconds are medians of ``repeats``.
    """

    artifact: str
    engine: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    load_seconds: float | None
    time_to_first_token_seconds: float | None
    prefill_tokens_per_second: float | None
    decode_tokens_per_second: float | None
    peak_memory_bytes: int | None
    size_bytes: int | None
    threads: int | None
    device: str
    why_not: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ItemScore:
    """One item's score; ``error`` set means that it has none (never a zero). ``target``: a text, or several references.
    """

    item_id: str
    score: float | None
    cluster: str
    prompt: str = ""
    prediction: str = ""
    target: str | list[str] = ""
    reason: str = ""
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """A task's mean over its scored items with a 95 % interval."""

    task: str
    artifact: str
    metric: str
    higher_is_better: bool
    value: float | None
    ci_low: float | None
    ci_high: float | None
    num_items: int
    num_errors: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The answer to one claim, with the evidence in words and numbers.

    Args:
        role: of a gate: ``target``, ``retain`` or ``floor``; else None.
        artifact: what a gate is about; else None.
        num_items_to_decide: of an inconclusive gate, about how many items would decide; None where none would or
            nobody can tell.
    """

    outcome: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    claim: str
    evidence: str
    role: str | None = None
    artifact: str | None = None
    num_items_to_decide: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields that say something."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a stage hands back: a line for the terminal, its artifacts and verdicts."""

    summary: str
    artifacts: tuple[Artifact, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    figures: dict[str, Any] = field(default_factory=dict)
