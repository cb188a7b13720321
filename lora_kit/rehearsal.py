"""The worst step first: what will need the most memory and disk is done for real before the first step.

The largest forward and backward pass of the training batches, an optimizer step, the largest held-out pass and a
checkpoint. What does not fit ends the run in its first minute; and where a pass does not fit, smaller ones are tried
until one does, so that the error names what to lower and to what.

Reads token files; writes a checkpoint beside the others and removes it. Leaves adapter and optimizer as they were.
(torch inside functions.)
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_kit import checkpoint, stopwatch
from lora_kit.errors import MachineError
from lora_kit.events import Note, tell
from lora_kit.loss import loss_sum
from lora_kit.recipe import Recipe
from lora_kit.resume import Resume
from lora_kit.rundir import writing
from lora_kit.shares import Shares
from lora_kit.tokens import ExampleFile
from lora_kit.types import Example
from lora_kit.units import bytes_text, seconds_text

STEPS_LOOKED_AT = 20_000
"""Steps among whose passes the largest is looked for: a second or two of arithmetic."""
_SMALLEST_TOKENS = 8


@stopwatch.part("rehearsal")
def rehearse(recipe: Recipe, net, trainable: Sequence, optimizer, checkpoints: Resume, state: dict[str, Any],
             batches: Iterable[list[int]], num_steps: int, shares: Shares, train_rows: ExampleFile,
             held_out_rows: ExampleFile, accelerator, work: Path) -> dict[str, Any]:
    """Do what the run will do at its largest, with an adapter and an optimizer that have not begun.

    Args:
        net: as the loop uses it.
        optimizer: torch's own or bitsandbytes', without state.
        state: as it goes into a checkpoint.
        batches: rows of each step from the next one on.

    Returns:
        ``train_tokens`` and ``held_out_tokens`` of the largest passes (padding included), ``checkpoint_bytes`` and
        ``save_seconds``.

    Raises:
        MachineError: no memory for a pass, with what fits; or no disk for the checkpoints.
    """
    import torch

    before = [parameter.detach().clone() for parameter in trainable]
    rest = itertools.islice(batches, min(STEPS_LOOKED_AT, num_steps))
    largest = _largest((micro for rows in rest for micro in shares.of(rows, train_rows)), shares, train_rows)
    of_held_out = _largest(shares.of(range(len(held_out_rows)), held_out_rows), shares, held_out_rows) \
        if len(held_out_rows) else []
    found: dict[str, Any] = {"train_tokens": shares.size_of(largest, train_rows),
                             "held_out_tokens": shares.size_of(of_held_out, held_out_rows)}

    def learn(examples: Sequence[Example]) -> None:
        batch = shares.batch_of_examples(examples)
        with accelerator.autocast():
            summed = loss_sum(net, batch)
        # Loss scaling of fp16 is left out: it would remember this step.
        (summed / max(1, batch.num_trained_tokens)).backward()

    def evaluate(examples: Sequence[Example]) -> None:
        with torch.no_grad(), accelerator.autocast():
            loss_sum(net, shares.batch_of_examples(examples))

    try:
        net.train()
        _try(learn, [train_rows[row] for row in largest], "a training pass", recipe, shares, accelerator)
        torch.nn.utils.clip_grad_norm_(trainable, recipe.train.max_grad_norm)
        optimizer.step()
        if of_held_out:
            net.eval()
            _try(evaluate, [held_out_rows[row] for row in of_held_out], "a held-out pass", recipe, shares, accelerator)
        found |= _save(checkpoints, state, work, accelerator)
    finally:
        net.train()
        with torch.no_grad():
            for parameter, value in zip(trainable, before, strict=True):
                parameter.copy_(value)
                parameter.grad = None
        optimizer.state.clear()
        if hasattr(optimizer, "initialized"):  # bitsandbytes makes its states when it first steps
            optimizer.initialized = False
    held_out = f", a held-out pass of {found['held_out_tokens']:,}" if of_held_out else ""
    tell(Note(text=f"the worst of the run fits: a training pass of {found['train_tokens']:,} tokens{held_out}, a "
                   f"checkpoint of {bytes_text(found['checkpoint_bytes'])} in {seconds_text(found['save_seconds'])}"))
    return found


def _largest(passes: Iterable[list[int]], shares: Shares, examples: ExampleFile) -> list[int]:
    """The pass of most tokens, padding included, and among those of most trained ones."""
    return max((micro for micro in passes if micro), key=lambda micro: (
        shares.size_of(micro, examples), sum(map(examples.num_trained, micro))), default=[0])


def _save(checkpoints: Resume, state: dict[str, Any], work: Path, accelerator) -> dict[str, Any]:
    """Write a checkpoint and remove it, and look whether there is room for all that will be kept."""
    started = time.perf_counter()
    tensors, values = checkpoints.content(state)
    place, size = work / "checkpoints" / ".rehearsal", 0
    if accelerator.is_main_process:
        with writing(place):
            shutil.rmtree(place, ignore_errors=True)
        try:
            size = checkpoint.size_bytes(checkpoint.save(place, state["step"], tensors, values))
            # Those that are kept, that of the lowest loss, and the one being written; one of them is there now.
            needed, free = (checkpoint.KEPT + 1) * size, shutil.disk_usage(work).free
        finally:
            shutil.rmtree(place, ignore_errors=True)
        if free < needed:
            raise MachineError(str(work), f"has {bytes_text(free)} left, and checkpoints of {bytes_text(size)} each "
                               f"need {bytes_text(needed)}", "free space, lower lora.rank, or choose another disk "
                               "with --runs")
    return {"checkpoint_bytes": size, "save_seconds": time.perf_counter() - started}


def _try(make: Callable[[Sequence[Example]], None], examples: list[Example], what: str, recipe: Recipe,
         shares: Shares, accelerator) -> None:
    """``make(examples)``; where memory runs out, MachineError with the size that does fit, tried out."""
    try:
        make(examples)
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    size = shares.size_of_examples(examples)
    fits = None
    if accelerator.num_processes == 1:  # the passes of several would have to be tried together
        fits = _largest_that_fits(make, examples)
    raise MachineError("train", f"out of memory in {what} of {size:,} tokens", _advice(recipe, examples, fits, shares))


def _largest_that_fits(make: Callable[[Sequence[Example]], None], examples: list[Example]) -> list[Example] | None:
    """Half of ``examples``, and half of that, until it can be made twice; less a quarter, as room for the loop's own
    way with memory. Single rows are cut."""
    tried = examples
    while True:
        if len(tried) > 1:
            tried = tried[:len(tried) // 2]
        else:
            half = len(tried[0].tokens_T) // 2
            if half < _SMALLEST_TOKENS:
                return None
            mask = tried[0].loss_mask_T[:half].copy()
            mask[-1] = 1
            tried = [replace(tried[0], tokens_T=tried[0].tokens_T[:half], loss_mask_T=mask)]
        try:
            make(tried)
            make(tried)  # memory that is freed in pieces may not serve a second time
            return tried if len(tried) == 1 else tried[:max(1, len(tried) * 3 // 4)]
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise


def _advice(recipe: Recipe, examples: list[Example], fits: list[Example] | None, shares: Shares) -> str:
    """What to lower and to what, by what was tried; by halves where nothing was."""
    measured = " (tried: it fits)" if fits is not None else " (a half; not tried)"
    more = "" if recipe.train.gradient_checkpointing else ", or set train.gradient_checkpointing: true"
    if fits is None and shares.accelerator.num_processes == 1:
        return f"not even the shortest pass fits: take a smaller base, or model.load_in: 4bit{more}"
    fits = fits or examples[:max(1, len(examples) // 2)]
    longest = max(len(example.tokens_T) for example in examples)
    if len(examples) > 1 and len(fits) > 1:
        if shares.budget is None:
            return f"lower train.micro_batch_size to {len(fits)}{measured}{more}"
        return f"lower train.pack_tokens to {shares.size_of_examples(fits)}{measured}{more}"
    if len(fits[0].tokens_T) >= longest and len(examples) > 1:
        key = "train.micro_batch_size to 1" if shares.budget is None else f"train.pack_tokens to {longest}"
        return f"lower {key}{measured}{more}"
    length = len(fits[0].tokens_T) if measured.endswith("fits)") else longest // 2
    return f"lower data.max_tokens to {length}{measured}{more}"


@contextmanager
def telling_of_memory(recipe: Recipe) -> Iterator[None]:
    """Make running out of memory in the block one line with exit code 6 that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        settings = recipe.train
        key, value = ("pack_tokens", settings.pack_tokens or settings.micro_batch_size * recipe.data.max_tokens) \
            if settings.packing else ("micro_batch_size", settings.micro_batch_size)
        half = f"lower train.{key} from {value} to {value // 2}" if value > 1 else \
            f"lower data.max_tokens from {recipe.data.max_tokens} to {recipe.data.max_tokens // 2}"
        more = "" if settings.gradient_checkpointing else ", or set train.gradient_checkpointing: true"
        raise MachineError("train", f"out of memory ({str(error).strip().splitlines()[0][:120] or 'no more'})",
                           half + more) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is how Python or torch, on any device, says that memory has run out."""
    text = str(error)
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text))
