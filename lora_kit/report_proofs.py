"""The report's sections of evidence: merge, quantized forms, speed, quality, answers.

A figure that does not exist is shown as not measured, with the reason, never as zero.
Texts stay plain here; the writers escape them. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import json
from typing import Any

from lora_kit import charts, eval_checks, report_items, report_serving
from lora_kit.recipe import QuantizeForm
from lora_kit.report_document import (
    TONES,
    Block,
    Cell,
    Figure,
    Link,
    Paragraph,
    Sample,
    Section,
    Table,
    Turn,
    VerdictLine,
    Verdicts,
    missing,
    rate_text,
    threads_text,
)
from lora_kit.report_findings import Findings
from lora_kit.units import bytes_text, count_text, number_text, seconds_text


def merge(found: Findings) -> Section:
    """What merging changed, beside what the adapter changed and what the type costs by itself."""
    certificate, blocks = found.merge_certificate, []
    if certificate is None:
        blocks.append(Paragraph(text=f"No certificate: {found.why_missing('merge')}.", tone="missing"))
    else:
        dtype = certificate.get("dtype", "its type")
        compared = (("adapter_change", "the base alone: what training changed"),
                    ("exact", "merged in fp32: must be rounding only"),
                    ("floor", f"that merge in {dtype}: what the type costs"),
                    ("unmerged", f"base + adapter unmerged, in {dtype}"),
                    ("merged", f"the files on disk, in {dtype}"))
        rows = [_comparison(title, certificate[key]) for key, title in compared if key in certificate]
        blocks += _stage_verdicts(found, "merge")
        blocks.append(Table(
            title="Against base + adapter in fp32",
            columns=("", "mean KL (nats a token)", "largest KL", "same first choice", "perplexity",
                     "largest difference"),
            rows=rows, numeric=(1, 2, 3, 4, 5),
            note=f"On {certificate.get('measured_on', 'held-out rows')}. Largest difference: of the log-probability of "
                 f"any of the {_kept_text(certificate)}."))
        blocks += _proof_details(certificate)
    return Section(anchor="merge", title="Merge certificate", blocks=blocks, intro=(
        "The merged model, read back from disk, against base plus adapter: merging must change nothing that its number "
        "type does not change by itself."))


def _kept_text(certificate: dict[str, Any]) -> str:
    kept = (certificate.get("merged") or {}).get("kept")
    return f"{kept['top_k']} likeliest tokens" if kept else "vocabulary's tokens"


def _proof_details(certificate: dict[str, Any]) -> list[Block]:
    """Of the files on disk: what they hold of the adapter's change, prose, answers, and what a few tokens kept miss."""
    blocks: list[Block] = []
    if certificate.get("delta"):
        blocks.append(_retention_table(certificate["delta"]))
    lines = _prose_lines(certificate.get("merged") or {}) + _answer_lines(certificate.get("answers"))
    if certificate.get("bits_per_weight"):
        lines.append(f"Size {bytes_text(certificate['size_bytes'])}, "
                     f"{number_text(certificate['bits_per_weight'], 3)} bits a weight.")
    if certificate.get("untied"):
        lines.append("The adapter parted the two ends of a tied model: they are two tensors now.")
    return blocks + [Paragraph(text=line) for line in lines]


def _retention_table(kept: dict[str, Any]) -> Table:
    """What is left of the adapter's change, over all and by layer."""
    rows: list[list[str | Cell]] = [
        [name, _number(each["projection"]), _number(each["noise"]), _share(each["sign"]),
         number_text(100 * each["relative_norm"], 2) + " %" if each.get("relative_norm") else "–"]
        for name, each in [("all", kept), *sorted(kept["by_layer"].items(), key=lambda each: (
            not each[0].isdigit(), int(each[0]) if each[0].isdigit() else 0))] if "projection" in each]
    return Table(
        title="What the stored weights hold of the adapter's change", columns=(
            "layer", "projection", "noise", "sign right", "change to weights"), rows=rows, numeric=(1, 2, 3, 4),
        note="Projection: how much of the change is there, 1 is all of it. Noise: what else is there, in units of the "
             "change. Sign: of the weights that it moves most.")


