"""Latencies of one request at a time: a table of percentiles, and the distribution of the gaps between tokens.

Measured by the stage bench, token by token (``latency.py``). Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_kit import charts
from lora_kit.report_document import Block, Cell, Figure, Table, missing
from lora_kit.report_findings import Findings
from lora_kit.units import count_text, number_text, seconds_text

_MOST_LINES = 5
_COLUMNS = ("artifact", "requests", "first token p50", "p90", "p99", "between tokens p50", "p90", "p99",
            "whole answer p50")


def blocks(found: Findings) -> list[Block]:
    """A table and a picture; nothing where the run was benched without latencies."""
    measured: dict[str, dict[str, Any]] = (found.bench or {}).get("latency") or {}
    if not any(measured.values()):
        return []
    rows: list[list[str | Cell]] = []
    for name, point in found.points().items():
        figures = measured.get(name)
        if not figures:
            rows.append([name, missing(point.get("why_not") or "no figure", span=len(_COLUMNS) - 1)])
            continue
        rows.append([name, count_text(figures["requests"]), *(seconds_text(figures[f"{kind}_p{percent}"])
                     for kind in ("first_token", "gap") for percent in (50, 90, 99)),
                     seconds_text(figures["end_to_end_p50"])])
    table = Table(title="Latency of one request at a time", columns=_COLUMNS, rows=rows,
                  numeric=tuple(range(1, len(_COLUMNS))), note=(
                      "All measured. Percentiles are linear between the two nearest; those of few requests are little "
                      "more than the slowest of them."))
    figure = _distribution({name: each["gaps"] for name, each in measured.items() if each and len(each["gaps"]) > 1})
    return [table, *([figure] if figure else [])]


def _distribution(gaps: dict[str, Sequence[float]]) -> Figure | None:
    """Share of gaps that are at most so long, a line for each artifact."""
    if not gaps:
        return None
    lines, words = [], []
    for style, (name, values) in enumerate(list(gaps.items())[:_MOST_LINES]):
        ordered = sorted(values)
        points = [(1e3 * value, 100 * (place + 1) / len(ordered)) for place, value in enumerate(ordered)]
        lines.append(charts.Line(name=name, points=[(points[0][0], 0.0), *points], style=style))
        words.append(f"{name} {number_text(1e3 * ordered[len(ordered) // 2], 3)} ms")
    text = f"Time between two tokens in the middle: {', '.join(words)}."
    wide, narrow = (charts.line_chart(
        lines, x_title="milliseconds between two tokens", y_title="% of gaps at most as long", words=text,
        from_zero=True, width=width, height=280) for width in (760, 380))
    return Figure(wide_svg=wide, narrow_svg=narrow, words=text,
                  caption="How long the gaps between tokens are: the steeper a line, the more even the answer.")
