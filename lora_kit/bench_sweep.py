"""An engine at one shape, until its times are stable and then until they tell enough; and at many shapes.

A shape is a batch size, tokens of each prompt, tokens of each answer. Depth is context before the prompt: a prompt of
``depth`` + ``prompt_tokens`` tokens is read as a whole, and decoding goes on from there. The rows of a batch begin and
end together, so each has the times of the batch. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lora_kit import energy, repeats
from lora_kit.errors import InternalError, MachineError
from lora_kit.latency import Limits
from lora_kit.units import count_text, number_text, seconds_text

STABLE = 0.1
"""A warm-up ends when two calls in a row are within this share of each other, or after MOST_WARM_UPS."""
MOST_WARM_UPS = 4
MOST_REPEATS = 100
_MOST_TOKENS = 2_000_000
"""Of all prompts that are drawn beforehand, where seconds say how often they are asked."""
_FIGURES = ("first_token_seconds", "per_token_seconds", "whole_seconds", "prefill_tokens_per_second",
            "decode_tokens_per_second", "requests_per_second", "goodput", "half_width", "joules_per_token")
Draw = Callable[..., list[list[int]]]
"""``draw(num=, length=, seed=)``: so many prompts of so many tokens, all different."""


def most_repeats(least: int, seconds: float | None, *, batch_size: int, prompt_tokens: int) -> int:
    """How many batches to draw prompts for, beyond those of the warm-up."""
    return least if seconds is None else max(least, min(MOST_REPEATS, _MOST_TOKENS // (batch_size * prompt_tokens)))


def time_shape(engine: Any, batches: Iterable[Sequence[Sequence[int]]], new_tokens: int, *, least: int,
               seconds: float | None = None, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Time ``engine`` on ``batches``, each asked once.

    Args:
        least: repeats that count after the warm-up; with ``seconds`` more, until their interval is narrow or that
            time is spent, or the batches are.

    Returns:
        ``warm_ups`` (seconds of each), ``times`` (what the engine's ``time_once`` gave), ``half_width`` (of the mean
        time of a batch, as a share of it; None of fewer than three) and ``joules`` of the repeats (``energy.py``).

    Raises:
        InternalError: other than ``new_tokens`` tokens came for each prompt.
    """
    unasked = iter(batches)
    warm_ups: list[float] = []
    while len(warm_ups) < MOST_WARM_UPS:
        warm_ups.append(whole(once(engine, next(unasked), new_tokens)))
        if len(warm_ups) > 1 and abs(warm_ups[-1] - warm_ups[-2]) <= STABLE * warm_ups[-2]:
            break
    times: list[dict[str, float]] = []
    meter, started = energy.Meter(), clock()
    for batch in unasked:
        times.append(once(engine, batch, new_tokens))
        if repeats.enough([whole(each) for each in times], least=least, spent=clock() - started, seconds=seconds):
            break
    return {"warm_ups": warm_ups, "times": times, "half_width": repeats.half_width([whole(each) for each in times]),
            "joules": meter.joules()}


def once(engine: Any, batch: Sequence[Sequence[int]], new_tokens: int) -> dict[str, float]:
    """What ``time_once`` gives for a batch; InternalError where the tokens are not as many as asked for."""
    taken = engine.time_once(batch, new_tokens)
    if taken["tokens_generated"] != len(batch) * new_tokens:
        raise InternalError(f"engine {engine.name}", f"generated {taken['tokens_generated']} tokens where "
                            f"{len(batch) * new_tokens} were asked for", "run again with --debug and report it")
    return taken


def whole(taken: dict[str, float]) -> float:
    """Seconds of a batch from its prompts to its last tokens."""
    return taken["first_token_seconds"] + taken["decode_seconds"]


def sweep(engine: Any, draw: Draw, *, batch_size: int, prompt_tokens: int, new_tokens: int, batch_sizes: Sequence[int],
          depths: Sequence[int], least: int, seconds: float | None, limits: Limits | None, seed: int,
          clock: Callable[[], float] = time.perf_counter) -> dict[str, list[dict[str, Any]]]:
    """``engine`` at each of ``batch_sizes``, and at each of ``depths`` with ``batch_size``.

    Returns:
        ``batch_size`` and ``depth``: at each the shape, what :func:`point` says, and ``why_not`` (why it says nothing
        where this machine cannot do it); nothing of a sweep that has no shapes.
    """
    shapes = {"batch_size": [(size, 0) for size in batch_sizes], "depth": [(batch_size, depth) for depth in depths]}
    found: dict[str, list[dict[str, Any]]] = {}
    seeds = itertools.count(seed)  # another for each shape, so that none asks what one before it asked
    for name, each in shapes.items():
        for size, depth in each:
            length = depth + prompt_tokens
            number = MOST_WARM_UPS + most_repeats(least, seconds, batch_size=size, prompt_tokens=length)
            prompts = draw(num=size * number, length=length, seed=next(seeds))
            batches = (prompts[first:first + size] for first in range(0, len(prompts), size))
            shape = {"batch_size": size, "prompt_tokens": length, "new_tokens": new_tokens}
            try:
                timed = time_shape(engine, batches, new_tokens, least=least, seconds=seconds, clock=clock)
                measured = {**point(timed, **shape, limits=limits), "why_not": ""}
            except MachineError as error:  # too many at once for it, say: the other shapes can still be measured
                measured = {**dict.fromkeys(_FIGURES), "repeats": 0, "why_not": str(error)}
            found.setdefault(name, []).append({**shape, "depth": depth, **measured})
    return found


