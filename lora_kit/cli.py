"""The command line: verbs, options, exit codes. The only place that prints or exits.

Heavy imports stand inside the verbs, so that ``--help`` and recipe errors are instant.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer.core import TyperGroup

from lora_kit import cli_adapters, cli_bench, cli_plan
from lora_kit.cli_options import RUNS as _RUNS
from lora_kit.cli_options import (
    AgainOption,
    DebugOption,
    FreshOption,
    InconclusiveOption,
    NoDepsOption,
    RecipeArgument,
    RunArgument,
    RunsOption,
    SetOption,
    TargetArgument,
)
from lora_kit.cli_options import do_stage as _do_stage
from lora_kit.cli_options import terminal as _terminal
from lora_kit.cli_plan import show_ledger


class _Verbs(TyperGroup):
    """The verbs; those of two words, such as ``eval compare``, stand beside the verb that they begin with."""

    def resolve_command(self, ctx, args):
        if " ".join(args[:2]) in self.commands:
            args = [" ".join(args[:2]), *args[2:]]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=_Verbs, name="lora-kit", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]},
    help="One recipe in, a fine-tuned model you can trust out.",
)

@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from lora_kit import __version__

        typer.echo(f"lora-kit {__version__}")
        raise typer.Exit()


@app.command()
def init(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="Name of a shipped recipe. Without it: the list.", show_default=False),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="File to write, or a folder for it. Default: here.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing: keep the recipe's own values.")] = False,
    debug: DebugOption = False,
) -> None:
    """Copy a shipped recipe here and fill in what it must know."""
    from lora_kit import scaffold

    if recipe is None:
        typer.echo("shipped recipes:")
        for name in scaffold.names():
            typer.echo(f"  {name:26} {scaffold.description(name)}")
        typer.echo("lora-kit init NAME copies one here")
        return
    target = to or Path(".")
    answers = {}
    for question in scaffold.questions(recipe):
        if yes or not sys.stdin.isatty():
            continue
        answers[question.key] = typer.prompt(question.text, default=question.default)
    path = scaffold.copy_recipe(recipe, target, answers)
    typer.echo(f"wrote {path}; next: lora-kit plan {path}")


app.command()(cli_plan.plan)


@app.command()
def data(
    recipe: RecipeArgument,
    show: Annotated[
        list[str] | None,
        typer.Option("--show", metavar="N|ORIGIN", help="Print example N (from 1), or those of a row such as "
                     "rows.jsonl:17, with the trained tokens marked. Repeatable."),
    ] = None,
    split: Annotated[str, typer.Option(metavar="train|held_out", help="Where --show looks.")] = "train",
    set_: SetOption = None, debug: DebugOption = False,
) -> None:
    """Prepare a recipe's data and show where every row and token went."""
    from lora_kit import data as data_module
    from lora_kit import data_view, pipeline, prepared

    recipe_file = _recipe_file_of(recipe, set_)
    wanted = data_view.checked(split, show or ())
    base = pipeline.check(recipe_file)
    found = prepared.find(recipe_file.recipe, recipe_file.folder, base)
    data_module.prepare(recipe_file.recipe, found, base)
    ledger = found.ledger()
    show_ledger(ledger)
    for title, columns, rows in data_view.tables(ledger, found.overlap(recipe_file.recipe)):
        _terminal.table(f"\n{title}", columns, rows)
    typer.echo(f"\n{data_view.lines(ledger, found.folder)}")
    for title, spans in data_view.examples(found.folder, split, wanted, base["artifact"]["tokenizer"]):
        typer.echo("")
        _terminal.marked(title, spans)


@app.command()
def train(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe file, or a run to go on with.", show_default=False)
    ],
    set_: SetOption = None, runs: RunsOption = _RUNS, fresh: FreshOption = False,
    num_processes: Annotated[
        int | None, typer.Option("--num-processes", min=1, help="Processes that train together. Default: the recipe's "
                                 "launch.num_processes.", show_default=False)] = None,
    launch: Annotated[
        Path | None, typer.Option("--launch", help="An accelerate config, in place of the recipe's launch section.",
                                  show_default=False)] = None,
    debug: DebugOption = False,
) -> None:
    """Train the adapter of a recipe, or go on with an unfinished run."""
    from lora_kit import launch as launch_module
    from lora_kit import stopwatch

    with stopwatch.importing():
        from lora_kit import pipeline, rundir
    from lora_kit.errors import RecipeError
    from lora_kit.stop_signals import StopSignals

    if rundir.is_run(recipe) and (set_ or fresh):
        raise RecipeError(f"lora-kit train {recipe}", "goes on with a run, whose recipe does not change",
                          "leave out --set and --fresh, or name the recipe")
    target = rundir.open_run(recipe) if rundir.is_run(recipe) else _recipe_file_of(recipe, set_)
    settings = launch_module.settings_of(target.recipe, launch, num_processes)
    launch_module.take_over_from_srun()
    is_launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if settings.num_processes > 1 and not is_launched:
        from lora_kit import launcher

        raise typer.Exit(launcher.launch(settings, launcher.command_again()))
    # Outside of the loop, which saves, nothing is lost: the same command goes on.
    with StopSignals(f"lora-kit train {recipe}", "run the same command again", "stopped before it was done"):
        if is_launched:
            run = pipeline.train_on_ranks(recipe if rundir.is_run(recipe) else target, runs_dir=runs, fresh=fresh)
        elif rundir.is_run(recipe):
            run = pipeline.continue_run(target, until="train")
        else:
            run = pipeline.run_recipe(target, runs_dir=runs, until="train", fresh=fresh)
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(f"adapter: {run.stage_dir('train') / 'adapter'}")


