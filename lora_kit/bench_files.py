"""What bench has measured as files: JSON with everything, CSV with a line for each row, Markdown with the tables.

Torch-free. Writes the files that it is told to; ``-`` is the output.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit import rundir
from lora_kit.report_document import Document, Paragraph, Section, Table, to_markdown

Shown = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""A table as (title, columns, rows)."""


@dataclass(frozen=True, kw_only=True)
class Files:
    """Where to write, None: nowhere."""

    json: Path | None = None
    csv: Path | None = None
    markdown: Path | None = None

    @property
    def take_the_output(self) -> bool:
        """Whether one of them goes to the output, where then nothing else belongs."""
        return Path("-") in (self.json, self.csv, self.markdown)


def write(files: Files, *, everything: Any, lines: Sequence[dict[str, Any]], shown: Sequence[Shown],
          notes: Sequence[str], echo: Callable[[str], None]) -> None:
    """Write what ``files`` names.

    Args:
        everything: what JSON has.
        lines: what CSV has, a line each; values that are no text, number or None are left out.
        shown, notes: what Markdown has.

    Raises:
        MachineError: a file cannot be written.
    """
    for path, made in ((files.json, lambda: json.dumps(everything, indent=1, ensure_ascii=False) + "\n"),
                       (files.csv, lambda: as_csv(lines)), (files.markdown, lambda: as_markdown(shown, notes))):
        if path == Path("-"):
            echo(made().rstrip("\n"))
        elif path is not None:
            with rundir.writing(path):
                rundir.write_text(path, made())


def as_csv(lines: Sequence[dict[str, Any]]) -> str:
    """Lines under the keys that any of them has, in the order in which they come; None is empty, numbers are whole."""
    plain = [{key: value for key, value in line.items() if value is None or isinstance(value, (str, int, float))}
             for line in lines]
    columns = list(dict.fromkeys(key for line in plain for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    return text.getvalue()


def as_markdown(shown: Sequence[Shown], notes: Sequence[str]) -> str:
    """The tables with their notes below."""
    blocks: list[Any] = [Table(title=title, columns=columns, rows=rows, numeric=tuple(range(1, len(columns))))
                         for title, columns, rows in shown]
    return to_markdown(Document(title="Inference speed", subtitle="", facts=(), sections=[Section(
        anchor="measured", title="Measured", blocks=[*blocks, *(Paragraph(text=note) for note in notes)])]))
