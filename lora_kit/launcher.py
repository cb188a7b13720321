"""`lora-kit train` with several processes: starts them, passes signals on, and ends all when one has ended badly.

Torch-free. Starts processes; reads and writes nothing else.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing

from lora_kit.errors import RecipeError, worst_exit_code
from lora_kit.events import Caution, tell
from lora_kit.recipe import LaunchSection
from lora_kit.stop_signals import SIGNALS

GRACE_SECONDS = 20.0
"""After one process has ended badly, how long the others may take to notice and save."""
_KILL_AFTER_SECONDS = 10.0
_POLL_SECONDS = 0.1
_STOPPED = 75


def launch(settings: LaunchSection, command: Sequence[str]) -> int:
    """Run ``command`` in this machine's share of ``settings.num_processes`` processes; the worst of their exit codes.

    A process that a signal has ended counts as stopped (75), since the run can go on from its last checkpoint.

    Raises:
        RecipeError: the machines are not told apart.
    """
    here = settings.num_processes // settings.num_machines
    if settings.num_processes % settings.num_machines:
        raise RecipeError("launch.num_processes", f"{settings.num_processes} on {settings.num_machines} machines",
                          "name a multiple of the machines: it is the number over all of them")
    if settings.num_machines > 1 and not (settings.main_process_ip and settings.main_process_port):
        raise RecipeError("launch", f"{settings.num_machines} machines, and no address of the first",
                          "set main_process_ip and main_process_port, and machine_rank on each")
    address, port = settings.main_process_ip or "127.0.0.1", settings.main_process_port or _free_port()
    first = settings.machine_rank * here
    processes = [subprocess.Popen(
        command, start_new_session=True,  # so that Ctrl-C comes once, from here
        env={**os.environ, "RANK": str(first + local), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(here),
             "WORLD_SIZE": str(settings.num_processes), "MASTER_ADDR": address, "MASTER_PORT": str(port),
             "LORA_KIT_LAUNCHER_PID": str(os.getpid()),
             # Several processes with all cores each are slower than one.
             "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // here))},
    ) for local in range(here)]

    def pass_on(number, frame) -> None:
        _send(processes, number)

    earlier = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        return _wait(processes, first)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _wait(processes: list[subprocess.Popen], first: int) -> int:
    """Wait until all have ended; after a bad end of one the others get GRACE_SECONDS, SIGTERM, and SIGKILL."""
    steps = [(GRACE_SECONDS, signal.SIGTERM), (GRACE_SECONDS + _KILL_AFTER_SECONDS, signal.SIGKILL)]
    ended_badly, sent = None, 0
    while any(process.poll() is None for process in processes):
        bad = [(rank, process.returncode) for rank, process in enumerate(processes, first) if process.poll()]
        if bad and ended_badly is None:
            ended_badly = time.monotonic()
            if bad[0][1] < 0:
                name = signal.Signals(-bad[0][1]).name
                tell(Caution(text=f"process {bad[0][0]} was ended by {name}; the others end"))
        if ended_badly is not None and sent < len(steps) and time.monotonic() - ended_badly > steps[sent][0]:
            _send(processes, steps[sent][1])
            sent += 1
        time.sleep(_POLL_SECONDS)
    return worst_exit_code([code if code >= 0 and code != 130 else _STOPPED
                            for code in (process.returncode for process in processes)])


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _free_port() -> int:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def command_again() -> list[str]:
    """This very command, for a process that is told by its environment that it is one of several."""
    return [sys.executable, "-m", "lora_kit.cli", *sys.argv[1:]]
