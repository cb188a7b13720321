"""Processes that train together and watch each other, so that none waits for one that is gone.

Each writes a file beside the run's: that it lives, renewed every other second, and at its end its exit code; and a
second one, renewed while it computes. A thread reads those of the others. When one has ended, or has given no sign for
STALE_SECONDS, or when none of all has computed anything for IDLE_SECONDS (one hangs, the others wait for it), this
process is about to wait without end in a collective operation that nothing can interrupt: after GRACE_SECONDS it ends
itself with 75, for the run can go on from its last checkpoint. Works over machines that share the run's folder, under
any launcher.

Torch-free. Reads and writes ``RUN/.ranks/``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from lora_kit.errors import StoppedError
from lora_kit.rundir import write_text

BEAT_SECONDS = 2.0
STALE_SECONDS = 30.0
IDLE_SECONDS = 30.0
GRACE_SECONDS = 10.0
"""After another process has ended, how long this one may take to end by itself, saving what it has."""
BUSY_SHARE = 0.01
"""CPU time over clock time from which a process computes. Waiting for one other over gloo takes 0.0035 of it, these
files included; feeding a GPU takes more."""
_FEW = 16
"""Up to so many all watch all; of more the first watches all and is watched by all, to spare the disk."""
_STOPPED = 75
_TODO = "run the same command again: it goes on from the last checkpoint"


class Ranks:
    """This process among ``number``, in ``folder``, which is this training's own.

    Args:
        folder: the same for all, made by :func:`folder_of`.
    """

    def __init__(self, folder: Path, rank: int, number: int) -> None:
        self.folder, self.rank, self.number = folder, rank, number
        self.watched = [other for other in (range(number) if rank == 0 or number <= _FEW else [0]) if other != rank]
        self._over = threading.Event()
        self._launcher = int(os.environ.get("LORA_KIT_LAUNCHER_PID", "0"))
        self._asked = False
        self._seen = (time.monotonic(), time.process_time())
        self._mark_work()
        self._write(None)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def end(self, code: int) -> None:
        """Tell the others how this process ends, and watch no more."""
        self._over.set()
        with suppress(OSError):
            self._write(code)

    def gone(self) -> str | None:
        """What is known of the first watched process that ended badly or gives no sign, or of all where none computes;
        None while the training lives."""
        now = self._time_of(self.rank)
        for rank in self.watched:
            code, last = self._code_of(rank), self._time_of(rank)
            if code:
                return f"process {rank} ended with {code}"
            if code is None and last is not None and now is not None and now - last > STALE_SECONDS:
                return f"process {rank} has given no sign for {now - last:.0f} s"
        # One that watches the first alone cannot tell whether another works.
        if now is not None and len(self.watched) == self.number - 1:
            worked = [self._time_of(rank, self._work) for rank in range(self.number) if self._code_of(rank) is None]
            if worked and None not in worked and now - max(worked) > IDLE_SECONDS:
                return f"none of {self.number} processes has computed anything for {now - max(worked):.0f} s"
        return None

    def explain(self, error: BaseException) -> BaseException:
        """``error``, or where it is a collective that failed because another process is gone, a StoppedError."""
        if not _is_of_collective(error):
            return error
        ends, found = time.monotonic() + STALE_SECONDS + 3 * BEAT_SECONDS, None
        while found is None and time.monotonic() < ends:
            found = self.gone()
            time.sleep(BEAT_SECONDS / 4)
        if found is None:
            return error
        return StoppedError(f"process {self.rank}", f"{found}, so this one stopped", _TODO)

    def _watch(self) -> None:
        ended = None
        while not self._over.wait(BEAT_SECONDS):
            with suppress(OSError):
                os.utime(self._file(self.rank))
            if self._has_worked():
                self._mark_work()
            if self._launcher and os.getppid() != self._launcher and not self._asked:
                self._asked = True
                os.kill(os.getpid(), signal.SIGTERM)  # the launcher is gone: save and stop
            gone = self.gone()
            if gone is None:
                ended = None  # it was slow, or all were asleep
                continue
            ended = ended or time.monotonic()
            if time.monotonic() - ended > GRACE_SECONDS:
                with suppress(OSError):
                    self._write(_STOPPED)
                    os.write(2, f"process {self.rank}: {gone}, so this one stopped; {_TODO}\n".encode())
                os._exit(_STOPPED)

    def _has_worked(self) -> bool:
        """Whether this process computed, or waited for a disk, since the last look."""
        before, self._seen = self._seen, (time.monotonic(), time.process_time())
        clock, cpu = (now - then for now, then in zip(self._seen, before, strict=True))
        return cpu > BUSY_SHARE * clock or _waits_for_disk()

    def _mark_work(self) -> None:
        with suppress(OSError):
            self._work(self.rank).touch()

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def _work(self, rank: int) -> Path:
        return self.folder / f"{rank}.work"

    def _write(self, code: int | None) -> None:
        write_text(self._file(self.rank), json.dumps({"pid": os.getpid(), "code": code}))

    def _code_of(self, rank: int) -> int | None:
        try:
            return json.loads(self._file(rank).read_text(encoding="utf-8"))["code"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _time_of(self, rank: int, file: Callable[[int], Path] | None = None) -> float | None:
        """When ``rank`` last renewed its ``file`` (default: that of its life), by the clock of the disk."""
        try:
            return (file or self._file)(rank).stat().st_mtime
        except OSError:
            return None


def folder_of(run: Path, token: str) -> Path:
    """A new folder for the files of one training by several processes; those of earlier ones go."""
    shutil.rmtree(run / ".ranks", ignore_errors=True)
    folder = run / ".ranks" / token
    folder.mkdir(parents=True)
    return folder


def _waits_for_disk() -> bool:
    """Whether the main thread sleeps in the kernel for a disk: a checkpoint on a slow one is no hang (Linux)."""
    try:
        status = Path("/proc/self/stat").read_text(encoding="ascii", errors="replace")
        return status.rpartition(")")[2].split()[0] == "D"
    except (OSError, IndexError):
        return False


def _is_of_collective(error: BaseException) -> bool:
    text, names = str(error), {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, RuntimeError) and (
        bool(names & {"DistError", "DistBackendError", "DistNetworkError"})
        or any(word in text for word in ("Connection closed by peer", "Connection reset by peer", "gloo", "NCCL",
                                         "Socket", "Broken pipe", "Timed out waiting")))