def _number(value: float) -> str:
    return f"{value:.3f}"


def _prose_lines(figures: dict[str, Any]) -> list[str]:
    prose, kept, lines = figures.get("prose"), figures.get("kept"), []
    if prose:
        lines.append(f"On plain prose ({count_text(prose['num_positions'])} tokens): mean KL {_with_error(prose)}, "
                     f"same first choice {_share(prose['top1_agreement'])}, perplexity ratio "
                     f"{number_text(prose['perplexity_ratio'])}.")
    if kept:
        lines.append(f"KL is over the {kept['top_k']} likeliest tokens and all others together; over all tokens it is "
                     f"higher by {number_text(kept['mean_missing'], 2)} on average (at most "
                     f"{number_text(kept['max_missing'], 2)}), measured at {kept['num_whole']} positions.")
    return lines


def _answer_lines(answers: dict[str, Any] | None) -> list[str]:
    if not answers or not answers["num_answers"]:
        return []
    parted = [each["first_difference"] for each in answers["samples"] if each["first_difference"] is not None] \
        if "samples" in answers else []
    first = f", the first of them at token {min(parted)}" if parted else ""
    return [f"Greedy answers to {answers['num_answers']} held-out prompts: {answers['num_same']} the same; of the "
            f"others {answers['num_near_ties']} part at a near tie{first}. Stopped within {answers['new_tokens']} "
            f"tokens: {_share(answers['stopped']['share'])} (before: {_share(answers['reference_stopped']['share'])})."]


def _comparison(title: str, figures: dict[str, Any]) -> list[str | Cell]:
    return [title, _with_error(figures), number_text(figures.get("max_kl"), 3), _share(figures.get("top1_agreement")),
            number_text(figures.get("perplexity_candidate")), number_text(figures.get("max_log_prob_difference"), 3)]


def _with_error(figures: dict[str, Any]) -> str:
    mean, error = figures.get("mean_kl"), figures.get("mean_kl_standard_error")
    return number_text(mean, 3) + (f" ± {number_text(error, 2)}" if error is not None else "")


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def quantized(found: Findings) -> Section:
    """What each quantized form costs against the merged model."""
    blocks: list[Block] = []
    if not found.recipe.forms:
        blocks.append(Paragraph(text="The recipe asks for no quantized form.", tone="missing"))
    else:
        blocks += _stage_verdicts(found, "quantize")
        rows: list[list[str | Cell]] = []
        notes, details = [], []
        for form in found.recipe.forms:
            certificate = found.certificates.get(form.name)
            if certificate is None:
                rows.append([form.name, missing(found.why_missing("quantize"), span=10)])
                continue
            ratio = certificate.get("size_ratio")
            rows.append([
                form.name, bytes_text(certificate.get("size_bytes")), "–" if ratio is None else f"{ratio:.0%}",
                number_text(certificate.get("bits_per_weight"), 3), _with_error(certificate),
                number_text(certificate.get("p95_kl"), 3), _share(certificate.get("top1_agreement")),
                number_text(certificate.get("perplexity_ratio")), _gain(certificate.get("gain")),
                _change_left(certificate.get("delta")), _bounds(form)])
            notes.append(f"{form.name}: {certificate.get('measured_on', '–')}, {certificate.get('engine', '–')} "
                         f"against {certificate.get('reference', 'merged')}."
                         + "".join(f" {certificate[key]}." for key in ("engine_note", "note") if certificate.get(key)))
            details += [Paragraph(text=f"{form.name}: {line}") for line in (
                _prose_lines(certificate)[:1] + _answer_lines(certificate.get("answers")))]
        blocks.append(Table(
            columns=("form", "size", "of merged", "bits a weight", "mean KL", "95 % of KL below",
                     "same first choice", "perplexity ratio", "gain kept", "change left", "bounds"),
            rows=rows, numeric=(1, 2, 3, 4, 5, 6, 7, 8, 9), note=" ".join([
                "KL in nats a token. Gain kept: of what training gained in the loss of these rows' answers, with its "
                "95 % interval. Change left: of the adapter's change of the weights, ± noise in units of it.",
                *notes])))
        blocks += _choice_blocks(found) + details
    return Section(anchor="quantized", title="Quantized forms", blocks=blocks, intro=(
        "Each form is made from the merged 16-bit model, reloaded in a fresh process and measured against it. It fails "
        "only by bounds that the recipe sets."))


