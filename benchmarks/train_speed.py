"""The speed of `lora-kit train` beside that of TRL's SFTTrainer and of transformers' Trainer with peft.

    python benchmarks/train_speed.py --threads 1 2          SmolLM2-135M; hours, on a quiet machine
    python benchmarks/train_speed.py --trl-best bf16+padding-free --hf-best bf16    the grid's winners are known
    python benchmarks/train_speed.py --quick                a tiny random model, two steps

All train the same LoRA (rank 16 on all linear layers, alpha 32, no dropout, the same first values) on the same token
ids in the same order, eight rows a step, with AdamW at a constant 2e-4. Rows are instructions with their answers
where the data folder of the tests is at hand, functions of the standard library with their docstrings elsewhere,
or ``--data``. Each measurement is a fresh process; contestants take turns, ``--rounds`` times.

* **lora-kit**: `lora-kit train` on a recipe, as it is; with ``train.fast: []`` where the recipe has that field.
  ``--precision`` is the recipe's ``train.precision``; given several, the first is the one that targets are for.
* **TRL, its defaults**: SFTConfig of trl 1.16, read in its source: weights in fp32 under bf16 autocast (``bf16`` is
  True unless ``fp16`` is set), gradient checkpointing on (not reentrant, as transformers 5 does), padded to the
  longest row, neither packed nor padding-free, no compile, fused AdamW, ``loss_type: nll`` through a head that makes
  log-probabilities in tiles and never the logits: on CUDA of the trained positions alone, on a CPU of every position;
  entropy and accuracy of every step beside it. On a machine without a GPU SFTConfig() itself ends in an error, since
  transformers wants ``use_cpu=True`` for bf16: that is given. Set otherwise: steps, batch, learning rate, its
  schedule, the rows' own order, and no logs, which all cost nothing.
* **TRL, its best**: the fastest of a grid: fp32, bf16 (as above), bf16-weights (under autocast too) × checkpointing
  on and off × padded, length-grouped, padding-free, packing; then torch.compile on the three fastest of those and on
  the defaults. Every setting is tried for a few steps and printed; one that does not run, with its reason. Packing
  makes blocks of as many tokens as eight rows have on average, one a step. Grouping by length begins with the longest
  rows: its batches are taken as they are, in an order of which any few are like the epoch.
* **HF Trainer with peft**: without checkpointing, its default; fp32, bf16 or bf16-weights, whichever is fastest.

Printed for each: useful tokens/s (tokens of rows, padding not counted, over the seconds of the steps after the first
two: the fastest of every step over the rounds, and the median of rounds), trained tokens/s, the process's peak
resident memory, start (from the start of the process to the first step: imports, model, data, proofs), warm-up (what
the first two steps took longer than later ones a token, padding counted, and the compiling that lora-kit reports; the
largest of the rounds),
and how far the losses are from peft in fp32 with each row on its own: the largest relative difference of the first
``--loss-steps`` steps (of a rival: of those that it is measured for). Where the trainer chooses which rows share a step
there is no such figure.

``--check`` exits 1 when a target is missed: 6 times TRL's defaults, 4 times TRL's best, half of the peak memory of
TRL's best, losses within 2e-3. They are stated for a CPU with bf16 matrix units. With ``--quick`` speed and memory
are not judged. ``--json PATH`` writes the figures. Linux only (/proc). Needs trl (`make install-dev` brings it).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count, islice, product
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

TIMES_DEFAULTS, TIMES_BEST, MEMORY_SHARE, LOSS_DISTANCE = 6.0, 4.0, 0.5, 2e-3
WARM_UP_STEPS = 2
LIMIT_SECONDS = 3600
"""Longest that one process may take: compiling can hang."""
BATCH_SIZE, LEARNING_RATE, SEED, MAX_TOKENS = 8, 2e-4, 0, 1024
LORA = {"rank": 16, "alpha": 32}
CHARACTERS = range(250, 2401)
"""Length of a row that is taken: makes it 191 tokens of SmolLM2 on average where the rows are instructions."""
QUICK_CHARACTERS = range(40, 401)
"""The same where a byte is a token."""
OWN_ORDER = ("packing", "length-grouped")
"""Layouts for which the trainer chooses which rows share a step: it gets all rows, and its losses are its own."""
PRECISIONS = ("fp32", "bf16", "bf16-weights")
TRL_DEFAULTS = "bf16+checkpointing+padded"
_CHILD = Path(__file__).parent / "train_speed_contestants.py"
_numbers = count()


# ---- what is measured ------------------------------------------------------------------


def grid() -> list[str]:
    """Settings of SFTTrainer without torch.compile, by name."""
    return ["+".join(filter(None, (precision, checkpointing, layout))) for precision, checkpointing, layout in product(
        PRECISIONS, ("", "checkpointing"), ("padded", "length-grouped", "padding-free", "packing"))]


def options_of(name: str) -> dict[str, Any]:
    """What a name of :func:`grid`, with ``+compile`` or without, means; the defaults' name means to set nothing."""
    if name == TRL_DEFAULTS:
        return {}
    precision, *rest = name.split("+")
    found = {"precision": precision, "checkpointing": "checkpointing" in rest, "compile": "compile" in rest}
    layouts = [part for part in rest if part not in ("checkpointing", "compile")]
    if len(layouts) != 1 or name.removesuffix("+compile") not in grid():
        raise argparse.ArgumentTypeError(f"{name} is no setting; they are named like {TRL_DEFAULTS} or {grid()[2]}")
    return {**found, "layout": layouts[0], "own_order": layouts[0] in OWN_ORDER}


