"""Checkpoints that are changed after they were written: is every change caught before anything is loaded?

    python benchmarks/corrupt.py --mutations 500

Two trainings of a tiny random model, of the same recipe, leave two checkpoints each. The first one's are copied and
changed: bits flipped, bytes swapped, overwritten, cut off or added; files emptied, removed, added, swapped with each
other, or taken from the older checkpoint or from the other training; manifests likewise; whole checkpoints under each
other's names, under a later step's, or taken from the other training; and the metrics that a checkpoint seals. No
change leaves the bytes as they were. Caught means: before a tensor file is opened to be loaded, the changed checkpoint
is refused by name, and the one before it is taken, or none where that was changed too. Every ``--resume-every``-th
change is followed by the training itself, which must end with the bytes of one that was never stopped.

``--check`` exits with 1 when a change was not caught; ``--json PATH`` writes the figures; ``--quick``: 40 changes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

from tests import killed_runs, tiny_run  # noqa: E402 - after the path is set

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
Mutation = Callable[[Path, Path, random.Random], set[str]]
"""Changes a training's folder, with another training's at hand; names the checkpoints (old, new) that must not pass."""


def _names(train: Path) -> tuple[str, str]:
    old, new = sorted(path.name for path in (train / "checkpoints").glob("step-*"))
    return old, new


def _pick(train: Path, rng: random.Random) -> Path:
    return train / "checkpoints" / _names(train)[1] / rng.choice(FILES)


def _in_bytes(change: Callable[[bytearray, random.Random], bytearray]) -> Mutation:
    def mutate(train: Path, other: Path, rng: random.Random) -> set[str]:
        path = _pick(train, rng)
        before = path.read_bytes()
        for _ in range(100):
            after = bytes(change(bytearray(before), rng))
            if after != before:
                break
        path.write_bytes(after)
        return {path.parent.name}

    return mutate


def _flip(content: bytearray, rng: random.Random) -> bytearray:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def _swap_bytes(content: bytearray, rng: random.Random) -> bytearray:
    one, two = rng.randrange(len(content)), rng.randrange(len(content))
    content[one], content[two] = content[two], content[one]
    return content


def _overwrite(content: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(content))
    length = min(rng.choice((1, 16, 512, 4096)), len(content) - start)
    content[start:start + length] = rng.choice((bytes(length), rng.randbytes(length)))
    return content


def _cut(content: bytearray, rng: random.Random) -> bytearray:
    return content[:rng.randrange(len(content))]


def _add(content: bytearray, rng: random.Random) -> bytearray:
    return content + rng.choice((b"\n", b" ", b"\0", rng.randbytes(rng.randrange(1, 4096))))


def _move_block(content: bytearray, rng: random.Random) -> bytearray:
    length = min(512, len(content) // 4)
    one = rng.randrange(len(content) // 2 - length)
    two = rng.randrange(len(content) // 2, len(content) - length)
    content[one:one + length], content[two:two + length] = content[two:two + length], content[one:one + length]
    return content


def _empty(train: Path, other: Path, rng: random.Random) -> set[str]:
    path = _pick(train, rng)
    path.write_bytes(b"")
    return {path.parent.name}


def _remove(train: Path, other: Path, rng: random.Random) -> set[str]:
    path = _pick(train, rng)
    path.unlink()
    return {path.parent.name}


def _add_file(train: Path, other: Path, rng: random.Random) -> set[str]:
    folder = _pick(train, rng).parent
    (folder / rng.choice(("more.bin", ".hidden", "adapter.bin", "optimizer.pt"))).write_bytes(rng.randbytes(16))
    return {folder.name}


def _swap_files(train: Path, other: Path, rng: random.Random) -> set[str]:
    folder = train / "checkpoints" / _names(train)[1]
    one, two = (folder / name for name in rng.sample(FILES, 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return {folder.name}


def _from_older(train: Path, other: Path, rng: random.Random) -> set[str]:
    old, new = _names(train)
    name = rng.choice(FILES)
    shutil.copy(train / "checkpoints" / old / name, train / "checkpoints" / new / name)
    return {new}


def _swap_with_older(train: Path, other: Path, rng: random.Random) -> set[str]:
    old, new = _names(train)
    name = rng.choice(FILES)
    one, two = (train / "checkpoints" / folder / name for folder in (old, new))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return {old, new}


def _from_other(train: Path, other: Path, rng: random.Random) -> set[str]:
    name, new = rng.choice(("manifest.json", "state.json")), _names(train)[1]
    shutil.copy(other / "checkpoints" / new / name, train / "checkpoints" / new / name)
    return {new}


def _swap_folders(train: Path, other: Path, rng: random.Random) -> set[str]:
    old, new = _names(train)
    folder = train / "checkpoints"
    (folder / old).rename(folder / "aside")
    (folder / new).rename(folder / old)
    (folder / "aside").rename(folder / new)
    return {old, new}


def _old_as_new(train: Path, other: Path, rng: random.Random) -> set[str]:
    old, new = _names(train)
    shutil.rmtree(train / "checkpoints" / new)
    shutil.copytree(train / "checkpoints" / old, train / "checkpoints" / new)
    return {new}


def _as_later(train: Path, other: Path, rng: random.Random) -> set[str]:
    later = f"step-{rng.randrange(100, 1000):06d}"
    old, new = _names(train)
    (train / "checkpoints" / new).rename(train / "checkpoints" / later)
    return {later}


def _foreign_folder(train: Path, other: Path, rng: random.Random) -> set[str]:
    new = _names(train)[1]
    shutil.rmtree(train / "checkpoints" / new)
    shutil.copytree(other / "checkpoints" / new, train / "checkpoints" / new)
    return {new}


def _foreign_added(train: Path, other: Path, rng: random.Random) -> set[str]:
    old, new = _names(train)
    shutil.rmtree(train / "checkpoints" / old)
    (train / "checkpoints" / new).rename(train / "checkpoints" / "keep")
    shutil.copytree(other / "checkpoints" / new, train / "checkpoints" / new)
    shutil.rmtree(train / "checkpoints" / "keep")
    return {new}


def _metrics(train: Path, other: Path, rng: random.Random) -> set[str]:
    """Before the older checkpoint's end, so that neither fits what was written."""
    path, (old, new) = train / "metrics.jsonl", _names(train)
    sealed = json.loads((train / "checkpoints" / old / "state.json").read_text())["log"]["metrics"]
    content = bytearray(path.read_bytes())
    place = rng.randrange(sealed)
    if rng.random() < 0.5:
        content[place] ^= 1 << rng.randrange(8)
    else:
        del content[place:]
    path.write_bytes(content)
    return {old, new}


