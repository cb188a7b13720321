"""How many processes train together, and where: from the recipe, an accelerate config, an option, or a launcher.

`lora-kit train` starts the processes of one machine itself; torchrun, accelerate launch and srun start them and say so
in environment variables. Whichever it is, each process ends up with the same ones and enters the same function.
Torch-free. Reads an accelerate config and the environment; sets the environment for srun's processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from lora_kit import yaml_file
from lora_kit.errors import RecipeError
from lora_kit.events import Note, tell
from lora_kit.recipe import LaunchSection, Recipe

_OURS = tuple(LaunchSection.model_fields)
_WITHOUT_EFFECT = ("compute_environment", "debug", "downcast_bf16", "enable_cpu_affinity", "gpu_ids",
                   "main_training_function", "rdzv_backend", "same_network", "tpu_env", "tpu_use_cluster",
                   "tpu_use_sudo", "use_cpu", "fsdp_config", "dynamo_config")
"""Keys of an accelerate config that lora-kit has no use for; it says so."""
_PORTS_FROM, _NUM_PORTS = 20_000, 20_000


def settings_of(recipe: Recipe, config: Path | None, num_processes: int | None) -> LaunchSection:
    """What to launch: ``launch`` of the recipe, in its place the accelerate config, and above both the number.

    Raises:
        RecipeError: the config is none, or asks for what the recipe does not do; or the batch cannot be split.
    """
    found = _read_config(config, recipe) if config is not None else recipe.launch
    if num_processes is not None:
        if found.num_machines > 1 and num_processes % found.num_machines:
            raise RecipeError("--num-processes", f"{num_processes} processes on {found.num_machines} machines",
                              "name a multiple of the machines: it is the number over all of them")
        found = found.model_copy(update={"num_processes": num_processes})
    check_split(recipe.train.batch_size, found.num_processes)
    return found


def check_split(batch_size: int, num_processes: int) -> None:
    """RecipeError, with the nearest batches that can be, when ``num_processes`` cannot share a batch."""
    if batch_size % num_processes:
        below = batch_size // num_processes * num_processes
        numbers = [number for number in range(1, batch_size + 1) if batch_size % number == 0]
        near = sorted(sorted(numbers, key=lambda number: abs(number - num_processes))[:2])
        raise RecipeError("train.batch_size", f"{batch_size} examples cannot be shared by {num_processes} processes",
                          f"use {f'{below} or ' if below else ''}{below + num_processes}, or "
                          f"{' or '.join(map(str, near))} processes")


def _read_config(path: Path, recipe: Recipe) -> LaunchSection:
    text, shown = yaml_file.read_text(path, "accelerate config", "accelerate config writes one"), str(path)
    tree = yaml_file.load_tree(text, shown, parts="settings", needed="name a file that accelerate config writes")
    values, places = yaml_file.plain(tree), yaml_file.Places(tree, shown)
    problems = list(_against_recipe(values, recipe, places))
    ours = {key: values[key] for key in _OURS if values.get(key) is not None}
    try:
        found = LaunchSection(**ours)
    except ValidationError as error:
        problems += yaml_file.explain(error, LaunchSection, ours, places)
    if problems:
        raise RecipeError.of(yaml_file.in_order(problems))
    ignored = [key for key in _WITHOUT_EFFECT if values.get(key) not in (None, False, "", {}, "LOCAL_MACHINE", "all")]
    if ignored:
        tell(Note(text=f"{shown}: not used by lora-kit: {', '.join(ignored)}"))
    return found


def _against_recipe(values: dict[str, Any], recipe: Recipe, places: yaml_file.Places) -> Iterator[RecipeError]:
    """What the config asks for that lora-kit does not do, or that the recipe says otherwise."""
    for key, value in values.items():
        where = places.of((key,))
        if key == "distributed_type":
            shards = recipe.train.shard == "fsdp"
            if value == "FSDP" and not shards or value in ("MULTI_GPU", "MULTI_CPU") and shards:
                yield RecipeError(where, f"distributed_type is {value}, and train.shard is {recipe.train.shard}",
                                  f"set train.shard: {'fsdp' if value == 'FSDP' else 'none'} in the recipe")
            elif value not in ("NO", "FSDP", "MULTI_GPU", "MULTI_CPU"):
                yield RecipeError(where, f"distributed_type {value} is not supported",
                                  "use MULTI_GPU, MULTI_CPU or FSDP")
        elif key == "mixed_precision":
            wanted = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}.get(str(value), str(value))
            if recipe.train.precision not in ("auto", wanted) or wanted not in ("fp32", "bf16", "fp16"):
                yield RecipeError(where, f"mixed_precision is {value}, and train.precision is {recipe.train.precision}",
                                  "leave it out: the recipe says it")
        elif key == "compute_environment" and value != "LOCAL_MACHINE":
            yield RecipeError(where, f"compute_environment {value} is not supported", "use LOCAL_MACHINE")
        elif key not in (*_OURS, *_WITHOUT_EFFECT):
            yield RecipeError(where, f"'{key}' of an accelerate config is not supported", "leave it out")


def take_over_from_srun() -> None:
    """Give the processes of one `srun` step the variables that torchrun would; nothing elsewhere.

    The port follows from the job's id, so that two jobs on one machine do not meet.
    """
    number = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if number < 2 or "WORLD_SIZE" in os.environ:
        return
    try:
        rank, local = os.environ["SLURM_PROCID"], os.environ["SLURM_LOCALID"]
        address = os.environ.get("MASTER_ADDR") or os.environ["SLURM_LAUNCH_NODE_IPADDR"]
        port = os.environ.get("MASTER_PORT") or str(_PORTS_FROM + int(os.environ["SLURM_JOB_ID"]) % _NUM_PORTS)
    except KeyError as error:
        raise RecipeError("srun", f"{number} tasks were started, and {error.args[0]} is not set",
                          "set MASTER_ADDR to the first node, or launch with torchrun") from None
    # The node that srun was called on leads; it is the first of the job when srun stands in a batch script.
    os.environ.update(WORLD_SIZE=str(number), RANK=rank, LOCAL_RANK=local, MASTER_ADDR=address, MASTER_PORT=port)
