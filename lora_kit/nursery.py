"""A process that has imported the heavy libraries, and forks one child for every call.

Importing torch, transformers, peft and evaluate takes five to ten seconds, and a run makes about twenty calls
in processes of their own (``isolate``). The nursery pays for the imports once: it imports, runs nothing, never
sees a model, and forks a child for each request, which is therefore as good as a new process. It lives as long
as the process that started it, also when that is killed: it ends when its control socket does.

Only where a fork is safe: on Linux, without an accelerator (a driver that was touched before a fork does not
work after it), and while the nursery has a single thread (locks that another thread held would stay locked).
Wherever something is amiss no child comes, and the caller starts a fresh process instead. Torch-free itself.
Reads and writes only the descriptors that it is given.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from lora_kit import hardware

LIBRARIES = (
    "torch", "transformers:AutoModelForCausalLM", "transformers:AutoTokenizer", "transformers:GenerationConfig",
    "transformers:BitsAndBytesConfig", "peft", "bitsandbytes", "transformers.integrations.bitsandbytes", "evaluate",
    "gguf", "safetensors.torch", "psutil",
)
"""What is imported ahead: a module, or ``module:name`` where a package loads its parts when they are asked for."""

_PER_CALL = ("LORA_KIT_",)
"""Prefixes of variables that are read each time they are used. Any other may be read by a library while it is
imported (OMP_NUM_THREADS, HF_HOME, HF_HUB_OFFLINE, PYTHONPATH ...): when one changes, a new nursery is started."""

_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""For the imports only. numpy's and scipy's OpenBLAS start their threads while they are loaded. What is called
in a child multiplies no matrices with numpy; bench does, and has fresh processes."""

_ACCELERATORS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd", "/dev/accel")
_PR_SET_PDEATHSIG = 1
_LAST_BYTES = 65_536
_SECONDS_TO_END = 10.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a child ended: exit code (minus the signal's number when a signal ended it) and the end of its stderr."""

    returncode: int
    stderr: str


class Nursery:
    """The nursery of this process; one at a time, see :func:`at_hand`.

    Args:
        command: starts a process that calls :func:`serve` with the control socket's descriptor, which is
            appended, and the libraries, which follow it.
        environment: of the imports, and by default of nothing else: a request brings its own.
    """

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        arrow = environment.get("JE_ARROW_MALLOC_CONF")
        # jemalloc, which pyarrow brings, starts a thread of its own while it is loaded unless told not to.
        arrow = ",".join(filter(None, [arrow, "background_thread:false"]))
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), *LIBRARIES], pass_fds=[theirs.fileno()],
                env={**environment, **_ONE_THREAD, "JE_ARROW_MALLOC_CONF": arrow},
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except OSError:
            self._control.close()
            raise
        finally:
            theirs.close()
        self.owner = os.getpid()
        self.calls = 0
        """Calls that are under way: several when threads make them."""
        self.has_served = False
        """Whether a child was ever forked."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def run(self, request: dict[str, Any], *, timeout_seconds: float | None) -> Ended | None:
        """Let a child answer ``request``; None when there was no child, or the nursery ended before it.

        The request goes by way of memory, not of a file: the environment in it holds secrets.

        Raises:
            subprocess.TimeoutExpired: it took longer; the child is gone.
        """
        read_end, write_end = os.pipe()
        words, stderr = os.memfd_create("request"), os.memfd_create("stderr")
        try:
            with open(words, "wb", closefd=False) as file:
                file.write(json.dumps(request).encode())
            try:
                socket.send_fds(self._control, [b"call"], [write_end, words, stderr])
            except OSError:
                return None
            finally:
                os.close(write_end)  # the nursery and the child hold it: it is at its end when both are gone
            answer = self._await(read_end, timeout_seconds)
            if answer is None:
                return None
            size = os.fstat(stderr).st_size
            last = os.pread(stderr, _LAST_BYTES, max(0, size - _LAST_BYTES))
            return Ended(returncode=answer, stderr=last.decode("utf-8", "replace"))
        finally:
            for descriptor in (read_end, words, stderr):
                os.close(descriptor)

    def _await(self, read_end: int, timeout_seconds: float | None) -> int | None:
        """The exit code that the nursery tells, after the child's number."""
        deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        told = b""
        try:
            while told.count(b"\n") < 2:
                if not _readable(read_end, deadline):
                    raise subprocess.TimeoutExpired("lora_kit.nursery", timeout_seconds or 0)
                piece = os.read(read_end, 64)
                if not piece:
                    return None
                told += piece
                self.has_served = True
        except subprocess.TimeoutExpired:
            if not told:  # it hangs in its imports
                self.close()
            else:
                with suppress(OSError):  # it has ended just now, and the child with it
                    self._control.send(b"kill " + told.split()[0])
            _await_end(read_end)
            raise
        except BaseException:  # an interrupt: nothing of it may run on
            self.close()
            _await_end(read_end)
            raise
        return int(told.split()[1])

    def close(self) -> None:
        """End it, and whatever it runs."""
        self._control.close()
        try:
            self._process.wait(0.5)  # it ends by itself unless it is still importing
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def forget(self) -> None:
        """In a fork of this process: leave the nursery to the one that started it."""
        self._control.close()