def write_rows(path: Path, characters: range) -> str:
    """Real conversations of one question and its answer as rows of ``messages``; returns what they are."""
    from tests.conftest import SHARED_DATA

    folder, found = SHARED_DATA / "self_instruct", "instructions and answers of self_instruct"
    if folder.is_dir():
        turns = _instructions(folder)
    else:
        turns, found = _functions(), "functions of the standard library and their docstrings"
    long_enough = (turn for turn in turns if sum(map(len, turn)) in characters)
    with open(path, "w", encoding="utf-8") as file:
        for question, answer in islice(long_enough, 400):
            file.write(json.dumps({"messages": [{"role": "user", "content": question},
                                                {"role": "assistant", "content": answer}]}) + "\n")
    return found


def _instructions(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            first = row["instances"][0]
            if first["output"].strip():
                yield "\n\n".join(filter(None, (row["instruction"], first["input"]))), first["output"]


def _functions() -> Iterator[tuple[str, str]]:
    from lora_kit.formats import python_docstrings

    for _, row in python_docstrings.records_of("stdlib"):
        yield f"{python_docstrings.INSTRUCTION}\n\n{row['code']}", row["docstring"]


# ---- one process -----------------------------------------------------------------------


def run_process(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The answer of a fresh process to ``request``, with ``start_seconds`` and ``peak_memory_bytes``.

    Where it gave none: ``died``, the last line that it wrote.
    """
    own = folder / f"process-{next(_numbers)}"
    own.mkdir()
    try:
        return _run_in(own, request)
    finally:
        if request["trainer"] != "prepare":  # whose rows all others read
            shutil.rmtree(own, ignore_errors=True)


def _run_in(own: Path, request: dict[str, Any]) -> dict[str, Any]:
    request = {**request, "folder": str(own), "answer": str(own / "answer.json")}
    (own / "request.json").write_text(json.dumps(request))
    threads = str(request["threads"])
    environment = {
        **os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(_ROOT), "PYTHONDONTWRITEBYTECODE": "1",
        # Compiled anew each time, so that the warm-up is that of a first run.
        "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor")}
    if request["trainer"] != "prepare":
        environment["LORA_KIT_CACHE"] = request["cache"]
    started, peak = time.time(), 0
    with open(own / "errors.txt", "w+", encoding="utf-8", errors="replace") as errors:
        process = subprocess.Popen([sys.executable, str(_CHILD), str(own / "request.json")], env=environment,
                                   stdout=subprocess.DEVNULL, stderr=errors, cwd=own)
        try:
            while process.poll() is None and time.time() - started < LIMIT_SECONDS:
                peak = max(peak, _peak_of(process.pid))
                time.sleep(0.2)
        finally:  # also when this program is interrupted
            over = process.poll() is None
            if over:
                process.kill()
                process.wait()
    if over:
        return {"died": f"took over {LIMIT_SECONDS} s"}
    if process.returncode or not (own / "answer.json").exists():
        return {"died": _last_words(process.returncode, (own / "errors.txt").read_text(errors="replace"))}
    answer = json.loads((own / "answer.json").read_text())
    answer["peak_memory_bytes"] = max(peak, answer["peak_memory_bytes"])
    if "first_step_at" in answer:
        answer["start_seconds"] = answer.pop("first_step_at") - started
    return answer


def _peak_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def _last_words(code: int, errors: str) -> str:
    lines = [line for line in errors.splitlines() if line.strip()]
    if code >= 0:
        return lines[-1].strip() if lines else f"ended with {code}"
    killed = "killed, most likely for lack of memory" if code == -signal.SIGKILL else f"ended by signal {-code}"
    return killed + (f"; its last line: {lines[-1].strip()}" if lines else "")


def speed(steps: list[dict[str, Any]], what: str = "tokens") -> float:
    """Tokens of ``steps`` a second."""
    return sum(step[what] for step in steps) / sum(step["seconds"] for step in steps)


def distance(losses: list[float], reference: list[float]) -> float | None:
    """Largest relative difference of the losses that both have; None without any."""
    return max((abs(mine - theirs) / abs(theirs) for mine, theirs in zip(losses, reference, strict=False)),
               default=None)


# ---- a contestant over the rounds ------------------------------------------------------


def summary(contestant: dict[str, Any], rounds: list[dict[str, Any]], num_steps: int,
            reference: list[float]) -> dict[str, Any]:
    """The figures of one contestant; ``died`` alone beside its name when a process of its gave no answer."""
    row = {key: contestant[key] for key in ("name", "role", "settings")}
    died = next((answer["died"] for answer in rounds if "died" in answer), None)
    if died is not None:
        return {**row, "died": died}
    kept = [answer["steps"][WARM_UP_STEPS:num_steps] or answer["steps"][-1:] for answer in rounds]
    fastest = [min(same, key=lambda step: step["seconds"]) for same in zip(*kept, strict=True)]
    warm_up = []
    for answer, steady in zip(rounds, kept, strict=True):
        first = answer["steps"][:min(WARM_UP_STEPS, len(answer["steps"]) - 1)]
        expected = sum(step["processed"] for step in first) / speed(steady, "processed")
        compiling = answer.get("warm_up_seconds", 0.0)
        warm_up.append(max(0.0, sum(step["seconds"] for step in first) - expected) + compiling)
    longest = max(rounds, key=lambda answer: len(answer["steps"]))
    losses = [step["loss"] for step in longest["steps"]]
    comparable = not contestant["request"]["options"].get("own_order")
    return {
        **row, "precision": longest.get("precision"), "useful_tokens_per_second": speed(fastest),
        "useful_tokens_per_second_median": statistics.median(map(speed, kept)),
        "trained_tokens_per_second": speed(fastest, "trained"), "seconds_per_step": statistics.mean(
            step["seconds"] for step in fastest),
        "peak_memory_bytes": max(answer["peak_memory_bytes"] for answer in rounds),
        "start_seconds": statistics.median(answer["start_seconds"] for answer in rounds),
        "warm_up_seconds": max(warm_up), "losses": losses, "num_losses": min(len(losses), len(reference)),
        "loss_distance": distance(losses, reference) if comparable else None,
        "tokens_of_steps": [step["tokens"] for step in longest["steps"]],
        "trained_tokens_of_steps": [step["trained"] for step in longest["steps"]],
        "said": sorted({text for answer in rounds for text in answer.get("said", ())}),
        "matrix_gflops": [answer["matrix_gflops"] for answer in rounds],
        "seconds_of_steps": [[step["seconds"] for step in answer["steps"]] for answer in rounds],
    }


class Benchmark:
    """The processes of one run of this program, in order."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        rows = arguments.data.resolve() if arguments.data else folder / "rows.jsonl"
        self.rows_are = str(arguments.data) if arguments.data else write_rows(
            rows, QUICK_CHARACTERS if arguments.quick else CHARACTERS)
        self.common = {"cache": str(folder / "cache"), "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE,
                       "recipe": self._recipe(rows)}
        self.data = self._process("prepare", tiny=arguments.quick, threads=max(arguments.threads),
                                  steps=max(arguments.steps, arguments.loss_steps))
        if "died" in self.data:
            sys.exit(f"the rows and the losses to compare with could not be made: {self.data['died']}")
        self.reference: list[float] = self.data.pop("losses")
        mean = BATCH_SIZE * self.data["num_tokens"] / self.data["num_rows"]
        self.common |= {key: self.data[key] for key in ("base", "data_dir", "num_rows")}
        self.common["block"] = max(self.data["longest"], round(mean))

    @staticmethod
    def _recipe(rows: Path) -> dict[str, Any]:
        return {"data": {"train": str(rows), "held_out_rows": 0, "max_tokens": MAX_TOKENS, "too_long": "drop",
                         "max_dropped": 0.5},
                "lora": LORA, "seed": SEED,
                "train": {"batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE, "schedule": "constant",
                          "warmup": 0.0, "stop_prompts": 0}}

    def _process(self, trainer: str, **request: Any) -> dict[str, Any]:
        return run_process({**self.common, "trainer": trainer, "clock": self.arguments.clock, **request}, self.folder)

    def ours(self) -> list[dict[str, Any]]:
        """lora-kit at each precision, with the fast path and, where the recipe can switch it off, without."""
        from lora_kit.recipe import TrainSection

        found = []
        for place, precision in enumerate(self.arguments.precision):
            for plain in (False, True) if "fast" in TrainSection.model_fields else (False,):
                options = {"precision": precision, **({"fast": []} if plain else {}),
                           **({"pack_tokens": self.arguments.pack_tokens} if self.arguments.pack_tokens else {})}
                found.append({
                    "name": f"lora-kit{', fast: []' if plain else ''} ({precision})", "settings": "as it is",
                    "role": "plain" if plain else "lora-kit" if place == 0 else "other precision",
                    "request": {"trainer": "lora-kit", "options": options}})
        return found

    def screened(self, trainer: str, names: list[str], num_threads: int) -> list[dict[str, Any]]:
        """Each of ``names`` for a few steps: tokens a second of its fastest step after the first (compiled: second).

        Where the trainer chose which rows share a step, of all its steps and of two more: they differ in length.
        """
        found = []
        for name in names:
            options = options_of(name) if trainer == "trl" else {"precision": name}
            skipped = 1 + bool(options.get("compile"))
            own_order = bool(options.get("own_order"))
            num_steps = self.arguments.screen_steps + bool(options.get("compile")) + 2 * own_order
            answer = self._process(trainer, options=options, threads=num_threads, steps=num_steps)
            entry = {"trainer": trainer, "settings": name, "died": answer.get("died")}
            if "died" not in answer:
                steps = answer["steps"][skipped:]
                entry |= {"useful_tokens_per_second": speed(steps) if own_order else max(
                              speed([step]) for step in steps),
                          "peak_memory_bytes": answer["peak_memory_bytes"]}
            found.append(entry)
            print(f"  {trainer:4} {name:46} " + (f"does not run: {entry['died']}" if entry["died"] else (
                f"{entry['useful_tokens_per_second']:7.1f} tokens/s  {entry['peak_memory_bytes'] / 1e9:5.2f} GB")),
                flush=True)
        return found

    def rivals(self, num_threads: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(contestants, what was screened to choose them)."""
        best, of_hf = self.arguments.trl_best, self.arguments.hf_best
        print(f"\nsettings tried, {_threads_text(num_threads)}, a few steps each", flush=True)
        tried: list[dict[str, Any]] = []
        if best is None:
            wanted = self.arguments.grid_precision
            tried += self.screened("trl", [name for name in grid() if name.split("+")[0] in wanted], num_threads)
            again = dict.fromkeys([*_in_order(tried)[:3], TRL_DEFAULTS])
            tried += self.screened("trl", [f"{name}+compile" for name in again], num_threads)
            best = next(iter(_in_order(tried)), None)
        if of_hf is None:
            tried_of_hf = self.screened("hf", list(PRECISIONS), num_threads)
            tried, of_hf = tried + tried_of_hf, next(iter(_in_order(tried_of_hf)), None)
        chosen = (("trl", "TRL, its defaults", TRL_DEFAULTS, "defaults"), ("trl", "TRL, its best", best, "best"),
                  ("hf", "HF Trainer with peft", of_hf, "hf"))
        return [{"name": name, "settings": settings, "role": role, "request": {
            "trainer": trainer, "options": options_of(settings) if trainer == "trl" else {"precision": settings}}}
            for trainer, name, settings, role in chosen if settings], tried

    def measure(self, num_threads: int, loss_steps: int) -> dict[str, Any]:
        """All contestants, taking turns."""
        rivals, tried = self.rivals(num_threads)
        contestants = [*self.ours(), *rivals]
        rounds: dict[str, list[dict[str, Any]]] = {each["name"]: [] for each in contestants}
        num_steps = self.arguments.steps
        for number in range(self.arguments.rounds):
            print(f"\nround {number + 1} of {self.arguments.rounds}, {_threads_text(num_threads)}", flush=True)
            for each in contestants:
                if any("died" in answer for answer in rounds[each["name"]]):
                    continue
                compared = number == 0 and not each["request"]["options"].get("own_order")
                longer = compared and each["request"]["trainer"] == "lora-kit"  # whose losses a target is set for
                answer = self._process(threads=num_threads, steps=max(num_steps, loss_steps if longer else 0),
                                       **each["request"])
                rounds[each["name"]].append(answer)
                print(f"  {each['name']:32} " + (answer.get("died") or "{:.1f} useful tokens/s".format(
                    speed(answer["steps"][WARM_UP_STEPS:num_steps] or answer["steps"][-1:]))), flush=True)
        return {"tried": tried, "contestants": [
            summary(each, rounds[each["name"]], num_steps, self.reference) for each in contestants]}


def _in_order(tried: list[dict[str, Any]]) -> list[str]:
    """Settings that ran, the fastest first."""
    ran = [entry for entry in tried if not entry["died"]]
    return [entry["settings"] for entry in sorted(ran, key=lambda entry: -entry["useful_tokens_per_second"])]


# ---- the targets -----------------------------------------------------------------------


def claims(by_threads: dict[str, dict[str, Any]], loss_steps: int, *, quick: bool = False) -> list[dict[str, Any]]:
    """The targets with ``met`` and the ``evidence``. What was not measured is not met."""
    found = []

    def claim(text: str, value: float | None, met: bool, shown: str) -> None:
        found.append({"claim": text, "met": value is not None and met,
                      "evidence": "not measured" if value is None else shown.format(value)})

    compared = []
    for threads, measured in by_threads.items():
        rows = {row["role"]: row for row in measured["contestants"] if "died" not in row}
        compared += [row for row in measured["contestants"] if row["role"] in ("lora-kit", "other precision")]

        def ratio(key: str, rival: str, rows: dict = rows) -> float | None:
            return rows["lora-kit"][key] / rows[rival][key] if {"lora-kit", rival} <= set(rows) else None

        for rival, target in () if quick else (("defaults", TIMES_DEFAULTS), ("best", TIMES_BEST)):
            times = ratio("useful_tokens_per_second", rival)
            claim(f"at least {target:g} times TRL's {rival} in useful tokens/s, {_threads_text(threads)}", times,
                  (times or 0) >= target, "{:.2f} times")
        share = None if quick else ratio("peak_memory_bytes", "best")
        if not quick:
            claim(f"at most {MEMORY_SHARE:g} of the peak memory of TRL's best, {_threads_text(threads)}", share,
                  (share or 1) <= MEMORY_SHARE, "{:.2f} of it")
    for name in dict.fromkeys(row["name"] for row in compared):
        distances = [row["loss_distance"] for row in compared if row["name"] == name and "died" not in row
                     and row["num_losses"] >= loss_steps]
        furthest = max(distances, default=None)
        claim(f"losses of {name} within {LOSS_DISTANCE:g} of fp32 over {loss_steps} steps", furthest,
              (1 if furthest is None else furthest) <= LOSS_DISTANCE, "{:.1e}")
    return found


def won_back(rows: dict[str, dict[str, Any]]) -> str | None:
    """After how many steps the fast path's longer warm-up is won back; None where that is not known."""
    if not {"lora-kit", "plain"} <= set(rows):
        return None
    fast, plain = rows["lora-kit"], rows["plain"]
    longer = (fast["start_seconds"] + fast["warm_up_seconds"]) - (plain["start_seconds"] + plain["warm_up_seconds"])
    saved = plain["seconds_per_step"] - fast["seconds_per_step"]
    if saved <= 0:
        return "the fast path saves nothing here"
    return (f"the fast path starts {max(0.0, longer):.1f} s later and saves {saved:.2f} s a step: "
            f"won back after {max(0.0, longer) / saved:.0f} steps")


# ---- what is printed -------------------------------------------------------------------


def _threads_text(threads: int | str) -> str:
    return "1 thread" if str(threads) == "1" else f"{threads} threads"


def machine() -> dict[str, Any]:
    """CPU, its matrix units, cores and the versions that matter."""
    from lora_kit import hardware, pipeline

    return {"cpu": hardware.cpu_model(), "cpu_bf16": hardware.cpu_supports_bf16(), "cores": hardware.usable_cores(),
            "versions": pipeline.versions(("torch", "transformers", "peft", "trl", "accelerate"))}


def table(rows: list[dict[str, Any]]) -> str:
    """The contestants as a Markdown table."""
    lines = [("training", "settings", "useful tokens/s", "median", "trained tokens/s", "peak GB", "start s",
              "warm-up s", "from fp32 losses")]
    for row in rows:
        if "died" in row:
            lines.append((row["name"], row["settings"], f"does not run: {row['died']}", *[""] * 6))
            continue
        off = row["loss_distance"]
        lines.append((
            row["name"], row["precision"] or row["settings"], f"{row['useful_tokens_per_second']:.0f}",
            f"{row['useful_tokens_per_second_median']:.0f}", f"{row['trained_tokens_per_second']:.0f}",
            f"{row['peak_memory_bytes'] / 1e9:.2f}", f"{row['start_seconds']:.1f}", f"{row['warm_up_seconds']:.1f}",
            "other order" if off is None else f"{off:.1e} ({row['num_losses']} steps)"))
    reasons = [line for line in lines if line[2].startswith("does not run")]
    widths = [max(len(line[at]) for line in lines if line not in reasons or at < 2) for at in range(len(lines[0]))]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in lines]
    return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *text[1:]])


