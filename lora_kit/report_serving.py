"""What a served model meets beside plain answers, in tables: for the terminal while it is measured, and for the report.

Measured by the stage bench (``bench_serving.py``). Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_kit.report_document import Block, Paragraph, Table
from lora_kit.report_findings import Findings
from lora_kit.units import bytes_text, count_text, number_text, seconds_text

_SPECULATIVE = ("decoding", "tokens/s", "accepted", "tokens a pass", "cost ratio", "predicted", "as passes take here",
                "measured", "same answers")
_MOST_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One part's table: what it is called in a sentence, its columns, and what makes its texts of the figures."""

    name: str
    columns: Sequence[str]
    title: Callable[[dict[str, Any]], str]
    rows: Callable[[dict[str, Any]], list[tuple[str, ...]]]
    lines: Callable[[dict[str, Any]], list[str]]


def blocks(found: Findings) -> list[Block]:
    """A table for each part that was measured, and why another was not."""
    made: list[Block] = []
    for name, figures in ((found.bench or {}).get("serving") or {}).items():
        shown = PARTS[name]
        if "why_not" in figures:
            made.append(Paragraph(text=f"No figures for {shown.name}: {figures['why_not']}.", tone="missing"))
            continue
        made.append(Table(title=shown.title(figures), columns=shown.columns,
                          rows=[list(row) for row in shown.rows(figures)],
                          numeric=tuple(range(1, len(shown.columns))),
                          note=". ".join(line[:1].upper() + line[1:] for line in shown.lines(figures)) + "."))
    return made


