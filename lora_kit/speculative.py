"""Speculative decoding, counted: what is drafted, what is accepted, and what it gains.

A draft is read by one pass of the model, which keeps those of its tokens that it would have chosen itself, and its own
next one (Leviathan et al. 2023, arXiv:2211.17192). So the answer is the greedy one, but for rounding: a pass over
several tokens rounds otherwise than one over each, and where two tokens are as likely, either may come. What drafts is
:class:`Lookup`, the tokens after an earlier occurrence of the newest ones, which cost nothing (Saxena 2023, "prompt
lookup decoding"), or :class:`Assistant`, a smaller model with the same tokenizer.

Shape suffixes: T tokens, V vocabulary. Reads and writes nothing.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lora_kit import outlook

LONGEST_MATCH = 3
"""Newest tokens that are looked for, then fewer of them down to one."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One greedy answer: its tokens, the passes after the prompt's that gave them, and tokens drafted and accepted."""

    tokens: tuple[int, ...]
    logits: tuple[float, ...]
    """Of each token, when it was chosen."""
    passes: int
    drafted: int
    accepted: int
    rejected: int
    """Passes in which a drafted token was wrong; those after it were not looked at."""
    seconds: float
    """Of the passes after the prompt's, and of drafting."""

    @property
    def acceptance(self) -> float | None:
        """Share of drafted tokens that were accepted; None where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass gave, its own one included."""
        return (len(self.tokens) - 1) / self.passes if self.passes else 1.0


class Drafter(Protocol):
    """What drafts."""

    def propose(self, known: Sequence[int], most: int) -> list[int]:
        """At most ``most`` tokens that may come after ``known``, which never loses a token within one answer."""


class Lookup:
    """Prompt lookup."""

    def propose(self, known: Sequence[int], most: int) -> list[int]:
        return lookup(known, most)


class Assistant:
    """The greedy tokens of ``model`` (of transformers, whose cache grows plainly); it may draft for several answers."""

    def __init__(self, model: Any) -> None:
        self.model, self._key = model, _cache_key(model)
        self._read: list[int] = []
        self._cache: Any = None

    def propose(self, known: Sequence[int], most: int) -> list[int]:
        import torch

        known = list(known)
        # What it read and was not accepted is taken back; the newest token is always read anew.
        common = next((place for place, pair in enumerate(zip(self._read, known, strict=False)) if pair[0] != pair[1]),
                      min(len(self._read), len(known)))
        common = min(common, len(known) - 1)
        if not common:
            self._cache = None
        elif common < len(self._read):
            self._cache.crop(common - len(self._read))  # negative: so many tokens less
        draft: list[int] = []
        with torch.inference_mode():
            while len(draft) < most:
                inputs = known[common:] if not draft else draft[-1:]
                out = self.model(input_ids=torch.tensor([inputs], device=self.model.device), use_cache=True,
                                 logits_to_keep=1, **{self._key: self._cache})
                self._cache = getattr(out, self._key)
                draft.append(int(out.logits[0, -1].argmax()))
        if draft:
            self._read = [*known, *draft[:-1]]
        return draft


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


def answer(model: Any, prompt: Sequence[int], *, new_tokens: int, drafted: int,
           drafter: Drafter | None = None) -> Answer:
    """The greedy answer of ``model`` (of transformers, whose cache grows plainly) to ``prompt``, past stop tokens.

    Args:
        drafted: tokens drafted for each pass; 0 is plain greedy decoding through the same code.
        drafter: what drafts; None: prompt lookup.
    """
    import torch

    key, drafter = _cache_key(model), drafter or Lookup()
    known, num_prompt, logits = list(prompt), len(prompt), []
    counted = {"passes": 0, "drafted": 0, "accepted": 0, "rejected": 0}
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([known], device=model.device), use_cache=True, logits_to_keep=1)
        cache = getattr(out, key)
        best, chosen = out.logits[0, -1:].max(-1)
        known.append(int(chosen))
        logits.append(float(best))
        started = time.perf_counter()
        while len(known) - num_prompt < new_tokens:
            left = new_tokens - (len(known) - num_prompt)
            # The pass gives one token of its own, so that no more than the others are worth a draft.
            draft = drafter.propose(known, min(drafted, left - 1)) if drafted and left > 1 else []
            inputs_1T = torch.tensor([[known[-1], *draft]], device=model.device)
            out = model(input_ids=inputs_1T, use_cache=True, **{key: cache})
            best, chosen = (each.tolist() for each in out.logits[0].max(-1))
            right = next((place for place, token in enumerate(draft) if chosen[place] != token), len(draft))
            known += chosen[:right + 1]
            logits += best[:right + 1]
            if right < len(draft):
                cache.crop(right - len(draft))  # negative: so many tokens less
            counted["passes"] += 1
            counted["drafted"] += len(draft)
            counted["accepted"] += right
            counted["rejected"] += right < len(draft)
        seconds = time.perf_counter() - started
    return Answer(tokens=tuple(known[num_prompt:]), logits=tuple(logits), seconds=seconds, **counted)