def heading(figures: dict[str, Any]) -> str:
    """Where and on what the figures below were measured."""
    at, data = figures["machine"], figures["data"]
    versions = ", ".join(f"{name} {version}" for name, version in at["versions"].items())
    mean = data["num_tokens"] / data["num_rows"]
    lines = [f"{at['cpu']}, {at['cores']} cores; {versions}",
             f"rows: {figures['rows']}; {data['num_rows']} of them, {mean:.0f} tokens on average, "
             f"{data['num_trained'] / data['num_tokens']:.0%} trained, {BATCH_SIZE} a step"]
    if not at["cpu_bf16"]:
        lines.append("this CPU has no bf16 matrix units: bf16 is slower than fp32 on it, and the targets are stated "
                     "for a CPU that has them")
    if figures["settings"].get("clock") == "cpu":
        lines.append("--clock cpu: seconds of steps are CPU seconds of the process over its threads")
    if figures["quick"]:
        lines.append("--quick: a tiny random model; its figures say that this program works, and nothing of speed")
    return "\n".join(lines)


def show(figures: dict[str, Any]) -> None:
    """Print everything that was measured."""
    print("\n" + heading(figures))
    for threads, measured in figures["threads"].items():
        rows = measured["contestants"]
        print(f"\n{_threads_text(threads)}\n\n{table(rows)}\n")
        for row in rows:
            for text in row.get("said", ()):
                print(f"{row['name']} says: {text}")
        ours = won_back({row["role"]: row for row in rows if "died" not in row})
        if ours:
            print(ours)
        yardstick = [value for row in rows for value in row.get("matrix_gflops", ())]
        if yardstick:
            print(f"fp32 matrix products of 768 beside the measurements: {min(yardstick):.0f} to {max(yardstick):.0f} "
                  "GFLOP/s")
    if not figures["train_fast"]:
        print("\nthe recipe of this lora-kit has no train.fast: it was measured once, as it is")
    print()
    for entry in figures["claims"]:
        print(f"{'met   ' if entry['met'] else 'missed'} {entry['claim']}: {entry['evidence']}")


