"""Trackers are told what metrics.jsonl says, through accelerate; a missing package is named before training."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec

import pytest

from lora_kit import pipeline, trackers
from lora_kit.errors import MachineError
from tests.test_train import metrics_of, recipe_for, write_rows

NAMES = ["tensorboard", "trackio", "wandb", "mlflow"]


@pytest.fixture(autouse=True)
def own_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    for name in ("TRACKIO_DIR", "MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY", "WANDB_SILENT"):
        monkeypatch.setenv(name, "")  # so that what the code sets goes with the test
        monkeypatch.delenv(name)


def train(model, tmp_path, names, **settings):
    rows = write_rows(tmp_path / "rows.jsonl")
    recipe_file = recipe_for(model, rows, f"train.track=[{', '.join(names)}]", **settings)
    return pipeline.run_recipe(recipe_file, runs_dir=tmp_path / "runs", until="train")


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named_before_training(name, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda package: None)
    with pytest.raises(MachineError) as caught:
        train(tiny_model, tmp_path, [name])
    assert str(caught.value) == f'train.track: {name}: is not installed; pip install "lora-kit[{name}]"'
    assert not list((tmp_path / "runs").glob("*/*/train/metrics.jsonl"))


@pytest.fixture
def stand_in(monkeypatch):
    """A tracker of accelerate's kind in the place of TensorBoard's, and what it was told."""
    from accelerate import tracking
    from accelerate.utils import LoggerType

    told = {"lines": [], "finished": 0}

    class StandIn(tracking.GeneralTracker):
        name, requires_logging_directory = "tensorboard", True

        def __init__(self, run_name, logging_dir):
            super().__init__()
            told.update(project=run_name, folder=logging_dir)

        def start(self):
            told["started"] = True

        @property
        def tracker(self):
            return self

        def store_init_configuration(self, values):
            told["settings"] = values

        def log(self, values, step=None, **_):
            told["lines"].append({"step": step, **values})

        def finish(self):
            told["finished"] += 1

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", StandIn)
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    monkeypatch.setattr(trackers, "find_spec", lambda package: True)
    return told


def test_a_tracker_is_told_what_metrics_jsonl_says(tiny_model, tmp_path, stand_in):
    run = train(tiny_model, tmp_path, ["tensorboard"])
    lines = [json.loads(line) for line in (run.stage_dir("train") / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and stand_in["lines"] == lines
    assert (stand_in["project"], stand_in["finished"]) == ("tiny", 1)
    assert stand_in["folder"] == str(run.stage_dir("train") / "trackers")
    assert stand_in["settings"]["lora.rank"] == 4 and stand_in["settings"]["train.steps"] == 6
    assert all(isinstance(value, (bool, int, float, str)) for value in stand_in["settings"].values())


def test_the_environment_is_left_as_it_was(tiny_model, tmp_path, stand_in, monkeypatch):
    keep = trackers._keep_local
    monkeypatch.setattr(trackers, "_keep_local", lambda names, place: keep(["trackio"], place))
    train(tiny_model, tmp_path, ["tensorboard"])
    assert stand_in["finished"] == 1 and "TRACKIO_DIR" not in os.environ


def test_trackers_change_no_loss(tiny_model, tmp_path, stand_in):
    tracked = train(tiny_model, tmp_path, ["tensorboard"])
    assert metrics_of(tracked) == metrics_of(train(tiny_model, tmp_path, []))


def test_a_tracker_that_does_not_start_is_one_line(tiny_model, tmp_path, stand_in, monkeypatch):
    from accelerate import tracking

    def fail(self):
        raise RuntimeError("no such\nserver")

    monkeypatch.setattr(tracking.LOGGER_TYPE_TO_CLASS["tensorboard"], "start", fail)
    with pytest.raises(MachineError, match=r"train.track: tensorboard: does not start \(no such server\); check"):
        train(tiny_model, tmp_path, ["tensorboard"])


@pytest.mark.parametrize(("given", "mode"), [
    ({}, "offline"), ({"WANDB_API_KEY": "k"}, None), ({"WANDB_MODE": "online"}, "online")])
def test_nothing_leaves_the_machine_unless_the_environment_says_so(given, mode, tmp_path, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    new = trackers._keep_local(NAMES, tmp_path)
    assert os.environ.get("WANDB_MODE") == mode and not set(given) & set(new)
    assert os.environ["TRACKIO_DIR"].startswith(str(tmp_path))
    assert os.environ["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path / 'mlflow.db'}"


def test_what_is_no_finite_number_is_not_told():
    assert trackers.told({"step": 3, "loss": 1.5, "grad_norm": float("inf"), "note": "x"}) == ({"loss": 1.5}, 3)


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="the extra tensorboard is not installed")
def test_tensorboard_itself_writes_into_the_run(tiny_model, tmp_path):
    run = train(tiny_model, tmp_path, ["tensorboard"])
    assert list((run.stage_dir("train") / "trackers").rglob("events.out.tfevents.*"))
