"""What the verbs share: their arguments and options, the terminal that they show tables on, and doing a stage.

The verbs stand in ``cli.py``, ``cli_plan.py`` and ``cli_bench.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.", show_default=False)]
RunArgument = Annotated[
    Path | None, typer.Argument(metavar="RUN", help="A run folder. Default: the newest.", show_default=False)
]
TargetArgument = Annotated[
    str | None, typer.Argument(
        metavar="RUN|ARTIFACT", show_default=False,
        help="A run, RUN/ARTIFACT, a model or adapter folder, or a .gguf file. Default: the newest run.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. train.steps=10. Repeatable."),
]
RunsOption = Annotated[Path, typer.Option("--runs", help="Folder of the runs.")]
NoDepsOption = Annotated[
    bool, typer.Option("--no-deps", help="An owed earlier stage is an error instead of being run.")
]
AgainOption = Annotated[bool, typer.Option("--again", help="Do the stage again even when it is done.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start a new run even when one can go on.")]
InconclusiveOption = Annotated[
    Literal["pass", "fail"] | None,
    typer.Option(show_default=False, help="What a gate that cannot be decided counts as. Default: neither, exit code "
                 "3.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show a traceback with an error.")]

JsonOption = Annotated[Path | None, typer.Option("--json", show_default=False, help="Write everything as JSON; - is "
                                                 "the output.")]
CsvOption = Annotated[Path | None, typer.Option("--csv", show_default=False, help="Write every row as CSV; - is the "
                                                "output.")]
MarkdownOption = Annotated[Path | None, typer.Option("--markdown", show_default=False, help="Write the tables as "
                                                     "Markdown; - is the output.")]

RUNS = Path("runs")


class LazyTerminal:
    """The terminal, made when the first event or table comes: rich is not imported for ``--help``."""

    def __init__(self) -> None:
        self.terminal = None

    def __call__(self, event) -> None:
        self._made()(event)

    def table(self, *arguments) -> None:
        self._made().table(*arguments)

    def marked(self, *arguments) -> None:
        self._made().marked(*arguments)

    def close(self) -> None:
        if self.terminal is not None:
            self.terminal.close()

    def _made(self):
        if self.terminal is None:
            from lora_kit.terminal import Terminal

            self.terminal = Terminal()
        return self.terminal


terminal = LazyTerminal()


def do_stage(stage: str, target: Path | None, runs: Path, no_deps: bool, again: bool,
             inconclusive: str | None = None) -> None:
    """Bring a run up to ``stage`` and say what came of it."""
    from lora_kit import pipeline, rundir

    opened = rundir.open_run(target) if target else rundir.open_run(rundir.newest(runs))
    typer.echo(f"run {opened.path}")
    pipeline.continue_run(opened, until=stage, no_deps=no_deps, redo=again, inconclusive=inconclusive)
    seal = opened.seal(stage)
    typer.echo(f"{stage}: {seal['summary']}")
    typer.echo(f"written to {opened.stage_dir(stage)}")
