"""The report's sections about the run itself: what came out, training, machine.

A figure that does not exist is shown as not measured, with the reason, never as zero.
Texts stay plain here; the writers escape them. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from lora_kit import charts, stopwatch
from lora_kit.report_document import (
    TONES,
    Block,
    Card,
    Cards,
    Cell,
    Code,
    Figure,
    Paragraph,
    Section,
    Table,
    VerdictLine,
    Verdicts,
    missing,
    rate_text,
)
from lora_kit.report_findings import Findings, reference_text
from lora_kit.units import bytes_text, count_text, number_text, seconds_text

_MEAN_FROM_STEPS = 30
"""A loss curve of at least this many steps also shows a running mean."""
_SPIKES_NAMED = 8


def summary(found: Findings) -> Section:
    """Headline figures, every verdict, and the artifacts side by side."""
    blocks: list[Block] = [Cards(cards=_cards(found))]
    verdicts = found.verdicts()
    if verdicts:
        blocks.append(Verdicts(lines=[
            VerdictLine(outcome=verdict.outcome, claim=verdict.claim, evidence=verdict.evidence)
            for _, verdict in verdicts]))
    else:
        blocks.append(Paragraph(text="No claim was tested: no verdict.", tone="missing"))
    blocks.append(_artifact_table(found))
    return Section(anchor="summary", title="What came out", blocks=blocks)


def _cards(found: Findings) -> list[Card]:
    train = found.figures("train")
    before, after = train.get("held_out_before"), train.get("held_out_after")
    loss = f"{number_text(before, 3)} → {number_text(after, 3)}" if before and after else "not measured"
    change = f"{(after / before - 1) * 100:+.1f} % on unseen rows" if before and after else _why_no_held_out(found)
    trained, total = train.get("num_trainable_params"), train.get("num_params")
    share = f"{100 * trained / total:.2g} % of {count_text(total)}" if trained and total else found.why_missing("train")
    cards = [
        Card(label="held-out loss", value=loss, note=change),
        Card(label="trained parameters", value=count_text(trained) if trained else "not measured", note=share),
        Card(label="training", value=seconds_text(train.get("train_seconds")) if train else "not measured",
             note=f"{count_text(train.get('trained_tokens'))} tokens trained" if train else found.why_missing("train")),
    ]
    name, point = _fastest(found)
    if point:
        cards.append(Card(label="fastest answer", note=f"tokens a second, {name}",
                          value=rate_text(point["decode_tokens_per_second"])))
    else:
        cards.append(Card(label="fastest answer", value="not measured", note=found.why_missing("bench")))
    return cards


def _why_no_held_out(found: Findings) -> str:
    if "train" in found.seals and not found.held_out:
        return "nothing was held out"
    return found.why_missing("train")


def _fastest(found: Findings) -> tuple[str, dict[str, Any] | None]:
    measured = {name: point for name, point in found.points().items() if point.get("decode_tokens_per_second")}
    if not measured:
        return "", None
    name = max(measured, key=lambda each: measured[each]["decode_tokens_per_second"])
    return name, measured[name]


def _artifact_table(found: Findings) -> Table:
    scored = [score for score in (found.scores or {}).get("scores", ()) if score.get("value") is not None]
    tasks = list(dict.fromkeys((score["task"], score["metric"]) for score in scored))[:3]
    by_key = {(score["artifact"], score["task"], score["metric"]): score for score in scored}
    columns = ["artifact", "kind", "size", "KL", *(_task_title(task, metric) for task, metric in tasks),
               "decode tok/s", "verdict"]
    points, rows = found.points(), []
    for name, artifact in found.artifacts.items():
        point = points.get(name)
        row: list[str | Cell] = [name, artifact.kind, bytes_text(artifact.size_bytes),
                                 number_text(found.mean_kl(name), 3)]
        for task in tasks:
            score = by_key.get((name, *task))
            row.append(number_text(score["value"], 3) if score else "–")
        speed = point.get("decode_tokens_per_second") if point else None
        row += [rate_text(speed), _worst(found, name)]
        rows.append(row)
    if not rows:
        rows = [[missing(found.why_missing("train"), span=len(columns))]]
    numeric = tuple(range(2, len(columns) - 1))
    return Table(title="Artifacts", columns=columns, rows=rows, numeric=numeric, note=(
        "KL: nats a token from the artifact before it (merged from base plus adapter, a quantized form from merged). "
        "A dash was not measured for this artifact; the sections below say why."))


def _task_title(task: str, metric: str) -> str:
    return task if metric == task else f"{task} {metric}"


def _worst(found: Findings, name: str) -> str | Cell:
    """The worst verdict that the stages gave about this artifact; a dash without one."""
    outcomes = found.outcomes_of(name)
    for outcome in ("FAIL", "INCONCLUSIVE", "PASS"):
        if outcome in outcomes:
            return Cell(text=outcome, tone=TONES[outcome])
    return "–"


_OPTIMIZERS = {"adamw": "AdamW", "adamw_8bit": "AdamW in 8 bits", "paged_adamw_8bit": "paged AdamW in 8 bits"}


def _lora_plus(settings) -> str:
    return f" (B {number_text(settings.lora_plus_ratio)} times it)" if settings.lora_plus_ratio != 1 else ""


def training(found: Findings) -> Section:
    """The loss curve and how training went."""
    train, recipe = found.figures("train"), found.recipe
    blocks: list[Block] = []
    figure = _loss_figure(found)
    blocks.append(figure if figure else Paragraph(text=f"No loss curve: {found.why_missing('train')}.", tone="missing"))
    speed = _speed_figure(found)
    if speed:
        blocks.append(speed)
    lora = recipe.lora
    rows: list[list[str | Cell]] = [
        ["adapter", f"rank {lora.rank}, alpha {number_text(lora.alpha)}, dropout {number_text(lora.dropout)}, "
                    f"targets {', '.join(lora.targets)}" + (", rsLoRA" if lora.rslora else "")
                    + (", DoRA" if lora.dora else "") + (f", init {lora.init}" if lora.init != "default" else "")],
        ["optimizer", f"{_OPTIMIZERS[recipe.train.optimizer]}, learning rate "
                      f"{number_text(recipe.train.learning_rate)}{_lora_plus(recipe.train)}, {recipe.train.schedule}, "
                      f"warm-up {number_text(100 * recipe.train.warmup)} %, batch {recipe.train.batch_size}"],
    ]
    if train:
        rows += [
            ["steps", count_text(train.get("steps"))],
            ["tokens", f"{count_text(train.get('trained_tokens'))} trained of {count_text(train.get('tokens_total'))} "
                       "passed through"],
            ["time", f"{seconds_text(train.get('train_seconds'))} in the loop, "
                     f"{seconds_text(found.seals['train'].get('seconds'))} for the stage"],
            ["speed", f"{rate_text(train.get('tokens_per_second'))} tokens/s{_useful(train)}"],
            *_ceiling_row(train),
            ["peak memory", _train_peak(train)],
            *_start_row(train),
            ["precision", f"{train.get('precision', '–')} on {train.get('device', '–')}, base held in "
                          f"{recipe.model.load_in}"],
            ["held-out loss", f"{number_text(train.get('held_out_before'))} before, "
                              f"{number_text(train.get('held_out_after'))} after" if found.held_out
             else missing(_why_no_held_out(found))],
        ]
        rows += [*_spikes_row(train), *_rehearsal_row(train)]
        rows.append(["rows of a batch", _packing_text(train.get("packing") or {})])
        rows.append(["fast path", _fast_text(train.get("fast") or {})])
        if train.get("stops"):
            stops = train["stops"]
            rows.append(["stops by itself", f"{stops['num_stopped']} of {stops['num_prompts']} answers to held-out "
                         f"prompts within {stops['new_tokens']} tokens (95 %: {stops['ci_low']:.0%} to "
                         f"{stops['ci_high']:.0%})"])
        if train.get("best_step") is not None:
            rows.append(["lowest held-out loss", f"at step {count_text(train['best_step'])}; "
                         f"the adapter kept is the {train.get('kept', 'last')} one"])
    else:
        rows.append(["result", missing(found.why_missing("train"))])
    blocks.append(Table(columns=("", ""), rows=rows))
    return Section(anchor="training", title="Training", blocks=blocks)


def _packing_text(packing: dict[str, Any]) -> str:
    """How the rows of a batch were laid out, and what proved it."""
    proof = packing.get("proof") or {}
    whole = ""
    if proof.get("floor_bound") is not None:
        whole = (f"; padded into one pass {number_text(proof['floor'], 2)} (bound "
                 f"{number_text(proof['floor_bound'], 2)}), accumulated {number_text(proof['accumulation'], 2)} (bound "
                 f"{number_text(proof['accumulation_bound'], 2)})")
    if packing.get("budget") is None:
        return f"padded: {packing.get('why_not') or 'train.packing is false'}{whole}"
    if not proof:
        return "packed, not proven on this model (train.prove)"
    return (f"packed: loss {number_text(proof['loss_difference'], 2)} and gradients "
            f"{number_text(proof['gradient_difference'], 2)} from those of separate rows, relative (bound "
            f"{number_text(proof['bound'], 2)}){whole}")


def _fast_text(fast: dict[str, Any]) -> str:
    """Which parts of the fast path served, what was left to the plain one, and what proved it."""
    if fast.get("why_not") or not fast.get("parts"):
        return f"not used: {fast.get('why_not') or 'train.fast is empty'}"
    served = ", ".join(f"{name} ({part['modules']})" for name, part in fast["parts"].items() if part["modules"])
    left = "; ".join(f"{number} modules of {name} are plain: {reason}" for name, part in fast["parts"].items()
                     for reason, number in part["left"].items())
    proof = fast.get("proof")
    proven = (f"loss {number_text(proof['loss_difference'], 2)} and gradients "
              f"{number_text(proof['gradient_difference'], 2)} from plain ones, relative (bound "
              f"{number_text(proof['bound'], 2)})" if proof else "not proven on this model (train.prove)")
    return "; ".join(filter(None, (served, left, proven)))


def _train_peak(train: dict[str, Any]) -> str:
    device, process = train.get("device_peak_memory_bytes"), train.get("peak_memory_bytes")
    if device:
        return f"{bytes_text(device)} on the device, {bytes_text(process)} in the process"
    return bytes_text(process)


def _useful(train: dict[str, Any]) -> str:
    """Tokens trained on a second, beside all that pass through."""
    trained, seconds = train.get("trained_tokens"), train.get("train_seconds")
    return f", {rate_text(trained / seconds)} of them trained on" if trained and seconds else ""


def _ceiling_row(train: dict[str, Any]) -> list[list[str | Cell]]:
    """What the steps needed over what one large matrix product reached on the same machine; nothing if not measured."""
    flops, ceiling, seconds = (train.get(key) for key in ("flops", "ceiling_flops_per_second", "train_seconds"))
    if not (flops and ceiling and seconds):
        return []
    share = number_text(100 * flops / seconds / ceiling, 3)
    return [["share of the ceiling", f"{share} %: {_rate_of_flops(flops / seconds)} needed by the steps, "
             f"{_rate_of_flops(ceiling)} reached by one large matrix product in {train.get('precision')} right before"]]


def _rate_of_flops(rate: float) -> str:
    return f"{number_text(rate / 1e12, 3)} TFLOP/s" if rate >= 1e12 else f"{number_text(rate / 1e9, 3)} GFLOP/s"


def _start_row(train: dict[str, Any]) -> list[list[str | Cell]]:
    start = train.get("start")
    if not start:
        return []
    return [["start of the command" if start["of_process"] else "start of the stage",
             f"ready to train after {stopwatch.start_text(start)}"]]


def _spikes_row(train: dict[str, Any]) -> list[list[str | Cell]]:
    spikes = train.get("loss_spikes")
    if spikes is None:
        return []
    if not spikes:
        return [["loss spikes", "none"]]
    named = "; ".join(f"{number_text(spike['loss'])} at step {count_text(spike['step'])} (rows {spike['rows']})"
                      for spike in spikes[:_SPIKES_NAMED])
    more = f"; and {count_text(len(spikes) - _SPIKES_NAMED)} more" if len(spikes) > _SPIKES_NAMED else ""
    return [["loss spikes", f"{count_text(len(spikes))}: {named}{more}"]]


def _rehearsal_row(train: dict[str, Any]) -> list[list[str | Cell]]:
    done = train.get("rehearsal")
    if not done:
        return []
    passes = [f"a {name} pass of {count_text(done[key])} tokens" for name, key in
              (("training", "train_tokens"), ("held-out", "held_out_tokens")) if done.get(key)]
    return [["worst step first", f"fitted: {', '.join(passes)}; a checkpoint of {bytes_text(done['checkpoint_bytes'])} "
                                 f"in {seconds_text(done['save_seconds'])}"]]


def _speed_figure(found: Findings) -> Figure | None:
    """Tokens a second over the steps; None before there are two of them."""
    kinds = [(name, style, [(line["step"], line[key]) for line in found.timings
                            if "step" in line and math.isfinite(line.get(key, math.nan))])
             for name, style, key in (("through the loop", 0, "tokens_per_second"),
                                      ("trained on", 1, "trained_tokens_per_second"))]
    kinds = [kind for kind in kinds if len(kind[2]) > 1]
    if not kinds:
        return None
    lines, words = [], []
    for name, style, points in kinds:
        words.append(f"{rate_text(statistics.median(rate for _, rate in points))} {name}")
        if len(points) >= _MEAN_FROM_STEPS:
            window = max(5, len(points) // 20)
            if not lines:
                lines.append(charts.Line(name=f"{name}, each step", points=points, style=style, faint=True))
            lines.append(charts.Line(name=f"{name}, mean of {window} steps", style=style,
                                     points=charts.running_mean(points, window)))
        else:
            lines.append(charts.Line(name=name, points=points, style=style))
    text = f"Tokens a second in the median step: {', '.join(words)}."
    wide, narrow = (
        charts.line_chart(lines, x_title="optimizer step", y_title="tokens a second", words=text, width=width,
                          height=height, from_zero=True) for width, height in ((860, 240), (380, 240)))
    return Figure(wide_svg=wide, narrow_svg=narrow, words=text,
                  caption="Speed of the steps themselves, without held-out evaluations and checkpoints.")


def _loss_figure(found: Findings) -> Figure | None:
    steps = [(line["step"], line["loss"]) for line in found.steps if math.isfinite(line["loss"])]
    held_out = [(line["step"], line["held_out_loss"]) for line in found.held_out
                if math.isfinite(line["held_out_loss"])]
    if not steps and not held_out:
        return None
    lines, caption = [], f"Loss in nats per trained token over {count_text(len(steps))} steps."
    if len(steps) < len(found.steps):
        caption += f" {count_text(len(found.steps) - len(steps))} more had a loss that is not finite."
    if len(steps) >= _MEAN_FROM_STEPS:
        window = max(5, len(steps) // 20)
        means = charts.running_mean(steps, window)
        lines += [charts.Line(name="training, each step", points=steps, style=0, faint=True),
                  charts.Line(name=f"training, mean of {window} steps", points=means, style=0)]
    elif steps:
        lines.append(charts.Line(name="training, each step", points=steps, style=0))
    if held_out:
        lines.append(charts.Line(name="held out", points=held_out, style=1, dots=True))
        caption += f" Held out: {count_text(found.held_out[0].get('num_rows'))} rows, the same each time."
    words = f"Training loss from {number_text(steps[0][1])} to {number_text(steps[-1][1])}." if steps else ""
    if held_out:
        words += f" Held-out loss from {number_text(held_out[0][1])} to {number_text(held_out[-1][1])}."
    wide, narrow = (
        charts.line_chart(lines, x_title="optimizer step", y_title="loss (nats per token)", words=words, width=width,
                          height=height) for width, height in ((860, 340), (380, 280)))
    return Figure(wide_svg=wide, narrow_svg=narrow, caption=caption, words=words)


def _flat_rows(values: dict[str, Any], prefix: str = "") -> list[list[str | Cell]]:
    """Scalars of a JSON object as rows; objects inside it with their key before the name, lists of scalars joined."""
    rows: list[list[str | Cell]] = []
    for key, value in values.items():
        name = f"{prefix}{key.removesuffix('_bytes')}".replace("_", " ")
        if isinstance(value, dict):
            rows += _flat_rows(value, f"{prefix}{key}: ")
        elif isinstance(value, list):
            if value and all(isinstance(item, (str, int, float)) for item in value) and len(value) <= 8:
                rows.append([name, ", ".join(_scalar(key, item) for item in value)])
        else:
            rows.append([name, _scalar(key, value)])
    return rows


def _scalar(key: str, value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if key.endswith("_bytes"):
        return bytes_text(value)
    if key.endswith("seconds"):
        return seconds_text(value)
    return count_text(value) if isinstance(value, int) else number_text(value)


def machine(found: Findings) -> Section:
    """Where and with what the run was made: lock.json, and the recipe verbatim."""
    lock, blocks = found.lock, []
    described = lock.get("machine") or {}
    if described:
        rows = _flat_rows({key: value for key, value in described.items() if key != "gpus"})
        rows += [["gpu", ", ".join(filter(None, [gpu.get("name"), bytes_text(gpu.get("memory_bytes"))]))]
                 for gpu in described.get("gpus") or ()]
        blocks.append(Table(title="Machine", columns=("", ""), rows=rows))
    versions = {package: version for package, version in (lock.get("versions") or {}).items() if version}
    if versions:
        blocks.append(Table(title="Versions", columns=("package", "version"), rows=_flat_rows(versions)))
    inputs: list[list[str | Cell]] = []
    base = lock.get("base") or {}
    if base:
        inputs.append(["base", reference_text(base), base.get("sha256") or "–"])
    for split, sources in (lock.get("sources") or {}).items():
        inputs += [[split.replace("_", " "), reference_text(source), source.get("sha256") or "–"] for source in sources]
    if inputs:
        blocks.append(Table(title="Inputs", columns=("", "what", "SHA-256"), rows=inputs))
    seconds = [[stage, seconds_text(seal.get("seconds"))] for stage, seal in found.seals.items()]
    if seconds:
        blocks.append(Table(title="Time of the stages", columns=("stage", "time"), rows=seconds, numeric=(1,)))
    if found.recipe_text:
        blocks.append(Code(title="The recipe, as it was given", text=found.recipe_text.rstrip("\n"), folded=True))
    if not blocks:
        blocks.append(Paragraph(text="The run's lock.json says nothing about the machine.", tone="missing"))
    return Section(anchor="machine", title="Machine, versions, inputs", blocks=blocks)
