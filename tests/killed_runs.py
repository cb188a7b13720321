"""Trainings that are killed (kill -9) and go on: in children forked of one process that has imported everything.

A child says over a pipe where it is: its start, each step, evaluation and save. Its parent kills it, at a moment after
one of those; or it kills itself before one of the file operations of a save, so that every boundary of the save can be
hit. Nothing of the child runs after that. Then another child goes on to the end, and the bytes are compared.

Writes below the folder that it is given. Forks, so: Linux, one thread, nothing trained in this process before.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import tiny, tiny_run

STEPS, SAVE_EVERY, STEPS_OF_EPOCH = 13, 3, 5
KINDS = {
    "plain": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}, "train": {"fast": [], "packing": False}},
    "fast": {"lora": {"rank": 4, "alpha": 8}, "train": {"keep": "best"}},
}
"""Two trainings: plain peft with padding and dropout, and the fast path with packing that keeps the best adapter."""
SECONDS_AT_MOST = 300.0


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where a child dies: ``seconds`` after it has said ``after``, or before file operation ``boundary`` of a save.

    ``after`` is begin, step N, eval N, save N (the N-th of this process) or saved N.
    """

    after: str
    seconds: float = 0.0
    boundary: int | None = None


@dataclass(frozen=True, kw_only=True)
class Lived:
    """How a child ended (0, or minus the signal's number), and what it said, with seconds since its start."""

    code: int
    said: list[tuple[str, float]]

    def moment(self, text: str) -> float:
        return next(seconds for said, seconds in self.said if said == text)

    def last_step(self) -> int:
        return max((int(said.split()[1]) for said, _ in self.said if said.startswith("step ")), default=0)


def make_place(folder: Path, kind: str) -> Path:
    """The recipe of ``kind`` in ``folder`` with its rows and model."""
    recipe = folder / "tiny.yaml"
    if not recipe.exists():
        tiny.save_model(folder / "model")
        tiny_run.write_rows(folder / "rows.jsonl", 24)
        train = {**tiny_run.SECTIONS["train"], "steps": STEPS, "micro_batch_size": 2, "save_every": SAVE_EVERY,
                 "eval_every": 4, "stop_prompts": 2, "stop_within": 8, **KINDS[kind]["train"]}
        data = {"train": "rows.jsonl", "held_out_rows": 4}
        tiny_run.write_recipe(folder, "./model", data=data, train=train, lora=KINDS[kind]["lora"])
    return recipe


def import_all() -> None:
    """What a training imports, so that forked children need not."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from lora_kit import checkpoint, data, pipeline, stop_rate, train  # noqa: F401


def live(recipe: Path, runs: Path, cut: Cut | None = None) -> Lived:
    """Fork a child that trains ``recipe`` in ``runs``, going on where there is something, and kill it at ``cut``."""
    runs.mkdir(parents=True, exist_ok=True)
    reading, writing = os.pipe()
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.close(reading)
            with open(runs / "output.txt", "ab", buffering=0) as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.environ["LORA_KIT_CACHE"] = str(recipe.parent / "cache")
            _train(recipe, runs, lambda text: os.write(writing, f"{text}\n".encode()), cut)
            code = 0
        except BaseException as error:  # noqa: BLE001 - a child that is left to live would be a second parent
            traceback.print_exc()
            code = getattr(error, "exit_code", 70)
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writing)
    said: list[tuple[str, float]] = []
    kills_at, waiting = None, ""
    try:
        while True:
            left = started + SECONDS_AT_MOST - time.monotonic()
            if left < 0:
                raise TimeoutError(f"a training took over {SECONDS_AT_MOST:.0f} s; see {runs}/output.txt")
            if kills_at is not None:
                left = max(0.0, kills_at - time.monotonic())
            if not select.select([reading], [], [], left)[0]:
                if kills_at is not None:
                    os.kill(child, signal.SIGKILL)
                    kills_at = None
                continue
            block = os.read(reading, 4096)
            if not block:
                break
            *lines, waiting = (waiting + block.decode()).split("\n")
            now = time.monotonic()
            said += [(line, now - started) for line in lines]
            if cut is not None and cut.boundary is None and cut.after in lines:
                kills_at = now + cut.seconds
    finally:
        os.close(reading)
        _, status = os.waitpid(child, 0)
    return Lived(code=os.waitstatus_to_exitcode(status), said=said)


def _train(recipe: Path, runs: Path, say: Callable[[str], Any], cut: Cut | None) -> None:
    from lora_kit import checkpoint, events, pipeline, train

    say("begin")
    state = {"saves": 0, "operations": 0, "counting": False}
    save, evaluate = checkpoint.save, train.evaluate_loss

    def watched_save(place, *arguments, **options):
        if place.name == ".rehearsal":
            return save(place, *arguments, **options)
        state["saves"] += 1
        say(f"save {state['saves']}")
        state["operations"], state["counting"] = 0, True
        try:
            return save(place, *arguments, **options)
        finally:
            state["counting"] = False
            say(f"saved {state['saves']} after {state['operations']} operations")

    def watched_evaluation(*arguments, **options):
        state["evaluations"] = state.get("evaluations", 0) + 1
        say(f"eval {state['evaluations']}")
        return evaluate(*arguments, **options)

    def watch(event: str, arguments: tuple) -> None:
        if state["counting"] and event.partition(".")[0] in ("open", "os", "shutil"):
            state["operations"] += 1
            if (cut is not None and cut.boundary == state["operations"] - 1
                    and cut.after == f"save {state['saves']}"):
                os.kill(os.getpid(), signal.SIGKILL)

    def listen(event) -> None:
        if isinstance(event, events.Progress):
            say(f"step {event.done}")

    checkpoint.save, train.evaluate_loss = watched_save, watched_evaluation
    sys.addaudithook(watch)
    with events.listening(listen):
        pipeline.run_recipe(tiny_run.read(recipe), runs_dir=runs, until="train")
    say("done")


def ending(runs: Path) -> dict[str, str]:
    """SHA-256 of what the one training under ``runs`` must share with an uninterrupted one: adapter, metrics, and the
    last checkpoint's adapter and optimizer. Missing files are left out."""
    [run] = runs.glob("*/*/train")
    last = sorted((run / "checkpoints").glob("step-*"))[-1:]
    files = {"adapter": run / "adapter" / "adapter_model.safetensors", "metrics": run / "metrics.jsonl"}
    for folder in last:
        files |= {f"{folder.name} {stem}": folder / f"{stem}.safetensors" for stem in ("adapter", "optimizer")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items() if path.exists()}