def _readable(descriptor: int, deadline: float | None) -> bool:
    """Wait until there is something to read, or the end; False at the deadline (monotonic seconds)."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    wait = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
    return bool(poll.poll(wait))


def _await_end(descriptor: int) -> None:
    deadline = time.monotonic() + _SECONDS_TO_END
    while _readable(descriptor, deadline) and os.read(descriptor, 64):
        pass


# ---- the nursery of this process -------------------------------------------------------


class _State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.current: Nursery | None = None
        self.key: Any = None
        self.given_up = False
        self.left_alone: list[Nursery] = []


_state = _State()


def is_possible() -> bool:
    """Whether a fork after the imports is safe here: Linux without an accelerator that torch could touch."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return False
    if hardware.gpus() or any(Path(path).exists() for path in _ACCELERATORS):
        return False
    try:
        return "+xpu" not in metadata.version("torch")  # Intel's GPUs have the same device files as any screen
    except metadata.PackageNotFoundError:
        return False


def run(
    request: dict[str, Any], *, command: list[str], environment: dict[str, str], own: dict[str, str],
    threads: int | None, timeout_seconds: float | None,
) -> Ended | None:
    """Let a child of this process's nursery answer ``request``; None where there can be none.

    Args:
        request: goes to the ``answer`` of :func:`serve`.
        command: see :class:`Nursery`.
        environment: of the imports; together with limits, cores and libraries it decides whether the nursery
            that there is will do.
        own: the child's environment, all of it.
        threads: CPU threads of the child; None: as many as ``environment`` gives a process.

    Raises:
        subprocess.TimeoutExpired: it took longer; the child is gone.
    """
    try:
        place = os.getcwd()
    except OSError:
        return None
    nursery = at_hand(command, environment)
    if nursery is None:
        return None
    envelope = {"request": request, "environment": own, "place": place, "threads": threads}
    try:
        ended = nursery.run(envelope, timeout_seconds=timeout_seconds)
    finally:
        with _state.lock:
            nursery.calls -= 1
    if ended is None and not nursery.has_served:
        _state.given_up = True  # what kept it from its first child would keep the next one too
        nursery.close()
    return ended


def at_hand(command: list[str], environment: dict[str, str]) -> Nursery | None:
    """The nursery for ``environment``, started if there is none yet, with one more call counted in ``calls``."""
    with _state.lock:
        if _state.given_up or not is_possible():
            return None
        key = (command, LIBRARIES, _inherited(environment))
        nursery = _state.current
        if nursery is not None and (key != _state.key or not nursery.is_alive()):
            if nursery.calls and nursery.is_alive():
                return None  # another thread is using it
            nursery.close()
            nursery = _state.current = None
        if nursery is None:
            try:
                nursery = _state.current = Nursery(command, environment)
            except OSError:
                _state.given_up = True
                return None
            _state.key = key
        nursery.calls += 1
        return nursery


def _inherited(environment: dict[str, str]) -> Any:
    """What a process takes from the one that starts it, and keeps."""
    limits = [resource.getrlimit(getattr(resource, name)) for name in sorted(dir(resource)) if name[:7] == "RLIMIT_"]
    status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace").splitlines()
    mask = [line for line in status if line.startswith("Umask:")]
    kept = {name: value for name, value in environment.items() if not name.startswith(_PER_CALL)}
    return kept, limits, mask, sorted(os.sched_getaffinity(0))


@atexit.register
def close() -> None:
    """End the nursery of this process, if there is one; the next call starts another."""
    nursery, _state.current = _state.current, None
    if nursery is not None and nursery.owner == os.getpid():
        nursery.close()


