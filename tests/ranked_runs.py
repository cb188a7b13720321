"""Trainings by several processes, forked of one that has imported everything, over gloo on this machine.

``python -m tests.ranked_runs FOLDER``: what came of each of :func:`main`'s trainings, as JSON. Forks, so: Linux.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import killed_runs, tiny, tiny_run

STEPS = 20


def make_recipe(folder: Path, name: str, **train: Any) -> Path:
    """A recipe of 20 steps of 8 rows, in fp32."""
    if not (folder / "model").exists():
        tiny.save_model(folder / "model")
        tiny_run.write_rows(folder / "rows.jsonl", 40)
    settings = {"steps": STEPS, "batch_size": 8, "micro_batch_size": 2, "learning_rate": 0.01, "precision": "fp32",
                "save_every": 6, "stop_prompts": 0, "prove": False, **train}
    return tiny_run.write_recipe(folder, "./model", name=name, data={"train": "rows.jsonl", "held_out_rows": 6},
                                 lora={"rank": 4, "alpha": 8, "dropout": train.get("dropout", 0.0)},
                                 train={key: value for key, value in settings.items() if key != "dropout"})


def fork(recipe: Path, runs: Path, number: int, watch: Callable[[int, int], None] = lambda rank, step: None) -> list:
    """Process ids of ``number`` ranks that train ``recipe`` in ``runs``; ``watch(rank, step)`` is called in them."""
    from lora_kit.launcher import _free_port

    port, children = _free_port(), []
    runs.mkdir(parents=True, exist_ok=True)
    for rank in range(number):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 70
        try:
            with open(runs / f"output-{rank}.txt", "ab", buffering=0) as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            os.environ.update(LORA_KIT_CACHE=str(recipe.parent / "cache"), RANK=str(rank), LOCAL_RANK=str(rank),
                              WORLD_SIZE=str(number), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            _train(recipe, runs, number, lambda step, rank=rank: watch(rank, step))
            code = 0
        except BaseException as error:  # noqa: BLE001 - a child that is left to live would be a second parent
            traceback.print_exc()
            code = getattr(error, "exit_code", 70)
        finally:
            sys.stdout.flush()
            os._exit(code)
    return children


def _train(recipe: Path, runs: Path, number: int, watch: Callable[[int], None]) -> None:
    from lora_kit import events, pipeline

    def listen(event) -> None:
        if isinstance(event, events.Progress):
            watch(event.done)

    with events.listening(listen):
        if number == 1:
            pipeline.run_recipe(tiny_run.read(recipe), runs_dir=runs, until="train")
        else:
            pipeline.train_on_ranks(tiny_run.read(recipe), runs_dir=runs)


def wait(children: list[int], seconds: float = 180) -> list[int]:
    """Exit codes of ``children``, minus the signal's number where one ended them; TimeoutError after ``seconds``."""
    codes: dict[int, int] = {}
    ends = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > ends:
            for child in set(children) - codes.keys():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                codes[child] = 124
        time.sleep(0.02)
    return [codes[child] for child in children]


def outcome(runs: Path) -> dict[str, Any]:
    """Losses, shapes of the adapter, number of processes, and the bytes that must be equal after a resume."""
    from safetensors import safe_open

    from lora_kit import rundir

    run = rundir.open_run(rundir.newest(runs))
    lines = [json.loads(line) for line in (run.work("train") / "metrics.jsonl").read_text().splitlines()]
    with safe_open(run.work("train") / "adapter" / "adapter_model.safetensors", "pt") as file:
        shapes = {key: list(file.get_tensor(key).shape) for key in file.keys()}  # noqa: SIM118 - not a mapping
    return {"losses": [line["loss"] for line in lines if "loss" in line],
            "held_out": [line["held_out_loss"] for line in lines if "held_out_loss" in line],
            "shapes": shapes, "num_processes": run.seal("train")["figures"]["num_processes"],
            "ending": killed_runs.ending(runs)}


def main(arguments: list[str]) -> int:
    folder = Path(arguments[0])
    killed_runs.import_all()
    found: dict[str, Any] = {}
    for shard in ("none", "fsdp"):
        recipe = make_recipe(folder, f"even-{shard}", shard=shard)
        for number in (1, 2, 4):
            codes = wait(fork(recipe, folder / f"{shard}-{number}", number))
            assert set(codes) == {0}, (folder / f"{shard}-{number}" / "output-0.txt").read_text()[-3000:]
            found[f"{shard} {number}"] = outcome(folder / f"{shard}-{number}")
        # Stopped in two places, with dropout, and gone on with.
        recipe = make_recipe(folder, f"stopped-{shard}", shard=shard, dropout=0.1, eval_every=5)
        assert set(wait(fork(recipe, folder / f"straight-{shard}", 2))) == {0}
        runs, stops = folder / f"stopped-{shard}", []

        def stop_at(rank: int, step: int, first: int = 7) -> None:
            if rank == 1 and step == first:  # one process alone is told
                os.kill(os.getpid(), signal.SIGTERM)

        stops.append(wait(fork(recipe, runs, 2, stop_at)))
        stops.append(wait(fork(recipe, runs, 2, lambda rank, step: stop_at(rank, step, 15))))
        assert set(wait(fork(recipe, runs, 2))) == {0}, (runs / "output-0.txt").read_text()[-3000:]
        found[f"stopped {shard}"] = {"codes": stops, "straight": outcome(folder / f"straight-{shard}"),
                                     "gone_on": outcome(runs)}
    for shard in ("none", "fsdp"):
        recipe = make_recipe(folder, f"4bit-{shard}", shard=shard, steps=6)
        text = recipe.read_text()
        assert '"base": "./model"' in text
        recipe.write_text(text.replace('"base": "./model"', '"base": "./model", "load_in": "4bit"'))
        codes = wait(fork(recipe, folder / f"4bit-{shard}", 2))
        assert set(codes) == {0}, (folder / f"4bit-{shard}" / "output-0.txt").read_text()[-3000:]
        found[f"4bit {shard}"] = outcome(folder / f"4bit-{shard}")
    # A process that dies, one that is stopped, and one that lives and computes no more.
    recipe = make_recipe(folder, "lost", save_every=4, steps=400)
    for name, number in (("dead", signal.SIGKILL), ("stopped rank", signal.SIGSTOP), ("hanging rank", None)):
        def lose(rank: int, step: int, number: int | None = number) -> None:
            if rank == 1 and step == 9:
                os.kill(os.getpid(), number) if number else threading.Event().wait()

        runs = folder / name
        started = time.monotonic()
        children = fork(recipe, runs, 2, lose)
        first = wait(children[:1])
        seconds = time.monotonic() - started
        if number == signal.SIGSTOP:
            os.kill(children[1], signal.SIGKILL)
        others = wait(children[1:])
        found[name] = {"code": first[0], "others": others, "seconds": seconds, "step": killed_runs.newest_step(runs),
                       "said": (runs / "output-0.txt").read_text()}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    os.environ.update(tiny_run.environment())
    sys.exit(main(sys.argv[1:]))
