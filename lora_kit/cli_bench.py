"""The verb ``bench``: of a run, of one artifact, or of a server.

A part of the command line (``cli.py``), with the same rule: heavy imports stand inside the verb.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_kit.cli_options import (
    RUNS,
    AgainOption,
    CsvOption,
    DebugOption,
    JsonOption,
    MarkdownOption,
    NoDepsOption,
    RunsOption,
    do_stage,
    terminal,
)

_LIST = "N,N"


def bench(
    target: Annotated[str | None, typer.Argument(
        metavar="RUN|ARTIFACT|URL", show_default=False,
        help="A run, RUN/ARTIFACT, a model or adapter folder, a .gguf file, or a server with OpenAI's API "
             "(http://HOST:PORT/v1). Default: the newest run.")] = None,
    runs: RunsOption = RUNS, no_deps: NoDepsOption = False, again: AgainOption = False,
    prompt_tokens: Annotated[int | None, typer.Option(min=2, show_default=False, help="Tokens of each prompt. Default: "
                                                      "128, or the recipe's.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=2, show_default=False, help="Tokens of each answer. Default: "
                                                   "32, or the recipe's.")] = None,
    depth: Annotated[str | None, typer.Option(metavar=_LIST, show_default=False, help="Tokens of context before the "
                                              "prompt, each number a row of its own.")] = None,
    batch_size: Annotated[str | None, typer.Option(metavar=_LIST, show_default=False, help="Prompts at once, each "
                                                   "number a row of its own. Not of a URL.")] = None,
    seconds: Annotated[float | None, typer.Option(min=1.0, show_default=False, help="Go on with each row until its "
                                                  "interval is narrow or these are spent.")] = None,
    goodput: Annotated[list[str] | None, typer.Option(
        metavar="ttft:TIME", show_default=False, help="Count requests a second that keep this limit on ttft (first "
        "token), tpot (a token after it) or e2el (the whole answer), e.g. ttft:500ms. Repeatable.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, show_default=False, help="CPU threads. Default: the machine's "
                                                "cores. Not of a URL.")] = None,
    model: Annotated[str | None, typer.Option(show_default=False, help="Of a URL: which model. Default: its only "
                                              "one.")] = None,
    concurrency: Annotated[str | None, typer.Option(metavar=_LIST, show_default=False, help="Of a URL: requests under "
                                                    "way at once, each number a row of its own. Default: 1.")] = None,
    requests: Annotated[int | None, typer.Option(min=1, show_default=False, help="Of a URL: requests of each row. "
                                                 "Default: four times those at once, 8 at least.")] = None,
    prompts_of: Annotated[Path | None, typer.Option(metavar="RUN", show_default=False, help="Of a URL: ask what this "
                                                    "run's evaluation asks, and keep the result in the run.")] = None,
    key_from: Annotated[str | None, typer.Option(metavar="VARIABLE", show_default=False, help="Of a URL: environment "
                                                 "variable that holds its key. Default: LORA_KIT_API_KEY.")] = None,
    engine: Annotated[Literal["llamacpp", "openvino", "hf"] | None, typer.Option(
        show_default=False, help="What runs GGUF files. Default: llamacpp; openvino is an extra.")] = None,
    speculative: Annotated[bool, typer.Option("--speculative", help="Of a run or its artifact: also measure "
                                              "speculative decoding by prompt lookup, as bench.speculative "
                                              "does.")] = False,
    assistant: Annotated[str | None, typer.Option(metavar="MODEL", show_default=False, help="For --speculative: a "
                                                  "smaller model with the same tokenizer that drafts too: an artifact "
                                                  "of the run, or as model.base.")] = None,
    retrieval: Annotated[int | None, typer.Option(metavar="K", min=1, show_default=False, help="Of a run or its "
                                                  "artifact: also measure what K passages before each question cost, "
                                                  "as bench.retrieval does.")] = None,
    adapters: Annotated[str | None, typer.Option(metavar="N,N", show_default=False, help="Of a run: also measure so "
                                                 "many adapters on one base, switched with each request, as "
                                                 "bench.adapters does.")] = None,
    json_: JsonOption = None, csv: CsvOption = None, markdown: MarkdownOption = None, debug: DebugOption = False,
) -> None:
    """Measure inference speed: of a run's artifacts, of one artifact, or of a server."""
    from lora_kit import bench_files, rundir
    from lora_kit.errors import RecipeError

    files = bench_files.Files(json=json_, csv=csv, markdown=markdown)
    of_all = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "depth": depth, "seconds": seconds,
              "goodput": goodput}
    of_url = {"model": model, "concurrency": concurrency, "requests": requests, "prompts_of": prompts_of,
              "key_from": key_from}
    of_artifact = {"batch_size": batch_size, "threads": threads, "no_deps": no_deps, "again": again,
                   "engine": engine, "speculative": speculative, "assistant": assistant, "retrieval": retrieval,
                   "adapters": adapters}
    is_url = bool(target) and target.startswith(("http://", "https://"))
    wrong = [name for name, value in (of_artifact if is_url else of_url).items() if value]
    if wrong:
        option = f"--{wrong[0].replace('_', '-')}"
        raise RecipeError(f"bench {target or ''}".strip(), f"{option} is " + (
            "not for a URL" if is_url else "for a URL (http://HOST:PORT/v1)"), f"leave out {option}")
    given = {name: value for name, value in (of_all | (of_url if is_url else of_artifact)).items() if value}
    if is_url:
        _of_server(target, given, files)
    elif target is None or rundir.is_run(Path(target)):
        _of_run(Path(target) if target else rundir.newest(runs), runs, given, files)
    else:
        _of_artifact(target, runs, given, files)


