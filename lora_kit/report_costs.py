"""Training against inference: the two sides of every fine-tuned model, beside each other.

Training moves gradients back through the network and is paid once; inference runs
forward only and is paid on every request. Measured figures come from the stages train
and bench; splits of memory and costs are derived from them by the formulas in ``memory.py`` and
here, and say so. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lora_kit import charts, memory, report_latency, report_load
from lora_kit.errors import ModelError
from lora_kit.recipe import CostSection
from lora_kit.report_document import Block, Cell, Figure, Paragraph, Section, Table, missing, rate_text, threads_text
from lora_kit.report_findings import Findings
from lora_kit.units import bytes_text, count_text, number_text, seconds_text

DERIVED = "derived"


@dataclass(frozen=True, kw_only=True)
class RequestCost:
    """What one request takes on the machine that was benched, at the shape that was benched."""

    seconds: float
    output_tokens_per_second: float
    input_tokens_per_second: float


def request_cost(point: dict[str, Any]) -> RequestCost | None:
    """Machine time of one request: (time to first token + (new tokens - 1)·batch / decode rate) / batch.

    None where the point was not measured.
    """
    first, decode = point.get("time_to_first_token_seconds"), point.get("decode_tokens_per_second")
    prefill = point.get("prefill_tokens_per_second")
    if not first or not decode or not prefill:
        return None
    batch, new_tokens = point["batch_size"], point["new_tokens"]
    return RequestCost(
        seconds=(first + (new_tokens - 1) * batch / decode) / batch,
        output_tokens_per_second=decode,
        input_tokens_per_second=prefill,
    )


def break_even_requests(train_seconds: float, request_seconds: float) -> float:
    """Requests after which inference has taken as long as training did.

    On one machine the price an hour cancels out: it is the break-even of cost as well.
    """
    return train_seconds / request_seconds


def price_of(seconds: float, cost: CostSection) -> float:
    """Price of ``seconds`` of the machine."""
    return seconds / 3600 * cost.price_per_hour


def price_per_million(tokens_per_second: float, cost: CostSection) -> float:
    """Price of a million tokens at a rate that fills the machine."""
    return price_of(1e6 / tokens_per_second, cost)


def section(found: Findings) -> Section:
    """The section of the report."""
    blocks: list[Block] = [_contrast_table(found)]
    figure = _memory_figure(found)
    if figure:
        blocks.append(figure)
    blocks.append(_memory_table(found))
    blocks.append(_request_table(found))
    curve = _cost_figure(found)
    if curve:
        blocks.append(curve)
    blocks += report_latency.blocks(found)
    blocks += report_load.blocks(found)
    if found.recipe.cost is None:
        blocks.append(Paragraph(text="The recipe gives no prices (cost.price_per_hour), so costs are left out; "
                                     "break-even needs none, since the price cancels on one machine.", tone="missing"))
    return Section(anchor="contrast", title="Training against inference", blocks=blocks, intro=(
        "Training holds weights, adapter, gradients, optimizer states and activations and is paid once a run; "
        "inference holds weights and KV cache and is paid on every request. Figures without a mark are measured; "
        "derived ones say so."))


def _contrast_table(found: Findings) -> Table:
    train, cost = found.figures("train"), found.recipe.cost
    name, point = _main_point(found)
    no_train, no_bench = missing(found.why_missing("train")), missing(_why_no_point(found, name))
    request = request_cost(point) if point else None
    train_seconds = train.get("train_seconds")

    def trained(text: str) -> str | Cell:
        return text if train else no_train

    def served(text: str) -> str | Cell:
        return text if request else no_bench

    shape = f"{point['prompt_tokens']} + {point['new_tokens']} tokens" if point else ""
    rows: list[list[str | Cell]] = [
        ["what runs", "forward and backward, gradients through the whole network", "forward only"],
        ["frequency", trained(f"once: {count_text(train.get('steps'))} steps, "
                              f"{count_text(train.get('trained_tokens'))} tokens trained"), _frequency(cost)],
        ["hardware", trained(_training_hardware(found)), served(_inference_hardware(found, point))],
        ["duration", trained(f"{seconds_text(train_seconds)} for the run"),
         served(f"{seconds_text(request.seconds if request else None)} for a request of {shape}")],
        ["tokens a second", trained(f"{rate_text(train.get('tokens_per_second'))} through the loop"),
         served(f"{rate_text(request.input_tokens_per_second if request else None)} read, "
                f"{rate_text(request.output_tokens_per_second if request else None)} written")],
        ["operations a token", *_operations(found, point)],
        ["memory pattern", "weights + adapter + gradients + optimizer states + activations",
         "weights + KV cache, which grows with every token"],
        ["peak memory", trained(bytes_text(_peak(train))) if _peak(train) else no_train,
         bytes_text(point["peak_memory_bytes"]) if point and point["peak_memory_bytes"] else no_bench],
        ["cost grows with", "model × trained tokens; ends with the run", "model × requests × length; never ends"],
    ]
    if cost is not None:
        thousand = price_of(1000 * request.seconds, cost) if request else 0.0
        per_request = f"{_money(thousand, cost)} for 1,000 requests ({DERIVED})" if request else no_bench
        rows.append(["cost", f"{_money(price_of(train_seconds, cost), cost)} once ({DERIVED})" if train_seconds
                     else no_train, per_request])
    if request and train_seconds:
        number = break_even_requests(train_seconds, request.seconds)
        rows.append(["break-even", f"{seconds_text(train_seconds)} of the machine",
                     f"as much after {count_text(number)} requests{_day(number, cost)} ({DERIVED})"])
    return Table(columns=("", "training", f"inference ({name})" if name else "inference"), rows=rows)


def _frequency(cost: CostSection | None) -> str:
    if cost is not None and cost.requests_per_day:
        return f"every request: {count_text(cost.requests_per_day)} a day (recipe)"
    return "every request"


def _day(requests: float, cost: CostSection | None) -> str:
    if cost is None or not cost.requests_per_day:
        return ""
    days = requests / cost.requests_per_day
    return f", day {count_text(max(1, -(-requests // cost.requests_per_day)))}" if days >= 1 else ", on the first day"


def _operations(found: Findings, point: dict[str, Any] | None) -> tuple[str | Cell, str | Cell]:
    try:
        shape = memory.shape_of(found.config or {})
        train = found.figures("train")
        total, mean_length = train.get("tokens_total"), (found.ledger or {}).get("lengths", {}).get("mean", 0)
        if not total:
            training: str | Cell = missing(found.why_missing("train"))
        else:
            flops = memory.training_flops_per_token(
                shape, found.recipe.lora, context=mean_length / 2, trained_share=train["trained_tokens"] / total,
                checkpointing=found.recipe.train.gradient_checkpointing)
            training = f"{_flops(flops)} ({DERIVED})"
        context = point["prompt_tokens"] if point else 0
        flops = memory.inference_flops_per_token(shape, context=context)
        where = f"after {count_text(context)} tokens" if point else "without context"
        return training, f"{_flops(flops)} ({DERIVED}, {where})"
    except ModelError as error:
        return missing(error.what), missing(error.what)


def _flops(flops: float) -> str:
    return f"{number_text(flops / 1e9, 3)} GFLOP"


def _memory_parts(found: Findings) -> tuple[list[tuple[str, float]] | None, str]:
    """(part, bytes) of training's peak; the last part is what the others leave. Or None and the reason."""
    train = found.figures("train")
    peak = _peak(train)
    if not peak:
        return None, found.why_missing("train")
    try:
        shape = memory.shape_of(found.config or {})
        held = memory.training_bytes(shape, found.recipe.lora, precision=train.get("precision", "bf16"),
                                     load_in=found.recipe.model.load_in, optimizer=found.recipe.train.optimizer)
    except ModelError as error:
        return None, error.what
    if (train.get("num_processes") or 1) > 1 and found.recipe.train.shard != "none":
        return None, "weights are sharded over processes, and the split of one process is not derived"
    if held.total > peak:
        return None, f"the derived parts ({bytes_text(held.total)}) exceed the measured peak"
    return [("weights", held.weights), ("adapter", held.adapter), ("gradients", held.gradients),
            ("optimizer states", held.optimizer), ("activations, logits, program", peak - held.total)], ""