def _speculative_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row under _SPECULATIVE for each way."""
    lines = []
    for way in found["ways"]:
        name = f"assistant {found['assistant']}" if way["way"] == "assistant" and found.get("assistant") else way["way"]
        rate = f"{way['accepted']:,} of {way['drafted']:,}"
        if way["acceptance_rate"] is not None:
            rate += f", rate {way['acceptance_rate']:.2f}"
        far = sum(not each["near_tie"] for each in way["apart"])
        same = f"{found['prompts'] - len(way['apart'])} of {found['prompts']}"
        if way["apart"]:
            same += f", {len(way['apart']) - far} part at a near tie" + (f", {far} at none" if far else "")
        ratio = way["measured"]
        lines.append((
            name, number_text(way["tokens_per_second"], 3), rate if way["drafted"] else "–",
            number_text(way["tokens_per_pass"], 3), *(_text(way[key]) for key in (
                "cost_ratio", "predicted", "predicted_here")),
            f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else "1",
            same if ratio else "–"))
    return lines


def _speculative_title(found: dict[str, Any]) -> str:
    """What was asked of what."""
    return (f"Speculative decoding of {found['artifact']}: {found['prompts']} prompts of "
            f"{count_text(found['prompt_tokens'])} tokens on average, {found['new_tokens']} new ones, "
            f"{found['drafted']} drafted a pass")


def _speculative_lines(found: dict[str, Any]) -> list[str]:
    """How to read the table, and every place where answers part."""
    one, several = found["pass_seconds"]
    said = [f"a pass over 1 token takes {seconds_text(one)}, over {1 + found['drafted']} {seconds_text(several)}; the "
            "formula takes both for equal, the column after it does not"]
    for way in found["ways"]:
        for each in way["apart"][:_MOST_SHOWN]:
            kind = "a near tie" if each["near_tie"] else "more than rounding"
            said.append(f"{way['way']}: prompt {each['prompt']} parts at token {each['position'] + 1} by "
                        f"{number_text(each['margin'], 2)} logits, {kind} (rounding moves a logit by up to "
                        f"{number_text(found['logit_noise'], 2)})")
    return said


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value >= 0.01 or value == 0 else f"{value:.1e}"


def _retrieval_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    def row(name: str, kind: str, *lookup: str) -> tuple[str, ...]:
        own = found[kind]
        return (name, *lookup, count_text(_mean(own["prompt_tokens"])), seconds_text(_median(own["prefill_seconds"])),
                seconds_text(_median(own["first_token_seconds"])))

    ratio = found["measured"]
    longer = f"{1 / ratio['ratio']:.2f} ({1 / ratio['high']:.2f} to {1 / ratio['low']:.2f})"
    return [(*row("question alone", "plain", "–", "–"), "1"),
            (*row(f"with {found['passages']} passages", "read", seconds_text(_median(found["embed_seconds"])),
                  seconds_text(_median(found["look_up_seconds"]))), longer)]


def _retrieval_title(found: dict[str, Any]) -> str:
    return (f"Retrieval for {found['artifact']}: {found['questions']} questions, {found['passages']} passages of "
            f"{found['passage_tokens']} tokens from {found['corpus']}")


def _retrieval_lines(found: dict[str, Any]) -> list[str]:
    by = "the model's own hidden states" if found["embed"] == "model" else "TF-IDF"
    hits = found["found"]
    first = _median(found["read"]["first_token_seconds"])
    parts = {"embedding": _median(found["embed_seconds"]), "look-up": _median(found["look_up_seconds"])}
    return [
        f"index: {found['indexed']:,} of {found['corpus_passages']:,} passages, embedded by {by} in "
        f"{seconds_text(found['index_seconds'])}, once; {bytes_text(found['index_bytes'])}",
        "of the time to the first token with passages "
        + ", ".join(f"{name} is {value / first:.1%}" for name, value in parts.items()) + ", and the rest is reading",
        f"a passage looked up by a piece of itself is among the {found['passages']} found in {hits['hits']} of "
        f"{hits['tried']} (95 % interval {hits['ci_low']:.0%} to {hits['ci_high']:.0%})"]


def _adapter_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    merged = found["merged"]
    rows = [("merged", bytes_text(merged["bytes"]), "–", "–", seconds_text(merged["first_token_seconds"]),
             number_text(merged["tokens_per_second"], 3), "1")]
    for each in found["rows"]:
        ratio = each["measured"]
        grown = each["process_bytes_added"]
        rows.append((f"{each['adapters']} on one base", bytes_text(each["resident_bytes"]),
                     bytes_text(grown) if grown is not None else "–", seconds_text(each["switch_seconds"]),
                     seconds_text(each["first_token_seconds"]), number_text(each["tokens_per_second"], 3),
                     f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"))
    return rows


def _adapter_title(found: dict[str, Any]) -> str:
    return (f"Adapters unmerged: {found['prompts']} prompts of {count_text(found['prompt_tokens'])} tokens on average, "
            f"{found['new_tokens']} new ones, the adapter switched with each")


def _adapter_lines(found: dict[str, Any]) -> list[str]:
    most = found["rows"][-1]
    apart = found["merged"]["bytes"] * most["adapters"]
    said = [f"an adapter holds {bytes_text(found['adapter_bytes'])} beside a base of "
            f"{bytes_text(found['base_bytes'])}; {most['adapters']} merged models would hold {bytes_text(apart)}, "
            f"{most['adapters']} adapters on one base hold {bytes_text(most['resident_bytes'])} (derived from the "
            "tensors)"]
    if found["own_loop"]:
        said.append("the merged model is decoded by the engine's own loop, which an unmerged adapter is not")
    return said


def _median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values)


PARTS = {
    "adapters": Shown(name="adapters on one base", title=_adapter_title, rows=_adapter_rows, lines=_adapter_lines,
                      columns=("", "weights in memory", "process grew by, each", "switching", "first token", "tokens/s",
                               "as fast as merged")),
    "speculative": Shown(name="speculative decoding", columns=_SPECULATIVE, title=_speculative_title,
                         rows=_speculative_rows, lines=_speculative_lines),
    "retrieval": Shown(name="retrieval", title=_retrieval_title, rows=_retrieval_rows, lines=_retrieval_lines,
                       columns=("", "embedding", "look-up", "tokens read", "prefill", "first token", "times as long")),
}
