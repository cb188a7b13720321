"""Speculative decoding by prompt lookup, counted: what is drafted, what is accepted, and what it gains.

The tokens after an earlier occurrence of the newest ones are a draft that costs nothing (Saxena 2023, "prompt
lookup decoding"); one pass of the model reads them all and keeps those that it would have chosen itself, and its own
next one (Leviathan et al. 2023, arXiv:2211.17192). So the answer is the greedy one, but for rounding: a pass over
several tokens rounds otherwise than one over each, and where two tokens are as likely, either may come.

Shape suffixes: T tokens, V vocabulary. Reads and writes nothing.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LONGEST_MATCH = 3
"""Newest tokens that are looked for, then fewer of them down to one."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One greedy answer: its tokens, the passes after the prompt's that gave them, and tokens drafted and accepted."""

    tokens: tuple[int, ...]
    passes: int
    drafted: int
    accepted: int
    seconds: float
    """Of the passes after the prompt's."""

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that were accepted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass gave, its own one included."""
        return (len(self.tokens) - 1) / self.passes if self.passes else 1.0


def lookup(tokens: Sequence[int], most: int) -> list[int]:
    """At most ``most`` tokens that followed an earlier occurrence of the newest of ``tokens``; [] without one.

    Of several occurrences the last that ``most`` tokens follow, else the one that most follow.
    """
    for length in range(min(LONGEST_MATCH, len(tokens) - 1), 0, -1):
        newest, best = list(tokens[-length:]), []
        for start in range(len(tokens) - length - 1, -1, -1):
            if list(tokens[start:start + length]) == newest:
                followed = list(tokens[start + length:start + length + most])
                best = followed if len(followed) > len(best) else best
                if len(best) == most:
                    break
        if best:
            return best
    return []


def answer(model: Any, prompt: Sequence[int], *, new_tokens: int, drafted: int) -> Answer:
    """The greedy answer of ``model`` (of transformers, whose cache grows plainly) to ``prompt``, past stop tokens.

    Args:
        drafted: tokens looked up for each pass; 0 is plain greedy decoding through the same code.
    """
    import torch

    key = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    known, num_prompt = list(prompt), len(prompt)
    counted = {"passes": 0, "drafted": 0, "accepted": 0}
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([known], device=model.device), use_cache=True, logits_to_keep=1)
        cache = getattr(out, key)
        known.append(int(out.logits[0, -1].argmax()))
        started = time.perf_counter()
        while len(known) - num_prompt < new_tokens:
            left = new_tokens - (len(known) - num_prompt)
            # The pass gives one token of its own, so that no more than the others are worth a draft.
            draft = lookup(known, min(drafted, left - 1)) if drafted and left > 1 else []
            inputs_1T = torch.tensor([[known[-1], *draft]], device=model.device)
            out = model(input_ids=inputs_1T, use_cache=True, **{key: cache})
            chosen = out.logits[0].argmax(-1).tolist()
            right = next((place for place, token in enumerate(draft) if chosen[place] != token), len(draft))
            known += [*draft[:right], chosen[right]]
            if right < len(draft):
                cache.crop(right - len(draft))  # negative: so many tokens less
            counted["passes"] += 1
            counted["drafted"] += len(draft)
            counted["accepted"] += right
        seconds = time.perf_counter() - started
    return Answer(tokens=tuple(known[num_prompt:]), seconds=seconds, **counted)


def parts_at_near_tie(model: Any, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> float | None:
    """Where two greedy answers part first, how far apart their two tokens are in logits there; None where they agree.

    Under about a tenth it is rounding.
    """
    import torch

    place = next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)
    if place is None:
        return None
    with torch.inference_mode():
        tokens_1T = torch.tensor([[*prompt, *one[:place]]], device=model.device)
        logits_V = model(input_ids=tokens_1T, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return float(abs(logits_V[one[place]] - logits_V[other[place]]))
