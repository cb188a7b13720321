"""Checkpoints of a training run: adapter, optimizer, random states and position, sealed.

A checkpoint is a folder ``step-000040`` written beside its final place, synced, sealed last by ``manifest.json``,
read back, and renamed. The manifest names the run, the step, and the size and SHA-256 of every file, and seals
itself. Only a checkpoint that is whole, of this run and of the step that its folder says is read; an older one goes
only after the new one verifies. safetensors and JSON only: nothing here is ever unpickled.

Reads and writes ``train/checkpoints/``. (torch inside functions.)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.errors import RefusedError
from lora_kit.events import Caution, tell
from lora_kit.rundir import writing
from lora_kit.sources import file_sha256

KEPT = 2
"""Newest checkpoints that are kept, beside that of the lowest held-out loss."""
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint: its folder and the JSON values of ``state.json``."""

    folder: Path
    state: dict[str, Any]


def save(checkpoints_dir: Path, step: int, tensors: dict[str, dict[str, Any]], state: dict[str, Any], *,
         run_id: str = "", keep_steps: Collection[int] = ()) -> Path:
    """Write the checkpoint of ``step`` and remove those it replaces.

    Args:
        tensors: file stem -> name -> tensor on any device, e.g. ``adapter`` and ``optimizer``.
        state: JSON values: position, best so far, offsets of the metrics files, random states.
        run_id: what only checkpoints of this run have in common.
        keep_steps: steps whose checkpoints stay besides the newest KEPT.

    Raises:
        MachineError: it cannot be written; the earlier checkpoints are still there.
        RefusedError: what is read back is not what was written; the earlier checkpoints are still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = checkpoints_dir / f"step-{step:06d}"
    scratch = checkpoints_dir / f".{final.name}.working"
    with writing(checkpoints_dir):
        try:
            checkpoints_dir.mkdir(parents=True, exist_ok=True)
            _clear_away(checkpoints_dir)
            scratch.mkdir()
            for stem, by_name in tensors.items():
                save_file({name: tensor.detach().contiguous().cpu() for name, tensor in by_name.items()},
                          str(scratch / f"{stem}.safetensors"))
            (scratch / STATE).write_text(json.dumps(state, indent=1))
            for path in scratch.iterdir():
                _sync(path)
            (scratch / MANIFEST).write_bytes(_manifest_of(scratch, step, run_id))
            _sync(scratch / MANIFEST)
            _sync(scratch)
            verified(scratch, step, run_id)
            replaced = checkpoints_dir / f".{final.name}.old"
            if final.exists():
                os.replace(final, replaced)  # a stop between these two is mended by _folders
            os.replace(scratch, final)
            _sync(checkpoints_dir)
            shutil.rmtree(replaced, ignore_errors=True)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(errno.EIO, str(error), str(scratch)) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    for old in _folders(checkpoints_dir)[:-KEPT]:
        if _step_of(old) not in keep_steps:
            going = old.with_name(f".{old.name}.going")
            os.replace(old, going)  # never half of one under its name
            shutil.rmtree(going, ignore_errors=True)
    return final


def newest(checkpoints_dir: Path, run_id: str = "",
           fits: Callable[[Checkpoint], None] = lambda checkpoint: None) -> Checkpoint | None:
    """The newest checkpoint that verifies; a broken one is named in a Caution and passed over. None without any.

    Args:
        fits: raises RefusedError for a whole checkpoint that cannot be gone on from.

    Raises:
        RefusedError: there are checkpoints and none verifies.
    """
    folders = _folders(checkpoints_dir)
    for folder in reversed(folders):
        try:
            found = verified(folder, _step_of(folder), run_id)
            fits(found)
            return found
        except RefusedError as error:
            told = f"{error.where}: {error.what}"
            tell(Caution(text=f"{told}; the checkpoint before it is used" if folder != folders[0] else told))
    if folders:
        raise RefusedError(str(checkpoints_dir), f"none of its {len(folders)} checkpoints can be gone on from",
                           "put one back from a copy, or start anew with --fresh")
    return None


def verified(folder: Path, step: int, run_id: str = "") -> Checkpoint:
    """The checkpoint in ``folder``, every byte of which is as it was written.

    Raises:
        RefusedError: it is not whole, was changed, or is of another run or step.
    """
    try:
        written = (folder / MANIFEST).read_bytes()
        manifest = json.loads(written)
        if _sealed({key: manifest[key] for key in ("run", "step", "files")}) != written:
            raise RefusedError(str(folder / MANIFEST), "does not match its own seal")
        if manifest["run"] != run_id:
            raise RefusedError(str(folder), "is a checkpoint of another run")
        if manifest["step"] != step:
            raise RefusedError(str(folder), f"is the checkpoint of step {manifest['step']}")
        found = {path.name for path in folder.iterdir()}
        if found != {MANIFEST, *manifest["files"]}:
            raise RefusedError(str(folder), "has files that the manifest does not name, or lacks some")
        for name, expected in manifest["files"].items():
            path = folder / name
            if path.is_symlink() or path.stat().st_size != expected["bytes"] or file_sha256(path) != expected["sha256"]:
                raise RefusedError(str(path), "does not match the checkpoint's manifest")
        return Checkpoint(folder=folder, state=json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedError(str(folder), f"is not a whole checkpoint ({error})") from None


def _manifest_of(folder: Path, step: int, run_id: str) -> bytes:
    files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
             for path in sorted(folder.iterdir())}
    return _sealed({"run": run_id, "step": step, "files": files})


def _sealed(content: dict[str, Any]) -> bytes:
    """The one form in which a manifest is written, so that any other byte is a change."""
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "seal": seal}, indent=1, sort_keys=True) + "\n").encode()


def size_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def load_tensors(checkpoint: Checkpoint, stem: str) -> dict[str, Any]:
    """Tensors of one file of the checkpoint by name, on the CPU."""
    from safetensors.torch import load_file

    return load_file(str(checkpoint.folder / f"{stem}.safetensors"))


def optimizer_tensors(optimizer) -> dict[str, Any]:
    """The optimizer's state as flat names ``<parameter index>.<key>`` -> tensor.

    Read from the state itself: bitsandbytes' ``state_dict`` wraps 8-bit moments into dictionaries of their own.
    """
    import torch

    flat = {}
    for index, parameter in enumerate(_parameters(optimizer)):
        for key, value in optimizer.state.get(parameter, {}).items():
            # bitsandbytes shares one quantization map among all parameters, and safetensors takes no shared memory.
            value = value.clone() if key.startswith("qmap") else value
            flat[f"{index}.{key}"] = whole(value) if isinstance(value, torch.Tensor) else torch.tensor(value)
    return flat


def load_optimizer_tensors(optimizer, flat: dict[str, Any]) -> None:
    """Put what :func:`optimizer_tensors` gave back into ``optimizer`` (same parameters, same order)."""
    import torch

    state = optimizer.state_dict()
    parameters = _parameters(optimizer)
    by_index: dict[int, dict[str, Any]] = {}
    for name, tensor in flat.items():
        index, _, key = name.partition(".")
        # A count of steps that bitsandbytes keeps as a Python number; torch's own is a float tensor.
        value = int(tensor) if tensor.dtype == torch.int64 else like(tensor, parameters[int(index)])
        by_index.setdefault(int(index), {})[key] = value
    state["state"] = by_index
    optimizer.load_state_dict(state)


def _parameters(optimizer) -> list:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def take_random() -> tuple:
    """The random states of this process as they are: Python's, numpy's, torch's, and of every CUDA device."""
    import random

    import numpy
    import torch

    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return random.getstate(), numpy.random.get_state(), torch.get_rng_state(), cuda


