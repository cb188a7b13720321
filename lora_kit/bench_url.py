"""A server behind a URL under load: latencies, throughput, and how many requests keep stated limits.

So many requests are under way at once, each followed by the next as soon as it is answered (as vLLM's
``--max-concurrency`` with all requests at hand). Before a load counts it is run until its answers take equally long
twice. All prompts differ. What the server counts (tokens, those from its prefix cache) is taken from its answers, and
said to be missing where it is; answers of another length than asked for, and requests that failed, are counted and
told, and no failed one is in any figure. Writes ``servers/<name>.json`` of a run where one is named.
"""

from __future__ import annotations

import itertools
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kit import bench_prompts, energy, events, hardware, latency, repeats, rundir
from lora_kit.bench_prompts import Prompt
from lora_kit.engines.url import Reply, Server, is_fault_of_all
from lora_kit.errors import LoraKitError, RecipeError
from lora_kit.latency import Limits, Trace
from lora_kit.rundir import Run, write_json
from lora_kit.units import count_text, number_text, seconds_text

FORMAT = 1
"""Version of what is written."""
FOLDER = "servers"
"""Folder of a run that holds what was measured with its prompts."""
LEAST_REQUESTS = 8
STABLE = 0.1
"""A warm-up ends when the middle answers of two rounds are within this share of each other, or after MOST_WARM_UPS."""
MOST_WARM_UPS = 4
BUSY = 0.7
"""Share of one core from which this program itself may be what is slow."""
_MOST_FAILURES = 3
"""Failures after which nothing more is tried where they are more than the answers."""
_CALIBRATED_AT = 128


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the server.

    Args:
        concurrency: requests under way at once, each a load of its own.
        depths: tokens of context before the prompt's ``prompt_tokens``, each a load of its own.
        requests: of each load; None: four times the concurrency, 8 at least.
        seconds: longest for each load; it ends before when the interval of its answers' times is narrow.
    """

    concurrency: tuple[int, ...] = (1,)
    depths: tuple[int, ...] = (0,)
    prompt_tokens: int = 128
    new_tokens: int = 32
    requests: int | None = None
    seconds: float | None = None
    limits: Limits | None = None

    def least(self, concurrency: int) -> int:
        """Requests of a load with so many at once."""
        return self.requests or max(LEAST_REQUESTS, 4 * concurrency)


@dataclass
class Round:
    """What came of some requests; filled by several threads."""

    replies: list[Reply] = field(default_factory=list)
    failures: list[LoraKitError] = field(default_factory=list)
    taken: int = 0
    seconds: float = 0.0
    cpu_share: float = 0.0


def measure(server: Server, load: Load, *, real: Sequence[Prompt] = (), seed: int = 0,
            clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Measure every load, one after the other.

    Args:
        real: prompts to ask in place of words at random.

    Returns:
        What :func:`tables` and :func:`notes` show and the record holds: the server, the shape, and ``loads``.

    Raises:
        RecipeError: depths are asked for with real prompts, or the server refuses what is asked.
        MachineError, ModelError: of a load no request was answered.
    """
    if real and load.depths != (0,):
        raise RecipeError("--depth", "has no effect on the prompts of a run", "leave out one of the two")
    if server.exposes_key:
        events.tell(events.Caution(text=f"the key goes to {server.url} unencrypted: use https"))
    words = _length(server, load, seed)
    limits = load.limits.text() if load.limits else None
    loads: list[dict[str, Any]] = []
    combined = list(itertools.product(load.depths, load.concurrency))
    unasked = itertools.cycle(real) if real else None
    for index, (depth, concurrency) in enumerate(combined):
        events.tell(events.Progress(stage="bench", done=index, total=len(combined), unit="load",
                                    fields={"at once": concurrency, **({"depth": depth} if depth else {})},
                                    table=_so_far({"limits": limits, "loads": loads})))
        asked = depth + load.prompt_tokens
        made = bench_prompts.of_words((words or bench_prompts.Length()).words(asked), f"{seed} {depth} {concurrency}")
        warm_ups = _warm_up(server, made, load, concurrency, clock)
        meter = energy.Meter()
        done = run(lambda prompt: server.ask(prompt.messages, load.new_tokens, prompt.tools), unasked or made,
                   concurrency=concurrency, least=load.least(concurrency), seconds=load.seconds, clock=clock)
        joules = meter.joules()
        found = figures(done, load)
        tokens = sum(answer[3] for answer in found["answers"])
        # Of a server elsewhere this machine's counters say nothing.
        used = energy.per_token(joules, tokens) if server.is_local and found["counted"] else None
        loads.append({"concurrency": concurrency, "depth": depth, "prompt_tokens_asked": None if real else asked,
                      "warm_ups": warm_ups, "joules_per_token": used, **found})
    events.tell(events.Progress(stage="bench", done=len(combined), total=len(combined), unit="load"))
    num_asked = sum(each["requests"] + each["failed"] for each in loads)
    return {
        "format": FORMAT, "url": server.url, "model": server.model, "software": server.software,
        "prompts": f"{len(real)} of a run" if real else "words at random", "new_tokens": load.new_tokens,
        "prompts_repeat": bool(real) and num_asked > len(real), "goes_past_stops": "ignore_eos" in server.asks,
        "limits": limits, "seconds": load.seconds, "loads": loads,
        "words": None if words is None or real else {"fixed": words.fixed, "each": words.each},
        "client": hardware.describe(), "server_is_local": server.is_local,
        "measured": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def run(ask: Callable[[Prompt], Reply], prompts: Iterator[Prompt], *, concurrency: int, least: int,
        seconds: float | None, clock: Callable[[], float] = time.perf_counter) -> Round:
    """Keep ``concurrency`` requests under way until ``repeats.enough`` of them are answered.

    Raises:
        LoraKitError: a request failed in a way in which all would, or none was answered.
    """
    found, lock, over = Round(), threading.Lock(), threading.Event()
    unexpected: list[BaseException] = []
    started, cpu = clock(), time.process_time()

    def wanted() -> Prompt | None:
        with lock:
            if over.is_set() or (seconds is None and found.taken >= least) or \
                    len(found.failures) >= max(_MOST_FAILURES, len(found.replies) + 1):
                return None
            if seconds is not None and repeats.enough([_whole(each) for each in found.replies], least=least,
                                                      spent=clock() - started, seconds=seconds):
                return None
            found.taken += 1
            return next(prompts)

    def work() -> None:
        try:
            while (prompt := wanted()) is not None:
                try:
                    reply = ask(prompt)
                except LoraKitError as error:
                    with lock:
                        found.failures.append(error)
                    if is_fault_of_all(error):
                        over.set()
                else:
                    with lock:
                        found.replies.append(reply)
        except BaseException as error:  # noqa: BLE001 - a thread's error is raised where it is waited for
            unexpected.append(error)
            over.set()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(concurrency)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)  # so that Ctrl-C is heard
    finally:
        over.set()
    found.seconds = clock() - started
    found.cpu_share = (time.process_time() - cpu) / found.seconds if found.seconds > 0 else 0.0
    if unexpected:
        raise unexpected[0]
    fatal = [error for error in found.failures if is_fault_of_all(error)]
    if fatal or not found.replies:
        raise (fatal or found.failures)[0]
    return found


