"""Stage bench: how fast each artifact answers, and how much memory it holds while it does.

Each artifact is loaded in a fresh process from the files that a user would load. A warm-up at the full shape until its
times are stable, then ``bench.repeats`` repeats, or as many as ``bench.seconds`` allow, with prompts of random tokens,
every one different, so that no prefix cache answers; stop tokens are ignored and the number of generated tokens is
checked (``bench_sweep.py``). Then some prompts are answered one at a time, token by token, for latencies; and further
shapes where the recipe names them. A matrix product timed before and after shows whether the machine was equally fast
for all, and the bandwidth of main memory how near decoding comes to its limit. What cannot be measured here is a point
without figures that says why.
Reads the run's artifacts; writes ``bench/<artifact>.json`` and ``bench/bench.json``.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_kit import (
    bench_files,
    bench_serving,
    bench_sweep,
    energy,
    events,
    hardware,
    isolate,
    latency,
    repeats,
    units,
)
from lora_kit.errors import InternalError, MachineError
from lora_kit.recipe import BenchSection, Recipe
from lora_kit.rundir import Run, write_json
from lora_kit.types import Artifact, BenchPoint, Result

UNEVEN = 1.3
"""Ratio of the fastest to the slowest calibration from which the machine counts as not equally fast."""
COLUMNS = ("artifact", "engine", "size", "peak memory", "load", "first token", "prefill tok/s", "decode tok/s")
"""Titles of what :func:`row_of` gives. Load is from nothing to ready: importing the engine's libraries included."""
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "llama-cpp-python", "openvino-genai",
             "numpy")


def stage(recipe: Recipe, run: Run) -> Result:
    """Measure every artifact that ``recipe.bench`` names, one after the other.

    Raises:
        RecipeError: the recipe names an artifact that the run does not have.
    """
    bandwidth = hardware.measure_read_bandwidth(_threads(recipe.bench))
    names = recipe.bench.artifacts or [name for name, artifact in run.artifacts().items() if artifact.kind != "adapter"]
    artifacts = [run.artifact(name) for name in names]
    work, measured = run.work("bench"), []
    for index, artifact in enumerate(artifacts):
        events.tell(events.Progress(
            stage="bench", done=index, total=len(artifacts), unit="artifact", fields={"measuring": artifact.name},
            table=_so_far(measured, artifacts[index:])))
        point, evidence = measure(artifact, recipe.bench, recipe.seed)
        evidence["bandwidth_share"] = bandwidth_share(point, bandwidth)
        write_json(work / f"{artifact.name}.json", {"point": point.as_dict(), **evidence})
        measured.append((point, evidence))
    events.tell(events.Progress(stage="bench", done=len(artifacts), total=len(artifacts), unit="artifact"))
    points = [point for point, _ in measured]
    speeds = {point.artifact: evidence["calibration_gflops"] for point, evidence in measured
              if evidence["calibration_gflops"]}
    caution = uneven_machine(speeds)
    if caution:
        events.tell(events.Caution(text=caution))
    sweeps = {point.artifact: evidence["sweeps"] for point, evidence in measured if evidence["sweeps"]}
    serving = bench_serving.measure(recipe, run, artifacts)
    write_json(work / "bench.json", {
        "serving": serving,
        "points": [point.as_dict() for point in points],
        "calibration_gflops": speeds,
        "caution": caution,
        "latency": {point.artifact: evidence["latency"] for point, evidence in measured},
        "half_width": {point.artifact: evidence["half_width"] for point, evidence in measured},
        "joules_per_token": {point.artifact: evidence["joules_per_token"] for point, evidence in measured},
        "sweeps": sweeps,
        "goodput": recipe.bench.goodput,
        "read_bandwidth_bytes_per_second": bandwidth,
        "threads": _threads(recipe.bench),
        "machine": hardware.describe(),
        "versions": versions(),
    })
    for title, columns, rows in shown(measured, recipe.bench):
        events.tell(events.Table(title=title, columns=columns, rows=rows))
    for text in remarks(measured, recipe.bench):
        events.tell(events.Note(text=text))
    shares = {point.artifact: evidence["bandwidth_share"] for point, evidence in measured
              if evidence["bandwidth_share"] is not None}
    if shares:
        events.tell(events.Note(text=f"decoding reads the weights at this share of the {bandwidth / 1e9:.1f} GB/s that "
                                "main memory gives: " + ", ".join(
                                    f"{name} {share:.0%}" for name, share in shares.items())))
    for part in bench_serving.parts(serving):
        events.tell(part)
    return Result(summary=_summary(points), figures={"points": {point.artifact: point.as_dict() for point in points}})


