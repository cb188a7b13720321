"""Numbers as people read them: bytes, seconds, counts. Reads and writes nothing."""

from __future__ import annotations


def bytes_text(num_bytes: float | None) -> str:
    """``num_bytes`` with a decimal unit (1 MB = 10**6 bytes); a dash for None."""
    if num_bytes is None:
        return "–"
    value, unit = float(num_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:,.0f} {unit}" if unit == "B" or abs(value) >= 99.95 else f"{value:.3g} {unit}"


def seconds_text(seconds: float | None) -> str:
    """``seconds`` as ms, s, min or h; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 0.9995:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    if seconds < 5999.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    return f"{seconds / 3600:.1f} h"


def count_text(count: float | None) -> str:
    """``count`` with thousands separators; a dash for None."""
    return "–" if count is None else f"{count:,.0f}"


def number_text(value: float | None, digits: int = 4) -> str:
    """``value`` with ``digits`` significant digits, and every digit before the point; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10**digits - 0.5 else f"{value:.{digits}g}"
