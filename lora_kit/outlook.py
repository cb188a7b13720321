"""Time and cost before they are spent: of training, of a request, and when the one has cost as much as the other.

Two rates say how fast a device is: operations a second in a step of training and in reading a prompt (both are bound by
arithmetic), and bytes a second of weights and cache while it writes (bound by memory: Pope et al. 2022,
arXiv:2211.05102 section 2). They are measured by ``lora-kit plan --calibrate`` or assumed shares of what the device
table states; a figure says which. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lora_kit import memory
from lora_kit.devices import Device
from lora_kit.memory import Shape
from lora_kit.recipe import CostSection, LoraSection

TRAIN_SHARE, READ_SHARE, WRITE_SHARE = 0.35, 0.5, 0.65
"""Shares of a device's stated matrix rate that training and reading reach, and of its bandwidth that writing does.
Assumptions where nothing was measured: the table's rates are upper bounds."""
DRAFTED = 4
"""Tokens that speculative decoding drafts for each pass, in what the plan shows of it."""
_PERIOD_SECONDS = {"h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """How fast a device is."""

    train_flops_per_second: float
    read_flops_per_second: float
    write_bytes_per_second: float
    source: str


def rates_of(device: Device, num_processes: int = 1) -> Rates | None:
    """Assumed rates of a device of the table; None where its maker states no matrix rate."""
    if not device.bf16_flops_per_second or not device.bandwidth_bytes_per_second:
        return None
    return Rates(
        train_flops_per_second=device.bf16_flops_per_second * TRAIN_SHARE * num_processes,
        read_flops_per_second=device.bf16_flops_per_second * READ_SHARE,
        write_bytes_per_second=device.bandwidth_bytes_per_second * WRITE_SHARE,
        source=f"assumed: {TRAIN_SHARE:.0%} of the stated matrix rate in training, {READ_SHARE:.0%} in reading, "
               f"{WRITE_SHARE:.0%} of the stated bandwidth in writing",
    )


def train_seconds(shape: Shape, lora: LoraSection, rates: Rates, *, num_tokens: int, num_trained: int,
                  mean_length: float, checkpointing: bool = False) -> float:
    """Seconds of all steps: operations (``memory.training_flops_per_token``) over the rate."""
    each = memory.training_flops_per_token(
        shape, lora, context=mean_length / 2, trained_share=num_trained / num_tokens, checkpointing=checkpointing)
    return each * num_tokens / rates.train_flops_per_second


@dataclass(frozen=True, kw_only=True)
class Request:
    """One request: tokens read and written, and tokens at its start that a prefix cache holds already."""

    input_tokens: float
    output_tokens: float
    cached_tokens: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RequestSeconds:
    """Seconds of one request alone on the device."""

    reading: float
    writing: float

    @property
    def total(self) -> float:
        return self.reading + self.writing


def request_seconds(shape: Shape, rates: Rates, request: Request, *, weight_bytes: float,
                    tokens_per_pass: float = 1.0, draft_share: float = 0.0) -> RequestSeconds:
    """Seconds of ``request``, alone on the device.

    Reading: operations of the tokens that no cache holds. Writing: for each pass all weights once, and the cache as it
    is on average then; a pass gives ``tokens_per_pass`` tokens and costs ``draft_share`` more for drafting.

    Args:
        weight_bytes: of the form that is served.
    """
    new = request.input_tokens - request.cached_tokens
    flops = new * memory.inference_flops_per_token(shape, context=request.cached_tokens + new / 2)
    cache = memory.kv_bytes(shape, round(request.input_tokens + request.output_tokens / 2))
    passes = request.output_tokens / tokens_per_pass
    return RequestSeconds(
        reading=flops / rates.read_flops_per_second,
        writing=passes * (weight_bytes + cache) / rates.write_bytes_per_second * (1 + draft_share),
    )


def tokens_per_pass(acceptance: float, drafted: float = DRAFTED) -> float:
    """Expected tokens of a pass of the model when each of ``drafted`` tokens is accepted with this probability.

    (1 - a^(n+1)) / (1 - a): Leviathan et al. 2023 (arXiv:2211.17192) equation 1.
    """
    if acceptance >= 1:
        return drafted + 1
    return (1 - acceptance ** (drafted + 1)) / (1 - acceptance)


def period_seconds(text: str) -> float:
    """Seconds of ``12h``, ``7d`` or ``2w``.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"([1-9][0-9]*)([hdw])", text.strip())
    if not found:
        raise ValueError("a period is a number and h, d or w, such as 7d")
    return int(found[1]) * _PERIOD_SECONDS[found[2]]


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """When inference has taken as long as training did, on one device; a price an hour cancels out."""

    requests: float
    days: float | None
    """None without ``requests_per_day``."""
    within_period: bool | None
    """Whether that is before the next training; None where training is done once."""


def break_even(seconds_of_training: float, seconds_of_request: float, cost: CostSection | None) -> BreakEven:
    """Requests, and days at the recipe's ``requests_per_day``, after which both have taken as long."""
    requests = seconds_of_training / seconds_of_request
    days = requests / cost.requests_per_day if cost and cost.requests_per_day else None
    within = None
    if days is not None and cost.retrain_every:
        within = days * 86400 <= period_seconds(cost.retrain_every)
    return BreakEven(requests=requests, days=days, within_period=within)


def price(seconds: float, cost: CostSection) -> float:
    """Price of ``seconds`` of the device."""
    return seconds / 3600 * cost.price_per_hour


def price_per_year(seconds_of_training: float, seconds_of_request: float, cost: CostSection) -> tuple[float, float]:
    """(training, inference) over a year of 365 days: training once or each period, inference on every request."""
    year = 365 * 86400.0
    times = year / period_seconds(cost.retrain_every) if cost.retrain_every else 1.0
    requests = 365 * (cost.requests_per_day or 0.0)
    return price(seconds_of_training, cost) * times, price(seconds_of_request, cost) * requests