def _choice_blocks(found: Findings) -> list[Block]:
    """Size against fidelity of every artifact, which of them no other beats, and which is recommended."""
    choice = found.figures("quantize").get("choice")
    forms = {name: figures for name, figures in (found.figures("quantize").get("forms") or {}).items()
             if figures.get("size_bytes")}
    if not choice or not forms:
        return []
    places = {"merged": ((choice["merged"]["size_bytes"] or 0) / 1e6, 0.0)} | {
        name: (figures["size_bytes"] / 1e6, figures["mean_kl"]) for name, figures in forms.items()}
    edge = sorted(places[name] for name in choice["frontier"] if name in places)
    words = (f"{len(choice['frontier'])} of {len(places)} artifacts are not beaten on size and KL together: "
             f"{', '.join(choice['frontier'])}.")
    lines = [charts.Line(name="no other is smaller and closer", points=edge, style=0, faint=True)] + [
        charts.Line(name=name, points=[place], style=index % 5, dots=True)
        for index, (name, place) in enumerate(places.items())]
    wide, narrow = (charts.line_chart(lines, x_title="MB", y_title="mean KL from merged, nats a token", words=words,
                                      width=width, height=300, from_zero=True) for width in (860, 380))
    rows: list[list[str | Cell]] = []
    for name, (megabytes, kl) in places.items():
        speed = (choice["merged"] if name == "merged" else forms[name]).get("tokens_per_second")
        remark = "recommended" if name == choice["recommended"] else choice["out"].get(name) or (
            "no other is smaller and closer" if name in choice["frontier"] else "")
        rows.append([name, f"{megabytes:.0f} MB", number_text(kl, 3),
                     "100%" if name == "merged" else _share(forms[name]["top1_agreement"]),
                     "100%" if name == "merged" else _gain(forms[name].get("gain")), rate_text(speed), remark])
    what = f"Recommended: {choice['recommended']}, {choice['why']}." if choice["recommended"] else \
        f"Nothing is recommended: {choice['why']}."
    return [Paragraph(text=what), Table(
        title="Which one", rows=rows,
        columns=("artifact", "size", "mean KL", "same first choice", "gain kept", "decode tok/s", ""),
        numeric=(1, 2, 3, 4, 5), note="Decoding one prompt at a time, the quickest of three, measured right "
        "after the form was; the speed section measures longer."),
        Figure(wide_svg=wide, narrow_svg=narrow, caption="Size against fidelity.", words=words)]


def _gain(gain: dict[str, Any] | None) -> str:
    if not gain or gain["value"] is None:
        return "cannot tell" if gain else "–"
    interval = "" if gain["ci_low"] is None else f" ({gain['ci_low']:.0%} to {gain['ci_high']:.0%})"
    return f"{gain['value']:.0%}{interval}"


def _change_left(kept: dict[str, Any] | None) -> str:
    return "–" if not kept or "projection" not in kept else f"{kept['projection']:.2f} ± {kept['noise']:.2f}"


def _bounds(form: QuantizeForm) -> str:
    bounds = []
    if form.max_kl is not None:
        bounds.append(f"KL at most {number_text(form.max_kl)}")
    if form.min_top1 is not None:
        bounds.append(f"same first choice at least {form.min_top1:.0%}")
    if form.min_gain_retained is not None:
        bounds.append(f"gain kept at least {form.min_gain_retained:.0%}")
    return ", ".join(bounds) or "none set"