def newest_step(runs: Path) -> int:
    """Step of the newest checkpoint under ``runs``, 0 without one."""
    return max((int(path.name.removeprefix("step-")) for path in runs.glob("*/*/train/checkpoints/step-*")), default=0)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """An uninterrupted training: its recipe, how it lived, its bytes, and file operations of each save."""

    recipe: Path
    lived: Lived
    ending: dict[str, str]

    @property
    def operations(self) -> list[int]:
        return [int(said.split()[3]) for said, _ in self.lived.said if said.startswith("saved ")]


def make_reference(folder: Path, kind: str) -> Reference:
    """Train ``kind`` in ``folder`` without interruption, after one training that prepares the data."""
    recipe = make_place(folder, kind)
    for name in ("first", "reference"):
        shutil.rmtree(folder / name, ignore_errors=True)
        lived = live(recipe, folder / name)
        assert lived.code == 0, (folder / name / "output.txt").read_text()[-3000:]
    found = ending(folder / "reference")
    assert len(found) == 4 and found == ending(folder / "first"), "two uninterrupted trainings differ"
    return Reference(recipe=recipe, lived=lived, ending=found)


def kill_and_go_on(reference: Reference, runs: Path, cuts: list[Cut]) -> dict[str, Any]:
    """Kill a training at each of ``cuts`` in turn, let it go on to its end, and compare.

    Returns:
        ``equal``; ``differ`` (names of what is not); ``codes`` of all processes; ``lost_steps`` (the most that a kill
        has thrown back).
    """
    shutil.rmtree(runs, ignore_errors=True)
    codes, lost = [], 0
    for cut in cuts:
        lived = live(reference.recipe, runs, cut)
        codes.append(lived.code)
        if list(runs.glob("*/*/train")):
            lost = max(lost, lived.last_step() - newest_step(runs))
    codes.append(live(reference.recipe, runs).code)
    try:
        found = ending(runs)
    except ValueError:
        found = {}
    differ = sorted(name for name in reference.ending.keys() | found.keys()
                    if found.get(name) != reference.ending.get(name))
    if not differ and codes[-1] == 0:
        shutil.rmtree(runs)
    return {"equal": not differ and codes[-1] == 0, "differ": differ, "codes": codes, "lost_steps": lost}


def draw_cut(stratum: str, reference: Reference, number: int, rng: random.Random) -> Cut:
    """A cut of ``stratum``: start, step, second epoch, evaluation, save boundary, save, last step."""
    lived = reference.lived
    if stratum == "start":
        return Cut(after="begin", seconds=rng.uniform(0, lived.moment("step 1")))
    if stratum in ("step", "second epoch"):
        first, last = (1, STEPS_OF_EPOCH - 1) if stratum == "step" else (STEPS_OF_EPOCH, STEPS - 2)
        step = rng.randint(first, last)
        spent = lived.moment(f"step {step + 1}") - lived.moment(f"step {step}")
        return Cut(after=f"step {step}", seconds=rng.uniform(0, spent))
    if stratum == "evaluation":
        evaluations = [said for said, _ in lived.said if said.startswith("eval ")]
        chosen = rng.choice(evaluations)
        place = lived.said.index((chosen, lived.moment(chosen)))
        return Cut(after=chosen, seconds=rng.uniform(0, lived.said[place + 1][1] - lived.said[place][1]))
    if stratum == "save boundary":
        # Each boundary in turn, of the save that is the first to remove an older checkpoint.
        return Cut(after="save 3", boundary=number % reference.operations[2])
    if stratum == "save":
        save = rng.randint(1, len(reference.operations))
        saved = f"saved {save} after {reference.operations[save - 1]} operations"
        return Cut(after=f"save {save}", seconds=rng.uniform(0, lived.moment(saved) - lived.moment(f"save {save}")))
    assert stratum == "last step", stratum
    return Cut(after=f"step {STEPS}",
               seconds=rng.uniform(0, lived.moment("done") - lived.moment(f"step {STEPS}")))


def main(arguments: list[str]) -> int:
    """``python -m tests.killed_runs FOLDER JSON``: what came of each ``{"kind": ..., "cuts": [...]}``, as JSON."""
    folder, wanted = Path(arguments[0]), json.loads(arguments[1])
    import_all()
    references = {kind: make_reference(folder / kind, kind) for kind in {each["kind"] for each in wanted}}
    found = [kill_and_go_on(references[each["kind"]], folder / each["kind"] / f"kill-{number}",
                            [Cut(**cut) for cut in each["cuts"]]) for number, each in enumerate(wanted)]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
