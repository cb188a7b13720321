"""Latency of requests, from the moments at which their tokens came.

All figures follow from a request's start and the moment of each of its tokens: time to first token, inter-token
latencies (the gaps between tokens), time per output token (their mean), end to end. Of several requests: percentiles
(linear between the two nearest, as numpy's), requests and tokens a second from the first start to the last end, and
goodput, the requests a second that keep stated limits. Terms as in NVIDIA's GenAI-Perf and vLLM's benchmark.

Torch-free. Reads and writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One request: when it was sent, and when each of its tokens came, in seconds of one clock."""

    started: float
    token_times: tuple[float, ...]
    prompt_tokens: int

    @property
    def first_token(self) -> float:
        """Time to first token."""
        return self.token_times[0] - self.started

    @property
    def gaps(self) -> tuple[float, ...]:
        """Inter-token latencies: one fewer than there are tokens."""
        return tuple(after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False))

    @property
    def per_token(self) -> float | None:
        """Time per output token: the mean gap; None with a single token."""
        return (self.token_times[-1] - self.token_times[0]) / (len(self.token_times) - 1) \
            if len(self.token_times) > 1 else None

    @property
    def end_to_end(self) -> float:
        """From sending to the last token."""
        return self.token_times[-1] - self.started


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a good request keeps, in seconds; None: no limit."""

    first_token: float | None = None
    per_token: float | None = None

    def keeps(self, trace: Trace) -> bool:
        """Whether ``trace`` is within both."""
        return ((self.first_token is None or trace.first_token <= self.first_token)
                and (self.per_token is None or (trace.per_token or 0.0) <= self.per_token))


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
        ``first_token_pNN``, ``gap_pNN``, ``end_to_end_pNN`` for 50, 90, 99; ``per_token_mean``; ``requests``,
        ``requests_per_second``, ``output_tokens_per_second``, ``input_tokens_per_second``; ``goodput`` (requests a
        second within ``limits``; None without limits). Gaps of requests of a single token are None.
    """
    found: dict[str, float | int | None] = {}
    gaps = [gap for each in traces for gap in each.gaps]
    for name, values in (("first_token", [each.first_token for each in traces]), ("gap", gaps),
                         ("end_to_end", [each.end_to_end for each in traces])):
        for percentile in PERCENTILES:
            found[f"{name}_p{percentile}"] = float(np.percentile(values, percentile)) if values else None
    each_mean = [each.per_token for each in traces if each.per_token is not None]
    found["per_token_mean"] = float(np.mean(each_mean)) if each_mean else None
    spent = max(each.token_times[-1] for each in traces) - min(each.started for each in traces)
    found["requests"] = len(traces)
    found["requests_per_second"] = len(traces) / spent
    found["output_tokens_per_second"] = sum(len(each.token_times) for each in traces) / spent
    found["input_tokens_per_second"] = sum(each.prompt_tokens for each in traces) / spent
    found["goodput"] = None if limits is None else sum(map(limits.keeps, traces)) / spent
    return found
