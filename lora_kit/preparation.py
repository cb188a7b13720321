"""How a model is prepared for the loop: rows packed, parts replaced by fast ones, and the proof of both.

Each is used where the model allows it, proven on two rows of the run where ``train.prove`` says so, taken
back where the proof fails, and told either way.

Reads and writes nothing.
"""

from __future__ import annotations

from typing import Any

from lora_kit import fast, packing, proof, stopwatch, tokens
from lora_kit.events import Caution, Note, tell
from lora_kit.recipe import FAST_PARTS, Recipe, TrainSection
from lora_kit.units import number_text

_NOUNS = {"linear": "linear layers", "mlp": "MLPs", "norm": "norms", "attention": "attention layers",
          "loss": "output layer", "prefix": "layers with a shared prefix"}

_CPU_PASS_TOKENS = 1024
_ROWS_TO_TIME = 8
"""Rows on whose lengths attention is timed."""


@stopwatch.part("proof")
def prepare(net, recipe: Recipe, examples: tokens.ExampleFile, num_steps: int, accelerator, precision: str,
            ) -> dict[str, dict[str, Any]]:
    """Let ``net`` (peft's model, not wrapped) train packed and fast where it can.

    Args:
        num_steps: of the run, to know whether a proof is cheap.
        precision: fp32, bf16 or fp16: the arithmetic.

    Returns:
        ``packing``: ``budget`` (tokens of a pass; None: padded), ``why_not`` and ``proof``;
        ``fast``: ``parts`` (by name: ``modules`` served and ``left``, numbers by reason), ``why_not`` and ``proof``.
        A proof is None, or what :meth:`lora_kit.proof.Reference.compare` gives and ``rows``.
    """
    settings = recipe.train
    packed: dict[str, Any] = {"budget": None, "why_not": None, "proof": None}
    quick: dict[str, Any] = {"parts": {}, "why_not": None, "proof": None}
    if settings.packing:
        packed["why_not"] = packing.why_not_packed(net.get_base_model())
    is_packed = settings.packing and packed["why_not"] is None
    if is_packed:
        packing.use_packing(net.get_base_model())
    reference, rows = None, []
    if is_packed or settings.fast:
        reference, rows = _reference(net, settings, examples, num_steps, accelerator, precision)
    if is_packed and reference is not None:
        packed["proof"] = reference.compare(packed=True) | {"rows": rows}
        if packed["proof"]["holds"]:
            tell(Note(text=f"packed rows give the loss and gradients of separate ones: {_apart(packed['proof'])}"))
        else:
            packing.stop_packing(net.get_base_model())
            is_packed = False
            packed["why_not"] = ("loss or gradients of two packed rows differ from those of separate rows: "
                                 + _apart(packed["proof"]))
    if packed["why_not"]:
        tell(Caution(text=f"rows are padded, not packed: {packed['why_not']}"))
    if is_packed:
        packed["budget"] = settings.pack_tokens or _budget(recipe, accelerator.device.type)
    if settings.fast:
        lengths = [examples.length(row) for row in range(min(len(examples), _ROWS_TO_TIME))]
        _use_fast(net, settings, reference, rows, is_packed, quick, lengths)
    return {"packing": packed, "fast": quick}


def _budget(recipe: Recipe, device_type: str) -> int:
    """Tokens of a packed pass where the recipe names none.

    A CPU gains nothing from longer passes (docs/speed.md has the figures), while activations grow with them.
    """
    longest = recipe.data.max_tokens
    rows = recipe.train.micro_batch_size * longest
    return min(rows, max(longest, _CPU_PASS_TOKENS)) if device_type == "cpu" else rows


def _use_fast(net, settings: TrainSection, reference, rows: list[str], is_packed: bool, quick: dict[str, Any],
              lengths: list[int]) -> None:
    parts = FAST_PARTS if "auto" in settings.fast else settings.fast
    used = fast.use_fast(net, parts, lengths)
    quick["parts"] = {name: {"modules": part.num_modules, "left": part.left} for name, part in used.items()}
    if not any(part.num_modules for part in used.values()):
        quick["why_not"] = "no part of it fits this model"
    elif reference is not None:
        quick["proof"] = reference.compare(is_packed, shares_prefix(quick)) | {"rows": rows}
        if not quick["proof"]["holds"]:
            fast.stop_fast(net)
            quick["why_not"] = f"its loss or gradients on two rows differ from plain ones: {_apart(quick['proof'])}"
    if quick["why_not"]:
        tell(Caution(text=f"the fast path is not used: {quick['why_not']}"))
        return
    served = ", ".join(f"{part.num_modules} {_NOUNS[name]}" for name, part in used.items() if part.num_modules)
    proven = f"; loss and gradients are the plain ones: {_apart(quick['proof'])}" if quick["proof"] else ""
    tell(Note(text=f"fast path: {served}{proven}"))
    for name, part in used.items():
        for reason, number in part.left.items():
            tell(Note(text=f"the plain path serves {number} {_NOUNS[name]}: {reason}"))


def _reference(net, settings: TrainSection, examples: tokens.ExampleFile, num_steps: int, accelerator, precision: str):
    """The reference of a proof with the origins of its rows; None where no proof is to be made."""
    lengths = [examples.length(row) for row in range(len(examples))]
    chosen = proof.rows_to_prove(lengths, [examples.num_trained(row) for row in range(len(examples))])
    in_run = num_steps * settings.batch_size * sum(lengths) / len(lengths)
    cheap = proof.is_cheap(sum(lengths[row] for row in chosen), in_run)
    if len(chosen) < 2 or not (settings.prove is True or settings.prove == "auto" and cheap):
        return None, []
    found = proof.Reference(net, [examples[row] for row in chosen], accelerator, precision)
    return found, [examples.origins[row] for row in chosen]


def _apart(found: dict[str, Any]) -> str:
    differ = max(found["loss_difference"], found["gradient_difference"])
    return f"{number_text(differ, 2)} apart, bound {number_text(found['bound'], 2)}"


def shares_prefix(quick: dict[str, Any]) -> bool:
    """Whether batches are to hold once what their rows begin with, by what :func:`prepare` found of ``fast``."""
    return quick["why_not"] is None and bool(quick["parts"].get("prefix", {}).get("modules"))


def plain(net) -> None:
    """Take all of it back: ``net`` attends and computes as transformers and peft made it."""
    fast.stop_fast(net)
    packing.stop_packing(net.get_base_model())