def bench_artifact(artifact: Artifact, bench: BenchSection, *, seed: int = 0) -> BenchPoint:
    """Measure one artifact, in a run or outside of any, in a fresh process.

    Returns a point without figures, and with ``why_not``, when this machine cannot measure it.
    """
    return measure(artifact, bench, seed)[0]


def remarks(measured: Sequence[tuple[BenchPoint, dict[str, Any]]], bench: BenchSection) -> list[str]:
    """How sure the times are where seconds were given for them, and the energy where the machine counts it."""
    lines = []
    wide = {point.artifact: evidence["half_width"] for point, evidence in measured
            if evidence["half_width"] is not None}
    if bench.seconds and wide:
        lines.append(f"half of the 95 % interval of an answer's time ({repeats.NARROW:.0%} is narrow, in at most "
                     f"{bench.seconds:g} s): " + ", ".join(f"{name} {width:.1%}" for name, width in wide.items()))
    joules = {point.artifact: evidence["joules_per_token"] for point, evidence in measured
              if evidence["joules_per_token"] is not None}
    if joules:
        lines.append("energy of a generated token, with its share of the prompt and all that ran beside: " + ", ".join(
            f"{name} {units.number_text(value, 3)} J" for name, value in joules.items()))
    return lines


def bandwidth_share(point: BenchPoint, bandwidth: float) -> float | None:
    """Bytes of weights that decoding reads a second, once for each step of the batch, over ``bandwidth``.

    None where nothing was measured, or the model lay on a GPU. The KV cache is left out: at short contexts it is
    little.
    """
    if not point.decode_tokens_per_second or not point.size_bytes or point.device != "cpu":
        return None
    return point.decode_tokens_per_second / point.batch_size * point.size_bytes / bandwidth


def measure_artifact(
    artifact: dict[str, Any], *, prompt_tokens: int, new_tokens: int, batch_size: int, repeats: int, threads: int,
    seed: int, seconds: float | None = None, batch_sizes: Sequence[int] = (), depths: Sequence[int] = (),
    goodput: Sequence[str] = (), prefer: str | None = None,
) -> dict[str, Any]:
    """Load ``artifact`` in this process and time it; :func:`bench_artifact` calls this in a process of its own.

    Returns:
        engine, device, load_seconds, ``repeats`` (a list of what the engine's ``time_once`` gave), ``warm_ups``,
        ``half_width`` and ``joules`` of them (``bench_sweep.time_shape``), ``latency`` (what
        :func:`lora_kit.latency.figures` says of as many prompts as ``repeats``, one at a time, and every gap between
        their tokens), ``sweeps`` (``bench_sweep.sweep``), calibration_gflops (before, after), peak_device_bytes (None
        on a CPU).
    """
    from lora_kit.engines import open_engine

    limits, before = latency.parse_limits(goodput), hardware.measure_matrix_gflops()
    started = time.perf_counter()
    engine = open_engine(Artifact(**artifact), threads=threads, **({"prefer": prefer} if prefer else {}))
    load_seconds = time.perf_counter() - started
    try:
        num_batches = bench_sweep.MOST_WARM_UPS + bench_sweep.most_repeats(
            repeats, seconds, batch_size=batch_size, prompt_tokens=prompt_tokens)
        draw = partial(random_prompts, engine.tokenizer, engine.num_tokens)
        prompts = draw(num=batch_size * num_batches + repeats, length=prompt_tokens, seed=seed)
        alone, prompts = prompts[:repeats], prompts[repeats:]
        batches = [prompts[first : first + batch_size] for first in range(0, len(prompts), batch_size)]
        timed = bench_sweep.time_shape(engine, batches, new_tokens, least=repeats, seconds=seconds)
        try:
            traces = [latency.trace(partial(engine.tokens_after, prompt, new_tokens), prompt_tokens=prompt_tokens,
                                    new_tokens=new_tokens) for prompt in alone]
        except ValueError as error:
            raise InternalError(f"engine {engine.name}", str(error), "run again with --debug and report it") from None
        swept = bench_sweep.sweep(
            engine, draw, batch_size=batch_size, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
            batch_sizes=batch_sizes, depths=depths, least=repeats, seconds=seconds, limits=limits, seed=seed + 1)
        return {
            "engine": engine.name,
            "latency": {**latency.figures(traces, limits), "gaps": [gap for each in traces for gap in each.gaps]},
            "device": engine.device,
            "load_seconds": load_seconds,
            "repeats": timed["times"],
            "warm_ups": timed["warm_ups"],
            "half_width": timed["half_width"],
            "joules": timed["joules"],
            "sweeps": swept,
            "calibration_gflops": [before, hardware.measure_matrix_gflops()],
            "peak_device_bytes": _peak_device_bytes(engine.device),
        }
    finally:
        engine.close()