def _leave_alone() -> None:
    global _state
    before, _state = _state, _State()
    if before.current is not None:
        before.current.forget()
        _state.left_alone = [*before.left_alone, before.current]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_alone)


# ---- in the nursery --------------------------------------------------------------------


def serve(descriptor: int, libraries: list[str], answer: Callable[[dict[str, Any]], None]) -> NoReturn:
    """Import ``libraries``, then fork a child for each request that comes until the control socket ends.

    A message is ``call`` with three descriptors (a pipe for the child's number and exit code, a line each; the
    request; the child's standard error), or ``kill NUMBER``.
    """
    # Ctrl-C in a terminal reaches everybody: the child ends by it, the nursery with the process that started it.
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=descriptor)
    control.set_inheritable(False)
    library, this = ctypes.CDLL(None), os.getpid()
    for name in libraries:
        _import_ahead(name)
    gc.collect()
    gc.freeze()  # a collection in a child would write to, and so copy, every page of these
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    running: dict[int, int] = {}
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(woken, select.POLLIN)
    while True:
        ready = {at for at, _ in poll.poll()}
        if woken in ready:
            os.read(woken, 4096)
            _tell_ends(running)
        if control.fileno() not in ready:
            continue
        message, descriptors, _, _ = socket.recv_fds(control, 64, 3, socket.MSG_CMSG_CLOEXEC)
        if not message:
            break
        if message.startswith(b"kill "):
            if int(message.split()[1]) in running:
                os.kill(int(message.split()[1]), signal.SIGKILL)
            continue
        status, words, stderr = descriptors
        number = _fork() if _may_fork() else None
        if number == 0:
            control.close()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, on_interrupt)
            library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != this:  # it ended before that was heard
                os._exit(1)
            for other in running.values():
                os.close(other)
            _be_child(words, stderr, answer)
        os.close(words)
        os.close(stderr)
        if number is None:
            os.close(status)
        else:
            running[number] = status
            _tell(status, number)
    for number in running:
        os.kill(number, signal.SIGKILL)
    os._exit(0)


def _import_ahead(name: str) -> None:
    """Import ``module`` or ``module:name``; a package that is not installed is passed over."""
    module, _, attribute = name.partition(":")
    if find_spec(module.partition(".")[0]) is None:
        return
    found = importlib.import_module(module)  # one that fails ends the nursery: half a package is worse than none
    if attribute:
        getattr(found, attribute)


def _may_fork() -> bool:
    torch = sys.modules.get("torch")
    return len(os.listdir("/proc/self/task")) == 1 and not (torch and torch.cuda.is_initialized())


def _fork() -> int | None:
    try:
        return os.fork()
    except OSError:
        return None


def _tell(status: int, number: int) -> None:
    with suppress(BrokenPipeError):  # nobody waits for it any more
        os.write(status, b"%d\n" % number)


def _tell_ends(running: dict[int, int]) -> None:
    for number in list(running):
        ended, code = os.waitpid(number, os.WNOHANG)
        if ended:
            status = running.pop(number)
            _tell(status, os.waitstatus_to_exitcode(code))
            os.close(status)


# ---- in a child ------------------------------------------------------------------------


def _be_child(words: int, stderr: int, answer: Callable[[dict[str, Any]], None]) -> NoReturn:
    """Answer the request as a fresh process would, and end."""
    code = 1
    try:
        os.dup2(stderr, 2)
        os.close(stderr)
        _state.given_up = True  # a call within a call is rare: it has a fresh process
        with open(words, "rb") as file:
            file.seek(0)
            envelope = json.loads(file.read())
        _take_over(envelope)
        answer(envelope["request"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - as the interpreter does at the end of a program
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _take_over(envelope: dict[str, Any]) -> None:
    """Environment, folder and threads as if the process had been started with them."""
    started_in = sys.path[0]
    os.environ.clear()
    os.environ.update(envelope["environment"])
    os.chdir(envelope["place"])
    if not sys.flags.safe_path and os.path.isabs(started_in):
        sys.path[0] = envelope["place"]  # python -m puts the folder there in which it starts
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()  # else all children draw the same; Python's own random sees to itself
    if envelope["threads"] and "torch" in sys.modules:
        # OMP_NUM_THREADS and MKL_NUM_THREADS were read when torch was loaded.
        sys.modules["torch"].set_num_threads(envelope["threads"])