@app.command()
def run(
    recipe: RecipeArgument, set_: SetOption = None, runs: RunsOption = _RUNS, fresh: FreshOption = False,
    inconclusive: InconclusiveOption = None, debug: DebugOption = False,
) -> None:
    """Do everything a recipe says, skipping what is done."""
    from lora_kit import pipeline
    from lora_kit.errors import GateFailed, GateInconclusive, RecipeError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("lora-kit run", "was launched with several processes, and only training uses them",
                          "launch lora-kit train, then lora-kit run without a launcher")
    opened = pipeline.open_for(_recipe_file_of(recipe, set_), runs, fresh=fresh)
    typer.echo(f"run {opened.path}")
    if not pipeline.owed(opened):
        typer.echo("nothing to do: every stage is done")
    elif opened.recipe.launch.num_processes > 1 and "train" in pipeline.owed(opened):
        _train_in_several(opened)
    try:
        pipeline.continue_run(opened, inconclusive=inconclusive)
    except (GateFailed, GateInconclusive):
        _finish(opened)
        raise
    _finish(opened)


def _train_in_several(opened) -> None:
    """Train in the recipe's several processes, which end when it is done; every later stage uses one."""
    from lora_kit import launch, launcher

    code = launcher.launch(launch.settings_of(opened.recipe, None, None),
                           [sys.executable, "-m", "lora_kit.cli", "train", str(opened.path)])
    if code:
        raise typer.Exit(code)


def _finish(opened) -> None:
    typer.echo(f"report: {opened.stage_dir('report') / 'index.html'}")


def _stage_verb(stage: str, summary: str):
    def verb(
        target: RunArgument = None, runs: RunsOption = _RUNS, no_deps: NoDepsOption = False, again: AgainOption = False,
        debug: DebugOption = False,
    ) -> None:
        _do_stage(stage, target, runs, no_deps, again)

    verb.__doc__ = summary
    app.command(name=stage)(verb)


@app.command()
def merge(
    target: Annotated[list[Path] | None, typer.Argument(metavar="RUN|ADAPTER...", show_default=False, help=(
        "A run folder (default: the newest), or an adapter in PEFT layout, or several of one base that become one, "
        "with --base and --out."))] = None,
    base: Annotated[str | None, typer.Option(help="For an ADAPTER: its base, as model.base in a recipe.")] = None,
    out: Annotated[Path | None, typer.Option(help="For an ADAPTER: the folder to write.")] = None,
    dtype: Annotated[Literal["auto", "bf16", "fp16", "fp32"] | None, typer.Option(
        show_default=False, help="For an ADAPTER: type of the merged weights. Default: auto.")] = None,
    weights: cli_adapters.WeightsOption = None, how: cli_adapters.HowOption = None,
    density: cli_adapters.DensityOption = None, rank: cli_adapters.RankOption = None,
    seed: cli_adapters.SeedOption = None,
    runs: RunsOption = _RUNS, no_deps: NoDepsOption = False, again: AgainOption = False, debug: DebugOption = False,
) -> None:
    """Merge an adapter into its base and prove that nothing changed."""
    from lora_kit.errors import RecipeError

    several = cli_adapters.several_of(target or [], weights, how, density, rank, seed)
    first = target[0] if target else None
    if not several and (first is None or not (first / "adapter_config.json").exists()):
        if base or out or dtype:
            raise RecipeError("merge", "--base, --out and --dtype are for an adapter folder",
                              "name one, or set merge.dtype in the recipe")
        _do_stage("merge", first, runs, no_deps, again)
        return
    if base is None or out is None:
        named = " ".join(str(folder) for folder in target)
        what = "are adapters, which need their" if several else "is an adapter, which needs its"
        raise RecipeError(named, f"{what} base and a folder to write",
                          f"lora-kit merge {named} --base BASE --out FOLDER")
    from lora_kit import adapter_verbs

    if several:
        adapter_verbs.merge_adapters(target, base, out, dtype or "auto", **several)
    else:
        adapter_verbs.merge_adapter(first, base, out, dtype or "auto")