def _inference_parts(found: Findings, point: dict[str, Any]) -> list[tuple[str, float]] | None:
    """(part, bytes) of an artifact's peak: weight file, KV cache at the benched shape, the rest."""
    peak, size = point.get("peak_memory_bytes"), point.get("size_bytes")
    if not peak or not size:
        return None
    try:
        per_token = memory.kv_bytes_per_token(memory.shape_of(found.config or {}))
    except ModelError:
        return None
    cache = per_token * point["batch_size"] * (point["prompt_tokens"] + point["new_tokens"])
    return [("weights", size), ("KV cache", cache), ("activations, logits, program", peak - size - cache)] \
        if size + cache <= peak else None


_STYLES = {"weights": 0, "adapter": 1, "gradients": 2, "optimizer states": 3, "KV cache": 4,
           "activations, logits, program": 5}


def _memory_figure(found: Findings) -> Figure | None:
    bars = []
    parts, _ = _memory_parts(found)
    if parts:
        bars.append(_bar("training", parts))
    for name, point in found.points().items():
        shown = _inference_parts(found, point)
        if shown:
            bars.append(_bar(name, shown))
    if not bars:
        return None
    words = "Peak memory: " + "; ".join(f"{bar.name} {bar.label}" for bar in bars) + "."
    wide, narrow = (charts.stacked_bars(bars, words=words, value_text=bytes_text, width=width) for width in (860, 380))
    return Figure(wide_svg=wide, narrow_svg=narrow, words=words, caption=(
        "Peak memory of training and of each artifact at inference. The length of a bar is measured; its parts are "
        "derived (weights at inference are the file's size), and grey is what they leave of the measured peak: "
        "activations, logits, Python and its libraries."))


