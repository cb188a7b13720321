"""Which artifact to take: those that no other beats on size and fidelity, and the one that fits the budget best.

Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_kit.recipe import ChooseSection
from lora_kit.units import bytes_text, number_text

GAIN, TOP1 = 0.95, 0.9
"""Share of the gain, and of the first choices where the gain cannot be told, that a recommended artifact keeps when the
recipe sets no bound of its own."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One artifact with its figures; those of the merged model are the reference's own.

    Args:
        gain: share of what training gained that is kept; None where it cannot be told.
        tokens_per_second: decoding, one prompt at a time, where this machine measured it.
        missed: whether it missed a bound of its own in the recipe.
    """

    name: str
    size_bytes: int
    mean_kl: float
    top1: float
    gain: float | None
    tokens_per_second: float | None
    missed: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """``recommended`` (a name, or None) and ``why``; ``frontier``: names that no other beats; ``out``: name to what it
    lacks."""

    recommended: str | None
    why: str
    frontier: tuple[str, ...]
    out: dict[str, str]


def choose(candidates: Sequence[Candidate], budget: ChooseSection) -> Choice:
    """The smallest or the quickest of ``candidates`` within ``budget``."""
    out = {each.name: lack for each in candidates if (lack := _lacks(each, budget))}
    within = [each for each in candidates if each.name not in out]
    frontier = tuple(each.name for each in candidates if not any(_beats(other, each) for other in candidates))
    if not within:
        return Choice(recommended=None, why="none is within the budget", frontier=frontier, out=out)
    if budget.prefer == "speed" and any(each.tokens_per_second for each in within):
        best = max(within, key=lambda each: (each.tokens_per_second or 0, -each.size_bytes))
        why = f"the quickest within the budget: {number_text(best.tokens_per_second, 3)} tokens/s"
    else:
        best = min(within, key=lambda each: (each.size_bytes, each.mean_kl))
        why = f"the smallest within the budget: {bytes_text(best.size_bytes)}"
    return Choice(recommended=best.name, why=f"{why} ({_rules(budget)})", frontier=frontier, out=out)


def _beats(one: Candidate, other: Candidate) -> bool:
    pair = ((one.size_bytes, other.size_bytes), (one.mean_kl, other.mean_kl))
    return all(a <= b for a, b in pair) and any(a < b for a, b in pair)


def _bounds(budget: ChooseSection) -> tuple[float, float | None]:
    """(share of the gain, share of first choices or None) that is asked for."""
    return (GAIN if budget.min_gain_retained is None else budget.min_gain_retained), budget.min_top1


def _lacks(each: Candidate, budget: ChooseSection) -> str | None:
    gain, top1 = _bounds(budget)
    if each.missed:
        return "misses its own bound"
    if budget.max_megabytes is not None and each.size_bytes > 1e6 * budget.max_megabytes:
        return f"over {budget.max_megabytes:g} MB"
    if budget.max_kl is not None and each.mean_kl > budget.max_kl:
        return f"KL over {budget.max_kl:g}"
    if top1 is None and each.gain is None:
        top1 = TOP1
    if top1 is not None and each.top1 < top1:
        return f"same first choice under {top1:.0%}"
    if each.gain is not None and each.gain < gain:
        return f"gain kept under {gain:.0%}"
    if budget.min_tokens_per_second is not None and (each.tokens_per_second or 0) < budget.min_tokens_per_second:
        return f"under {budget.min_tokens_per_second:g} tokens/s" if each.tokens_per_second else "speed not measured"
    return None


def _rules(budget: ChooseSection) -> str:
    gain, top1 = _bounds(budget)
    rules = [f"gain kept at least {gain:.0%}" + ("" if top1 is not None else
                                                 f", or where it cannot be told {TOP1:.0%} of first choices")]
    rules += [f"same first choice at least {top1:.0%}"] if top1 is not None else []
    rules += [f"KL at most {budget.max_kl:g}"] if budget.max_kl is not None else []
    rules += [f"at most {budget.max_megabytes:g} MB"] if budget.max_megabytes is not None else []
    if budget.min_tokens_per_second is not None:
        rules.append(f"at least {budget.min_tokens_per_second:g} tokens/s")
    return "; ".join(rules)