def figures(done: Round, load: Load) -> dict[str, Any]:
    """What ``latency.figures`` says of a load, and what else is known of it.

    Returns:
        Besides those figures: ``half_width`` (of the mean time of an answer, as a share of it), ``failed`` and
        ``why_failed``, ``counted`` (whether the server counted its tokens; else pieces stand for them),
        ``other_length`` (answers that were not as long as asked for), ``prompt_tokens`` (least, middle, most),
        ``cached_share`` (of the prompts' tokens), ``tokens_per_piece``, ``client_cpu_share`` and ``answers`` (seconds
        to the first token, seconds per token, seconds in all, tokens).
    """
    replies = done.replies
    counted = all(reply.output_tokens for reply in replies)
    traces = [Trace(started=reply.started, token_times=reply.times, prompt_tokens=reply.prompt_tokens or 0,
                    num_tokens=reply.output_tokens if counted else None) for reply in replies]
    found: dict[str, Any] = latency.figures(traces, load.limits)
    lengths = [reply.prompt_tokens for reply in replies if reply.prompt_tokens is not None]
    cached = [reply.cached_tokens for reply in replies if reply.cached_tokens is not None]
    if len(lengths) < len(replies):
        found["input_tokens_per_second"] = None
    return {
        **found, "half_width": repeats.half_width([trace.end_to_end for trace in traces]),
        "failed": len(done.failures), "why_failed": str(done.failures[0]) if done.failures else "",
        "counted": counted,
        "other_length": sum(trace.output_tokens != load.new_tokens for trace in traces) if counted else None,
        "prompt_tokens": [min(lengths), statistics.median(lengths), max(lengths)] if lengths else None,
        "cached_share": sum(cached) / sum(lengths) if len(cached) == len(replies) == len(lengths) else None,
        "tokens_per_piece": sum(trace.output_tokens for trace in traces) / sum(len(each.times) for each in replies),
        "client_cpu_share": done.cpu_share,
        "answers": [[trace.first_token, trace.per_token, trace.end_to_end, trace.output_tokens] for trace in traces],
    }