app.command()(cli_adapters.extract)


_stage_verb("quantize", "Quantize the merged model of a run and measure what it cost.")


app.command()(cli_bench.bench)
app.command(name="bench compare")(cli_plan.bench_compare)


@app.command(name="eval")
def eval_(
    target: Annotated[
        Path | None, typer.Argument(metavar="RUN", show_default=False, help="A run folder, or a recipe with "
                                    "--dry-run. Default: the newest run.")
    ] = None,
    runs: RunsOption = _RUNS, no_deps: NoDepsOption = False, again: AgainOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what each gate can show with its items. Loads no model.")
    ] = False,
    baseline: Annotated[
        Path | None, typer.Option(help="Compare with this baseline.lock, as eval.baseline does.")
    ] = None,
    write_baseline: Annotated[
        Path | None, typer.Option(help="Write what the artifacts score there, for --baseline of later runs.")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop once every gate is decided, or after this time: 300s, 5m. "
                                 "As eval.budget does.")
    ] = None,
    inconclusive: InconclusiveOption = None,
    junit: Annotated[
        Path | None, typer.Option(help="Write the gates as JUnit XML, a test case for each.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write gates, scores and changed items as Markdown, for a CI step's summary.")
    ] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON.")] = None,
    debug: DebugOption = False,
) -> None:
    """Score the artifacts of a run with its suite and decide its gates."""
    from lora_kit import ci_files, pipeline, rundir
    from lora_kit.errors import GateFailed, GateInconclusive, LoraKitError

    if dry_run:
        _foresee(target, runs, baseline)
        return
    opened = rundir.open_run(target) if target else rundir.open_run(rundir.newest(runs))
    if baseline:
        opened = pipeline.compare_with(opened, baseline)
    if budget:
        opened = pipeline.within(opened, budget)
    decided: LoraKitError | None = None
    try:
        with ci_files.reporting(opened, junit_path=junit, markdown=markdown, json_path=json_,
                                inconclusive=inconclusive):
            _do_stage("eval", opened.path, runs, no_deps, again, inconclusive)
    except (GateFailed, GateInconclusive) as error:
        decided = error
    # What was scored is worth keeping whatever the gates say of it.
    if write_baseline:
        typer.echo(f"baseline {pipeline.write_baseline(opened, write_baseline)}")
    if decided:
        raise decided


def _foresee(target: Path | None, runs: Path, baseline: Path | None) -> None:
    from lora_kit import foresight, rundir

    if target and not rundir.is_run(target) and target.is_file():
        set_ = [f"eval.baseline={baseline.resolve()}"] if baseline else None
        found = foresight.of_recipe(_recipe_file_of(target, set_))
    else:
        opened = rundir.open_run(target) if target else rundir.open_run(rundir.newest(runs))
        found = foresight.of_run(opened, baseline)
    _terminal.table(f"gates of suite {found.suite}, before anything is computed", foresight.COLUMNS, found.rows())
    typer.echo("")
    for line in found.lines():
        typer.echo(line)


@app.command(name="eval compare")
def eval_compare(
    before: Annotated[str, typer.Argument(metavar="A", show_default=False, help="What was there before: a run (its "
                                          "merged model), RUN/ARTIFACT, its eval folder, or an items.jsonl.")],
    after: Annotated[str, typer.Argument(metavar="B", show_default=False, help="What is to be judged, named alike.")],
    examples: Annotated[int, typer.Option(min=0, metavar="N", help="Items to show that got worse, and better, of each "
                                          "task.")] = 3,
    json_: Annotated[Path | None, typer.Option("--json", help="Write everything as JSON; - is the output.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write it as Markdown; - is the output.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to browse the items with.")] = None,
    debug: DebugOption = False,
) -> None:
    """Compare two evaluations over the items that both have: what got better, what got worse."""
    import json

    from lora_kit import paired, report_items, rundir, scored
    from lora_kit.report_document import to_markdown

    a, b = scored.find(before), scored.find(after)
    compared = paired.compare(a, b, num_examples=examples)
    quiet = False
    if html is not None:
        with rundir.writing(html):
            rundir.write_text(html, report_items.comparison_page(compared, a, b))
    for path, text in ((json_, json.dumps(compared, indent=1, ensure_ascii=False) + "\n"),
                       (markdown, to_markdown(paired.document(compared)))):
        if path == Path("-"):
            typer.echo(text, nl=False)
            quiet = True
        elif path is not None:
            with rundir.writing(path):
                rundir.write_text(path, text)
    if quiet:
        return
    _terminal.table(f"A {compared['a']['label']}, B {compared['b']['label']}", paired.COLUMNS,
                    paired.rows(compared))
    typer.echo(f"\n{paired.NOTE}")
    for line in paired.example_lines(compared):
        typer.echo(line if line.startswith(" ") else f"\n{line}")


