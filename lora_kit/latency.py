"""Latency of requests, from the moments at which their tokens came.

All figures follow from a request's start and the moment of each of its tokens: time to first token, inter-token
latencies (the gaps between tokens), time per output token (their mean), end to end. Of several requests: percentiles
(linear between the two nearest, as numpy's), requests and tokens a second from the first start to the last end, and
goodput, the requests a second that keep stated limits. Terms as in vLLM's benchmark, whose names the limits have: ttft,
tpot, e2el (NVIDIA's tools call the time per output token inter-token latency).

Torch-free. Reads and writes nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lora_kit.errors import RecipeError
from lora_kit.units import seconds_text

PERCENTILES = (50, 90, 99)
LIMITS = {"ttft": "first_token", "tpot": "per_token", "e2el": "end_to_end"}
"""What a limit may be on, by its name: time to first token, time per output token, end-to-end latency."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One request: when it was sent, and when each of its tokens came, in seconds of one clock.

    Args:
        num_tokens: tokens of the answer where they did not come one by one; None: one came at each of
            ``token_times``, which are then those of tokens and not of pieces of several.
    """

    started: float
    token_times: tuple[float, ...]
    prompt_tokens: int
    num_tokens: int | None = None

    @property
    def output_tokens(self) -> int:
        """Tokens of the answer."""
        return len(self.token_times) if self.num_tokens is None else self.num_tokens

    @property
    def first_token(self) -> float:
        """Time to first token."""
        return self.token_times[0] - self.started

    @property
    def gaps(self) -> tuple[float, ...]:
        """Inter-token latencies: one fewer than there are tokens (or pieces)."""
        return tuple(after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False))

    @property
    def per_token(self) -> float | None:
        """Time per output token: seconds after the first one, over the tokens after it; None with a single token."""
        return (self.token_times[-1] - self.token_times[0]) / (self.output_tokens - 1) \
            if self.output_tokens > 1 and len(self.token_times) > 1 else None

    @property
    def end_to_end(self) -> float:
        """From sending to the last token."""
        return self.token_times[-1] - self.started


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a good request keeps, in seconds; None: no limit."""

    first_token: float | None = None
    per_token: float | None = None
    end_to_end: float | None = None

    def keeps(self, trace: Trace) -> bool:
        """Whether ``trace`` is within all of them; an answer of one token has no time per token and keeps that."""
        return self.allow(trace.first_token, trace.per_token, trace.end_to_end)

    def allow(self, first_token: float, per_token: float | None, end_to_end: float) -> bool:
        """Whether these seconds are within the limits."""
        return ((self.first_token is None or first_token <= self.first_token)
                and (self.per_token is None or (per_token or 0.0) <= self.per_token)
                and (self.end_to_end is None or end_to_end <= self.end_to_end))

    def text(self) -> str:
        """The limits in words, e.g. ``ttft 500 ms, tpot 50 ms``."""
        return ", ".join(f"{name} {seconds_text(getattr(self, field))}" for name, field in LIMITS.items()
                         if getattr(self, field) is not None)


def parse_limits(texts: Sequence[str]) -> Limits | None:
    """``ttft:500ms``, ``tpot:0.05s`` and such as limits; a bare number is in milliseconds, as in vLLM. None of none.

    Raises:
        RecipeError: one is not of that form, or a name comes twice.
    """
    found: dict[str, float] = {}
    for text in texts:
        match = re.fullmatch(r"(\w+):(\d+(?:\.\d+)?)(ms|s)?", text)
        if not match or match[1] not in LIMITS or float(match[2]) == 0:
            raise RecipeError(f"goodput {text}", "is no limit", f"write {', '.join(LIMITS)} with a time: ttft:500ms")
        if LIMITS[match[1]] in found:
            raise RecipeError(f"goodput {text}", f"is a second limit on {match[1]}", "leave one of them out")
        found[LIMITS[match[1]]] = float(match[2]) * (1.0 if match[3] == "s" else 1e-3)
    return Limits(**found) if found else None


def trace(tokens: Callable[[], Iterator[int]], *, prompt_tokens: int, new_tokens: int,
          clock: Callable[[], float] = time.perf_counter) -> Trace:
    """Time one request.

    Args:
        tokens: sends the request and gives its tokens as they come.

    Raises:
        ValueError: other than ``new_tokens`` tokens came.
    """
    started, moments = clock(), []
    for _ in tokens():
        moments.append(clock())
    if len(moments) != new_tokens:
        raise ValueError(f"{len(moments)} tokens came where {new_tokens} were asked for")
    return Trace(started=started, token_times=tuple(moments), prompt_tokens=prompt_tokens)


def figures(traces: Sequence[Trace], limits: Limits | None = None) -> dict[str, float | int | None]:
    """All figures of ``traces`` (at least one), by name, in seconds and per second.

    Returns:
        ``first_token_pNN``, ``gap_pNN``, ``per_token_pNN``, ``end_to_end_pNN`` for 50, 90, 99; ``per_token_mean``;
        ``requests``, ``requests_per_second``, ``output_tokens_per_second``, ``input_tokens_per_second``; ``goodput``
        (requests a second within ``limits``; None without limits). Gaps of requests of a single token are None.
    """
    found: dict[str, float | int | None] = {}
    gaps = [gap for each in traces for gap in each.gaps]
    each_mean = [each.per_token for each in traces if each.per_token is not None]
    for name, values in (("first_token", [each.first_token for each in traces]), ("gap", gaps),
                         ("per_token", each_mean), ("end_to_end", [each.end_to_end for each in traces])):
        for percentile in PERCENTILES:
            found[f"{name}_p{percentile}"] = float(np.percentile(values, percentile)) if values else None
    found["per_token_mean"] = float(np.mean(each_mean)) if each_mean else None
    spent = max(each.token_times[-1] for each in traces) - min(each.started for each in traces)
    found["requests"] = len(traces)
    found["requests_per_second"] = len(traces) / spent
    found["output_tokens_per_second"] = sum(each.output_tokens for each in traces) / spent
    found["input_tokens_per_second"] = sum(each.prompt_tokens for each in traces) / spent
    found["goodput"] = None if limits is None else sum(map(limits.keeps, traces)) / spent
    return found
