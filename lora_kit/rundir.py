"""The run folder: where stages leave their results and find each other's.

``runs/<recipe>/<run-id>/`` holds recipe.yaml (verbatim), lock.json (what was resolved)
and a folder for each stage. A stage writes into a temporary folder that is renamed when
it is whole, with ``stage.json`` written last: its presence means done. ``train`` works in
place, so that it can go on. One process at a time writes to a run. Torch-free.
Reads and writes the run folder.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_kit.errors import DataError, MachineError, RecipeError, RefusedError
from lora_kit.recipe import IDENTITY, Recipe
from lora_kit.recipe_file import RecipeFile, parse_recipe
from lora_kit.types import Artifact

IN_PLACE = ("train",)
_RUN_ID = re.compile(r"^\d{8}-\d{6}-[0-9a-f]{4}$")
BEAT_SECONDS, STALE_SECONDS = 5.0, 60.0
"""How often a holder renews its sign, and after how long without one a holder on another machine counts as dead."""
_CHECK_TODO = "make the folder writable, free space, or choose another with --runs"


class Run:
    """One run folder; see the module's docstring. Made by :func:`create` or :func:`open_run`."""

    def __init__(self, path: Path, recipe_file: RecipeFile, resolved: dict[str, Any]) -> None:
        self.path, self.recipe_file, self.resolved = path, recipe_file, resolved

    @property
    def recipe(self) -> Recipe:
        return self.recipe_file.recipe

    @property
    def uid(self) -> str:
        """What no other run has, whatever its folder is called."""
        return self.resolved.get("uid", "")

    def stage_dir(self, stage: str) -> Path:
        """Folder of the finished stage."""
        return self.path / stage

    def work(self, stage: str) -> Path:
        """Folder that the stage writes into while it runs."""
        return self.path / stage if stage in IN_PLACE else self.path / f".{stage}.working"

    def seal(self, stage: str) -> dict[str, Any] | None:
        """The stage's ``stage.json``, or None while it is not done."""
        path = self.path / stage / "stage.json"
        if not path.exists():
            return None
        return _read_object(path, f"remove {path.parent} and run again")

    @contextmanager
    def publishing(self, stage: str, made_from: str | None = None, *, anew: bool = False) -> Iterator[Path]:
        """Hand out the folder that ``stage`` writes into; what it published earlier stays until :meth:`publish`.

        Of a stage that works in place, what it left unfinished is still there; of one that is made of parts, what it
        left or published where that was made from the same.

        Args:
            made_from: what the parts of such a stage are made from, as a text; None of a stage that is not of parts.
            anew: leave out what was made before.
        """
        work = self.work(stage)
        with writing(work):
            goes_on = stage in IN_PLACE or (made_from and not anew and self._has_parts(stage, made_from))
            if not goes_on and work.exists():
                shutil.rmtree(work)
            work.mkdir(parents=True, exist_ok=True)
            (work / "stage.json").unlink(missing_ok=True)
            if made_from:
                write_text(self._mark(stage), made_from)
        yield work

    def _has_parts(self, stage: str, made_from: str) -> bool:
        """Whether the working folder has parts made from ``made_from``; those that were published are linked there."""
        work, mark = self.work(stage), self._mark(stage)
        if work.exists() and mark.is_file() and mark.read_text(encoding="utf-8") == made_from:
            return True
        if (self.seal(stage) or {}).get("made_from") != made_from:
            return False
        if work.exists():
            shutil.rmtree(work)
        shutil.copytree(self.stage_dir(stage), work, copy_function=_link)
        return True

    def set_aside(self, stage: str) -> None:
        """Move what a stage published out of its way, so that it starts anew; it goes when the stage is published."""
        with writing(self.stage_dir(stage)):
            shutil.rmtree(self._old(stage), ignore_errors=True)
            os.replace(self.stage_dir(stage), self._old(stage))

    def _mark(self, stage: str) -> Path:
        """Says what the parts in the working folder of ``stage`` are made from."""
        return self.path / f".{stage}.made_from"

    def _old(self, stage: str) -> Path:
        return self.path / f".{stage}.old"

    def publish(self, stage: str, seal: dict[str, Any]) -> None:
        """Seal the stage's working folder and put it in place of an earlier one."""
        work, final = self.work(stage), self.stage_dir(stage)
        with writing(work):
            write_json(work / "stage.json", seal)
            self._mark(stage).unlink(missing_ok=True)
            old = self._old(stage)
            if work == final:
                shutil.rmtree(old, ignore_errors=True)
                return
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                os.replace(final, old)
            try:
                os.replace(work, final)
            except OSError:
                if old.exists():
                    os.replace(old, final)
                raise
            shutil.rmtree(old, ignore_errors=True)

    def artifacts(self) -> dict[str, Artifact]:
        """Artifacts of the finished stages by name, with absolute paths: base, adapter, merged, quantized forms."""
        found = {}
        base = self.resolved.get("base")
        if base:
            found["base"] = Artifact(**base["artifact"])
        for stage in ("train", "merge", "quantize"):
            for fields in (self.seal(stage) or {}).get("artifacts", ()):
                artifact = Artifact(**fields)
                found[artifact.name] = replace(
                    artifact,
                    path=str((self.path / artifact.path).absolute()),
                    tokenizer=str((self.path / artifact.tokenizer).absolute()) if artifact.tokenizer else None,
                )
        return found

    def artifact(self, name: str) -> Artifact:
        """The artifact called ``name``; RecipeError when this run has none of that name."""
        found = self.artifacts()
        if name not in found:
            raise RecipeError(str(self.path), f"has no artifact '{name}'", f"it has: {', '.join(found) or 'none yet'}")
        return found[name]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for writing; MachineError at once when another process holds it.

        Two things hold it: the operating system's lock, which goes with the process, and, for machines among which
        that lock does not work, the time of run.lock, which the holder renews every few seconds.
        """
        path = self.path / "run.lock"
        with writing(path):
            file = open(path, "a+")
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise MachineError(str(self.path), f"is in use by {_holder_text(_read_holder(file))}",
                                   "wait for it or stop it") from None
            except OSError as error:
                raise MachineError(str(path), f"cannot be locked ({error.strerror or error})",
                                   "choose a folder on a disk that has file locks with --runs") from None
            self._refuse_if_beating(path, _read_holder(file))
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine(),
                      "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": secrets.token_hex(8)}
            with writing(path):
                file.truncate(0)
                file.write(json.dumps(holder))
                file.flush()
            self._token, over = holder["token"], threading.Event()
            threading.Thread(target=_beat, args=(path, holder["token"], over), daemon=True).start()
            try:
                yield
            finally:
                over.set()
                self._token = None
                if _token_in(path) == holder["token"]:
                    file.truncate(0)
                # Closing alone would not do: a process forked meanwhile still holds the open file.
                fcntl.flock(file, fcntl.LOCK_UN)
        finally:
            file.close()

    _token: str | None = None

    def check_held(self) -> None:
        """MachineError when another process has taken over a run that this one had locked, taking it for dead."""
        if self._token is not None and _token_in(self.path / "run.lock") != self._token:
            raise MachineError(str(self.path), "was taken over by another process while this one gave no sign",
                               "leave the run to that one")

    def _refuse_if_beating(self, path: Path, holder: dict[str, Any]) -> None:
        """Raise for a holder on another machine that has given a sign of late; one on this machine is dead."""
        if not holder or holder.get("machine") == _machine():
            return
        with writing(path), tempfile.TemporaryFile(dir=path.parent) as now:
            # Both times are the file server's, whatever the clocks of the machines say.
            age = os.fstat(now.fileno()).st_mtime - path.stat().st_mtime
        if age < STALE_SECONDS:
            raise MachineError(str(self.path), f"is in use by {_holder_text(holder)}, which gave a sign "
                               f"{max(0, age):.0f} s ago", f"wait for it or stop it; {STALE_SECONDS:.0f} s after its "
                               "last sign it counts as dead")


def _beat(path: Path, token: str, over: threading.Event) -> None:
    """Renew the time of ``path`` until ``over``, or until another process has taken it."""
    while not over.wait(BEAT_SECONDS):
        with suppress(OSError):
            if _token_in(path) != token:
                return
            os.utime(path)


def _token_in(path: Path) -> str | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["token"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_holder(file) -> dict[str, Any]:
    file.seek(0)
    try:
        holder = json.loads(file.read())
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _holder_text(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"pid {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"


def _machine() -> str:
    """What tells one running system from another; containers of one system share its locks."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