def _bar(name: str, parts: list[tuple[str, float]]) -> charts.Bar:
    return charts.Bar(name=name, parts=[(part, value, _STYLES[part]) for part, value in parts],
                      label=bytes_text(sum(value for _, value in parts)))


def _memory_table(found: Findings) -> Table:
    columns = ("", "weights", "adapter", "gradients", "optimizer states", "KV cache", "rest", "measured peak")
    rows: list[list[str | Cell]] = []
    parts, why = _memory_parts(found)
    train = found.figures("train")
    if parts:
        values = dict(parts)
        rows.append(["training", *(bytes_text(values[part]) for part in ("weights", "adapter", "gradients",
                                                                        "optimizer states")),
                     "none", bytes_text(values["activations, logits, program"]), bytes_text(_peak(train))])
    else:
        peak = bytes_text(_peak(train)) if _peak(train) else missing(found.why_missing("train"))
        rows.append(["training", missing(why, span=6), peak])
    for name, point in found.points().items():
        if point.get("why_not"):
            rows.append([name, missing(point["why_not"], span=7)])
            continue
        shown = dict(_inference_parts(found, point) or [])
        rest = shown.get("activations, logits, program")
        rows.append([name, bytes_text(point.get("size_bytes")), "none", "none", "none",
                     bytes_text(shown.get("KV cache")), bytes_text(rest), bytes_text(point.get("peak_memory_bytes"))])
    notes = ["Peaks are measured: of the process, or of the GPU where the model lay on one. Weights of an artifact are "
             "the size of its file. Everything else is derived; rest = peak - the others."]
    try:
        per_token = memory.kv_bytes_per_token(memory.shape_of(found.config or {}))
        notes.append(f"The KV cache takes {bytes_text(per_token)} for each token of each sequence "
                     "(2 · layers · KV heads · head size · 2 bytes).")
    except ModelError as error:
        notes.append(f"KV cache not derived: {error.what}.")
    return Table(title="Memory, part by part", columns=columns, rows=rows, note=" ".join(notes),
                 numeric=tuple(range(1, len(columns))))


def _request_table(found: Findings) -> Table:
    cost = found.recipe.cost
    train_seconds = found.figures("train").get("train_seconds")
    columns = ["artifact", "one request", "requests until break-even"]
    if cost is not None:
        columns += ["1,000 requests", "a million tokens read", "a million tokens written"]
        if cost.requests_per_day:
            columns.append("a day")
    rows: list[list[str | Cell]] = []
    for name, point in found.points().items():
        request = request_cost(point)
        if request is None:
            rows.append([name, missing(point.get("why_not") or "no figure", span=len(columns) - 1)])
            continue
        number = break_even_requests(train_seconds, request.seconds) if train_seconds else None
        row: list[str | Cell] = [name, seconds_text(request.seconds), count_text(number)]
        if cost is not None:
            row += [_money(price_of(1000 * request.seconds, cost), cost),
                    _money(price_per_million(request.input_tokens_per_second, cost), cost),
                    _money(price_per_million(request.output_tokens_per_second, cost), cost)]
            if cost.requests_per_day:
                row.append(_money(price_of(request.seconds, cost) * cost.requests_per_day, cost))
        rows.append(row)
    if not rows:
        rows.append([missing(_why_no_point(found, None), span=len(columns))])
    price = f" Price: {_money(cost.price_per_hour, cost)} an hour of this machine (recipe)." if cost else ""
    return Table(
        title="What a request takes, and when inference has taken more than training", columns=columns, rows=rows,
        numeric=tuple(range(1, len(columns))),
        note="All derived. One request = (time to first token + further tokens / decode rate) / batch, at the benched "
             "shape; break-even = seconds of training / seconds of a request, on one machine." + price)