_stage_verb("report", "Write the report of a run: one HTML page and one Markdown file.")


@app.command()
def chat(
    target: TargetArgument = None, runs: RunsOption = _RUNS,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    debug: DebugOption = False,
) -> None:
    """Talk to a model: a run's merged model, or any artifact."""
    from lora_kit import chat as chat_module
    from lora_kit import pipeline, rundir
    from lora_kit.engines import open_engine

    artifact, opened = pipeline.artifact_at(target or str(rundir.newest(runs)), runs)
    typer.echo(f"{artifact.name}: {artifact.path}\n/reset starts anew, /quit or Ctrl-D ends")
    engine = open_engine(artifact)
    tools_mode = opened.recipe.data.tools if opened else "template"
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            typer.echo("")
            break
        if text == "/quit":
            break
        if text == "/reset":
            messages = list(start)
            continue
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        prompt = chat_module.prompt_ids(engine.tokenizer, messages, tools_mode=tools_mode)
        answer = ""
        for piece in engine.stream(prompt, max_new_tokens=max_new_tokens):
            typer.echo(piece, nl=False)
            answer += piece
        typer.echo("")
        messages.append({"role": "assistant", "content": answer})
    engine.close()


@app.command()
def doctor(debug: DebugOption = False) -> None:
    """Show versions, devices, extras and combinations that are known to be bad."""
    from lora_kit.doctor import examine

    rows = [(check.group, check.name, check.status, check.detail) for check in examine()]
    _terminal.table("", ("", "what", "status", "detail"), rows)


def _recipe_file_of(recipe: Path, set_: list[str] | None):
    from lora_kit.recipe_file import read_recipe

    return read_recipe(recipe, set_ or ())


def main() -> None:
    """Run the command line and exit with DESIGN's exit code; no traceback reaches a user without ``--debug``."""
    from lora_kit import events, stopwatch

    stopwatch.begin_with_process()
    debug = "--debug" in sys.argv
    # The hub's libraries report home and fetch kernels unless told not to.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # An output that cannot hold an arrow or a dash shows a question mark instead of ending the run.
    sys.stdout.reconfigure(errors="replace")
    listener = _terminal if int(os.environ.get("RANK", "0")) == 0 else (lambda event: None)
    # Told to end outside of training's loop (which saves a checkpoint): as by Ctrl-C, with no process left behind.
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        with events.listening(listener):
            code = app(standalone_mode=False)
        if code == 130:  # typer makes this of a KeyboardInterrupt
            raise KeyboardInterrupt
        code = code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        _terminal.close()
        typer.echo("interrupted", err=True)
        code = 130
    except BaseException as error:  # noqa: BLE001 - the one place where everything ends
        _terminal.close()
        code = _report(error, debug)
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:
        code = _report(error, debug)
    raise SystemExit(code)


def _report(error: BaseException, debug: bool) -> int:
    """Print one line for ``error`` (several for a recipe's problems) and return the exit code."""
    from typer.exceptions import TyperException

    from lora_kit.errors import LoraKitError

    if BrokenPipeError in (type(error), type(error.__context__)):
        # Nobody reads on (`| head`), of which typer and rich make a SystemExit(1). What is still in the buffer
        # goes nowhere, so that Python says nothing at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 130
    if isinstance(error, (SystemExit, typer.Exit)):
        code = getattr(error, "exit_code", getattr(error, "code", 0))
        return code if isinstance(code, int) else 1
    if isinstance(error, typer.Abort):
        typer.echo("interrupted", err=True)
        return 130
    if isinstance(error, TyperException):
        text = error.format_message()
        # Without arguments the message is the help page itself.
        typer.echo(text if "\n" in text else f"lora-kit: {text}; see lora-kit --help", err=True)
        return 2
    if debug:
        import traceback

        traceback.print_exception(error)
    if isinstance(error, LoraKitError):
        rank = int(os.environ.get("RANK", "0"))
        for line in error.lines() if rank == 0 or error.exit_code != 75 else ():  # the first says that all stopped
            typer.echo(f"process {rank}: {line}" if rank else line, err=True)
        return error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        typer.echo("lora-kit: out of memory; lower train.pack_tokens or data.max_tokens", err=True)
        return 6
    if isinstance(error, OSError):
        typer.echo(f"{error.filename or 'lora-kit'}: {error.strerror or error}; check space and permissions", err=True)
        return 6
    text = " ".join(str(error).split())[:300]
    typer.echo(f"lora-kit: {type(error).__name__}: {text}; a bug of ours: run again with --debug and report it",
               err=True)
    return 70


if __name__ == "__main__":
    main()