def _length(server: Server, load: Load, seed: int) -> bench_prompts.Length | None:
    """How many tokens words come to for the server; its first requests, in which it is found what it takes."""
    def count(prompt: Prompt) -> int | None:
        return server.settle(prompt.messages, 2).prompt_tokens

    return bench_prompts.length_by(count, min(_CALIBRATED_AT, max(load.depths) + load.prompt_tokens), f"{seed} length")


def _warm_up(server: Server, prompts: Iterator[Prompt], load: Load, concurrency: int, clock: Callable[[], float]
             ) -> list[float]:
    """Seconds of the middle answer of each round."""
    middles: list[float] = []
    for _ in range(MOST_WARM_UPS):
        done = run(lambda prompt: server.ask(prompt.messages, load.new_tokens), prompts, concurrency=concurrency,
                   least=concurrency, seconds=None, clock=clock)
        middles.append(statistics.median(_whole(reply) for reply in done.replies))
        if len(middles) > 1 and abs(middles[-1] - middles[-2]) <= STABLE * middles[-2]:
            break
    return middles


def _whole(reply: Reply) -> float:
    return reply.times[-1] - reply.started


# ---- what is shown -----------------------------------------------------------------------

COLUMNS = ("at once", "depth", "requests", "first token p50", "p99", "gap p50", "p99", "per token", "answer p50", "±",
           "requests/s", "tokens/s")


def columns(record: dict[str, Any]) -> tuple[str, ...]:
    """Titles of what :func:`rows` gives."""
    kept = COLUMNS if any(load["depth"] for load in record["loads"]) else COLUMNS[:1] + COLUMNS[2:]
    return (*kept, "good/s") if record["limits"] else kept


def _so_far(record: dict[str, Any]) -> events.Table | None:
    return events.Table(title="", columns=columns(record), rows=rows(record)) if record["loads"] else None


def rows(record: dict[str, Any]) -> list[list[str]]:
    """A row for each load."""
    found = []
    for load in record["loads"]:
        row = [count_text(load["concurrency"]), count_text(load["depth"]), count_text(load["requests"]),
               seconds_text(load["first_token_p50"]), seconds_text(load["first_token_p99"]),
               seconds_text(load["gap_p50"]), seconds_text(load["gap_p99"]), seconds_text(load["per_token_mean"]),
               seconds_text(load["end_to_end_p50"]),
               "–" if load["half_width"] is None else f"{load['half_width']:.1%}",
               number_text(load["requests_per_second"], 3), number_text(load["output_tokens_per_second"], 3)]
        if "depth" not in columns(record):
            del row[1]
        found.append([*row, number_text(load["goodput"], 3)] if record["limits"] else row)
    return found


