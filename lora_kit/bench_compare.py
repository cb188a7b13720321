"""Two artifacts against each other, in turns: is B slower than A?

Both are loaded, warmed up at the full shape until their times are stable, and then answer one after the other, each
pair in a new order and with prompts that neither has seen. The number of pairs is fixed before the first counts:
as many as fit into the seconds that are given. What is compared is the time of a whole answer, its prefill and its
decoding apart (``speed_ratio.py``).

Stored results are compared without running anything, where both are of one machine; with so few repeats they seldom
tell. Reads artifacts, or ``bench/<artifact>.json`` of runs; writes nothing.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_kit import bench, hardware, isolate
from lora_kit.bench_sweep import once
from lora_kit.errors import DataError
from lora_kit.speed_ratio import FEWEST_PAIRS, SpeedRatio, fails, of_pairs
from lora_kit.types import Artifact

COLUMNS = ("", "A", "B", "B is as fast", "interval", "verdict")
PARTS = {"prefill": "prefill_seconds", "decode": "decode_seconds"}
MOST_PAIRS = 200
STABLE = 0.1
"""A warm-up ends when two calls in a row are within this share of each other, or after MOST_WARM_UPS."""
MOST_WARM_UPS = 6


def compare(a: Artifact, b: Artifact, *, prompt_tokens: int, new_tokens: int, batch_size: int, seconds: float,
            threads: int | None, seed: int = 0) -> dict[str, Any]:
    """Measure both in a fresh process; see :func:`measure_both` for what comes back, and :func:`ratios`."""
    threads = threads or hardware.usable_cores()
    answer = isolate.call("lora_kit.bench_compare:measure_both", {
        "a": a.as_dict(), "b": b.as_dict(), "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
        "batch_size": batch_size, "seconds": seconds, "threads": threads, "seed": seed}, threads=threads, fresh=True)
    return answer.value


def measure_both(a: dict[str, Any], b: dict[str, Any], *, prompt_tokens: int, new_tokens: int, batch_size: int,
                 seconds: float, threads: int, seed: int) -> dict[str, Any]:
    """Load both artifacts in this process and time them in turns.

    Returns:
        ``a`` and ``b``: name, engine, warm_ups (seconds) and ``times``, what the engine's ``time_once`` gave for each
        pair; ``threads``, ``calibration_gflops`` (before, after), the shape.
    """
    from lora_kit.engines import open_engine

    before = hardware.measure_matrix_gflops()
    engines = [open_engine(Artifact(**each), threads=threads) for each in (a, b)]
    try:
        times, warm_ups = take_turns(engines, prompt_tokens=prompt_tokens, new_tokens=new_tokens,
                                     batch_size=batch_size, seconds=seconds, seed=seed)
        sides = {side: {"name": each["name"], "engine": engine.name, "warm_ups": warm, "times": taken}
                 for side, each, engine, warm, taken in zip("ab", (a, b), engines, warm_ups, times, strict=True)}
    finally:
        for engine in engines:
            engine.close()
    return {**sides, "threads": threads, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens,
            "batch_size": batch_size, "calibration_gflops": [before, hardware.measure_matrix_gflops()],
            "machine": hardware.describe(), "versions": bench.versions()}


def take_turns(engines: Sequence[Any], *, prompt_tokens: int, new_tokens: int, batch_size: int, seconds: float,
               seed: int, clock: Callable[[], float] = time.perf_counter
               ) -> tuple[list[list[dict[str, float]]], list[list[float]]]:
    """(what ``time_once`` gave for each pair, seconds of the warm-ups), for each of two engines.

    Raises:
        InternalError: an engine generated other than the tokens that were asked for.
    """
    most = MOST_PAIRS + MOST_WARM_UPS
    first = engines[0]
    vocabulary = min(engine.num_tokens for engine in engines)
    prompts = bench.random_prompts(first.tokenizer, vocabulary, num=batch_size * most, length=prompt_tokens, seed=seed)
    batches = iter([prompts[start:start + batch_size] for start in range(0, len(prompts), batch_size)])

    def timed(engine, batch) -> tuple[dict[str, float], float]:
        started = clock()
        return once(engine, batch, new_tokens), clock() - started

    warm_ups: list[list[float]] = [[], []]
    for _ in range(MOST_WARM_UPS):
        batch = next(batches)
        for engine, spent in zip(engines, warm_ups, strict=True):
            spent.append(timed(engine, batch)[1])
        if all(len(spent) > 1 and abs(spent[-1] - spent[-2]) <= STABLE * spent[-2] for spent in warm_ups):
            break
    num_pairs = max(FEWEST_PAIRS, min(MOST_PAIRS, int(seconds / sum(spent[-1] for spent in warm_ups))))
    times: list[list[dict[str, float]]] = [[], []]
    for pair in range(num_pairs):
        batch = next(batches)
        for side in ((0, 1), (1, 0))[pair % 2]:
            times[side].append(timed(engines[side], batch)[0])
    return times, warm_ups


def stored(path: Path) -> dict[str, Any]:
    """``bench/<artifact>.json`` of a run as :func:`measure_both` gives a side.

    Raises:
        DataError: it is no such file, or nothing was measured in it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        point, repeats = found["point"], found["repeats"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(str(path), "is no stored result of lora-kit bench",
                        "name a run's bench/ARTIFACT.json") from None
    if not repeats:
        raise DataError(str(path), f"holds no times: {point.get('why_not') or 'nothing was measured'}",
                        "measure it again")
    return {"name": point["artifact"], "engine": point["engine"], "times": repeats,
            "shape": [point[key] for key in ("batch_size", "prompt_tokens", "new_tokens", "threads")]}


def of_stored(a: Path, b: Path) -> dict[str, Any]:
    """Two stored results as :func:`measure_both` gives them.

    Raises:
        DataError: one of them is none, or they were taken at different shapes or with different threads, or on
            different machines.
    """
    sides = [stored(path) for path in (a, b)]
    if sides[0]["shape"] != sides[1]["shape"]:
        raise DataError("bench compare", f"{a} and {b} have other shapes or threads", "measure both alike")
    machines = [_machine_of(path) for path in (a, b)]
    if None in machines or machines[0] != machines[1]:
        raise DataError("bench compare", f"{a} and {b} are not known to be of one machine", "measure both here")
    batch_size, prompt_tokens, new_tokens, threads = sides[0]["shape"]
    return {"a": sides[0], "b": sides[1], "batch_size": batch_size, "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens, "threads": threads}


def _machine_of(path: Path) -> Any:
    """Processor and cores that ``bench.json`` beside ``path`` names; None where it does not."""
    try:
        machine = json.loads((path.parent / "bench.json").read_text(encoding="utf-8"))["machine"]
        return machine["cpu"], machine["cores"], [gpu["name"] for gpu in machine["gpus"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def parts(measured: dict[str, Any], found: dict[str, SpeedRatio]) -> Iterator[Any]:
    """What is shown: a table as (title, columns, rows), and lines."""
    shape = f"{measured['batch_size']} x {measured['prompt_tokens']} + {measured['new_tokens']} tokens"
    yield (f"A {measured['a']['name']} ({measured['a']['engine']}), B {measured['b']['name']} "
           f"({measured['b']['engine']}), {shape}, {measured['threads']} threads", COLUMNS, rows(measured, found))
    number = next(iter(found.values())).num_pairs
    turns = "taken in turns" if "calibration_gflops" in measured else "stored, not taken in turns"
    yield f"{number} pairs, {turns}; 95 % intervals of a trimmed mean of the pairs' logarithms"
    speeds = measured.get("calibration_gflops")
    if speeds and max(speeds) > bench.UNEVEN * min(speeds):
        yield (f"the machine was not equally fast: a matrix product ran at {speeds[0]:.0f} GFLOP/s before and at "
               f"{speeds[1]:.0f} after; pairs keep that out of the ratio")


def everything(measured: dict[str, Any], found: dict[str, SpeedRatio]) -> dict[str, Any]:
    """All times and the ratios."""
    return {**measured, "ratios": {part: {**asdict(ratio), "verdict": ratio.verdict}
                                   for part, ratio in found.items()}}


def lines(measured: dict[str, Any], found: dict[str, SpeedRatio]) -> list[dict[str, Any]]:
    """A line for each part: who was compared at which shape, median rates, the ratio with its interval."""
    shape = {key: measured[key] for key in ("batch_size", "prompt_tokens", "new_tokens", "threads")}
    return [{"part": part, "a": measured["a"]["name"], "b": measured["b"]["name"], **shape,
             "a_tokens_per_second": a, "b_tokens_per_second": b, **asdict(ratio), "verdict": ratio.verdict}
            for part, ratio in found.items() for a, b in [_rates(measured, part)]]


def ratios(times_a: Sequence[dict[str, float]], times_b: Sequence[dict[str, float]]) -> dict[str, SpeedRatio]:
    """How many times as fast B is, for ``prefill`` and ``decode``; pairs in the order in which they were taken.

    Raises:
        DataError: there are too few pairs.
    """
    if min(len(times_a), len(times_b)) < FEWEST_PAIRS:
        raise DataError("bench compare", f"{min(len(times_a), len(times_b))} pairs tell nothing",
                        f"{FEWEST_PAIRS} are the fewest: raise bench.repeats, or compare on the spot")
    number = min(len(times_a), len(times_b))
    return {part: of_pairs([each[key] for each in times_a[:number]], [each[key] for each in times_b[:number]])
            for part, key in PARTS.items()}


def rows(measured: dict[str, Any], found: dict[str, SpeedRatio]) -> list[tuple[str, ...]]:
    """A row under COLUMNS for each part: median tokens a second of both, and the ratio."""
    found_rows = []
    for part, ratio in found.items():
        found_rows.append((f"{part} tokens/s", *(f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
                                                 for rate in _rates(measured, part)),
                           f"{ratio.ratio:.3f} times", f"{ratio.low:.3f} to {ratio.high:.3f}", ratio.verdict))
    return found_rows


def _rates(measured: dict[str, Any], part: str) -> list[float]:
    """Median tokens a second of both sides."""
    tokens = measured["batch_size"] * (measured["prompt_tokens"] if part == "prefill" else measured["new_tokens"] - 1)
    return [tokens / statistics.median(each[PARTS[part]] for each in measured[side]["times"]) for side in "ab"]


def decided(found: dict[str, SpeedRatio], limit: float) -> tuple[bool | None, str]:
    """Whether some part of B is slower than A by more than ``limit``, and that in words."""
    outcomes = {part: fails(ratio, limit) for part, ratio in found.items()}
    failed = [part for part, outcome in outcomes.items() if outcome]
    if failed:
        worst = min(failed, key=lambda part: found[part].ratio)
        return True, f"{worst}: {found[worst].text()}; the limit is {limit:.1%} slower"
    unsure = [part for part, outcome in outcomes.items() if outcome is None]
    if unsure:
        return None, f"{' and '.join(unsure)}: cannot tell whether B is over {limit:.1%} slower; raise --seconds"
    return False, f"B is not over {limit:.1%} slower"
