"""Experiment trackers: what metrics.jsonl says, told to TensorBoard, trackio, W&B or MLflow through accelerate.

Each is an extra of lora-kit. They write below the run's own folder and stay there, except where the user's environment
says otherwise (WANDB_MODE, WANDB_API_KEY, TRACKIO_DIR, MLFLOW_TRACKING_URI); metrics.jsonl is written in any case.

Reads the environment; writes ``train/trackers/``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_kit.errors import MachineError
from lora_kit.recipe import Recipe

FOLDER = "trackers"


def check_installed(names: Sequence[str]) -> None:
    """MachineError for the first tracker of ``names`` whose package is missing: accelerate would leave it out."""
    for name in names:
        if find_spec(name) is None:
            raise MachineError(f"train.track: {name}", "is not installed", f'pip install "lora-kit[{name}]"')


def options_of_accelerator(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """Keyword arguments of accelerate's Accelerator for the trackers ``names``; none without trackers."""
    if not names:
        return {}
    from accelerate.utils import ProjectConfiguration

    return {"log_with": list(names), "project_config": ProjectConfiguration(
        project_dir=str(folder), logging_dir=str(folder / FOLDER))}


def start(accelerator, recipe: Recipe, run_id: str, folder: Path) -> ExitStack:
    """Start the trackers of ``recipe`` on the main process; leaving the returned context finishes them.

    Raises:
        MachineError: a tracker does not start.
    """
    names, finishing = recipe.train.track, ExitStack()
    if not names:
        return finishing
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    for variable in _keep_local(names, place):
        finishing.callback(os.environ.pop, variable, None)  # the next run of this process has a folder of its own
    try:
        accelerator.init_trackers(recipe.name, config=_flat(recipe.section_json("model", "lora", "train", "seed")),
                                  init_kwargs=_options(run_id, place))
    except Exception as error:  # noqa: BLE001 - whatever a tracker's package raises, the user is told in one line
        finishing.close()
        raise MachineError(f"train.track: {', '.join(names)}", f"does not start ({' '.join(str(error).split())[:200]})",
                           "check its set-up, or leave it out: metrics.jsonl is written in any case") from None
    # Not accelerator.end_training(), which also ends the group of processes that later stages need.
    for tracker in accelerator.trackers:
        finishing.callback(tracker.finish)
    return finishing


def told(values: dict[str, Any]) -> tuple[dict[str, float], int]:
    """A line of metrics.jsonl as (numbers by name, step)."""
    numbers = {name: value for name, value in values.items()
               if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)}
    return numbers, int(values["step"])


def _keep_local(names: Sequence[str], place: Path) -> list[str]:
    """Say where to write, in the environment variables that the trackers read, unless the user has; returns those
    that were set."""
    wanted = {"trackio": {"TRACKIO_DIR": str(place / "trackio")},
              "mlflow": {"MLFLOW_TRACKING_URI": f"sqlite:///{place / 'mlflow.db'}"},
              # Without a key wandb would ask for a login, and wait.
              "wandb": {"WANDB_SILENT": "true"} | ({} if "WANDB_API_KEY" in os.environ else {"WANDB_MODE": "offline"})}
    new = {variable: value for name in names for variable, value in wanted.get(name, {}).items()
           if variable not in os.environ}
    os.environ.update(new)
    return list(new)


def _options(run_id: str, place: Path) -> dict[str, dict[str, Any]]:
    return {
        "wandb": {"dir": str(place), "name": run_id, "id": run_id, "resume": "allow"},
        "trackio": {"name": run_id, "resume": "allow"},
        "mlflow": {"run_name": run_id, "logging_dir": str(place / "mlflow")},
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON values as ``a.b`` -> number or text, which is all that TensorBoard takes."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