def _cost_figure(found: Findings) -> Figure | None:
    """What training and inference have taken after so many requests, up to twice the main artifact's break-even."""
    name, point = _main_point(found)
    request, trained = request_cost(point) if point else None, found.figures("train").get("train_seconds")
    if not request or not trained:
        return None
    cost = found.recipe.cost
    scale = price_of(1.0, cost) if cost else 1.0
    number = break_even_requests(trained, request.seconds)
    most = 2 * number
    lines = [charts.Line(name="training, once", points=[(0, trained * scale), (most, trained * scale)], style=0)]
    others = {other: request_cost(each) for other, each in found.points().items() if other != name}
    shown = [(name, request), *((other, each) for other, each in others.items() if each)]
    for style, (label, each) in enumerate(shown[:4], start=1):
        # No higher than twice training: what costs more leaves the picture at its top.
        last = min(most, 2 * trained / each.seconds)
        lines.append(charts.Line(name=label, points=[(0, 0.0), (last, last * each.seconds * scale)], style=style,
                                 faint=label != name))
    lines.append(charts.Line(name="break-even", points=[(number, trained * scale)], style=5, dots=True))
    unit = cost.currency if cost else "seconds of the machine"
    words = (f"Training takes {seconds_text(trained)} once; requests to {name} have taken as long after "
             f"{count_text(number)}{_day(number, cost)}.")
    wide, narrow = (charts.line_chart(lines, x_title="requests", y_title=unit, words=words, from_zero=True, width=width)
                    for width in (760, 380))
    return Figure(wide_svg=wide, narrow_svg=narrow, words=words, caption=(
        f"What has been spent after so many requests at the benched shape ({DERIVED}): training once, and inference on "
        f"every request. They cross at the break-even of {name}."))


def _money(amount: float, cost: CostSection) -> str:
    return f"{number_text(amount, 3)} {cost.currency}"


def _main_point(found: Findings) -> tuple[str | None, dict[str, Any] | None]:
    """The artifact that stands for inference: the merged model, else the first that was measured."""
    points = {name: point for name, point in found.points().items() if not point.get("why_not")}
    name = "merged" if "merged" in points else next(iter(points), None)
    return name, points.get(name)


def _why_no_point(found: Findings, name: str | None) -> str:
    reasons = [point["why_not"] for point in found.points().values() if point.get("why_not")]
    return reasons[0] if reasons and name is None else found.why_missing("bench")


def _peak(train: dict[str, Any]) -> int | None:
    """Training's peak where the model lay: on the GPU when there was one, else of the process."""
    return train.get("device_peak_memory_bytes") or train.get("peak_memory_bytes")


def _training_hardware(found: Findings) -> str:
    train = found.figures("train")
    machine = found.lock.get("machine") or {}
    processes = train.get("num_processes") or 1
    parts = [_device_name(str(train.get("device", "")), machine)]
    if processes > 1:
        parts.append(f"{processes} processes")
    if train.get("threads") and str(train.get("device")) == "cpu":
        parts.append(threads_text(train["threads"]))
    return ", ".join([*parts, str(train.get("precision", ""))]).strip(", ")


def _inference_hardware(found: Findings, point: dict[str, Any] | None) -> str:
    if not point:
        return ""
    machine = (found.bench or {}).get("machine") or {}
    threads = f", {threads_text(point['threads'])}" if point.get("device") == "cpu" else ""
    return f"{_device_name(point.get('device', ''), machine)}{threads}, {point['engine']}"


def _device_name(device: str, machine: dict[str, Any]) -> str:
    if device.startswith("cuda"):
        names = sorted({gpu["name"] for gpu in machine.get("gpus") or ()})
        return f"{device} ({', '.join(names)})" if names else device
    return machine.get("cpu") or device if device == "cpu" else device
