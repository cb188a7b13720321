"""How events look in a terminal: a progress bar there, plain lines where the output is no terminal.

Writes to standard output. Torch-free.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table as RichTable
from rich.text import Text

from lora_kit import events
from lora_kit.units import seconds_text

_LINE_EVERY_SECONDS = 10.0
_NUMBER = re.compile(r"^(–|[-+]?\d[\d,.]*(e[-+]?\d+)?( ?(%|B|[kMGT]B|ms|s|h))?)?$")  # a unit may follow


class Terminal:
    """Renders events as they come; use as a listener, and close it at the end."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, soft_wrap=True)
        self.is_terminal = sys.stdout.isatty()
        self.bar: _Bar | None = None
        self.task = None
        self.last_line = 0.0

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.Progress):
            self._progress(event)
            return
        if not isinstance(event, (events.Note, events.Caution)):
            self.close()
        if isinstance(event, events.StageStarted):
            self._print(f"[bold]{event.stage}[/bold]" + (f" [dim]({escape(event.why)})[/dim]" if event.why else ""))
        elif isinstance(event, events.StageFinished):
            self._print(f"  [green]done[/green] in {seconds_text(event.seconds)}: {escape(event.summary)}")
        elif isinstance(event, events.StageSkipped):
            self._print(f"[bold]{event.stage}[/bold] [dim]skipped: {escape(event.why)}[/dim]")
        elif isinstance(event, events.Note):
            self._print(f"  {escape(event.text)}")
        elif isinstance(event, events.Caution):
            self._print(f"  [yellow]note:[/yellow] {escape(event.text)}")
        elif isinstance(event, events.Table):
            self.table(event.title, event.columns, event.rows)

    def table(self, title: str, columns, rows) -> None:
        """Print a table."""
        console = self.console if self.is_terminal else Console(highlight=False, width=160)
        console.print(_rich(title, columns, rows))

    def marked(self, title: str, spans) -> None:
        """Print (text, trained) spans under ``title``: trained text in colour, where there is none between ⟦ and ⟧."""
        self.close()
        in_colour = self.is_terminal and self.console.color_system is not None and not self.console.no_color
        text = Text()
        for part, trained in spans:
            text.append(part if in_colour or not trained else f"⟦{part}⟧",
                        style="bold green" if in_colour and trained else "")
        self.console.print(f"[bold]{escape(title)}[/bold]")
        self.console.print(text)

    def close(self) -> None:
        """Take the progress bar off, if there is one."""
        if self.bar is not None:
            self.bar.above = None
            self.bar.stop()
            self.bar = self.task = None

    def _print(self, text: str) -> None:
        (self.bar.console if self.bar else self.console).print(text)

    def _progress(self, event: events.Progress) -> None:
        fields = "  ".join(f"{name} {value}" for name, value in event.fields.items())
        if not self.is_terminal:
            now = time.monotonic()
            if event.done in (1, event.total) or now - self.last_line >= _LINE_EVERY_SECONDS:
                self.last_line = now
                self.console.print(f"  {event.stage} {event.unit} {event.done}/{event.total}  {escape(fields)}")
            return
        if self.bar is None:
            self.bar = _Bar(TextColumn("  {task.description}"), BarColumn(bar_width=30),
                            TextColumn("{task.completed:.0f}/{task.total:.0f}"), TextColumn("{task.fields[shown]}"),
                            console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(event.stage, total=event.total, shown="")
        if event.table is not None:
            self.bar.above = _rich(event.table.title, event.table.columns, event.table.rows)
        self.bar.update(self.task, completed=event.done, total=event.total, shown=escape(fields))
        if event.done >= event.total:
            self.close()


class _Bar(Bar):
    """A progress bar with a table above it that grows with it; the table goes when the bar stops."""

    above: RichTable | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        if self.above is not None:
            yield self.above
        yield from super().get_renderables()


def _rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> RichTable:
    """A table whose columns after the first are right-aligned when they hold numbers."""
    table = RichTable(title=escape(title) if title else None, title_justify="left", box=None, pad_edge=False,
                      padding=(0, 2, 0, 0))
    rows = [[str(cell) for cell in row] for row in rows]
    for index, column in enumerate(columns):
        numbers = index > 0 and bool(rows) and all(_NUMBER.match(row[index]) for row in rows)
        table.add_column(escape(column), overflow="fold", justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table
