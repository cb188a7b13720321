"""Part ``kernels``: what is done element by element in the other parts, compiled for this machine's CPU.

torch runs such a formula as one pass over memory for each operation, in 16 bits with copies in fp32 between them.
``kernels.c`` does each in one pass. It is compiled once, in about a second, by the machine's C compiler (``$CC``,
cc, gcc or clang) and kept in the cache folder, named by its source, the command and the processor. Where there is
no compiler, or its result cannot be loaded, torch's operations serve as before and the reason is told.

Threads are those of torch: the library takes the OpenMP that torch has loaded, so there is no second pool of them.
Reads kernels.c and attention.c; writes ``kernels/`` in the cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from lora_kit import hardware
from lora_kit.sources import cache_dir

_SOURCE = Path(__file__).with_name("kernels.c")
_ATTENTION = Path(__file__).with_name("attention.c")
"""Appended for bf16 alone, which is what matrix units multiply."""
_TYPES = {"fp32": ("float", "(value)", "(value)"), "bf16": ("uint16_t", "load_bf16(value)", "store_bf16(value)")}
_SUFFIXES = {torch.float32: "_fp32", torch.bfloat16: "_bf16"}
# No -ffast-math: it lets NaN pass unseen, and gcc then switches denormal numbers off in the whole process.
# A product and a sum become one instruction, which -std=c11 alone forbids.
_FLAGS = ["-O3", "-std=c11", "-ffp-contract=fast", "-shared", "-fPIC", "-fno-math-errno",
          "-fno-trapping-math", "-fno-signed-zeros"]
_VARIANTS = (["-march=native", "-mprefer-vector-width=512"], ["-march=native"], ["-mcpu=native"], [])
_NUMBERS = {"float": ctypes.c_float, "size": ctypes.c_ssize_t, "int": ctypes.c_int}
_TIMEOUT_SECONDS = 120

_in_use: ctypes.CDLL | None = None


def use() -> str | None:
    """Let the other parts call the kernels from now on; None, or the reason why they cannot."""
    global _in_use
    library, reason = _library()
    _in_use = library
    return reason


def stop() -> None:
    """Undo :func:`use`."""
    global _in_use
    _in_use = None


def serves(*tensors: torch.Tensor) -> bool:
    """Whether the kernels are in use and take ``tensors``: on a CPU, fp32 or bf16, all of one type."""
    first = tensors[0]
    return (_in_use is not None and first.dtype in _SUFFIXES
            and all(tensor.dtype == first.dtype and tensor.device.type == "cpu" for tensor in tensors))


def call(name: str, dtype: torch.dtype, *arguments: torch.Tensor | float | int) -> None:
    """Run the kernel ``name`` for values of ``dtype``; tensors are given by where they begin."""
    getattr(_in_use, name + _SUFFIXES[dtype])(*(
        argument.data_ptr() if isinstance(argument, torch.Tensor) else argument for argument in arguments))


def multiplies(*tensors: torch.Tensor) -> bool:
    """Whether the kernels of attention.c, which need a CPU's matrix units, are in use and take ``tensors``."""
    return serves(*tensors) and tensors[0].dtype == torch.bfloat16 and _has_matrix_units(_in_use)


@cache
def _has_matrix_units(library: ctypes.CDLL) -> bool:
    # The system lets a process use them once it has asked.
    return library.matrix_units() == 1


def num_kernels() -> int:
    """How many kernels kernels.c has, each for two types."""
    return len(_signatures(_SOURCE))


@cache
def _library() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled kernels, or why there are none."""
    compiler = next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang")
                     if name and (found := shutil.which(shlex.split(name)[0]))), None)
    if compiler is None:
        return None, "there is no C compiler"
    if sys.platform == "win32":
        return None, "they are not built on Windows"
    source = _source()
    reason = "the C compiler fails"
    for variant in _VARIANTS:
        # Not linked with OpenMP: its functions are found in the one that torch has loaded for everyone.
        command = [compiler, *_FLAGS, "-fopenmp", *variant]
        try:
            path = _compiled(source, command)
            library = ctypes.CDLL(str(path))
        except OSError as error:
            reason = f"what was compiled cannot be loaded: {error}"
            continue
        except subprocess.SubprocessError as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            reason = f"the C compiler fails: {lines[0] if lines else error}"
            continue
        for file, suffixes in ((_SOURCE, _SUFFIXES.values()), (_ATTENTION, [_SUFFIXES[torch.bfloat16]])):
            for name, types in _signatures(file).items():
                for suffix in suffixes:
                    function = getattr(library, name + suffix)
                    function.restype, function.argtypes = None, types
        return library, None
    return None, reason


def _source() -> str:
    """kernels.c for each type of values, one below the other, with attention.c for bf16."""
    parts = []
    for name, (ctype, load, store) in _TYPES.items():
        files = [_SOURCE, _ATTENTION] if name == "bf16" else [_SOURCE]
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
        parts += [f"#define T {ctype}", f"#define LOAD(value) {load}", f"#define STORE(value) {store}",
                  f"#define NAME(name) name##_{name}", text, "#undef T", "#undef LOAD", "#undef STORE", "#undef NAME"]
    return "\n".join(parts) + "\n"


def _compiled(source: str, command: list[str]) -> Path:
    """The shared library of ``source``, from the cache or by ``command``; OSError or SubprocessError when it fails."""
    name = "\0".join([source, *command, hardware.cpu_model(), *sorted(hardware.cpu_flags()), torch.__version__])
    folder = cache_dir() / "kernels"
    library = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        file, made = Path(work, "kernels.c"), Path(work, "kernels.so")
        file.write_text(source, encoding="utf-8")
        link = [] if sys.platform == "darwin" else ["-lm"]
        objects = [option for option in command if option != "-shared"]
        subprocess.run([*objects, "-c", str(file), "-o", f"{work}/kernels.o"], check=True, capture_output=True,
                       text=True, timeout=_TIMEOUT_SECONDS)
        subprocess.run([command[0], "-shared", f"{work}/kernels.o", "-o", str(made), *link], check=True,
                       capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        made.replace(library)  # another process may be doing the same: one whole file wins
    return library


@cache
def _signatures(source: Path) -> dict[str, list]:
    """Kernel -> ctypes of its arguments, read from ``source``."""
    found = {}
    for part in source.read_text(encoding="utf-8").split("void NAME(")[1:]:
        name, _, rest = part.partition(")(")
        arguments = rest.partition(") {")[0].split(",")
        found[name] = [ctypes.c_void_p if "*" in argument else _NUMBERS[argument.split()[0]] for argument in arguments]
    return found
