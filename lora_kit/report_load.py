"""What was measured under load: artifacts at several batch sizes and depths, and servers with several requests at once.

Tables as the verb shows them, and throughput drawn against what was asked at once. Torch-free; reads and writes
nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_kit import bench_sweep, charts, latency
from lora_kit.report_document import Block, Figure, Table
from lora_kit.report_findings import Findings
from lora_kit.units import count_text, number_text, seconds_text

_MOST_LINES = 5


def blocks(found: Findings) -> list[Block]:
    """Tables and pictures; nothing where neither a sweep nor a server was measured."""
    bench = found.bench or {}
    sweeps: dict[str, dict[str, list[dict[str, Any]]]] = bench.get("sweeps") or {}
    made: list[Block] = [
        Table(title=title, columns=columns, rows=rows, numeric=tuple(range(1, len(columns))), note=_SWEEP_NOTE)
        for title, columns, rows in bench_sweep.tables(sweeps, latency.parse_limits(bench.get("goodput", ())))]
    made += _drawn({name: _points(each.get("batch_size", ()), "batch_size", "decode_tokens_per_second")
                    for name, each in sweeps.items()}, "prompts at once", "tokens a second, decoding")
    made += _drawn({name: _points(each.get("depth", ()), "depth", "decode_tokens_per_second")
                    for name, each in sweeps.items()}, "tokens of context before the prompt",
                   "tokens a second, decoding")
    if found.servers:
        made.append(_server_table(found.servers))
        made += _drawn({f"{record['model']}{_depth_text(depth)}": _points(
            [load for load in record["loads"] if load["depth"] == depth], "concurrency", "output_tokens_per_second")
            for record in found.servers for depth in sorted({load["depth"] for load in record["loads"]})},
            "requests at once", "tokens a second, all requests")
    return made


_SWEEP_NOTE = ("All measured, medians of the repeats; the rows of a batch begin and end together. ± is half of the "
               "95 % interval of an answer's time, over its mean.")


def _points(entries: Sequence[dict[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    return sorted((entry[x], entry[y]) for entry in entries if entry[y] is not None)


def _depth_text(depth: int) -> str:
    return f", depth {count_text(depth)}" if depth else ""


def _drawn(series: dict[str, list[tuple[float, float]]], x_title: str, y_title: str) -> list[Figure]:
    """A line for each of ``series`` with two points at least."""
    shown = {name: points for name, points in series.items() if len({x for x, _ in points}) > 1}
    if not shown:
        return []
    shown = dict(list(shown.items())[:_MOST_LINES])
    lines = [charts.Line(name=name, points=points, style=style, dots=True)
             for style, (name, points) in enumerate(shown.items())]
    words = "; ".join(f"{name}: {number_text(points[0][1], 3)} at {count_text(points[0][0])}, "
                      f"{number_text(points[-1][1], 3)} at {count_text(points[-1][0])}"
                      for name, points in shown.items())
    text = f"{y_title[0].upper()}{y_title[1:]}, by {x_title}: {words}."
    wide, narrow = (charts.line_chart(lines, x_title=x_title, y_title=y_title, words=text, from_zero=True, width=width,
                                      height=280) for width in (760, 380))
    return [Figure(wide_svg=wide, narrow_svg=narrow, words=text, caption=(
        f"Throughput against {x_title}. Where a line is flat, more at once only makes each wait longer.")
        if "at once" in x_title else f"Throughput against {x_title}.")]


def _server_table(servers: Sequence[dict[str, Any]]) -> Table:
    columns = ["model", "server", "at once", "requests", "first token p50", "p99", "per token",
               "answer p50", "requests/s", "tokens/s", "good/s"]
    rows = []
    for record in servers:
        for load in record["loads"]:
            rows.append([record["model"], record["url"].partition("//")[2].removesuffix("/v1"),
                         count_text(load["concurrency"]),
                         count_text(load["requests"]), seconds_text(load["first_token_p50"]),
                         seconds_text(load["first_token_p99"]), seconds_text(load["per_token_mean"]),
                         seconds_text(load["end_to_end_p50"]), number_text(load["requests_per_second"], 3),
                         number_text(load["output_tokens_per_second"], 3), number_text(load["goodput"], 3)])
    limits = sorted({record["limits"] for record in servers if record["limits"]})
    failed = sum(load["failed"] for record in servers for load in record["loads"])
    pieces = any(not load["counted"] for record in servers for load in record["loads"])
    note = "All measured, by lora-kit bench URL --prompts-of with this run."
    note += f" good/s: requests a second within {' or '.join(limits)}." if limits else ""
    note += f" {failed} requests failed and are in no figure." if failed else ""
    note += " Where a server counts no tokens, a piece of its stream is taken for one." if pieces else ""
    return Table(title="Servers under load", columns=columns, rows=rows, numeric=tuple(range(2, len(columns))),
                 note=note)