def random_prompts(tokenizer: Any, vocab_size: int, *, num: int, length: int, seed: int) -> list[list[int]]:
    """``num`` prompts of ``length`` random tokens, none special, no two with the same first token.

    A prefix cache compares from the first token on: with different ones it never has a hit. Where the
    vocabulary is smaller than ``num`` only whole prompts differ. Ids from ``vocab_size`` on, which some
    tokenizers have and their models do not, are left out.
    """
    import numpy as np

    special = set(tokenizer.all_special_ids)
    ordinary = np.array([token for token in range(min(len(tokenizer), vocab_size)) if token not in special])
    generator = np.random.default_rng(seed)
    prompts_NT = generator.choice(ordinary, size=(num, length))
    if len(ordinary) >= num:
        prompts_NT[:, 0] = generator.choice(ordinary, size=num, replace=False)
    prompts = prompts_NT.tolist()
    assert len({tuple(prompt) for prompt in prompts}) == num
    return prompts


def uneven_machine(gflops: dict[str, float]) -> str:
    """One line when the calibrations beside the artifacts are more than 30 % apart, else an empty text."""
    if not gflops or max(gflops.values()) <= UNEVEN * min(gflops.values()):
        return ""
    slow, fast = min(gflops, key=gflops.get), max(gflops, key=gflops.get)
    return (f"the machine was not equally fast while it measured: a matrix product ran at {gflops[slow]:.0f} GFLOP/s "
            f"beside {slow} and at {gflops[fast]:.0f} beside {fast}; compare speeds with care")


def row_of(point: BenchPoint) -> list[str]:
    """The point's texts under :data:`COLUMNS`; in place of figures that do not exist, dashes and the reason."""
    return [
        point.artifact,
        point.engine or "–",
        units.bytes_text(point.size_bytes),
        units.bytes_text(point.peak_memory_bytes),
        units.seconds_text(point.load_seconds),
        units.seconds_text(point.time_to_first_token_seconds),
        _rate_text(point.prefill_tokens_per_second),
        point.why_not or _rate_text(point.decode_tokens_per_second),
    ]


def _so_far(measured: Sequence[tuple[BenchPoint, dict[str, Any]]], waiting: Sequence[Artifact]) -> events.Table:
    """What :func:`shown` will begin with, with a row for each that is not measured yet."""
    rows = [row_of(point) for point, _ in measured]
    rows += [[artifact.name, "…" if place == 0 else ""] + [""] * (len(COLUMNS) - 2)
             for place, artifact in enumerate(waiting)]
    return events.Table(title="", columns=COLUMNS, rows=rows)


def shown(measured: Sequence[tuple[BenchPoint, dict[str, Any]]], bench: BenchSection) -> list[bench_files.Shown]:
    """Tables as (title, columns, rows): the artifacts side by side, then each sweep."""
    points = [point for point, _ in measured]
    shape = f"{points[0].batch_size} x {points[0].prompt_tokens} + {points[0].new_tokens} tokens" if points else ""
    sweeps = {point.artifact: evidence["sweeps"] for point, evidence in measured if evidence.get("sweeps")}
    return [(f"Speed at {shape}", COLUMNS, [row_of(point) for point in points]),
            *bench_sweep.tables(sweeps, latency.parse_limits(bench.goodput))]