MUTATIONS: dict[str, Mutation] = {
    "a bit flipped": _in_bytes(_flip), "two bytes swapped": _in_bytes(_swap_bytes),
    "bytes overwritten": _in_bytes(_overwrite), "cut off": _in_bytes(_cut), "bytes added": _in_bytes(_add),
    "two blocks swapped": _in_bytes(_move_block), "a file emptied": _empty, "a file removed": _remove,
    "a file added": _add_file, "two files swapped": _swap_files, "a file of the older one": _from_older,
    "a file swapped with the older one's": _swap_with_older, "a file of another run": _from_other,
    "checkpoints under each other's names": _swap_folders, "the older one as the newer": _old_as_new,
    "under a later step's name": _as_later, "another run's checkpoint": _foreign_folder,
    "another run's checkpoint alone": _foreign_added, "metrics changed": _metrics,
}


def _content_of(train: Path) -> dict[str, bytes]:
    return {str(path.relative_to(train)): path.read_bytes() for path in sorted(train.rglob("*")) if path.is_file()}


def look(run_path: Path) -> tuple[str | None, list[str], list[str]]:
    """What going on with the run would do: the checkpoint it takes (None: refused), what it says, what was loaded."""
    from types import SimpleNamespace

    import safetensors.torch

    from lora_kit import checkpoint, events, rundir
    from lora_kit.errors import RefusedError
    from lora_kit.training_log import TrainingLog

    run, said, loaded = rundir.open_run(run_path), [], []
    log = TrainingLog(run.work("train"), SimpleNamespace(is_main_process=True, trackers=[]))
    load = safetensors.torch.load_file
    safetensors.torch.load_file = loaded.append
    try:
        with events.listening(lambda event: said.append(getattr(event, "text", ""))):
            found = checkpoint.newest(run.work("train") / "checkpoints", run.uid,
                                      lambda one: log.check(one.state["log"]))
        return (found.folder.name if found else ""), said, loaded
    except RefusedError:
        return None, said, loaded
    finally:
        safetensors.torch.load_file = load


