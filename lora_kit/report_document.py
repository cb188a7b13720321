"""The report as blocks of text, tables and figures, and those blocks as Markdown.

The page is composed once and written twice: ``report_html.py`` draws the same blocks as HTML.
Texts in blocks are plain: each writer escapes them for its own format, so that nothing
that came out of data or a model can become markup. Reads and writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lora_kit.units import count_text, number_text

Tone = Literal["", "pass", "fail", "unsure", "missing"]
TONES: dict[str, Tone] = {"PASS": "pass", "FAIL": "fail", "INCONCLUSIVE": "unsure"}
"""Tone of a verdict's outcome."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Text of a table with a tone: an outcome is drawn as a badge, ``missing`` is faint.

    ``span`` columns are covered; the row then has as many cells fewer.
    """

    text: str
    tone: Tone = ""
    span: int = 1


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    text: str
    tone: Tone = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of cells. ``numeric`` holds the indices of columns that are set flush right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    title: str = ""
    note: str = ""
    numeric: Sequence[int] = ()


@dataclass(frozen=True, kw_only=True)
class Card:
    """A headline figure."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Cards:
    cards: Sequence[Card]


@dataclass(frozen=True, kw_only=True)
class VerdictLine:
    outcome: str
    claim: str
    evidence: str


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    lines: Sequence[VerdictLine]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing for wide and one for narrow pages, as SVG; ``words`` says what is to be seen."""

    wide_svg: str
    narrow_svg: str
    caption: str
    words: str


@dataclass(frozen=True, kw_only=True)
class Span:
    text: str
    trained: bool


@dataclass(frozen=True, kw_only=True)
class Marked:
    """One training example with its trained tokens marked."""

    origin: str
    spans: Sequence[Span]


@dataclass(frozen=True, kw_only=True)
class Turn:
    role: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A held-out prompt, the reference answer (empty without one), and each artifact's answer beside it."""

    origin: str
    turns: Sequence[Turn]
    reference: str
    answers: Sequence[tuple[str, str, str]]
    """(artifact, text, remark)"""


@dataclass(frozen=True, kw_only=True)
class Code:
    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Link:
    """A way to a file beside the page."""

    text: str
    target: str


Block = Paragraph | Table | Cards | Verdicts | Figure | Marked | Sample | Code | Link


@dataclass(frozen=True, kw_only=True)
class Section:
    anchor: str
    title: str
    blocks: Sequence[Block]
    intro: str = ""


@dataclass(frozen=True, kw_only=True)
class Document:
    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def missing(why: str, span: int = 1) -> Cell:
    """A cell for a figure that does not exist, with the reason, over ``span`` columns."""
    return Cell(text=f"not measured: {why}" if why else "not measured", tone="missing", span=span)


def threads_text(num_threads: int) -> str:
    """``1 thread``, ``2 threads``."""
    return f"{num_threads} thread{'' if num_threads == 1 else 's'}"


def rate_text(value: float | None) -> str:
    """A rate such as tokens a second: three digits, thousands written out; a dash for None."""
    return count_text(value) if value is not None and value >= 100 else number_text(value, 3)


def parse_marked(text: str) -> list[Marked]:
    """Examples of a ``preview.txt``: ``--- origin`` lines, trained spans between ⟦ and ⟧."""
    found = []
    for part in re.split(r"^--- ", text, flags=re.MULTILINE)[1:]:
        origin, _, body = part.partition("\n")
        spans = []
        for piece in re.split(r"(⟦[^⟧]*⟧)", body.rstrip("\n")):
            if piece:
                trained = piece.startswith("⟦") and piece.endswith("⟧")
                spans.append(Span(text=piece[1:-1] if trained else piece, trained=trained))
        found.append(Marked(origin=origin.strip(), spans=spans))
    return found


def to_markdown(document: Document) -> str:
    """The document as GitHub-flavoured Markdown, drawings replaced by their words."""
    lines = [f"# {escape(document.title)}", ""]
    if document.subtitle:
        lines += [escape(document.subtitle), ""]
    lines += [f"- {escape(name)}: {escape(value)}" for name, value in document.facts] + [""]
    for section in document.sections:
        lines += [f"## {escape(section.title)}", ""]
        if section.intro:
            lines += [escape(section.intro), ""]
        for block in section.blocks:
            lines += [*_block_lines(block), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def escape(text: str) -> str:
    """Plain text on one line of Markdown: no markup, no HTML, no table border."""
    return re.sub(r"([\\`*\[\]<>|#])", r"\\\1", " ".join(printable(text).split()))


def printable(text: object) -> str:
    """Text that any file can hold: control characters and lone surrogates become U+FFFD."""
    text = str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", text)


def _block_lines(block: Block) -> list[str]:
    match block:
        case Paragraph():
            return [escape(block.text)]
        case Cards():
            return [f"- **{escape(card.label)}**: {escape(card.value)}"
                    + (f" ({escape(card.note)})" if card.note else "") for card in block.cards]
        case Verdicts():
            return [f"- **{escape(line.outcome)}** {escape(line.claim)}: {escape(line.evidence)}"
                    for line in block.lines]
        case Table():
            return _table_lines(block)
        case Link():
            return [f"[{escape(block.text)}]({block.target})"]
        case Figure():
            return [f"*{escape(block.caption)}* {escape(block.words)}"]
        case Marked():
            text = "".join(f"⟦{span.text}⟧" if span.trained else span.text for span in block.spans)
            return [f"{escape(block.origin)}:", "", *_fenced(text)]
        case Sample():
            lines = [f"### {escape(block.origin)}", ""]
            texts = [(turn.role, turn.text) for turn in block.turns]
            texts += [("reference", block.reference)] if block.reference else []
            texts += [(f"{name}, {remark}" if remark else name, text) for name, text, remark in block.answers]
            for name, text in texts:
                lines += [f"**{escape(name)}**", "", *_fenced(text), ""]
            return lines
        case Code():
            return [f"{escape(block.title)}:", "", *_fenced(block.text)]


def _table_lines(table: Table) -> list[str]:
    rule = ["--:" if index in table.numeric else "---" for index in range(len(table.columns))]
    lines = [f"**{escape(table.title)}**", ""] if table.title else []
    lines += ["| " + " | ".join(map(escape, table.columns)) + " |", "|" + "|".join(rule) + "|"]
    for row in table.rows:
        texts = []
        for cell in row:
            texts += [escape(cell.text), *[""] * (cell.span - 1)] if isinstance(cell, Cell) else [escape(cell)]
        lines.append("| " + " | ".join(texts) + " |")
    return lines + (["", escape(table.note)] if table.note else [])


def _fenced(text: str) -> list[str]:
    text = printable(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, text, fence]