def bench(found: Findings) -> Section:
    """Speed and peak memory of each artifact."""
    points = found.points()
    if not points:
        nothing = Paragraph(text=f"No speed: {found.why_missing('bench')}.", tone="missing")
        return Section(anchor="bench", title="Speed", blocks=[nothing])
    rows: list[list[str | Cell]] = []
    for name, point in points.items():
        if point.get("why_not"):
            rows.append([name, missing(point["why_not"], span=7)])
            continue
        rows.append([
            name, point["engine"], bytes_text(point["size_bytes"]), bytes_text(point["peak_memory_bytes"]),
            seconds_text(point["load_seconds"]), seconds_text(point["time_to_first_token_seconds"]),
            rate_text(point["prefill_tokens_per_second"]), rate_text(point["decode_tokens_per_second"]),
        ])
    whole, first = found.bench or {}, next(iter(points.values()))
    machine = whole.get("machine") or {}
    blocks: list[Block] = [Table(
        columns=("artifact", "engine", "size", "peak memory", "load", "first token", "prefill tok/s", "decode tok/s"),
        rows=rows, numeric=(2, 3, 4, 5, 6, 7),
        note=f"Medians of {first['repeats']} repeats after a warm-up: batch {first['batch_size']}, "
             f"{first['prompt_tokens']} prompt tokens (random, all different) and {first['new_tokens']} new ones, "
             f"{threads_text(first['threads'])}, on {machine.get('cpu', '–')}. Each artifact in a "
             "fresh process; load includes importing the engine's libraries.")]
    if whole.get("caution"):
        blocks.append(Paragraph(text=f"Caution: {whole['caution']}.", tone="unsure"))
    blocks += report_serving.blocks(found)
    return Section(anchor="bench", title="Speed", blocks=blocks)


def quality(found: Findings) -> Section:
    """Scores with intervals, paired differences, what was not measured."""
    scores, blocks = found.scores, []
    if scores is None:
        blocks.append(Paragraph(text=f"No scores: {found.why_missing('eval')}.", tone="missing"))
        return Section(anchor="quality", title="Quality", blocks=blocks)
    blocks += _stage_verdicts(found, "eval")
    blocks += _budget(scores.get("budget"))
    if found.answered:
        blocks.append(Link(text="Browse the items by task, verdict and change", target=report_items.FILE))
    if any("role" in verdict for verdict in scores.get("verdicts", ())):
        blocks.append(_claims(scores["verdicts"]))
    units = scores.get("units") or {}
    if scores.get("scores"):
        blocks.append(Table(
            title="Scores",
            columns=("task", "metric", "artifact", "value", "95 % interval", "items", "errors", "better"),
            rows=[[score["task"], score["metric"], score["artifact"], _value_cell(score), _interval(score),
                   count_text(score["num_items"]), count_text(score["num_errors"]),
                   "higher" if score["higher_is_better"] else "lower"] for score in scores["scores"]],
            numeric=(3, 4, 5, 6),
            note="; ".join(f"{metric}: {unit}" for metric, unit in units.items())))
    if scores.get("differences"):
        blocks.append(Table(
            title="Differences on the same items",
            columns=("task", "metric", "artifact", "against", "difference", "95 % interval", "items", "clusters", ""),
            rows=[[each["task"], each["metric"], each["artifact"], each["baseline"], _signed(each["difference"]),
                   _interval(each, signed=True), count_text(each["num_items"]), count_text(each["num_clusters"]),
                   _direction(each)] for each in scores["differences"]],
            numeric=(4, 5, 6, 7),
            note="Paired over the items that both have, 95 % intervals by cluster. Better or worse only where the "
                 "interval leaves zero out. baseline/ names what a baseline.lock says."))
    if scores.get("gains"):
        blocks.append(Table(
            title="What quantized forms keep of the gain", columns=eval_checks.GAIN_COLUMNS,
            rows=eval_checks.gain_rows(scores["gains"]), numeric=(2, 3, 4, 6, 7),
            note="Of the tasks that the suite claims to get better: (artifact's - base) / (merged - base) over the "
                 "items that all three have, its 95 % interval by drawing clusters anew."))
    blocks += _checks(scores)
    if scores.get("flips"):
        blocks.append(_changed_items(scores["flips"]))
    skipped = scores.get("not_measured")
    if skipped:
        blocks.append(Table(title="Not measured", columns=("artifact", "task", "why"),
                            rows=[[each["artifact"], each.get("task", "–"), each["why"]] for each in skipped]))
    asked = scores.get("tasks") or {}
    if asked:
        blocks.append(Table(
            title="What was asked", columns=("task", "items", "of rows", "left out", "not drawn", "unusable", "what"),
            rows=[[task, count_text(about.get("num_items")), count_text(about.get("num_rows")),
                   count_text(about.get("num_left_out")), count_text(about.get("num_not_drawn")),
                   count_text(sum((about.get("unusable") or {}).values())),
                   about.get("description") or about.get("kind", "–")] for task, about in asked.items()],
            numeric=(1, 2, 3, 4, 5)))
    return Section(anchor="quality", title="Quality", blocks=blocks)


