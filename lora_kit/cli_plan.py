"""The verbs that look ahead and compare: ``plan`` and ``bench compare``.

A part of the command line (``cli.py``), with the same rule: heavy imports stand inside the verbs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_kit.cli_options import (
    RUNS,
    CsvOption,
    DebugOption,
    JsonOption,
    MarkdownOption,
    RunsOption,
    SetOption,
    terminal,
)


def plan(
    recipe: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A recipe file.", show_default=False)] = None,
    on: Annotated[str | None, typer.Option("--on", metavar="DEVICE", show_default=False, help="Device to plan for: "
                                           "rtx4090, h100, m3-max-36gb, cpu ... Default: the one at hand.")] = None,
    gpus: Annotated[int, typer.Option(min=1, help="Devices that training is spread over.")] = 1,
    price: Annotated[float | None, typer.Option(min=0.0, show_default=False, help="Price of the device for an hour, in "
                                                "place of cost.price_per_hour.")] = None,
    write: Annotated[Path | None, typer.Option(metavar="FILE", show_default=False, help="Write the recipe with the "
                                               "changes that make it fit.")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="First measure this machine: five steps of this "
                                            "recipe, and its base answering.")] = False,
    accuracy: Annotated[bool, typer.Option("--accuracy", help="Without a recipe: forecasts of all runs beside what "
                                           "they measured, and learn from them.")] = False,
    runs: RunsOption = RUNS, set_: SetOption = None, debug: DebugOption = False,
) -> None:
    """Check a recipe and show what it will do: rows, tokens, steps, memory, time, cost."""
    from lora_kit import devices, pipeline, prepared
    from lora_kit.errors import RecipeError
    from lora_kit.events import Note, tell
    from lora_kit.plan import make_plan, precision_of, priced
    from lora_kit.recipe_file import read_recipe

    if accuracy and recipe is None:
        from lora_kit import plan_record

        _show_parts(plan_record.parts(runs))
        return
    if accuracy or recipe is None:
        raise RecipeError("lora-kit plan", "takes a recipe, or --accuracy without one", "lora-kit plan RECIPE")
    recipe_file, device = read_recipe(recipe, set_ or ()), devices.named(on)
    base = pipeline.check(recipe_file)
    if calibrate:
        from lora_kit import calibrate as measuring

        measuring.calibrate(recipe_file, precision_of(recipe_file.recipe, devices.named(None)))
    found = prepared.find(recipe_file.recipe, recipe_file.folder, base)
    if not found.exists:
        from lora_kit import data

        tell(Note(text="preparing the data, once"))
        data.prepare(recipe_file.recipe, found, base)
    made = make_plan(recipe_file.recipe, found, base, device=device, num_processes=gpus,
                     cost=priced(recipe_file.recipe, price))
    show_ledger(made.ledger)
    _show_parts(made.parts())
    if write:
        from lora_kit import advice

        advice.write(recipe_file, made.advice.changes if made.advice else [], write)
        typer.echo(f"wrote {write}")
    typer.echo(f"\nnext: lora-kit run {write or recipe}")


def bench_compare(
    a: Annotated[str, typer.Argument(metavar="A", show_default=False, help="What was there before: RUN/ARTIFACT, a "
                                     "model folder, a .gguf file, or a stored bench/ARTIFACT.json.")],
    b: Annotated[str, typer.Argument(metavar="B", show_default=False, help="What is to be judged, named alike.")],
    seconds: Annotated[float, typer.Option(min=1.0, help="How long to measure, loading and warm-up not counted.")] = 60,
    prompt_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens that are generated after it.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    threads: Annotated[int | None, typer.Option(help="CPU threads. Default: the machine's cores.")] = None,
    fail_on: Annotated[str | None, typer.Option(metavar="slower:PERCENT", show_default=False, help="Exit 1 when B is "
                                                "slower by more, 3 when that cannot be told.")] = None,
    json_: JsonOption = None, csv: CsvOption = None, markdown: MarkdownOption = None,
    runs: RunsOption = RUNS, debug: DebugOption = False,
) -> None:
    """Measure two artifacts in turns, or read two stored results: is B slower?"""
    from lora_kit import bench_compare as comparing
    from lora_kit import bench_files, pipeline, speed_ratio
    from lora_kit.errors import GateFailed, GateInconclusive, RecipeError

    limit = speed_ratio.parse_limit(fail_on) if fail_on else None
    are_stored = [name.endswith(".json") for name in (a, b)]
    if any(are_stored) and not all(are_stored):
        raise RecipeError("bench compare", "takes two stored results or two artifacts", "name both alike")
    if all(are_stored):
        measured = comparing.of_stored(Path(a), Path(b))
    else:
        measured = comparing.compare(
            pipeline.artifact_at(a, runs)[0], pipeline.artifact_at(b, runs)[0], prompt_tokens=prompt_tokens,
            new_tokens=new_tokens, batch_size=batch_size, seconds=seconds, threads=threads)
    found = comparing.ratios(measured["a"]["times"], measured["b"]["times"])
    files, parts = bench_files.Files(json=json_, csv=csv, markdown=markdown), list(comparing.parts(measured, found))
    if not files.take_the_output:
        _show_parts(parts)
    bench_files.write(
        files, everything=comparing.everything(measured, found), lines=comparing.lines(measured, found),
        shown=[part for part in parts if not isinstance(part, str)],
        notes=[part for part in parts if isinstance(part, str)], echo=typer.echo)
    if limit is not None:
        failed, why = comparing.decided(found, limit)
        if failed is None:
            raise GateInconclusive("bench compare", why)
        if failed:
            raise GateFailed("bench compare", why)
        typer.echo(why)


def _show_parts(parts) -> None:
    for part in parts:
        typer.echo(part) if isinstance(part, str) else terminal.table(*part)


def show_ledger(found: dict[str, Any]) -> None:
    from lora_kit import ledger

    splits = [split.replace("_", " ") for split in found["splits"]]
    terminal.table("ledger", ("", *splits), ledger.split_rows(found))
    if found["reasons"]:
        terminal.table("\nreasons", ledger.REASON_COLUMNS, ledger.reason_rows(found))
