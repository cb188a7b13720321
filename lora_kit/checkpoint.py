"""Checkpoints of a training run: adapter, optimizer, random state and position, sealed.

A checkpoint is a folder ``step-000040`` written beside its final place, synced, sealed
last by ``manifest.json`` with the SHA-256 of every file, and renamed. Only a checkpoint
whose manifest verifies is read; an older one goes only after the new one verifies.
safetensors and JSON only: nothing here is ever unpickled.

Reads and writes ``train/checkpoints/``. (torch inside functions.)
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit.errors import RefusedError
from lora_kit.events import Caution, tell
from lora_kit.rundir import writing
from lora_kit.sources import file_sha256

KEPT = 2
"""Checkpoints kept beside the best adapter."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A verified checkpoint: its folder and the JSON values of ``state.json``."""

    folder: Path
    state: dict[str, Any]


def save(checkpoints_dir: Path, step: int, tensors: dict[str, dict[str, Any]], state: dict[str, Any]) -> Path:
    """Write the checkpoint of ``step`` and remove those it replaces.

    Args:
        tensors: file stem -> name -> tensor on any device, e.g. ``adapter`` and ``optimizer``.
        state: JSON values: position, best so far, offsets of the metrics files, random states.

    Raises:
        MachineError: it cannot be written; the earlier checkpoints are still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = checkpoints_dir / f"step-{step:06d}"
    scratch = checkpoints_dir / f".step-{step:06d}.working"
    with writing(checkpoints_dir):
        try:
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)
            for stem, by_name in tensors.items():
                save_file({name: tensor.detach().contiguous().cpu() for name, tensor in by_name.items()},
                          str(scratch / f"{stem}.safetensors"))
            (scratch / "state.json").write_text(json.dumps(state, indent=1))
            for path in scratch.iterdir():
                _sync(path)
            manifest = {path.name: file_sha256(path) for path in sorted(scratch.iterdir())}
            (scratch / "manifest.json").write_text(json.dumps({"step": step, "files": manifest}, indent=1))
            _sync(scratch / "manifest.json")
            _verified(scratch)
            replaced = checkpoints_dir / f".step-{step:06d}.old"
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():
                os.replace(final, replaced)
            os.replace(scratch, final)
            _sync(checkpoints_dir)
            shutil.rmtree(replaced, ignore_errors=True)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(errno.EIO, str(error), str(scratch)) from None
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    for old in _folders(checkpoints_dir)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def newest(checkpoints_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; a broken one is named in a Caution and passed over."""
    for folder in reversed(_folders(checkpoints_dir)):
        try:
            return _verified(folder)
        except RefusedError as error:
            tell(Caution(text=f"{error}; the checkpoint before it is used"))
    return None


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


def random_state() -> dict[str, Any]:
    """torch's random states of this process as JSON values."""
    import torch

    state = {"cpu": torch.get_rng_state().numpy().tobytes().hex()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo :func:`random_state`."""
    import torch

    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cpu"]), dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.frombuffer(bytearray.fromhex(state["cuda"]), dtype=torch.uint8))


def whole(tensor):
    """A sharded tensor (FSDP2) gathered whole; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(tensor, parameter):
    """``tensor`` sharded like ``parameter`` when that is sharded and of the same shape."""
    if hasattr(parameter, "full_tensor") and tensor.shape == parameter.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
    return tensor


def _folders(checkpoints_dir: Path) -> list[Path]:
    found = [path for path in checkpoints_dir.glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def _verified(folder: Path) -> Checkpoint:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest["files"].items():
            if file_sha256(folder / name) != expected:
                raise RefusedError(str(folder / name), "does not match the checkpoint's manifest")
        if {path.name for path in folder.iterdir()} != {"manifest.json", *manifest["files"]}:
            raise RefusedError(str(folder), "has files that the manifest does not name, or lacks some")
        return Checkpoint(folder=folder, state=json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(str(folder), f"is not a whole checkpoint ({error})") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
