"""Greedy answers of two models to the same prompts: where they part, whether that was a near tie, how often they stop.

Two right implementations of one model part at a token that both like almost equally; a model that lost something
parts where the reference was sure. So beside the first difference stands how much the reference preferred its own
token. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_kit.engines import Engine
from lora_kit.stats import wilson

NUM_ANSWERS = 12
"""Prompts that are answered."""
ANSWER_TOKENS = 64
"""Longest answer."""
NEAR_TIE = 0.1
"""Nats by which the reference may prefer its token for a difference to count as a near tie (1.1 times as likely)."""
_KEPT = 64


def answer(engine: Engine, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reference's answers to the first prompts of ``rows``.

    Returns:
        Of each: prompt_tokens, prompt, tokens, text, stopped, and ``liked``: at each position of the answer, and at the
        one after it, the likeliest tokens with their log-probabilities.
    """
    prompts = sample_prompts(rows, NUM_ANSWERS)
    found = []
    for prompt, said in zip(prompts, engine.generate(prompts, max_new_tokens=ANSWER_TOKENS), strict=True):
        after_TV = engine.log_probs([*prompt, *said.tokens])[len(prompt) - 1:]
        ids_TK = np.argsort(-after_TV, axis=1)[:, :_KEPT]
        liked = [[[int(token), float(row_V[token])] for token in ids] for ids, row_V in zip(ids_TK, after_TV,
                                                                                            strict=True)]
        found.append({"prompt_tokens": prompt, "prompt": engine.tokenizer.decode(prompt), "tokens": list(said.tokens),
                      "text": said.text, "stopped": said.stopped, "liked": liked})
    return found


def compare_answers(reference: Sequence[dict[str, Any]], engine: Engine) -> dict[str, Any]:
    """``engine``'s answers beside those of :func:`answer`.

    Returns:
        num_answers, num_same, num_near_ties (of those that part), stopped and reference_stopped (each share with
        its 95 % interval after Wilson, None without an answer), new_tokens, and ``samples``: prompt, reference,
        candidate, first_difference (index of the first token that differs, or None), preference (nats by which the
        reference preferred its own token there; None where the candidate's is not among its likeliest 64), near_tie.
    """
    answers = engine.generate([each["prompt_tokens"] for each in reference], max_new_tokens=ANSWER_TOKENS)
    samples = []
    for before, after in zip(reference, answers, strict=True):
        place = first_difference(before["tokens"], after.tokens)
        preferred = None if place is None else _preference(before, after.tokens, place, engine.stop_ids)
        samples.append({"prompt": before["prompt"], "reference": before["text"], "candidate": after.text,
                        "first_difference": place, "preference": preferred,
                        "near_tie": preferred is not None and preferred <= NEAR_TIE})
    return {"num_answers": len(samples), "num_same": sum(each["first_difference"] is None for each in samples),
            "num_near_ties": sum(each["near_tie"] for each in samples),
            "stopped": _share(sum(each.stopped for each in answers), len(answers)),
            "reference_stopped": _share(sum(each["stopped"] for each in reference), len(reference)),
            "new_tokens": ANSWER_TOKENS, "samples": samples}


def _preference(before: dict[str, Any], tokens: Sequence[int], place: int, stop_ids: Sequence[int]) -> float | None:
    """Nats by which the reference preferred its token at ``place`` to the candidate's; an end stands for a stop."""
    liked = dict(before["liked"][place]) if place < len(before["liked"]) else {}
    own = [before["tokens"][place]] if place < len(before["tokens"]) else stop_ids
    other = [tokens[place]] if place < len(tokens) else stop_ids
    values = [max((liked[token] for token in side if token in liked), default=None) for side in (own, other)]
    return None if None in values else values[0] - values[1]


def _share(count: int, total: int) -> dict[str, float] | None:
    if not total:
        return None
    low, high = wilson(count, total)
    return {"share": count / total, "ci_low": low, "ci_high": high}


def sample_prompts(rows: Sequence[dict[str, Any]], count: int) -> list[list[int]]:
    """The tokens before the first answer of the first ``count`` rows that have both."""
    found = []
    for row in rows:
        if row["trained"] and any(row["trained"]) and not row["trained"][0] and len(found) < count:
            found.append(row["tokens"][: row["trained"].index(1)])
    return found


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ, an end included; None when they are equal."""
    if tuple(a) == tuple(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
