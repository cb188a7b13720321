"""How events look: plain lines where the output is no terminal, a bar where it is one."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from lora_kit import terminal
from lora_kit.events import Caution, Note, Progress, StageFinished, StageSkipped, StageStarted, Table
from lora_kit.terminal import Terminal


@pytest.fixture
def shown(capsys):
    """What a Terminal prints for events, as lines, on an output that is no terminal."""

    def show(*events) -> list[str]:
        screen = Terminal()
        for event in events:
            screen(event)
        screen.close()
        return capsys.readouterr().out.splitlines()

    return show


def test_each_kind_of_event_is_a_line(shown):
    assert shown(
        StageStarted(stage="merge", why="not done yet"), Note(text="a note"), Caution(text="mind this"),
        StageFinished(stage="merge", seconds=1.5, summary="equal"), StageSkipped(stage="bench", why="done"),
    ) == ["merge (not done yet)", "  a note", "  note: mind this", "  done in 1.5 s: equal", "bench skipped: done"]


def test_brackets_in_texts_are_shown_as_they_are(shown):
    assert shown(Note(text="[bold]x[/bold] [/] data[0]")) == ["  [bold]x[/bold] [/] data[0]"]
    assert shown(StageFinished(stage="s", seconds=1, summary="[1, 2] [/b]")) == ["  done in 1 s: [1, 2] [/b]"]
    lines = shown(Table(title="[x]", columns=("a[0]", "[/b]"), rows=[("[red]", "[/]")]))
    assert [line.split() for line in lines] == [["[x]"], ["a[0]", "[/b]"], ["[red]", "[/]"]]


def test_a_long_line_is_not_broken(shown):
    text = " ".join(["word"] * 100)
    assert shown(Note(text=text)) == [f"  {text}"]


def test_progress_becomes_a_line_now_and_then(shown, monkeypatch):
    clock = iter(float(second) for second in range(1000, 2000))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    events = [Progress(stage="train", done=done, total=25, fields={"loss": f"{done}.0"}) for done in range(1, 26)]
    lines = shown(*events)
    assert lines == ["  train step 1/25  loss 1.0", "  train step 11/25  loss 11.0", "  train step 21/25  loss 21.0",
                     "  train step 25/25  loss 25.0"]


def test_a_table_has_its_numbers_on_the_right(shown):
    lines = shown(Table(title="speed", columns=("artifact", "tokens/s", "device"),
                        rows=[("base", "1,234.5", "cpu"), ("merged", "9", "cpu"), ("gguf-q8_0", "–", "cpu")]))
    assert [line.rstrip() for line in lines] == [
        "speed",
        "artifact   tokens/s  device",
        "base        1,234.5  cpu",
        "merged            9  cpu",
        "gguf-q8_0         –  cpu",
    ]


def test_a_table_of_other_things_than_texts_is_shown(shown):
    assert [line.split() for line in shown(Table(title="", columns=("a", "b"), rows=[(1, None)]))] == [
        ["a", "b"], ["1", "None"]]


@pytest.fixture
def screen(monkeypatch):
    """A Terminal on a terminal of 80 columns, and what it wrote so far."""
    output = io.StringIO()
    made = Terminal()
    made.console = Console(file=output, force_terminal=True, width=80, highlight=False, color_system=None)
    made.is_terminal = True
    return made, output


def test_a_terminal_gets_a_bar_that_goes_when_it_is_full(screen):
    made, output = screen
    made(Progress(stage="train", done=1, total=2, fields={"loss": "3.25"}))
    assert made.bar is not None
    made(Note(text="while it runs"))
    made(Progress(stage="train", done=2, total=2, fields={"loss": "2.5"}))
    assert made.bar is None
    text = output.getvalue()
    assert "while it runs" in text and "2/2" in text and "loss 2.5" in text


def test_what_is_known_so_far_stands_above_the_bar_while_it_runs(screen):
    made, output = screen

    def frame() -> list[str]:
        """The lines that the bar shows now."""
        output.seek(0)
        output.truncate()
        made.bar.refresh()
        return [line.split() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", output.getvalue()).splitlines()]

    def table(*rows) -> Table:
        return Table(title="", columns=("artifact", "tok/s"), rows=rows)

    made(Progress(stage="bench", done=0, total=2, table=table(("base", "…"), ("merged", ""))))
    assert [line for line in frame() if line][:3] == [["artifact", "tok/s"], ["base", "…"], ["merged"]]
    made(Progress(stage="bench", done=1, total=2, table=table(("base", "12.5"), ("merged", "…"))))
    made(Progress(stage="bench", done=1, total=2, fields={"still": "1"}))
    lines = [line for line in frame() if line]
    assert lines[:3] == [["artifact", "tok/s"], ["base", "12.5"], ["merged", "…"]] and "1/2" in lines[3]
    output.truncate(output.seek(0))
    made(Progress(stage="bench", done=2, total=2))
    assert made.bar is None and "merged" not in output.getvalue().rpartition("2/2")[0].rpartition("1/2")[2]


def test_the_next_stage_takes_a_bar_off(screen):
    made, _ = screen
    made(Progress(stage="train", done=1, total=2))
    made(StageStarted(stage="merge"))
    assert made.bar is None and made.task is None


# ---- examples with their mask ----------------------------------------------------------

SPANS = [("<user>[hi]", False), ("yes[/b]", True), ("", False), ("end", False)]


def test_without_colour_trained_text_stands_between_brackets(capsys):
    Terminal().marked("train 1: [a]", SPANS)
    assert capsys.readouterr().out.splitlines() == ["train 1: [a]", "<user>[hi]⟦yes[/b]⟧end"]


@pytest.mark.parametrize(("options", "shown"), [
    ({"color_system": "standard"}, "<user>[hi]\x1b[1;32myes[/b]\x1b[0mend"),
    ({"color_system": "standard", "no_color": True}, "<user>[hi]⟦yes[/b]⟧end"),
    ({"color_system": None}, "<user>[hi]⟦yes[/b]⟧end"),
])
def test_at_a_terminal_trained_text_is_coloured(options, shown):
    screen = Terminal()
    screen.is_terminal = True
    screen.console = Console(file=io.StringIO(), force_terminal=True, highlight=False, soft_wrap=True, **options)
    screen.marked("t", SPANS)
    assert screen.console.file.getvalue().splitlines()[1] == shown
