"""Call one of lora-kit's functions in a process of its own, which never saw a model.

What is measured from files on disk is measured in a process that never saw the model
in another form; a native crash there becomes an error message here, and peak memory is
that call's own. The process is forked from one that has only imported the libraries
(``nursery``) where that is safe, and a new interpreter elsewhere. Arguments and result travel as JSON.
Torch-free itself. Reads and writes only a temporary folder.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit import errors, nursery
from lora_kit.errors import InternalError, LoraKitError, MachineError

_COMMAND = [sys.executable, "-m", "lora_kit.isolate"]
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


@dataclass(frozen=True, kw_only=True)
class Isolated:
    """What came back: the JSON value, wall seconds, and the process's peak resident bytes.

    The bytes include the libraries: those that the call imports, or all that the nursery has imported (0.4 GB).
    """

    value: Any
    seconds: float
    peak_memory_bytes: int


def call(
    function: str, arguments: dict[str, Any], *, threads: int | None = None, timeout_seconds: float | None = None,
    fresh: bool = False,
) -> Isolated:
    """Call ``module:function`` of lora_kit with keyword ``arguments`` in a process of its own.

    Args:
        function: e.g. ``lora_kit.certificate:measure``; only modules of lora_kit.
        arguments: JSON values.
        threads: CPU threads of the process; None leaves the environment as it is.
        timeout_seconds: the process is killed after that long.
        fresh: start a new interpreter in any case, so that the time that imports take is the call's too.

    Raises:
        LoraKitError: the same class, place and remedy that the function raised.
        MachineError: the process crashed, was killed or took too long.
    """
    assert function.startswith("lora_kit."), function
    imports = dict(os.environ)
    root = str(Path(__file__).parent.parent)
    imports["PYTHONPATH"] = os.pathsep.join(filter(None, [root, imports.get("PYTHONPATH", "")]))
    environment = dict(imports)
    if threads:
        environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
    with tempfile.TemporaryDirectory(prefix="lora-kit-") as folder:
        answer = Path(folder) / "answer.json"
        request = {"function": function, "arguments": arguments, "answer": str(answer)}
        started = time.perf_counter()
        done: nursery.Ended | subprocess.CompletedProcess[str] | None = None
        try:
            if not fresh:
                done = nursery.run(request, command=_COMMAND, environment=imports, own=environment, threads=threads,
                                   timeout_seconds=timeout_seconds)
            if done is None:
                left = None if timeout_seconds is None else timeout_seconds - (time.perf_counter() - started)
                done = subprocess.run(
                    _COMMAND, input=json.dumps(request), env=environment, text=True, capture_output=True, timeout=left)
        except subprocess.TimeoutExpired:
            raise MachineError(function, f"took over {timeout_seconds:.0f} s and was stopped") from None
        seconds = time.perf_counter() - started
        if answer.exists():
            reply = json.loads(answer.read_text())
            if "error" in reply:
                kind = errors.BY_EXIT_CODE.get(reply["error"]["exit_code"], InternalError)
                problem = kind(reply["error"]["where"], reply["error"]["what"], reply["error"]["todo"])
                problem.__cause__ = RuntimeError(reply["error"]["traceback"])
                raise problem
            return Isolated(value=reply["value"], seconds=seconds, peak_memory_bytes=reply["peak_memory_bytes"])
    raise MachineError(function, _how_it_died(done.returncode), _last_line(done.stderr))


def _how_it_died(code: int) -> str:
    if code == -signal.SIGKILL:
        return "the process was killed, most likely for lack of memory"
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"the process crashed ({names.get(-code, f'signal {-code}')})"
    return f"the process ended with code {code} and no answer"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return f"its last line: {lines[-1][:300]}" if lines else ""


def peak_memory_bytes() -> int:
    """Peak resident bytes of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    # ru_maxrss survives exec: a child starts with its parent's peak. VmHWM is this process's own.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return peak * 1024


def reset_peak_memory() -> None:
    """Start :func:`peak_memory_bytes` anew from here, where the system can (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _answer_request(request: dict[str, Any]) -> None:
    module_name, _, function_name = request["function"].partition(":")
    assert module_name.startswith("lora_kit.")
    try:
        value = getattr(importlib.import_module(module_name), function_name)(**request["arguments"])
        json.dumps(value)  # a value that is no JSON is an error of the function, told like any other
        reply = {"value": value, "peak_memory_bytes": peak_memory_bytes()}
    except LoraKitError as error:
        reply = {"error": {"exit_code": error.exit_code, "where": error.where, "what": error.what,
                           "todo": error.todo, "traceback": traceback.format_exc()}}
    except MemoryError:
        reply = {"error": {"exit_code": 6, "where": request["function"], "what": "out of memory",
                           "todo": "", "traceback": traceback.format_exc()}}
    except Exception as error:  # noqa: BLE001 - whatever it is, it travels back as one line
        reply = {"error": {"exit_code": 70, "where": request["function"],
                           "what": f"{type(error).__name__}: {error}", "todo": "run again with --debug and report it",
                           "traceback": traceback.format_exc()}}
        if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
            reply["error"].update(exit_code=6, where=str(error.filename or request["function"]),
                                  what=f"cannot be written ({error.strerror})", todo="free space or check permissions")
    answer = Path(request["answer"])
    answer.with_suffix(".part").write_text(json.dumps(reply))
    os.replace(answer.with_suffix(".part"), answer)  # killed meanwhile, it leaves no half an answer


def _answer_in_child(request: dict[str, Any]) -> None:
    reset_peak_memory()
    _answer_request(request)


if __name__ == "__main__":
    if sys.argv[1:]:
        nursery.serve(int(sys.argv[1]), sys.argv[2:], _answer_in_child)
    _answer_request(json.loads(sys.stdin.read()))
