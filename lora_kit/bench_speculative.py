"""Speculative decoding beside plain decoding on real prompts: what is accepted, what that should gain, what it gains.

All ways answer each prompt through the same code (``speculative.py``), with as many tokens and in another order for
each prompt; where the engine has a quicker loop for plain decoding, that stands beside them. The speed-up is predicted
from what was accepted and from the seconds of single passes, measured apart, and then measured.

Reads a model, and the assistant's; writes nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lora_kit import speculative, speed_ratio
from lora_kit.chat import load_tokenizer, prompt_ids
from lora_kit.errors import ModelError
from lora_kit.types import Artifact

PLAIN, LOOKUP, ASSISTANT, QUICK = "plain", "prompt lookup", "assistant", "plain, own loop"
_FLOOR = 1e-4
"""Logits that are no further apart are a near tie whatever was measured."""


def measure(artifact: dict[str, Any], *, asked: Sequence[dict[str, Any]], tools_mode: str,
            assistant: dict[str, Any] | None, drafted: int, new_tokens: int, threads: int) -> dict[str, Any]:
    """Load ``artifact`` and the assistant in this process and let them answer; call it in one of its own.

    Args:
        asked: prompts, each with its ``messages`` and ``tools``.

    Returns:
        What :func:`of_models` gives, with artifact, engine, assistant and threads.

    Raises:
        ModelError: a model keeps its cache otherwise, or the assistant's tokenizer is another one.
    """
    from lora_kit.engines import open_engine

    loaded = [open_engine(Artifact(**each), threads=threads, prefer="hf") for each in (artifact, assistant) if each]
    for engine, each in zip(loaded, (artifact, assistant), strict=False):
        if engine.likelihood_note:
            raise ModelError(each["path"], f"cannot take back what it read: {engine.likelihood_note}",
                             "leave bench.speculative out for this model")
    engine = loaded[0]
    if assistant:
        check_tokenizers(artifact, assistant)
    prompts = [prompt_ids(engine.tokenizer, each["messages"], each["tools"], tools_mode=tools_mode) for each in asked]
    with engine:
        found = of_models(engine.model, prompts, drafted=drafted, new_tokens=new_tokens,
                          assistant=loaded[1].model if assistant else None,
                          quick=engine if engine.has_own_loop else None)
        return {"artifact": artifact["name"], "engine": engine.name, "threads": threads, "device": engine.device,
                "assistant": assistant["name"] if assistant else None, **found}


def check_tokenizers(artifact: dict[str, Any], assistant: dict[str, Any]) -> None:
    """ModelError where the two would not mean the same by a token."""
    own, other = (load_tokenizer(each["tokenizer"] or each["path"]).get_vocab() for each in (artifact, assistant))
    if own != other:
        differing = [token for token, number in own.items() if other.get(token) != number]
        raise ModelError(f"bench.speculative.assistant: {assistant['name']}",
                         f"has another tokenizer ({len(own):,} tokens here, {len(other):,} there, {len(differing):,} "
                         "of the first mean something else)", "name a model with the same one")


def of_models(model: Any, prompts: Sequence[Sequence[int]], *, drafted: int, new_tokens: int, assistant: Any = None,
              quick: Any = None) -> dict[str, Any]:
    """All ways of answering ``prompts`` with models in memory.

    Args:
        quick: an engine whose ``tokens_after`` decodes plainly in a way of its own.

    Returns:
        prompts, prompt_tokens (mean), new_tokens, drafted (most a pass), logit_noise, pass_seconds (of 1 and of
        1 + drafted tokens), and ``ways``: of each its name, tokens_per_second, what was accepted, cost_ratio, the
        predictions, the measured ratio to plain with its interval, and ``apart``: where its answers part from the plain
        ones (prompt, position, margin in logits, near_tie).
    """
    drafters = {PLAIN: None, LOOKUP: speculative.Lookup()}
    if assistant is not None:
        drafters[ASSISTANT] = speculative.Assistant(assistant)
    names = [*drafters, *([QUICK] if quick is not None else [])]

    def once(name: str, prompt: Sequence[int]) -> speculative.Answer:
        if name == QUICK:
            return _quickly(quick, prompt, new_tokens)
        return speculative.answer(model, prompt, new_tokens=new_tokens, drafted=drafted if drafters[name] else 0,
                                  drafter=drafters[name])

    for name in names:
        once(name, prompts[0])
    answers: dict[str, list[speculative.Answer]] = {name: [] for name in names}
    for number, prompt in enumerate(prompts):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            answers[name].append(once(name, prompt))
    noise = max(speculative.logit_noise(model, prompt, each)
                for prompt, each in zip(prompts, answers[PLAIN], strict=True))
    middle = sorted(prompts, key=len)[len(prompts) // 2]
    one, several = (speculative.pass_seconds(model, middle, number) for number in (1, 1 + drafted))
    costs = {LOOKUP: _lookup_seconds([*middle, *answers[PLAIN][0].tokens], drafted) / one}
    if assistant is not None:
        costs[ASSISTANT] = speculative.pass_seconds(assistant, middle, 1) / one
    ways = []
    for name in names:
        way = _figures(name, answers[PLAIN], answers[name])
        way["apart"] = _apart(model, prompts, answers[PLAIN], answers[name], noise)
        if name in costs:
            way |= _predicted(way, cost_ratio=costs[name], widened=(several - one) / one / drafted)
        ways.append(way)
    return {"prompts": len(prompts), "prompt_tokens": statistics.mean(map(len, prompts)), "new_tokens": new_tokens,
            "drafted": drafted, "logit_noise": noise, "pass_seconds": [one, several], "ways": ways}


def _quickly(engine: Any, prompt: Sequence[int], new_tokens: int) -> speculative.Answer:
    tokens, started = [], 0.0
    for token in engine.tokens_after(prompt, new_tokens):
        if not tokens:
            started = time.perf_counter()
        tokens.append(token)
    return speculative.Answer(tokens=tuple(tokens), logits=(), passes=new_tokens - 1, drafted=0, accepted=0, rejected=0,
                              seconds=time.perf_counter() - started)


def _lookup_seconds(known: Sequence[int], drafted: int) -> float:
    """Seconds of looking up one token after ``known``, on average over several places."""
    places = range(len(known) // 2, len(known))
    started = time.perf_counter()
    found = sum(len(speculative.lookup(known[:place], drafted)) for place in places)
    return (time.perf_counter() - started) / max(found, 1)


def _figures(name: str, plain: Sequence[speculative.Answer], quick: Sequence[speculative.Answer]) -> dict[str, Any]:
    total = {key: sum(getattr(each, key) for each in quick) for key in ("passes", "drafted", "accepted", "rejected")}
    decoded = sum(len(each.tokens) - 1 for each in quick)
    found = {"way": name, **total, "tokens_per_pass": decoded / total["passes"],
             "acceptance_rate": speculative.acceptance_rate(total["accepted"], total["rejected"]),
             "tokens_per_second": decoded / sum(each.seconds for each in quick), "measured": None,
             "cost_ratio": None, "predicted": None, "predicted_here": None}
    if name != PLAIN:
        ratio = speed_ratio.of_pairs([each.seconds for each in plain], [each.seconds for each in quick])
        found["measured"] = {**asdict(ratio), "verdict": ratio.verdict}
    return found


def _predicted(way: dict[str, Any], *, cost_ratio: float, widened: float) -> dict[str, Any]:
    """Speed-ups as Leviathan et al. 2023 have it, and with the time that a longer pass takes here.

    Args:
        widened: how much longer a pass takes for each further token, as a share of a pass over one.
    """
    each = way["drafted"] / way["passes"]
    rate = way["acceptance_rate"]
    return {"cost_ratio": cost_ratio,
            "predicted": speculative.predicted_speedup(rate or 0.0, each, cost_ratio),
            "predicted_here": way["tokens_per_pass"] / (each * cost_ratio + 1 + each * widened)}


def _apart(model: Any, prompts: Sequence[Sequence[int]], plain: Sequence[speculative.Answer],
           quick: Sequence[speculative.Answer], noise: float) -> list[dict[str, Any]]:
    found = []
    for number, (prompt, one, other) in enumerate(zip(prompts, plain, quick, strict=True), start=1):
        place = speculative.first_difference(one.tokens, other.tokens)
        if place is not None:
            margin = speculative.parts_at_near_tie(model, prompt, one.tokens, other.tokens)
            found.append({"prompt": number, "position": place, "tokens": [one.tokens[place], other.tokens[place]],
                          "margin": margin, "near_tie": margin <= max(2 * noise, _FLOOR)})
    return found