def acceptance_rate(accepted: int, rejected: int) -> float | None:
    """Leviathan's alpha: the share of drafted tokens that were looked at and were right.

    What stands behind a wrong one is never looked at, so that it counts neither way. None where none was looked at.
    """
    return accepted / (accepted + rejected) if accepted + rejected else None


def predicted_speedup(acceptance: float, drafted: float, cost_ratio: float) -> float:
    """(1 - a^(n+1)) / ((1 - a)(n c + 1)): Leviathan et al. 2023, Theorem 3.8.

    It takes a pass over ``drafted`` + 1 tokens to last as long as one over a single token.

    Args:
        acceptance: the rate of :func:`acceptance_rate`.
        drafted: tokens drafted for each pass; a mean where that differs.
        cost_ratio: seconds of drafting a token over those of a pass of the model over one token.
    """
    return outlook.tokens_per_pass(acceptance, drafted) / (drafted * cost_ratio + 1)


def pass_seconds(model: Any, prompt: Sequence[int], number: int, *, repeats: int = 5) -> float:
    """Median seconds of a pass over ``number`` tokens after ``prompt``."""
    import torch

    key, spent = _cache_key(model), []
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=True, logits_to_keep=1)
        cache, inputs = getattr(out, key), torch.tensor([[prompt[0]] * number], device=model.device)
        for turn in range(repeats + 1):
            started = time.perf_counter()
            out = model(input_ids=inputs, use_cache=True, **{key: cache})
            out.logits[0, -1].argmax().item()  # a GPU works behind the clock's back: wait for it
            if turn:  # the first warms up
                spent.append(time.perf_counter() - started)
            cache.crop(-number)
    return statistics.median(spent)


def logit_noise(model: Any, prompt: Sequence[int], answered: Answer) -> float:
    """Largest difference between the logits of an answer's tokens, when they were chosen and in one pass over all.

    So much does rounding move a logit, by which tokens are read together.
    """
    import torch

    with torch.inference_mode():
        tokens_1T = torch.tensor([[*prompt, *answered.tokens[:-1]]], device=model.device)
        logits_TV = model(input_ids=tokens_1T, use_cache=False, logits_to_keep=len(answered.tokens)).logits[0]
        again_T = logits_TV.gather(-1, torch.tensor(answered.tokens, device=model.device)[:, None])[:, 0]
    return max(abs(one - other) for one, other in zip(again_T.float().tolist(), answered.logits, strict=True))


def parts_at_near_tie(model: Any, prompt: Sequence[int], one: Sequence[int], other: Sequence[int]) -> float | None:
    """Where two greedy answers part first, how far apart their two tokens are in logits there; None where they agree.

    Up to twice what :func:`logit_noise` says it is rounding.
    """
    import torch

    place = first_difference(one, other)
    if place is None:
        return None
    with torch.inference_mode():
        tokens_1T = torch.tensor([[*prompt, *one[:place]]], device=model.device)
        logits_V = model(input_ids=tokens_1T, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return float(abs(logits_V[one[place]] - logits_V[other[place]]))


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token in which two answers of one length differ; None where they agree."""
    return next((place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]), None)


def _cache_key(model: Any) -> str:
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PeftModel hides its forward
    return "cache" if "cache" in inspect.signature(plain.forward).parameters else "past_key_values"