def put_random(taken: tuple) -> None:
    """Undo what was drawn since :func:`take_random`."""
    import random

    import numpy
    import torch

    python, of_numpy, cpu, cuda = taken
    random.setstate(python)
    numpy.random.set_state(of_numpy)
    torch.set_rng_state(cpu)
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)


def random_state(taken: tuple | None = None) -> dict[str, Any]:
    """The random states of this process, or those ``taken``, as JSON values."""
    python, of_numpy, cpu, cuda = taken or take_random()
    return {"python": [python[0], list(python[1]), python[2]],
            "numpy": [of_numpy[0], of_numpy[1].tolist(), *of_numpy[2:]],
            "cpu": cpu.numpy().tobytes().hex(), "cuda": [state.numpy().tobytes().hex() for state in cuda]}


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo :func:`random_state`."""
    import numpy
    import torch

    def tensor_of(text: str):
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    version, values, gauss = state["python"]
    kind, words, *rest = state["numpy"]
    put_random(((version, tuple(values), gauss), (kind, numpy.array(words, numpy.uint32), *rest),
                tensor_of(state["cpu"]), [tensor_of(text) for text in state["cuda"]]))


def whole(tensor):
    """A sharded tensor (FSDP2) gathered whole; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor, parameter):
    """``tensor`` sharded like ``parameter`` when that is sharded and of the same shape."""
    if hasattr(parameter, "full_tensor") and tensor.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _folders(checkpoints_dir: Path) -> list[Path]:
    """Folders of checkpoints in order of their steps, after one that was being replaced is put back."""
    for old in checkpoints_dir.glob(".step-*.old"):
        name = checkpoints_dir / old.name.removeprefix(".").removesuffix(".old")
        if not name.exists():
            with writing(name):
                os.replace(old, name)
    found = [path for path in checkpoints_dir.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=_step_of)


def _clear_away(checkpoints_dir: Path) -> None:
    """Remove what a process that was killed has left half done."""
    _folders(checkpoints_dir)
    for pattern in (".step-*.working", ".step-*.old", ".step-*.going"):
        for path in checkpoints_dir.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until ``path`` is on the disk, and let it be read from there the next time."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if path.is_file() and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