def _budget(budget: dict[str, Any] | None) -> list[Block]:
    """How the time of an evaluation with a budget was used; nothing of one without."""
    if not budget:
        return []
    rows: list[list[str | Cell]] = [
        [count_text(number), ", ".join(f"{task} {count_text(items)}" for task, items in look["num_items"].items()),
         f"{look['share_of_plan'] * 100:.0f} %", count_text(look["num_decided"]), seconds_text(look["seconds"])]
        for number, look in enumerate(budget["looks"], 1)]
    return [Table(title="Looks within the time", numeric=(0, 2, 3, 4), rows=rows, columns=(
        "look", "items", "of the plan", "gates decided", "after"), note=(
        f"Stopped because {budget['stopped']}. Early looks ask for more evidence, so that all of them together are "
        "wrong as rarely as one."))]


def _checks(scores: dict[str, Any]) -> list[Block]:
    """The evaluation's checks of itself; none of an evaluation that made none."""
    blocks: list[Block] = []
    if scores.get("checks"):
        blocks.append(Table(
            title="Chat template, BOS and stop tokens against training's", columns=("artifact", "outcome", "evidence"),
            rows=[[check["artifact"], Cell(text=check["outcome"], tone=TONES[check["outcome"]]), check["evidence"]]
                  for check in scores["checks"]]))
    overlap = scores.get("overlap") or {}
    if overlap:
        rows: list[list[str | Cell]] = []
        for task, about in overlap.items():
            if about["why_not"]:
                rows.append([task, missing(about["why_not"], span=3)])
            else:
                rows.append([task, count_text(about["num_items"]), count_text(about["num_overlapping"]),
                             ", ".join(about["items"][:3]) or "–"])
        blocks.append(Table(title="Items that overlap training rows", columns=("task", "items", "overlapping", "e.g."),
                            rows=rows, numeric=(1, 2), note="The same question and answer, a same question of 8 words "
                            "and more, or 70 % of an item's 8-grams in the training rows."))
    if scores.get("clean"):
        blocks.append(Table(title="Without the items that overlap", columns=eval_checks.CLEAN_COLUMNS,
                            rows=eval_checks.clean_rows(scores["clean"], scores["scores"]), numeric=(2, 3, 4, 5, 6)))
    if scores.get("clean_differences"):
        blocks.append(Table(
            title="Differences without these items", columns=eval_checks.DIFFERENCE_COLUMNS, numeric=(3, 4, 5, 6, 7),
            rows=eval_checks.clean_difference_rows(scores["clean_differences"], scores["differences"])))
    return blocks


