"""How a model is prepared for the loop: rows packed, parts replaced by fast ones, and the proof of both.

Each is used where the model allows it, proven on two rows of the run where ``train.prove`` says so, taken
back where the proof fails, and told either way.

Reads and writes nothing.
"""

from __future__ import annotations

from typing import Any

from lora_kit import choices, fast, hardware, packing, proof, stopwatch, tokens
from lora_kit.errors import InternalError, ModelError
from lora_kit.events import Caution, Note, tell
from lora_kit.recipe import FAST_PARTS, Recipe, TrainSection
from lora_kit.units import number_text

_NOUNS = {"linear": "linear layers", "mlp": "MLPs", "norm": "norms", "attention": "attention layers",
          "kernels": "compiled kernels", "loss": "output layer", "prefix": "layers with a shared prefix"}

_ROWS_TO_TIME = 8
"""Rows on whose lengths attention is timed."""


@stopwatch.part("proof")
def prepare(net, recipe: Recipe, examples: tokens.ExampleFile, num_steps: int, accelerator, precision: str,
            parts: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Let ``net`` (peft's model, not wrapped) train packed and fast where it can.

    Args:
        num_steps: of the run, to know whether a proof is cheap.
        precision: fp32, bf16 or fp16: the arithmetic.
        parts: of the fast path, that this run began with: nothing is timed again, for a run that goes on has to
            compute as it did. None at its beginning.

    Returns:
        ``packing``: ``budget`` (tokens of a pass; None: padded), ``why_not`` and ``proof`` (None, or what
        :meth:`lora_kit.proof.Proof.of_batches` gives and ``rows``); ``fast``: ``parts`` (by name: ``modules`` served
        and ``left``, numbers by reason), ``why_not`` and ``proof`` (None, or :meth:`lora_kit.proof.Proof.of_path`'s).

    Raises:
        InternalError: accumulation weighs rows wrongly.
        ModelError: rows in one pass teach something else than one by one, and rounding does not explain it.
    """
    settings, plain_model = recipe.train, net.get_base_model()
    why_not = packing.why_not_packed(plain_model) if settings.packing else "train.packing is false"
    packed: dict[str, Any] = {"budget": None, "why_not": why_not, "proof": None}
    if why_not is None:
        packing.use_packing(plain_model)
    chosen, proven = _rows_to_prove(settings, examples, num_steps), None
    if chosen:
        proven = proof.Proof(net, [examples[row] for row in chosen], accelerator, precision)
        packed["proof"] = proven.of_batches(packed=why_not is None) | {
            "rows": [examples.origins[row] for row in chosen]}
        _look_at_proof(packed, precision == "fp32" and recipe.model.load_in == "16bit")
    if packed["why_not"] is None:
        packed["budget"] = packing.budget_of(recipe, accelerator.device.type, precision)
    else:
        packing.stop_packing(plain_model)
        if settings.packing:
            tell(Caution(text=f"rows are padded, not packed: {packed['why_not']}"))
    quick: dict[str, Any] = {"parts": {}, "why_not": None, "proof": None}
    wanted = (list(FAST_PARTS) if "auto" in settings.fast else settings.fast) if parts is None else parts
    if wanted:
        lengths = [examples.length(row) for row in range(min(len(examples), _ROWS_TO_TIME))] if parts is None else []
        _use_fast(net, wanted, proven, packed["budget"] is not None, quick, lengths)
    return {"packing": packed, "fast": quick}


def _rows_to_prove(settings: TrainSection, examples: tokens.ExampleFile, num_steps: int) -> list[int]:
    """The two rows to prove batches on; none where the recipe does not ask for it, or where it would cost too much."""
    if settings.prove is False:
        return []
    lengths = [examples.length(row) for row in range(len(examples))]
    chosen = proof.rows_to_prove(lengths, [examples.num_trained(row) for row in range(len(examples))])
    in_run = num_steps * settings.batch_size * sum(lengths) / len(lengths)
    cheap = proof.is_cheap(sum(lengths[row] for row in chosen), in_run)
    return chosen if len(chosen) == 2 and (settings.prove is True or cheap) else []


def _look_at_proof(packed: dict[str, Any], is_exact: bool) -> None:
    """Raise, tell or set ``why_not`` by what the proof in ``packed`` says; ``is_exact``: rounding explains little."""
    proven = packed["proof"]
    of_rows = f"loss or gradients of {' and '.join(proven['rows'])}"
    if not proven["accumulates"]:
        raise InternalError("train.prove", f"{of_rows}, accumulated, differ by "
                            f"{number_text(proven['accumulation'], 2)} from their sum (bound "
                            f"{number_text(proven['accumulation_bound'], 2)})", "report it as a bug")
    if not proven["adds_up"]:
        apart = (f"{of_rows} in one pass differ by {number_text(proven['floor'], 2)} from those of a pass each (bound "
                 f"{number_text(proven['floor_bound'], 2)})")
        if is_exact:
            raise ModelError("train.prove", apart, "the model mixes the rows of a batch, or this is a bug to report; "
                             "train.prove: false trains all the same")
        tell(Caution(text=f"{apart}: rounding, or a fault; train.precision: fp32 tells them apart"))
    if packed["why_not"] is None:
        if proven["holds"]:
            tell(Note(text=f"packed rows give the loss and gradients of separate ones: {_apart(proven)}"))
        else:
            packed["why_not"] = f"loss or gradients of two packed rows differ by too much: {_apart(proven)}"


def _use_fast(net, parts: list[str], proven: proof.Proof | None, is_packed: bool, quick: dict[str, Any],
              lengths: list[int]) -> None:
    used = _chosen_once(net, parts, lengths)
    quick["parts"] = {name: {"modules": part.num_modules, "left": part.left} for name, part in used.items()}
    if not any(part.num_modules for part in used.values()):
        quick["why_not"] = "no part of it fits this model"
    elif proven is not None:
        quick["proof"] = proven.of_path(packed=is_packed, share_prefix=shares_prefix(quick))
        if not quick["proof"]["holds"]:
            fast.stop_fast(net)
            quick["why_not"] = f"its loss or gradients on two rows differ from plain ones: {_apart(quick['proof'])}"
    if quick["why_not"]:
        tell(Caution(text=f"the fast path is not used: {quick['why_not']}"))
        return
    served = ", ".join(f"{part.num_modules} {_NOUNS[name]}" for name, part in used.items() if part.num_modules)
    apart = f"; loss and gradients are the plain ones: {_apart(quick['proof'])}" if quick["proof"] else ""
    tell(Note(text=f"fast path: {served}{apart}"))
    for name, part in used.items():
        for reason, number in part.left.items():
            tell(Note(text=f"the plain path serves {number} {_NOUNS[name]}: {reason}"))


def _chosen_once(net, parts: list[str], lengths: list[int]) -> dict[str, fast.Part]:
    """``fast.use_fast``, where what is timed for these ``lengths`` is timed once on this machine."""
    if not lengths or "attention" not in parts:
        return fast.use_fast(net, parts, lengths)
    import torch

    config = net.get_base_model().config.get_text_config()
    asked = {
        "what": "attention", "kernels": "kernels" in parts, "lengths": lengths, "heads": config.num_attention_heads,
        "groups": getattr(config, "num_key_value_heads", None), "size": getattr(config, "head_dim", None),
        "hidden": config.hidden_size, "dtype": str(net.get_base_model().get_input_embeddings().weight.dtype),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "cpu": hardware.cpu_model(),
    }
    before = choices.recall(asked)
    used = fast.use_fast(net, parts, lengths, before)
    served, slower = used["attention"].num_modules > 0, fast.MEASURED_SLOWER in used["attention"].left
    if before is None and (served or slower) and choices.keep(asked, served) != served:
        fast.stop_fast(net)  # another process has timed it meanwhile, and otherwise
        used = fast.use_fast(net, parts, lengths, not served)
    return used


def _apart(found: dict[str, Any]) -> str:
    differ = max(found["loss_difference"], found["gradient_difference"])
    return f"{number_text(differ, 2)} apart, bound {number_text(found['bound'], 2)}"


def parts_in_use(quick: dict[str, Any]) -> list[str]:
    """Parts of the fast path that serve, by what :func:`prepare` found of ``fast``."""
    return [name for name, part in quick["parts"].items() if part["modules"]] if quick["why_not"] is None else []


def shares_prefix(quick: dict[str, Any]) -> bool:
    """Whether batches are to hold once what their rows begin with, by what :func:`prepare` found of ``fast``."""
    return "prefix" in parts_in_use(quick)


def plain(net) -> None:
    """Take all of it back: ``net`` attends and computes as transformers and peft made it."""
    fast.stop_fast(net)
    packing.stop_packing(net.get_base_model())