def lines(measured: Sequence[tuple[BenchPoint, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every figure of every artifact, flat: first at the recipe's shape, then at each of a sweep."""
    found = []
    for point, evidence in measured:
        figures = {key: value for key, value in (evidence["latency"] or {}).items() if key != "gaps"}
        found.append({"sweep": "", "depth": 0, **point.as_dict(), **figures, "half_width": evidence.get("half_width"),
                      "joules_per_token": evidence.get("joules_per_token")})
        for name, each in evidence.get("sweeps", {}).items():
            found += [{"sweep": name, "artifact": point.artifact, "engine": point.engine, "threads": point.threads,
                       "device": point.device, **one} for one in each]
    return found


def write_files(folder: Path, bench: BenchSection, files: bench_files.Files, echo: Callable[[str], None]) -> None:
    """What the stage left in ``folder``, as ``files`` wants it."""
    whole = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    measured = []
    for fields in whole["points"]:
        evidence = json.loads((folder / f"{fields['artifact']}.json").read_text(encoding="utf-8"))
        measured.append((BenchPoint(**evidence.pop("point")), evidence))
    bench_files.write(files, everything=whole, lines=lines(measured), shown=shown(measured, bench), echo=echo,
                      notes=[*([whole["caution"]] if whole["caution"] else []), *remarks(measured, bench)])


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide speed."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def measure(artifact: Artifact, bench: BenchSection, seed: int = 0) -> tuple[BenchPoint, dict[str, Any]]:
    """The point of :func:`bench_artifact`, and what ``bench/<artifact>.json`` has beside it."""
    threads = _threads(bench)
    shape = {"prompt_tokens": bench.prompt_tokens, "new_tokens": bench.new_tokens, "batch_size": bench.batch_size,
             "repeats": bench.repeats, "threads": threads}
    more = {"seconds": bench.seconds, "batch_sizes": bench.batch_sizes, "depths": bench.depths,
            "goodput": bench.goodput, **({"prefer": bench.engine} if artifact.kind == "gguf" else {})}
    try:
        answer = isolate.call(
            "lora_kit.bench:measure_artifact", {"artifact": artifact.as_dict(), "seed": seed, **shape, **more},
            threads=threads, fresh=True,  # load time is from nothing to ready
        )
    except MachineError as error:
        events.tell(events.Caution(text=f"{artifact.name} was not measured: {error}"))
        return BenchPoint(
            artifact=artifact.name, engine="", load_seconds=None, time_to_first_token_seconds=None,
            prefill_tokens_per_second=None, decode_tokens_per_second=None, peak_memory_bytes=None,
            size_bytes=artifact.size_bytes, device="", why_not=str(error), **shape,
        ), {"repeats": [], "calibration_gflops": None, "latency": None, "half_width": None, "sweeps": {},
            "joules_per_token": None}
    value = answer.value
    shape["repeats"] = len(value["repeats"])
    peak = value["peak_device_bytes"] if value["peak_device_bytes"] is not None else answer.peak_memory_bytes
    point = BenchPoint(
        artifact=artifact.name, engine=value["engine"], load_seconds=value["load_seconds"],
        peak_memory_bytes=peak, size_bytes=artifact.size_bytes, device=value["device"],
        **shape, **rates(value["repeats"], bench),
    )
    return point, {
        "repeats": value["repeats"],
        "latency": value["latency"],
        "warm_ups": value["warm_ups"],
        "half_width": value["half_width"],
        "joules": value["joules"],
        "joules_per_token": energy.per_token(
            value["joules"], bench.batch_size * bench.new_tokens * len(value["repeats"])),
        "sweeps": value["sweeps"],
        "calibration_gflops": statistics.mean(value["calibration_gflops"]),
        "calibration_gflops_before_after": value["calibration_gflops"],
        "peak_process_bytes": answer.peak_memory_bytes,
        "peak_device_bytes": value["peak_device_bytes"],
    }


def rates(timed: list[dict[str, Any]], bench: BenchSection) -> dict[str, float]:
    """Medians over the repeats, as the fields of a BenchPoint.

    Prefill: prompt tokens of the batch over the seconds to its first tokens. Decode: the tokens after the
    first ones over the seconds after them, summed over the batch.
    """
    decoded = bench.batch_size * (bench.new_tokens - 1)
    return {
        "time_to_first_token_seconds": statistics.median(one["first_token_seconds"] for one in timed),
        "prefill_tokens_per_second": statistics.median(
            bench.batch_size * bench.prompt_tokens / one["prefill_seconds"] for one in timed),
        "decode_tokens_per_second": statistics.median(decoded / one["decode_seconds"] for one in timed),
    }


def _threads(bench: BenchSection) -> int:
    return bench.threads or hardware.usable_cores()


def _peak_device_bytes(device: str) -> int | None:
    """Peak bytes that torch held on a GPU; None where the model lay in main memory."""
    if not device.startswith("cuda"):
        return None
    import torch

    return torch.cuda.max_memory_allocated(device)


def _rate_text(value: float | None) -> str:
    return units.count_text(value) if value is not None and value >= 100 else units.number_text(value, 3)


def _summary(points: list[BenchPoint]) -> str:
    speeds = [f"{point.artifact} {_rate_text(point.decode_tokens_per_second)}" for point in points
              if not point.why_not]
    missing = [point.artifact for point in points if point.why_not]
    return ("decode tokens/s: " + ", ".join(speeds) if speeds else "nothing was measured") + (
        f"; not measured: {', '.join(missing)}" if missing else "")