def _claims(verdicts: list[dict[str, Any]]) -> Table:
    """The gates by role, with what would decide those that are not decided."""
    rows: list[list[str | Cell]] = []
    for verdict in verdicts:
        needed = verdict.get("num_items_to_decide")
        decides = "decided" if verdict["outcome"] != "INCONCLUSIVE" else \
            f"about {count_text(needed)} items" if needed else "not known"
        rows.append([verdict.get("role", "–"), verdict["claim"],
                     Cell(text=verdict["outcome"], tone=TONES[verdict["outcome"]]), decides])
    return Table(title="Claims", columns=("role", "claim", "verdict", "what would decide"), rows=rows, note=(
        "A target must get better, a retained task must not fall by more than its margin, a floor must be reached. "
        "That any claim passes wrongly has a chance of 2.5 %, and so has that any fails wrongly (Holm)."))


def _changed_items(flips: list[dict[str, Any]]) -> Table:
    """Which items went which way from one stage to the next."""
    rows: list[list[str | Cell]] = [[
        each["task"], each["metric"], f"{each['baseline']} → {each['artifact']}", count_text(each["num_worse"]),
        count_text(each["num_better"]), count_text(each["num_same"]),
        ", ".join(each["worse"][:3]) or "–"] for each in flips]
    numeric = sum(each.get("num_numeric", 0) for each in flips)
    return Table(
        title="Items that changed, stage by stage",
        columns=("task", "metric", "stage", "worse", "better", "same", "got worse, e.g."), rows=rows, numeric=(3, 4, 5),
        note="Of scores that are 0 or 1, worse is right to wrong and better is wrong to right."
             + (f" {count_text(numeric)} of the changes lie within rounding." if numeric else ""))


def _value_cell(score: dict[str, Any]) -> str | Cell:
    return number_text(score["value"]) if score["value"] is not None else missing("no item could be scored")


def _interval(fields: dict[str, Any], signed: bool = False) -> str:
    low, high = fields.get("ci_low"), fields.get("ci_high")
    if low is None or high is None:
        return "–"
    text = _signed if signed else number_text
    return f"{text(low)} to {text(high)}"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{'+' if value > 0 else ''}{number_text(value, 3)}"


def _direction(difference: dict[str, Any]) -> Cell:
    low, high = difference.get("ci_low"), difference.get("ci_high")
    if low is None or high is None or low <= 0 <= high:
        return Cell(text="cannot tell", tone="unsure")
    better = (low > 0) == difference["higher_is_better"]
    return Cell(text="better", tone="pass") if better else Cell(text="worse", tone="fail")


def answers(found: Findings) -> Section:
    """Held-out prompts with the answers of the base and the merged model side by side."""
    blocks: list[Block] = [
        Sample(
            origin=str(sample.get("origin", "")),
            turns=[Turn(role=str(turn.get("role", "")), text=_turn_text(turn)) for turn in sample.get("messages", ())],
            reference=_as_text(sample.get("reference")),
            answers=[_answer(name, answer) for name, answer in (sample.get("answers") or {}).items()],
        ) for sample in found.samples]
    if not blocks:
        why = "the recipe asks for none" if found.recipe.eval.samples == 0 else found.why_missing("eval")
        blocks.append(Paragraph(text=f"No samples: {why}.", tone="missing"))
    return Section(anchor="samples", title="Answers before and after", blocks=blocks, intro=(
        "Held-out prompts, answered greedily by the base and the merged model; the row's own answer beside them."))


def _answer(name: str, answer: dict[str, Any]) -> tuple[str, str, str]:
    if answer.get("error"):
        return name, "", f"no answer: {answer['error']}"
    text = _as_text(answer.get("text"))
    remarks = [remark for remark, holds in (("cut off", not answer.get("stopped", True)), ("empty", not text)) if holds]
    return name, text, ", ".join(remarks)


def _turn_text(turn: dict[str, Any]) -> str:
    return "\n".join(filter(None, [_as_text(turn.get("content")), _as_text(turn.get("tool_calls") or None)]))


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, indent=1)


def _stage_verdicts(found: Findings, stage: str) -> list[Block]:
    lines = [VerdictLine(outcome=verdict.outcome, claim=verdict.claim, evidence=verdict.evidence)
             for of, verdict in found.verdicts() if of == stage]
    return [Verdicts(lines=lines)] if lines else []
