"""examples/ci: the workflow and the action fit the schemas of GitHub, and the action's script does what it says."""

import json
import os
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import jsonschema
import pytest
from ruamel.yaml import YAML

from tests import tiny_run

FOLDER = tiny_run.ROOT / "examples" / "ci"
ACTION = FOLDER / "lora-kit-eval" / "action.yml"
WORKFLOW = FOLDER / "evaluate.yml"


def read(path: Path) -> dict:
    return json.loads(json.dumps(YAML(typ="safe").load(path.read_text(encoding="utf-8"))))


def problems(values: dict, schema: str) -> list[str]:
    """What the schema of check-jsonschema's wheel (from schemastore.org) says against ``values``."""
    text = (resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / f"{schema}.json").read_text()
    return [error.message for error in jsonschema.validators.validator_for(json.loads(text))(
        json.loads(text)).iter_errors(values)]


def test_both_fit_the_public_schemas():
    assert problems(read(WORKFLOW), "github-workflows") == []
    assert problems(read(ACTION), "github-actions") == []


@pytest.mark.parametrize("path, schema, change", [
    (WORKFLOW, "github-workflows", lambda values: values["jobs"]["evaluate"].pop("runs-on")),
    (WORKFLOW, "github-workflows", lambda values: values.update(job={})),
    (ACTION, "github-actions", lambda values: values["runs"].update(using="composit")),
    (ACTION, "github-actions", lambda values: values["runs"]["steps"][0].pop("shell"))])
def test_the_schemas_see_mistakes(path, schema, change):
    values = read(path)
    change(values)
    assert problems(values, schema)


def test_the_workflow_names_inputs_and_outputs_that_the_action_has():
    action, job = read(ACTION), read(WORKFLOW)["jobs"]["evaluate"]
    (step,) = [step for step in job["steps"] if step.get("uses", "").endswith("lora-kit-eval")]
    assert set(step["with"]) <= set(action["inputs"])
    assert {name for name, each in action["inputs"].items() if each.get("required")} <= set(step["with"])
    assert "steps.lora-kit.outputs.outcome" in WORKFLOW.read_text() and set(action["outputs"]) == {"outcome"}


def test_no_input_stands_in_a_script():
    for step in [*read(ACTION)["runs"]["steps"], *read(WORKFLOW)["jobs"]["evaluate"]["steps"]]:
        assert "${{" not in step.get("run", ""), "text of a pull request would become a command"


@pytest.fixture
def world(tmp_path, tiny_model):
    """The tiny recipe, and ``lora-kit`` on the path."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "lora-kit"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lora_kit.cli "$@"\n')
    program.chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    tiny_run.write_recipe(tmp_path, tiny_model, quantize=None)
    (tmp_path / "suite.yaml").write_text(
        "tasks: [held_out_loss]\nroles: {task: held_out_loss, role: retain, margin: 0.01}\n")
    return tmp_path


def run_steps(world: Path, **given) -> tuple[int, dict[str, str], str]:
    """The action's own scripts with its defaults and ``given``: exit code, outputs, the step's summary."""
    action = read(ACTION)
    inputs = {name: each.get("default", "") for name, each in action["inputs"].items()} | given
    summary, outputs, code = world / "summary.txt", world / "outputs.txt", 0
    for file in (summary, outputs):
        file.write_text("")
    for step in action["runs"]["steps"]:
        if "run" not in step or step["name"] == "Install":
            continue
        environment = {name: inputs[value.removeprefix("${{ inputs.").removesuffix(" }}")]
                       for name, value in step["env"].items()}
        done = subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], cwd=world, capture_output=True, text=True,
                              env={**os.environ, **environment, "PATH": f"{world / 'bin'}:{os.environ['PATH']}",
                                   "PYTHONPATH": str(tiny_run.ROOT), "GITHUB_STEP_SUMMARY": str(summary),
                                   "GITHUB_OUTPUT": str(outputs), "LORA_KIT_CACHE": str(world / "cache")})
        code = done.returncode
        if code:
            print(done.stdout + done.stderr)
            break
    lines = [line.partition("=") for line in outputs.read_text().splitlines()]
    return code, {name: value for name, _, value in lines}, summary.read_text()


def test_the_actions_scripts_leave_verdicts(world):
    from junitparser import JUnitXml

    code, outputs, summary = run_steps(world, recipe="tiny.yaml", suite="./suite.yaml")
    assert code == 0 and outputs == {"outcome": "PASS"}
    assert summary.startswith("# PASS: evaluation of tiny") and "merged no worse than base" in summary
    reports = world / "lora-kit-reports"
    found = json.loads((reports / "gates.json").read_text())
    assert (found["format"], found["outcome"], found["exit_code"]) == (1, "PASS", 0)
    assert found["budget"]["stopped"] == "every gate is decided"
    assert JUnitXml.fromfile(str(reports / "gates.xml")).failures == 0
    assert list(world.glob("runs/*/*/eval/*/items.jsonl"))


def test_a_gate_that_fails_fails_the_step_and_is_in_the_summary(world):
    (world / "suite.yaml").write_text(
        "tasks: [held_out_loss]\ngates: {task: held_out_loss, at_most: 0.0001}\n")
    code, outputs, summary = run_steps(world, recipe="tiny.yaml", suite="./suite.yaml", reports="a folder")
    assert code == 1 and outputs == {"outcome": "FAIL"}
    assert summary.startswith("# FAIL: evaluation of tiny") and (world / "a folder" / "gates.xml").exists()


def test_a_hostile_input_is_no_command(world):
    code, outputs, summary = run_steps(world, recipe="tiny.yaml", suite="./suite.yaml",
                                       budget="5m; touch stolen; $(touch stolen)")
    assert code == 2 and not (world / "stolen").exists() and outputs == {}
    shutil.rmtree(world / "runs")