def _keys(given: dict[str, Any]) -> dict[str, Any]:
    """Options as keys of the recipe's bench section."""
    from lora_kit import latency
    from lora_kit.bench_url import counts

    latency.parse_limits(given.get("goodput", ()))
    keys = {name: given[name] for name in ("prompt_tokens", "new_tokens", "seconds", "goodput", "threads", "engine")
            if name in given}
    if "depth" in given:
        keys["depths"] = list(counts(given["depth"], "--depth", least=0))
    if "batch_size" in given:
        keys["batch_sizes"] = list(counts(given["batch_size"], "--batch-size"))
    return keys


def _of_run(path: Path, runs: Path, given: dict[str, Any], files: Any) -> None:
    from lora_kit import bench_files, pipeline, rundir

    opened, keys = rundir.open_run(path), _keys(given) | _serving_keys(given)
    if keys:
        opened = pipeline.serving(opened, keys)
    do_stage("bench", opened.path, runs, given.get("no_deps", False), given.get("again", False))
    if files != bench_files.Files():
        from lora_kit import bench

        bench.write_files(opened.stage_dir("bench"), opened.recipe.bench, files, typer.echo)


def _of_artifact(target: str, runs: Path, given: dict[str, Any], files: Any) -> None:
    from lora_kit import bench as bench_module
    from lora_kit import pipeline
    from lora_kit.errors import MachineError, RecipeError
    from lora_kit.recipe import BenchSection

    serving = _serving_keys(given)
    if serving:
        _serve(target, runs, serving, given, files)
        return
    section = BenchSection(**_keys(given))
    artifact, _ = pipeline.artifact_at(target, runs)
    if "engine" in given and artifact.kind != "gguf":
        raise RecipeError(f"bench {target}", "--engine is for a GGUF file", "leave it out")
    point, evidence = bench_module.measure(artifact, section)
    if point.why_not:
        raise MachineError(f"bench {target}", "nothing was measured", point.why_not)
    _show(bench_module.shown([(point, evidence)], section), bench_module.remarks([(point, evidence)], section), files,
          {"point": point.as_dict(), **evidence}, bench_module.lines([(point, evidence)]))


def _of_server(url: str, given: dict[str, Any], files: Any) -> None:
    from lora_kit import bench_prompts, bench_url, latency, rundir
    from lora_kit.engines import url as engine

    load = bench_url.Load(
        concurrency=bench_url.counts(given.get("concurrency", "1"), "--concurrency"),
        depths=bench_url.counts(given.get("depth", "0"), "--depth", least=0),
        prompt_tokens=given.get("prompt_tokens", 128), new_tokens=given.get("new_tokens", 32),
        requests=given.get("requests"), seconds=given.get("seconds"),
        limits=latency.parse_limits(given.get("goodput", ())))
    run = rundir.open_run(given["prompts_of"]) if "prompts_of" in given else None
    real = bench_prompts.of_run(run) if run else []
    server = engine.connect(url, model=given.get("model"), key_from=given.get("key_from", engine.KEY_FROM))
    record = bench_url.measure(server, load, real=real)
    notes = bench_url.notes(record)
    if run:
        notes.append(f"written to {bench_url.write(record, run)}")
    _show([(bench_url.title(record), bench_url.columns(record), bench_url.rows(record))], notes, files, record,
          bench_url.lines(record))


def _serving_keys(given: dict[str, Any]) -> dict[str, Any]:
    """Keys of the section bench that ask for prompts, with their values."""
    found: dict[str, Any] = {}
    if "assistant" in given:
        found["speculative.assistant"] = given["assistant"]
    elif "speculative" in given:
        found["speculative"] = {}
    if "retrieval" in given:
        found["retrieval.passages"] = given["retrieval"]
    if "adapters" in given:
        from lora_kit.bench_url import counts

        found["adapters"] = list(counts(given["adapters"], "--adapters"))
    return found


def _serve(target: str, runs: Path, serving: dict[str, Any], given: dict[str, Any], files: Any) -> None:
    """Measure what ``serving`` asks for of one artifact of a run, and show it; nothing is written."""
    from lora_kit import bench_files, pipeline
    from lora_kit import bench_serving as measuring
    from lora_kit.errors import RecipeError

    shape = [name for name in _keys(given) if name != "threads"]
    if shape or files != bench_files.Files():
        raise RecipeError(f"bench {target}", "takes no shape and writes no file where it asks a run's prompts",
                          "leave out --speculative, --assistant, --retrieval and --adapters, or the other options")
    artifact, run = pipeline.artifact_at(target, runs)
    if run is None:
        raise RecipeError(f"bench {target}", "lies in no run, whose prompts could be asked",
                          "name RUN/ARTIFACT, or leave out what asks for prompts")
    threads = {"threads": given["threads"]} if "threads" in given else {}
    run = pipeline.serving(run, serving | threads, keep=False)
    only = [key.partition(".")[0] for key in serving]
    for event in measuring.parts(measuring.measure(run.recipe, run, [artifact], only=only)):
        terminal(event)


def _show(tables: Any, notes: list[str], files: Any, everything: Any, lines: list[dict[str, Any]]) -> None:
    from lora_kit import bench_files

    tables = list(tables)
    if not files.take_the_output:
        for title, columns, rows in tables:
            terminal.table(title, columns, rows)
        for note in notes:
            typer.echo(note)
    bench_files.write(files, everything=everything, lines=lines, shown=tables, notes=notes, echo=typer.echo)
