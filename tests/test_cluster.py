"""examples/cluster/: each file fits the schema of what it is for, and runs the command that there is again on 75."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator, ValidationError

from lora_kit import errors
from tests import tiny_run

FOLDER = tiny_run.ROOT / "examples" / "cluster"
_KUBERNETES = "pypi:kubernetes-validate==1.37.0/kubernetes_validate/kubernetes-json-schema/v1.37.0-local-strict"
_SKYPILOT = "pypi:skypilot==0.14.1/sky/utils"


def read(name: str) -> dict:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load((FOLDER / name).read_text())


def test_there_are_only_those_that_are_checked():
    assert sorted(path.name for path in FOLDER.iterdir()) == ["kubernetes.yaml", "skypilot.yaml", "slurm.sbatch"]


# ---- Kubernetes ------------------------------------------------------------------------


@pytest.fixture
def job_schema(archive_member):
    """Kubernetes' own schema of a Job, strict: unknown keys are errors."""
    from referencing import Registry, Resource
    from referencing.jsonschema import DRAFT202012

    job = json.loads(archive_member(f"{_KUBERNETES}/job-batch-v1.json").read_text())
    definitions = json.loads(archive_member(f"{_KUBERNETES}/_definitions.json").read_text())
    job.pop("$id", None)
    definitions.pop("$id", None)

    def retrieve(uri: str):
        assert uri.endswith("_definitions.json"), uri
        return Resource.from_contents(definitions, default_specification=DRAFT202012)

    job["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    return Draft202012Validator(job, registry=Registry(retrieve=retrieve))


def test_kubernetes(job_schema):
    job = read("kubernetes.yaml")
    job_schema.validate(job)
    rules = job["spec"]["podFailurePolicy"]["rules"]
    by_action = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule}
    assert by_action["Ignore"] == [errors.StoppedError.exit_code]
    assert set(by_action["FailJob"]) < set(errors.BY_EXIT_CODE) - {75, 6, 70}
    # The API server asks for both where there is a podFailurePolicy.
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    [container] = job["spec"]["template"]["spec"]["containers"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules if "onExitCodes" in rule} == {container["name"]}
    check_command(container["command"])


def test_the_schema_sees_a_mistake(job_schema):
    job = read("kubernetes.yaml")
    job["spec"]["template"]["spec"]["containers"][0]["imgae"] = "x"
    with pytest.raises(ValidationError, match="imgae"):
        job_schema.validate(job)


# ---- SkyPilot --------------------------------------------------------------------------


@pytest.fixture
def sky_schemas(archive_member, monkeypatch):
    """SkyPilot's own schemas.py; of the modules that it imports only the values that it asks for."""
    path = archive_member(f"{_SKYPILOT}/schemas.py")
    constants = types.ModuleType("constants")
    constants.__getattr__ = lambda name: (
        ("aws", "gcp", "azure", "kubernetes") if name in ("ALL_CLOUDS", "STORAGE_ONLY_CLOUDS")
        else 0 if name == "MIN_PRIORITY" else 1000 if name == "MAX_PRIORITY"
        else [] if name.endswith("KEYS_IN_TASK") else r"^.*$")
    names = {"sky": types.ModuleType("sky"), "sky.skylet": types.ModuleType("sky.skylet"),
             "sky.utils": types.ModuleType("sky.utils")}
    names["sky.skylet"].constants = constants
    waits = types.SimpleNamespace(supported_modes=lambda: ["none"])
    names["sky.skylet"].autostop_lib = types.SimpleNamespace(AutostopWaitFor=waits)
    names["sky.utils"].kubernetes_enums = types.ModuleType("kubernetes_enums")
    names["sky.utils"].kubernetes_enums.__getattr__ = lambda name: ()
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("ENV_VAR_IS_SKYPILOT_SERVER", "")
    module = types.ModuleType("sky_schemas")
    exec(compile(path.read_text(), str(path), "exec"), module.__dict__)  # noqa: S102 - the archive's hash is pinned
    return module


def test_skypilot(sky_schemas):
    task = read("skypilot.yaml")
    Draft202012Validator(_task_schema(sky_schemas)).validate(task)
    Draft202012Validator(sky_schemas.get_resources_schema()).validate(task["resources"])
    # Its schema of mounts needs all of SkyPilot; docs.skypilot.co lists keys and modes.
    assert all(mount.keys() == {"name", "mode"} and mount["mode"] == "MOUNT" for mount in task["file_mounts"].values())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    check_command(task["run"].split())
    task["resources"]["job_recovery"]["recover_on_exit_codes"] = [300]
    with pytest.raises(ValidationError):
        Draft202012Validator(sky_schemas.get_resources_schema()).validate(task["resources"])


def _task_schema(sky_schemas) -> dict:
    sky_schemas._task_config_schema = lambda: {"type": "object"}  # needs all of SkyPilot, and is not used here
    return sky_schemas.get_task_schema()


# ---- Slurm -----------------------------------------------------------------------------

SBATCH = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue",
          "open-mode", "output"}
"""Options of sbatch that the example uses (slurm.schedmd.com/sbatch.html): there is no schema of them."""


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (8, False)])
def test_slurm_requeues_on_75(tmp_path, code, requeued):
    path = FOLDER / "slurm.sbatch"
    options = re.findall(r"^#SBATCH --([a-z-]+)", path.read_text(), re.MULTILINE)
    assert set(options) == SBATCH and len(options) == len(SBATCH)
    for name, body in (("srun", f'echo "$@" > {tmp_path}/srun.txt; exit {code}'),
                       ("scontrol", f'echo "$@" > {tmp_path}/scontrol.txt')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(["bash", "-eu", str(path), "my.yaml"] if code == 0 else ["bash", str(path), "my.yaml"],
                          env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"})
    assert done.returncode == code
    assert (tmp_path / "scontrol.txt").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol.txt").read_text() == "requeue 4711\n"
    words = (tmp_path / "srun.txt").read_text().split()
    assert words[:2] == ["--kill-on-bad-exit=0", "--wait=0"]
    check_command(words[2:])


def check_command(words: list[str]) -> None:
    """Each is lora-kit train with options that it has."""
    from typer.testing import CliRunner

    from lora_kit.cli import app

    assert words[:2] == ["lora-kit", "train"]
    told = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    assert all(word in told for word in words if word.startswith("--"))


def test_the_docs_name_each_of_them():
    page = (Path(FOLDER).parent.parent / "docs" / "processes.md").read_text()
    assert all(f"examples/cluster/{path.name}" in page for path in FOLDER.iterdir())