def _arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads, one table each")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant is measured")
    parser.add_argument("--steps", type=int, default=8, help=f"steps of a measurement, {WARM_UP_STEPS} of them warm-up")
    parser.add_argument("--loss-steps", type=int, default=20, help="steps of lora-kit whose losses are compared, in "
                        "the first round at the first number of threads; a rival's are as many as it is measured for")
    parser.add_argument("--screen-steps", type=int, default=3, help="steps of each setting of the grid; at least 2")
    parser.add_argument("--precision", nargs="+", default=["auto"], choices=("auto", "bf16", "fp32"), help="lora-kit's")
    parser.add_argument("--pack-tokens", type=int, metavar="N", help="lora-kit's tokens of a pass; default: its own")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: the process's CPU seconds over "
                        "its threads, for a machine that others work on too")
    parser.add_argument("--grid-precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="of TRL's "
                        "settings try these only: fp32 takes hours, and up to 16 GB, where bf16 is quick")
    parser.add_argument("--trl-best", metavar="NAME", help="TRL's best setting, from an earlier grid: no grid then")
    parser.add_argument("--hf-best", choices=PRECISIONS, help="the same of HF Trainer")
    parser.add_argument("--data", type=Path, metavar="FILE", help="rows of any format of lora-kit")
    parser.add_argument("--quick", action="store_true", help="a tiny random model, two steps, no grid")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    arguments = parser.parse_args(given)
    if arguments.trl_best:
        try:
            options_of(arguments.trl_best)
        except argparse.ArgumentTypeError as error:
            parser.error(str(error))
    if min(*arguments.threads, arguments.rounds, arguments.screen_steps - 1, arguments.steps - WARM_UP_STEPS) < 1:
        parser.error(f"--threads and --rounds are at least 1, --screen-steps 2, --steps {WARM_UP_STEPS + 1}")
    arguments.precision = list(dict.fromkeys(arguments.precision))
    if arguments.quick:
        arguments.threads, arguments.rounds, arguments.steps = [1], 1, 2
        arguments.loss_steps, arguments.trl_best, arguments.hf_best = 2, "fp32+padding-free", "fp32"
    return arguments


