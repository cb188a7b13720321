"""The verb ``bench``: of a run, of one artifact, or of a server.

A part of the command line (``cli.py``), with the same rule: heavy imports stand inside the verb.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lora_kit.cli_options import RUNS, AgainOption, DebugOption, NoDepsOption, RunsOption, do_stage, terminal


def bench(
    target: Annotated[str | None, typer.Argument(
        metavar="RUN|ARTIFACT|URL", show_default=False,
        help="A run, RUN/ARTIFACT, a model or adapter folder, a .gguf file, or a server with OpenAI's API "
             "(http://HOST:PORT/v1). Default: the newest run.")] = None,
    runs: RunsOption = RUNS, no_deps: NoDepsOption = False, again: AgainOption = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads, for an ARTIFACT.")] = None,
    model: Annotated[str | None, typer.Option(show_default=False, help="Of a URL: which model. Default: its only "
                                              "one.")] = None,
    concurrency: Annotated[str | None, typer.Option(metavar="N,N", show_default=False, help="Of a URL: requests under "
                                                    "way at once, each number a load of its own. Default: 1.")] = None,
    depth: Annotated[str | None, typer.Option(metavar="N,N", show_default=False, help="Of a URL: tokens of context "
                                              "before the prompt, each number a load of its own. Default: 0.")] = None,
    prompt_tokens: Annotated[int | None, typer.Option(min=2, show_default=False, help="Of a URL: tokens of each "
                                                      "prompt. Default: 128.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=2, show_default=False, help="Of a URL: tokens of each answer. "
                                                   "Default: 32.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, show_default=False, help="Of a URL: requests of each load. "
                                                 "Default: twice those at once, 8 at least.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1.0, show_default=False, help="Of a URL: go on with each load "
                                                  "until its interval is narrow or these are spent.")] = None,
    goodput: Annotated[list[str] | None, typer.Option(
        metavar="ttft:TIME", show_default=False, help="Of a URL: count requests a second that keep this limit on ttft "
        "(first token), tpot (a token after it) or e2el (the whole answer), e.g. ttft:500ms. Repeatable.")] = None,
    prompts_of: Annotated[Path | None, typer.Option(metavar="RUN", show_default=False, help="Of a URL: ask what this "
                                                    "run's evaluation asks, and keep the result in the run.")] = None,
    key_from: Annotated[str | None, typer.Option(metavar="VARIABLE", show_default=False, help="Of a URL: environment "
                                                 "variable that holds its key. Default: LORA_KIT_API_KEY.")] = None,
    speculative: Annotated[bool, typer.Option("--speculative", help="Of a run or its artifact: also measure "
                                              "speculative decoding by prompt lookup, as bench.speculative "
                                              "does.")] = False,
    assistant: Annotated[str | None, typer.Option(metavar="MODEL", show_default=False, help="For --speculative: a "
                                                  "smaller model with the same tokenizer that drafts too: an artifact "
                                                  "of the run, or as model.base.")] = None,
    debug: DebugOption = False,
) -> None:
    """Measure inference speed: of a run's artifacts, of one artifact, or of a server."""
    from lora_kit import rundir
    from lora_kit.errors import MachineError, RecipeError

    of_url = {"--model": model, "--concurrency": concurrency, "--depth": depth, "--prompt-tokens": prompt_tokens,
              "--new-tokens": new_tokens, "--requests": requests, "--seconds": seconds, "--goodput": goodput,
              "--prompts-of": prompts_of, "--key-from": key_from}
    serving = _serving_keys(speculative, assistant)
    if target and target.startswith(("http://", "https://")):
        if threads or no_deps or again or serving:
            raise RecipeError(f"bench {target}", "is a server: --threads, --no-deps, --again, --speculative and "
                              "--assistant are not for it", "leave them out")
        _of_server(target, {name: value for name, value in of_url.items() if value is not None})
        return
    given = [name for name, value in of_url.items() if value]
    if given:
        raise RecipeError("bench", f"{given[0]} is for a URL", "name a server, or set the bench section of the recipe")
    if target is None or rundir.is_run(Path(target)):
        path = Path(target) if target else None
        if serving:
            from lora_kit import pipeline

            path = pipeline.serving(rundir.open_run(path or rundir.newest(runs)), serving).path
        do_stage("bench", path, runs, no_deps, again)
        return
    if serving:
        _serve(target, runs, serving, threads)
        return
    from lora_kit import bench as bench_module
    from lora_kit import pipeline
    from lora_kit.recipe import BenchSection

    artifact, _ = pipeline.artifact_at(target, runs)
    point = bench_module.bench_artifact(artifact, BenchSection(threads=threads))
    if point.why_not:
        raise MachineError(f"bench {target}", "nothing was measured", point.why_not)
    terminal.table("", bench_module.COLUMNS, [bench_module.row_of(point)])


def _of_server(url: str, given: dict[str, Any]) -> None:
    from lora_kit import bench_prompts, bench_url, latency, rundir
    from lora_kit.engines import url as engine

    load = bench_url.Load(
        concurrency=bench_url.counts(given.get("--concurrency", "1"), "--concurrency"),
        depths=bench_url.counts(given.get("--depth", "0"), "--depth", least=0),
        prompt_tokens=given.get("--prompt-tokens", 128), new_tokens=given.get("--new-tokens", 32),
        requests=given.get("--requests"), seconds=given.get("--seconds"),
        limits=latency.parse_limits(given.get("--goodput", ())))
    run = rundir.open_run(given["--prompts-of"]) if "--prompts-of" in given else None
    real = bench_prompts.of_run(run) if run else []
    server = engine.connect(url, model=given.get("--model"), key_from=given.get("--key-from", engine.KEY_FROM))
    record = bench_url.measure(server, load, real=real)
    terminal.table(bench_url.title(record), bench_url.columns(record), bench_url.rows(record))
    for line in bench_url.notes(record):
        typer.echo(line)
    if run:
        typer.echo(f"written to {bench_url.write(record, run)}")


def _serving_keys(speculative: bool, assistant: str | None) -> dict[str, Any]:
    """Keys of the section bench that the options stand for, with their values."""
    found: dict[str, Any] = {}
    if assistant:
        found["speculative.assistant"] = assistant
    elif speculative:
        found["speculative"] = {}
    return found


def _serve(target: str, runs: Path, given: dict[str, Any], threads: int | None) -> None:
    """Measure what the options ask for of one artifact of a run, and show it; nothing is written."""
    from lora_kit import bench_serving as measuring
    from lora_kit import pipeline
    from lora_kit.errors import RecipeError

    artifact, run = pipeline.artifact_at(target, runs)
    if run is None:
        raise RecipeError(f"bench {target}", "lies in no run, whose prompts could be asked",
                          "name RUN/ARTIFACT, or leave out what asks for prompts")
    run = pipeline.serving(run, given | ({"threads": threads} if threads else {}), keep=False)
    only = [key.partition(".")[0] for key in given]
    for event in measuring.parts(measuring.measure(run.recipe, run, [artifact], only=only)):
        terminal(event)
