"""What a served model meets beside plain answers, in tables: for the terminal while it is measured, and for the report.

Measured by the stage bench (``bench_serving.py``). Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_kit.report_document import Block, Paragraph, Table
from lora_kit.report_findings import Findings
from lora_kit.units import count_text, number_text, seconds_text

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


PARTS = {
    "speculative": Shown(name="speculative decoding", columns=_SPECULATIVE, title=_speculative_title,
                         rows=_speculative_rows, lines=_speculative_lines),
}