def main(given: list[str] | None = None) -> int:
    """Run as the module's docstring says."""
    arguments = _arguments(given)
    from lora_kit.recipe import TrainSection

    figures: dict[str, Any] = {
        "machine": machine(), "quick": arguments.quick, "train_fast": "fast" in TrainSection.model_fields,
        "settings": {"steps": arguments.steps, "warm_up_steps": WARM_UP_STEPS, "rounds": arguments.rounds,
                     "loss_steps": arguments.loss_steps, "batch_size": BATCH_SIZE, "learning_rate": LEARNING_RATE,
                     "seed": SEED, "lora": LORA, "precision": arguments.precision, "clock": arguments.clock}}
    with tempfile.TemporaryDirectory(prefix="train-speed-") as name:
        benchmark = Benchmark(arguments, Path(name))
        figures |= {"rows": benchmark.rows_are, "data": benchmark.data}
        print(heading(figures), flush=True)
        figures |= {"reference_losses": benchmark.reference, "threads": {}}
        for place, threads in enumerate(arguments.threads):
            figures["threads"][str(threads)] = benchmark.measure(
                threads, arguments.loss_steps if place == 0 else arguments.steps)
    figures["claims"] = claims(figures["threads"], arguments.loss_steps, quick=arguments.quick)
    show(figures)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(arguments.check and not all(entry["met"] for entry in figures["claims"]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # and the process under way with it
    sys.exit(main())