def create(runs_dir: Path, recipe_file: RecipeFile, resolved: dict[str, Any]) -> Run:
    """Open a new run of the recipe under ``runs_dir``."""
    path = runs_dir / recipe_file.recipe.name / _run_id(time.time())
    while path.exists():
        path = path.with_name(_run_id(time.time()))
    scratch = path.with_name(f".{path.name}.new")
    resolved = {**resolved, "uid": secrets.token_hex(8)}
    with writing(path):
        scratch.mkdir(parents=True)
        (scratch / "recipe.yaml").write_text(recipe_file.text, encoding="utf-8")
        write_json(scratch / "lock.json", resolved)
        os.replace(scratch, path)
    return Run(path, recipe_file, resolved)


def _run_id(now: float) -> str:
    """Date, time and the fraction of the second (in 65,536ths), so that names sort as the runs were opened."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.localtime(now))}-{int(now % 1 * 65536):04x}"


def open_run(path: Path | str) -> Run:
    """The run in the folder ``path``, with the recipe that it was made from.

    Raises:
        RecipeError: it is no run folder.
        RefusedError: its lock.json or recipe.yaml is not whole.
    """
    path = Path(path)
    if not is_run(path):
        raise RecipeError(str(path), "is not a run folder", "name a folder with a recipe.yaml and a lock.json")
    lock, recipe = path / "lock.json", path / "recipe.yaml"
    todo = f"move {path} away; lora-kit run RECIPE then opens a new run"
    resolved = _read_object(lock, todo)
    missing = [key for key in ("recipe_path", "overrides", "base") if key not in resolved]
    if missing:
        raise RefusedError(str(lock), f"is not whole: '{missing[0]}' is missing", todo)
    try:
        text = recipe.read_text(encoding="utf-8")
    except ValueError:
        raise RefusedError(str(recipe), "is not whole", todo) from None
    recipe_file = parse_recipe(text, Path(resolved["recipe_path"]), resolved["overrides"], shown_as=str(recipe))
    return Run(path, recipe_file, resolved)


def _read_object(path: Path, todo: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RefusedError(str(path), "is not whole", todo)
    return value


def update(run: Run, recipe_file: RecipeFile, resolved: dict[str, Any]) -> Run:
    """Put the recipe as it reads now into an existing run (its later sections may have changed)."""
    assert recipe_file.recipe.fingerprint(*IDENTITY) == run.recipe.fingerprint(*IDENTITY)
    resolved = {**resolved, "uid": run.uid}
    with writing(run.path):
        write_text(run.path / "recipe.yaml", recipe_file.text)
        write_json(run.path / "lock.json", resolved)
    return Run(run.path, recipe_file, resolved)


def runs_in(runs_dir: Path, recipe_name: str | None = None) -> list[Path]:
    """Run folders under ``runs_dir``, oldest first."""
    pattern = f"{recipe_name or '*'}/*"
    found = (path for path in runs_dir.glob(pattern) if _RUN_ID.match(path.name) and is_run(path))
    return sorted(found, key=lambda path: path.name)


def newest(runs_dir: Path) -> Path:
    """The newest run under ``runs_dir``; DataError when there is none."""
    found = runs_in(runs_dir)
    if not found:
        raise DataError(str(runs_dir), "holds no run", "lora-kit run RECIPE makes one")
    return found[-1]


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run folder."""
    return (path / "lock.json").exists() and (path / "recipe.yaml").exists()


def _link(source: str, place: str) -> None:
    try:
        os.link(source, place)
    except OSError:  # a disk without links
        shutil.copy2(source, place)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as readable JSON so that a reader sees the old file or the new one, never half."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write ``text`` through a temporary file that is synced and renamed."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except OSError:
        with suppress(OSError):
            scratch.unlink()
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write under ``path`` into one line with exit code 6."""
    try:
        yield
    except OSError as error:
        name = error.filename or path
        raise MachineError(str(name), f"cannot be written ({error.strerror or error})", _CHECK_TODO) from None