def point(timed: dict[str, Any], *, batch_size: int, prompt_tokens: int, new_tokens: int, limits: Limits | None
          ) -> dict[str, Any]:
    """The figures of a shape; rates are summed over the batch, seconds are medians over the repeats.

    Returns:
        ``first_token_seconds``, ``per_token_seconds``, ``whole_seconds``, ``prefill_tokens_per_second``,
        ``decode_tokens_per_second``, ``requests_per_second`` (requests of all repeats over their seconds), ``goodput``
        (those of them within ``limits``; None without), ``half_width``, ``repeats``, ``joules_per_token``.
    """
    times = timed["times"]
    spent = sum(map(whole, times))
    per_token = [each["decode_seconds"] / (new_tokens - 1) for each in times]
    kept = [limits is not None and limits.allow(each["first_token_seconds"], token, whole(each))
            for each, token in zip(times, per_token, strict=True)]
    return {
        "repeats": len(times),
        "first_token_seconds": statistics.median(each["first_token_seconds"] for each in times),
        "per_token_seconds": statistics.median(per_token),
        "whole_seconds": statistics.median(map(whole, times)),
        "prefill_tokens_per_second": statistics.median(
            batch_size * prompt_tokens / each["prefill_seconds"] for each in times),
        "decode_tokens_per_second": statistics.median(
            batch_size * (new_tokens - 1) / each["decode_seconds"] for each in times),
        "requests_per_second": batch_size * len(times) / spent,
        "goodput": None if limits is None else batch_size * sum(kept) / spent,
        "half_width": timed["half_width"],
        "joules_per_token": energy.per_token(timed["joules"], batch_size * new_tokens * len(times)),
    }


# ---- what is shown -----------------------------------------------------------------------

COLUMNS = ("artifact", "batch", "depth", "repeats", "first token", "per token", "answer", "±", "prefill tok/s",
           "decode tok/s", "requests/s", "good/s")
_TITLES = {"batch_size": "More prompts at once", "depth": "More context before the prompt"}


def tables(sweeps: dict[str, dict[str, list[dict[str, Any]]]], limits: Limits | None
           ) -> Iterator[tuple[str, tuple[str, ...], list[list[str]]]]:
    """(title, columns, rows) of each sweep over all artifacts; ``sweeps`` by artifact, as :func:`sweep` gives them."""
    dropped = {"artifact"} if set(sweeps) == {""} else set()
    dropped |= set() if limits else {"good/s"}
    for name, title in _TITLES.items():
        points = [(artifact, each) for artifact, found in sweeps.items() for each in found.get(name, ())]
        if not points:
            continue
        kept = [place for place, column in enumerate(COLUMNS)
                if column not in dropped and not (column == "depth" and name == "batch_size")]
        shown = [[cells[place] for place in kept] for artifact, each in points for cells in [_cells(artifact, each)]]
        shape = f"{points[0][1]['prompt_tokens'] - points[0][1]['depth']} + {points[0][1]['new_tokens']} tokens"
        yield (f"{title}, {shape}" + (f"; good: {limits.text()}" if limits else ""),
               tuple(COLUMNS[place] for place in kept), shown)


def _cells(artifact: str, each: dict[str, Any]) -> list[str]:
    return [artifact, count_text(each["batch_size"]), count_text(each["depth"]), count_text(each["repeats"]),
            seconds_text(each["first_token_seconds"]), seconds_text(each["per_token_seconds"]),
            seconds_text(each["whole_seconds"]), width_text(each["half_width"]),
            *(number_text(each[f"{name}_per_second"], 3) for name in ("prefill_tokens", "decode_tokens")),
            each["why_not"] or number_text(each["requests_per_second"], 3), number_text(each["goodput"], 3)]


def width_text(half_width: float | None) -> str:
    """Half of an interval as a share; a dash where there is none."""
    return "–" if half_width is None else f"{half_width:.1%}"
