"""Drawings as inline SVG: a line chart, stacked bars and a histogram.

No library and no script: a page that carries its own pictures opens anywhere, and a
plotting library would cost a dependency or megabytes. Colours are classes (``s0`` to ``s5``,
``axis``, ``grid``) that the page's style sheet sets, for light and dark. Torch-free; reads
and writes nothing.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_POINTS = 400
"""Points drawn of one line; longer lines are averaged over equal stretches."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A named series of (x, y). ``style`` is the number of its colour; ``dots`` marks every point."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int
    dots: bool = False
    faint: bool = False


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A row of stacked parts: (name, value, number of the colour). ``label`` stands at its end."""

    name: str
    parts: Sequence[tuple[str, float, int]]
    label: str


def line_chart(
    lines: Sequence[Line], *, x_title: str, y_title: str, words: str, width: int = 760, height: int = 320,
    from_zero: bool = False,
) -> str:
    """Lines over a common linear scale, with axes, their titles and a legend.

    Args:
        lines: at least one point in all; points that are not finite are left out and break nothing.
        words: what a reader who does not see the drawing is told.
        width, height: in SVG units, which are pixels at full size.
        from_zero: the scale of y begins at zero, so that heights compare as the values do.
    """
    lines = [_finite(line) for line in lines]
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    assert xs, "a chart needs a point"
    legend = [(line.name, line.style, line.faint) for line in lines if line.points]
    y_ticks = ticks(0.0 if from_zero else min(ys), max(ys), 5)
    decimals = max(0, -math.floor(math.log10(y_ticks[1] - y_ticks[0]) + 1e-9))
    y_texts = [f"{tick:,.{decimals}f}" for tick in y_ticks]
    left, right, bottom = max(54, 34 + 7 * max(map(len, y_texts))), 16, 46  # digits of 12 px beside the title
    top = 14 + 20 * _legend_rows([name for name, _, _ in legend], left, width)
    x_ticks = [tick for tick in ticks(min(xs), max(xs), 4 if width < 500 else 7) if min(xs) <= tick <= max(xs)]
    place_x = _scale(min(xs), max(xs), left, width - right)
    place_y = _scale(y_ticks[0], y_ticks[-1], height - bottom, top)
    parts = [_open(width, height, words)]
    for tick, text in zip(y_ticks, y_texts, strict=True):
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in x_ticks:
        x = place_x(tick)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:g}</text>')
    axis_y = height - bottom
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{axis_y}" y2="{axis_y}"/>')
    middle = (left + width - right) / 2
    parts.append(f'<text class="title" x="{middle:.1f}" y="{height - 8}" text-anchor="middle">{_text(x_title)}</text>')
    turn = f'transform="rotate(-90 14 {(top + axis_y) / 2:.1f})"'
    parts.append(f'<text class="title" x="14" y="{(top + axis_y) / 2:.1f}" text-anchor="middle" {turn}>'
                 f"{_text(y_title)}</text>")
    for line in lines:
        parts.append(_draw_line(line, place_x, place_y))
    parts.append(_legend(legend, left, 16, width))
    return "".join(parts) + "</svg>"


def stacked_bars(
    bars: Sequence[Bar], *, words: str, value_text: Callable[[float], str], width: int = 760
) -> str:
    """Horizontal stacked bars over a common scale that starts at zero, with a legend.

    Each part carries its name and value as a tooltip; values must not be negative.
    """
    assert bars and all(value >= 0 for bar in bars for _, value, _ in bar.parts)
    narrow = width < 500
    names = {(name, style): None for bar in bars for name, _, style in bar.parts}
    top = 14 + 20 * _legend_rows([name for name, _ in names], 8, width)
    row, thick = (46, 16) if narrow else (34, 18)
    left, right = (8, 8) if narrow else (150, 96)
    most = max(sum(value for _, value, _ in bar.parts) for bar in bars) or 1
    place = _scale(0, most, left, width - right)
    height = top + row * len(bars) + 6
    parts = [_open(width, height, words)]
    parts.append(_legend([(name, style, False) for name, style in names], 8, 14, width))
    for index, bar in enumerate(bars):
        y = top + index * row + (row - thick if narrow else (row - thick) / 2)
        if narrow:  # the name above the bar, the value at the right end of that line
            parts.append(f'<text class="name" x="{left}" y="{y - 6:.1f}">{_text(bar.name)}</text>')
            parts.append(f'<text class="value" x="{width - right}" y="{y - 6:.1f}" text-anchor="end">'
                         f"{_text(bar.label)}</text>")
        else:
            parts.append(f'<text class="name" x="{left - 10}" y="{y + thick - 5:.1f}" text-anchor="end">'
                         f"{_text(bar.name)}</text>")
        so_far = 0.0
        for name, value, style in bar.parts:
            start, end = place(so_far), place(so_far + value)
            so_far += value
            if end - start > 0.05:
                parts.append(f'<rect class="s{style}" x="{start:.1f}" y="{y:.1f}" width="{end - start:.1f}" '
                             f'height="{thick}"><title>{_text(name)}: {_text(value_text(value))}</title></rect>')
        if not narrow:
            parts.append(f'<text class="value" x="{place(so_far) + 8:.1f}" y="{y + thick - 5:.1f}">'
                         f"{_text(bar.label)}</text>")
    return "".join(parts) + "</svg>"


def histogram(
    edges: Sequence[float], counts: Sequence[tuple[str, Sequence[int], int]], *, x_title: str, words: str,
    width: int = 760, height: int = 240
) -> str:
    """Counts between ``edges`` as columns, several series stacked.

    Args:
        edges: one more than there are columns, rising.
        counts: (name, count of each column, number of the colour) of each series.
    """
    assert len(edges) > 1 and all(len(series) == len(edges) - 1 for _, series, _ in counts)
    left, right, bottom = 54, 16, 46
    top = 14 + 20 * _legend_rows([name for name, _, _ in counts], left, width)
    most = max(sum(column) for column in zip(*(series for _, series, _ in counts), strict=True)) or 1
    y_ticks = [tick for tick in ticks(0, most, 4) if tick == int(tick)]
    place_x = _scale(edges[0], edges[-1], left, width - right)
    place_y = _scale(0, max(most, y_ticks[-1]), height - bottom, top)
    axis_y = height - bottom
    parts = [_open(width, height, words)]
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:,.0f}</text>')
    every = max(1, len(edges) // (5 if width < 500 else 9))
    for edge in edges[::every]:
        parts.append(f'<text class="tick" x="{place_x(edge):.1f}" y="{axis_y + 18}" text-anchor="middle">{edge:,g}'
                     "</text>")
    for index in range(len(edges) - 1):
        start, end, so_far = place_x(edges[index]) + 0.5, place_x(edges[index + 1]) - 0.5, 0
        for name, series, style in counts:
            if series[index]:
                low, high = place_y(so_far), place_y(so_far + series[index])
                parts.append(f'<rect class="s{style}" x="{start:.1f}" y="{high:.1f}" width="{end - start:.1f}" '
                             f'height="{max(low - high, 0.5):.1f}"><title>{_text(name)}, {edges[index]:,g} to '
                             f"{edges[index + 1] - 1:,g}: {series[index]:,}</title></rect>")
                so_far += series[index]
    parts.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{axis_y}" y2="{axis_y}"/>')
    middle = (left + width - right) / 2
    parts.append(f'<text class="title" x="{middle:.1f}" y="{height - 8}" text-anchor="middle">{_text(x_title)}</text>')
    parts.append(_legend([(name, style, False) for name, _, style in counts], left, 16, width))
    return "".join(parts) + "</svg>"


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) that enclose ``low`` to ``high``."""
    if high <= low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def running_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Each y replaced by the mean of the last ``window`` (fewer at the start)."""
    out, total, held = [], 0.0, []
    for x, y in points:
        held.append(y)
        total += y
        if len(held) > window:
            total -= held.pop(0)
        out.append((x, total / len(held)))
    return out


def thinned(points: Sequence[tuple[float, float]], most: int = MAX_POINTS) -> list[tuple[float, float]]:
    """At most ``most`` points: means over equal stretches of the series."""
    if len(points) <= most:
        return list(points)
    out = []
    for index in range(most):
        part = points[index * len(points) // most : (index + 1) * len(points) // most]
        out.append((sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)))
    return out


def _finite(line: Line) -> Line:
    points = [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]
    return Line(name=line.name, points=thinned(points), style=line.style, dots=line.dots, faint=line.faint)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    if high == low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _draw_line(line: Line, place_x: Callable[[float], float], place_y: Callable[[float], float]) -> str:
    placed = [(place_x(x), place_y(y)) for x, y in line.points]
    if not placed:
        return ""
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
    faint = " faint" if line.faint else ""
    drawn = f'<path class="line l{line.style}{faint}" d="{path}"/>' if len(placed) > 1 else ""
    if line.dots or len(placed) == 1:
        for (x, y), (step, value) in zip(placed, line.points, strict=True):
            drawn += (f'<circle class="s{line.style} dot" cx="{x:.1f}" cy="{y:.1f}" r="4">'
                      f"<title>{_text(line.name)} at {step:g}: {value:.4g}</title></circle>")
    return drawn


def _legend(entries: Sequence[tuple[str, int, bool]], left: float, top: float, width: int) -> str:
    parts, x, y = [], float(left), top
    for name, style, faint in entries:
        needed = _text_width(name)
        if x + needed > width and x > left:
            x, y = float(left), y + 20
        fade = " faint" if faint else ""
        parts.append(f'<rect class="s{style}{fade}" x="{x:.1f}" y="{y - 9}" width="11" height="11" rx="2"/>')
        parts.append(f'<text class="key" x="{x + 17:.1f}" y="{y + 1}">{_text(name)}</text>')
        x += needed
    return "".join(parts)


def _legend_rows(names: Sequence[str], left: float, width: int) -> int:
    rows, x = 1, float(left)
    for name in names:
        needed = _text_width(name)
        if x + needed > width and x > left:
            rows, x = rows + 1, float(left)
        x += needed
    return rows


def _text_width(name: str) -> float:
    return 17 + 6.7 * len(name) + 18  # key, letters at 12 px, gap


def _open(width: int, height: int, words: str) -> str:
    return (f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
            f'aria-label="{_text(words)}">')


def _text(text: object) -> str:
    return html.escape(str(text), quote=True)