def lines(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure of every load, flat, beside whose it is."""
    found = []
    for load in record["loads"]:
        least, middle, most = load["prompt_tokens"] or (None, None, None)
        found.append({"url": record["url"], "model": record["model"], "prompts": record["prompts"],
                      "new_tokens_asked": record["new_tokens"], "limits": record["limits"], **load,
                      "prompt_tokens_least": least, "prompt_tokens_middle": middle, "prompt_tokens_most": most})
    return found


def title(record: dict[str, Any]) -> str:
    """What was asked of whom."""
    asked = sorted({load["prompt_tokens_asked"] for load in record["loads"]} - {None})
    shape = f"{' or '.join(map(str, asked))} + " if asked else "prompts of a run + "
    return f"{record['model']} at {record['url']}, {shape}{record['new_tokens']} tokens"


def notes(record: dict[str, Any]) -> list[str]:
    """What has to be known beside the figures, a line each."""
    loads, lines = record["loads"], []
    lengths = [load["prompt_tokens"] for load in loads if load["prompt_tokens"]]
    if lengths:
        middles = [middle for _, middle, _ in lengths]
        per_load = f", {number_text(min(middles))} to {number_text(max(middles))} in the middle of each load" \
            if max(middles) - min(middles) >= 1 else f", {number_text(middles[0])} in the middle"
        lines.append(f"prompts: {record['prompts']}, {min(each[0] for each in lengths)} to "
                     f"{max(each[2] for each in lengths)} tokens by the server's count{per_load}")
    else:
        lines.append(f"prompts: {record['prompts']}; the server does not say how many tokens they have")
    if not all(load["counted"] for load in loads):
        lines.append("the server gives no usage: tokens are not counted, and a piece of its stream is taken for one")
    else:
        other, num = sum(load["other_length"] for load in loads), sum(load["requests"] for load in loads)
        lines.append(f"answers: {num - other} of {num} have the {record['new_tokens']} tokens asked for, by the "
                     "server's count" + ("" if record["goes_past_stops"] else "; it does not take ignore_eos"))
        pieces = [load["tokens_per_piece"] for load in loads]
        if max(abs(each - 1) for each in pieces) > 0.05:
            lines.append(f"a piece of the stream has {min(pieces):.2f} to {max(pieces):.2f} tokens: gaps are between "
                         "pieces, not tokens")
    shares = [load["cached_share"] for load in loads]
    lines.append("prefix cache: " + (
        "the server does not say what it took from there" if None in shares else
        f"{max(shares):.1%} of the prompts' tokens at most came from there, by the server's count") + (
        "; prompts were asked more than once" if record["prompts_repeat"] else "; no prompt was asked twice"))
    if record["limits"]:
        lines.append(f"good/s: requests a second within {record['limits']}")
    wide = [load for load in loads if (load["half_width"] or 1.0) > repeats.NARROW]
    if record["seconds"] and wide:
        lines.append(f"±: half of the 95 % interval of an answer's time; wider than {repeats.NARROW:.0%} when the "
                     f"{record['seconds']:.0f} s of a load were spent")
    for load in loads:
        if load["failed"]:
            lines.append(f"{load['failed']} requests failed at {load['concurrency']} at once and are in no figure: "
                         f"{load['why_failed']}")
    joules = [load["joules_per_token"] for load in loads if load["joules_per_token"] is not None]
    if joules:
        lines.append(f"energy of a generated token, with its share of the prompt and all that ran beside: "
                     f"{number_text(min(joules), 3)} to {number_text(max(joules), 3)} J")
    busy = max(load["client_cpu_share"] for load in loads)
    if busy > BUSY:
        lines.append(f"this program took {busy:.0%} of a core itself: the server may be faster than it could see")
    return lines


def write(record: dict[str, Any], run: Run) -> Path:
    """Keep the record in the run; the newest of a server, model and kind of prompts stays."""
    kind = "prompts" if record["prompts"].endswith("of a run") else "words"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{record['url'].partition('//')[2]}-{record['model']}-{kind}").strip("-.")
    path = run.path / FOLDER / f"{name[:120]}.json"
    with run.locked(), rundir.writing(path):
        path.parent.mkdir(exist_ok=True)
        write_json(path, record)
    return path


def counts(text: str, name: str, *, least: int = 1) -> tuple[int, ...]:
    """``1,2,4`` as numbers in the order given.

    Raises:
        RecipeError: one is no number, is under ``least``, or comes twice.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,9}", part) for part in parts) or min(map(int, parts)) < least \
            or len(set(parts)) < len(parts):
        raise RecipeError(f"{name} {text}", f"is no list of different numbers from {least} on", f"write {name} 1,2,4")
    return tuple(map(int, parts))