def try_one(name: str, run_path: Path, other: Path, rng: random.Random) -> str | None:
    """Change the run's checkpoints as ``name`` says; None when it is caught, else what was wrong."""
    train = run_path / "train"
    before = _content_of(train)
    must_not_pass = MUTATIONS[name](train, other / "train", rng)
    after = _content_of(train)
    if after == before:
        return "the change changed nothing"
    there = sorted((path.name for path in (train / "checkpoints").glob("step-*")), reverse=True)
    good = [folder for folder in there if folder not in must_not_pass]
    taken, said, loaded = look(run_path)
    if loaded:
        return f"{loaded} was loaded"
    if _content_of(train) != after:
        return "what was refused was changed"
    if taken != (good[0] if good else None):
        return f"{taken} was taken, not {good[0] if good else 'none'}"
    unnamed = [folder for folder in there if folder in must_not_pass and (not good or folder > good[0])
               and not any(folder in text or "metrics.jsonl" in text for text in said)]
    return f"{unnamed[0]} was not named" if unnamed else None


def main(arguments: list[str] | None = None) -> int:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=500, help="how many changes")
    parser.add_argument("--resume-every", type=int, default=50, metavar="N", help="train on after every N-th; 0: never")
    parser.add_argument("--seed", type=int, default=1, help="of the changes")
    parser.add_argument("--quick", action="store_true", help="40 changes, training on after one")
    parser.add_argument("--check", action="store_true", help="exit 1 unless all were caught")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    args = parser.parse_args(arguments)
    if args.quick:
        args.mutations, args.resume_every = 40, 40

    os.environ.update(tiny_run.environment())
    killed_runs.import_all()
    caught: dict[str, list[int]] = {name: [0, 0] for name in MUTATIONS}
    wrong: list[dict[str, Any]] = []
    resumed, equal = 0, 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = killed_runs.make_reference(folder, "plain")
        runs = {}
        for which in ("mine", "other"):
            killed_runs.live(reference.recipe, folder / which,
                             killed_runs.Cut(after=f"step {killed_runs.STEPS - 3}"))
            [runs[which]] = (folder / which).glob("*/*")
        for number in range(args.mutations):
            rng = random.Random(f"{args.seed} {number}")
            kind = list(MUTATIONS)[number % len(MUTATIONS)]
            work = folder / "work"
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(folder / "mine", work)
            [run_path] = work.glob("*/*")
            problem = try_one(kind, run_path, runs["other"], rng)
            caught[kind][0] += 1
            caught[kind][1] += problem is None
            if problem:
                wrong.append({"number": number, "kind": kind, "problem": problem})
                print(f"{number}: {kind}: {problem}", flush=True)
            if args.resume_every and (number + 1) % args.resume_every == 0:
                lived = killed_runs.live(reference.recipe, work)
                # 7: refused, for no checkpoint was left.
                as_it_should = lived.code == 7 or killed_runs.ending(work) == reference.ending
                resumed, equal = resumed + 1, equal + as_it_should
    figures = {"mutations": args.mutations, "caught": args.mutations - len(wrong), "wrong": wrong,
               "kinds": {kind: {"changes": tried, "caught": good} for kind, (tried, good) in caught.items()},
               "trained_on": resumed, "trained_on_well": equal}
    print(f"{'change':40} {'times':>6} {'caught':>7}")
    for kind, (tried, good) in caught.items():
        print(f"{kind:40} {tried:6} {good:7}")
    print(f"\n{figures['caught']} of {args.mutations} changes caught before anything was loaded; after {resumed} of "
          f"them training went on, and {equal} ended byte-equal or were refused for lack of another checkpoint")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(args.check and (bool(wrong) or equal < resumed))


if __name__ == "__main__":
    sys.exit(main())
