"""The report's section on data: the ledger, duplicates and overlap, lengths, the first rows with their mask.

Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from lora_kit import charts, overlap
from lora_kit.ledger import (
    REASON_COLUMNS,
    SOURCE_COLUMNS,
    duplicate_text,
    reason_rows,
    source_rows,
    split_rows,
)
from lora_kit.report_document import Block, Figure, Paragraph, Section, Table, parse_marked
from lora_kit.report_findings import Findings
from lora_kit.units import count_text, number_text

_BALANCE = "Tokens in + repeated = trained + context + dropped + cut, counted again from the token files. "
_PADDING = "Padding is no data: it is made with the batches"


def section(found: Findings) -> Section:
    """Where every row and token went, and what training looks like to the model."""
    blocks: list[Block] = []
    if found.ledger is None:
        blocks.append(Paragraph(text=f"No ledger: {found.why_missing('data')}.", tone="missing"))
    else:
        blocks += _ledger_blocks(found)
    marked = parse_marked(found.preview or "")
    if marked:
        blocks.append(Paragraph(text="The first rows as the model sees them. Marked tokens are trained on, the rest is "
                                     "context:"))
        blocks += marked
    return Section(anchor="data", title="Data", blocks=blocks)


def _ledger_blocks(found: Findings) -> list[Block]:
    ledger = found.ledger or {}
    splits = [split.replace("_", " ") for split in ledger.get("splits", {})]
    padded = found.figures("train").get("tokens_padded")
    note = _BALANCE + _PADDING + (f", {count_text(padded)} tokens of it in training." if padded is not None else ".")
    blocks: list[Block] = [Table(title="Ledger", columns=("", *splits), rows=split_rows(ledger), note=note,
                                 numeric=tuple(range(1, len(splits) + 1)))]
    if ledger.get("sources"):
        blocks.append(Table(title="By source", columns=SOURCE_COLUMNS, rows=source_rows(ledger),
                            numeric=tuple(range(2, len(SOURCE_COLUMNS))), note="The last five columns are tokens."))
    if ledger.get("reasons"):
        blocks.append(Table(title="Rows that were left out or changed", columns=REASON_COLUMNS,
                            rows=reason_rows(ledger), numeric=(2, 3)))
    blocks.append(Paragraph(text=duplicate_text(ledger)))
    report = [*ledger.get("overlap", ()), *(found.overlap or ())]
    if report:
        blocks.append(Table(
            title="Overlap of training rows with what is measured", columns=overlap.COLUMNS, rows=overlap.rows(report),
            numeric=(1, 2, 3, 4, 5), note=(
                "Items whose question, or question and answer, stand in a training row; and items of whose word "
                f"{overlap.NGRAM}-grams at least {overlap.THRESHOLD:.0%} occur in the training rows.")))
    figure = _length_figure(ledger)
    return [*blocks, figure] if figure else blocks


def _length_figure(ledger: dict) -> Figure | None:
    bars = ledger.get("histogram")
    if not bars:
        return None
    counts = [("train", bars["train"], 0), *([("held out", bars["held_out"], 1)] if any(bars["held_out"]) else [])]
    lengths = ledger.get("lengths", {})
    words = (f"Training examples have {number_text(lengths.get('median'))} tokens in the median, "
             f"{count_text(lengths.get('max'))} at most.")
    wide, narrow = (charts.histogram(bars["edges"], counts, x_title="tokens of an example", words=words, width=width)
                    for width in (760, 360))
    return Figure(wide_svg=wide, narrow_svg=narrow, caption=f"Number of examples by their length. {words}", words=words)
