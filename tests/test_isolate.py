"""A call in a process of its own, forked or fresh: what comes back, and how a failure there is told.

Each way has every test (``call`` is a fixture). The nursery here imports next to nothing, so that it starts
quickly; ``test_nursery.py`` has what only a nursery does. The functions that are called stand in ``calls.py``
below, which a ``sitecustomize.py`` on the child's path makes a module of lora_kit: only modules of lora_kit can
be called.
"""

from __future__ import annotations

import functools
import os

import pytest

from lora_kit import isolate, nursery
from lora_kit.errors import BY_EXIT_CODE, InternalError, MachineError, RecipeError

CALLS = '''
import ctypes, os, signal, sys, time
from lora_kit.errors import BY_EXIT_CODE

def double(number):
    print("noise on standard output")
    return {"doubled": 2 * number, "threads": os.environ.get("OMP_NUM_THREADS"), "pid": os.getpid(),
            "parent": os.getppid(), "cache": os.environ.get("LORA_KIT_CACHE"), "folder": os.getcwd(),
            "blas": os.environ.get("OPENBLAS_NUM_THREADS"), "path": sys.path[:2]}

def fail(exit_code):
    raise BY_EXIT_CODE[exit_code]("the place", "what broke", "what to do")

def stumble():
    raise KeyError("nobody caught this")

def crash():
    print("the last words", file=sys.stderr, flush=True)
    ctypes.string_at(0)

def abort():
    os.abort()

def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)

def leave():
    os._exit(3)

def sleep(note=None):
    if note:
        with open(note + ".part", "w") as file:
            file.write(f"{os.getpid()} {os.getppid()}")
        os.replace(note + ".part", note)
    time.sleep(60)

def end_program():
    sys.exit(4)

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)

def __getattr__(name):
    if name == "start_thread":  # as a library does while it is loaded
        import threading
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        return True
    raise AttributeError(name)

def torch_threads():
    import torch
    return torch.get_num_threads()

def draw():
    import random
    import numpy.random
    return [random.random(), float(numpy.random.random())]

def loaded():
    return sorted({name.partition(".")[0] for name in sys.modules})

def within():
    from lora_kit import isolate
    return [os.getpid(), isolate.call("lora_kit.calls:double", {"number": 1}).value]

def no_json():
    return {1, 2}

def out_of_memory():
    raise MemoryError

def use_memory(num_bytes):
    held = b"x" * num_bytes
    return len(held)
'''


@pytest.fixture(scope="module", autouse=True)
def calls(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        prepare(patch, tmp_path_factory.mktemp("calls"))
        yield
    nursery.close()


def prepare(patch, folder):
    """Make the functions above a module of lora_kit in the processes that ``call`` starts; a light nursery."""
    (folder / "calls.py").write_text(CALLS)
    (folder / "sitecustomize.py").write_text(f"import lora_kit\nlora_kit.__path__.append({str(folder)!r})\n")
    patch.setenv("PYTHONPATH", str(folder))
    patch.setattr(nursery, "LIBRARIES", ("json",))


@pytest.fixture(params=["forked", "fresh"])
def call(request):
    if request.param == "forked" and not nursery.is_possible():
        pytest.skip("no process is forked on this machine")
    return functools.partial(isolate.call, fresh=request.param == "fresh")


def test_the_value_comes_back_from_another_process(call):
    done = call("lora_kit.calls:double", {"number": 21}, threads=3)
    assert done.value["doubled"] == 42 and done.value["threads"] == "3"
    assert done.value["pid"] != os.getpid()
    assert 0 < done.seconds < 60


def test_threads_are_left_as_they_are_when_not_named(call, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert call("lora_kit.calls:double", {"number": 1}).value["threads"] == "7"


@pytest.mark.parametrize("exit_code", [2, 5, 7, 70])
def test_an_error_keeps_its_class_place_and_remedy(call, exit_code):
    with pytest.raises(BY_EXIT_CODE[exit_code]) as caught:
        call("lora_kit.calls:fail", {"exit_code": exit_code})
    assert (caught.value.where, caught.value.what, caught.value.todo) == ("the place", "what broke", "what to do")
    assert "in fail" in str(caught.value.__cause__), "the traceback of the other process, for --debug"


def test_a_function_of_lora_kit_raises_its_own_error(call):
    with pytest.raises(RecipeError, match="there is no format 'mesages'; did you mean messages"):
        call("lora_kit.formats:load", {"name": "mesages"})


def test_an_unforeseen_exception_is_a_bug_of_ours(call):
    with pytest.raises(InternalError, match=r"lora_kit.calls:stumble: KeyError: 'nobody caught this'; run again"):
        call("lora_kit.calls:stumble", {})


def test_a_value_that_is_no_json_is_told(call):
    with pytest.raises(InternalError, match="lora_kit.calls:no_json: TypeError: Object of type set is not JSON"):
        call("lora_kit.calls:no_json", {})


@pytest.mark.parametrize(("function", "told"), [
    ("crash", "the process crashed (SIGSEGV)"), ("abort", "the process crashed (SIGABRT)"),
    ("be_killed", "the process was killed, most likely for lack of memory"),
    ("leave", "the process ended with code 3 and no answer"),
    ("end_program", "the process ended with code 4 and no answer"),
    ("interrupt", "the process crashed (SIGINT)"), ("out_of_memory", "out of memory"),
])
def test_a_crash_becomes_one_line(call, function, told):
    with pytest.raises(MachineError) as caught:
        call(f"lora_kit.calls:{function}", {})
    assert str(caught.value).startswith(f"lora_kit.calls:{function}: {told}")


def test_the_last_words_of_a_crash_are_told(call):
    with pytest.raises(MachineError, match="its last line: the last words"):
        call("lora_kit.calls:crash", {})


def test_a_call_that_hangs_is_stopped(call):
    with pytest.raises(MachineError, match="took over 3 s and was stopped"):
        call("lora_kit.calls:sleep", {}, timeout_seconds=3)


def test_peak_memory_is_the_call_s_own(call):
    held_here = bytearray(200_000_000)
    held_here[::4096] = b"x" * len(held_here[::4096])
    small = call("lora_kit.calls:use_memory", {"num_bytes": 1}).peak_memory_bytes
    large = call("lora_kit.calls:use_memory", {"num_bytes": 100_000_000}).peak_memory_bytes
    assert small < 100_000_000, "the parent's memory is counted"
    assert large - small == pytest.approx(100_000_000, rel=0.05)


def test_peak_memory_can_start_anew():
    block = b"x" * 200_000_000
    del block
    before = isolate.peak_memory_bytes()
    isolate.reset_peak_memory()
    if before == isolate.peak_memory_bytes():
        pytest.skip("this system has no /proc/self/clear_refs that may be written")
    assert before - isolate.peak_memory_bytes() > 100_000_000


def test_only_functions_of_lora_kit_are_called(call):
    with pytest.raises(AssertionError):
        call("os:getcwd", {})
