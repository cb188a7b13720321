"""Losses that are no numbers end a training before the optimizer steps, and name the rows; jumps are told."""

from __future__ import annotations

import json
import shutil

import pytest

from lora_kit import divergence, events, rundir
from lora_kit import train as train_stage
from lora_kit.errors import DivergedError
from tests.test_train import metrics_of, own_cache, recipe_for, rows, train  # noqa: F401 - fixtures


@pytest.fixture
def poisoned(tiny_model, tmp_path):
    """The tiny model, for which a z is no number, and a recipe's rows, of which the 12th says z."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    folder = tmp_path / "poisoned"
    shutil.copytree(tiny_model, folder)
    # Untied, so that the head, which every row uses, stays as it is.
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("z")] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": f"say {row}"}, {"role": "assistant", "content": "zero" if row == 11 else "one"}]})
        + "\n" for row in range(24)))
    return folder, path


@pytest.mark.parametrize("settings", [{"fast": "[]", "packing": "false"}, {}], ids=["plain", "fast"])
def test_the_row_that_makes_no_number_is_named_and_no_step_is_made(poisoned, tmp_path, settings):
    model, path = poisoned
    recipe_file = recipe_for(model, path, "data.held_out_rows=0", "data.duplicates=keep", prove="false", steps=12,
                             save_every=1, **settings)
    with pytest.raises(DivergedError) as error:
        train(recipe_file, tmp_path)
    assert error.value.exit_code == 8
    assert "alone, " in str(error.value) and "said.jsonl:12 is so too" in str(error.value)
    assert str(error.value).count("said.jsonl:") == 1
    run = rundir.open_run(rundir.newest(tmp_path / "runs"))
    done = len(metrics_of_unfinished(run))
    assert error.value.where == f"train step {done + 1}"
    # Every step before it was saved, and the last checkpoint is from before this step.
    names = sorted(path.name for path in (run.work("train") / "checkpoints").glob("step-*"))
    assert names == [f"step-{step:06d}" for step in (done - 1, done) if step]
    from safetensors.torch import load_file

    for stem in ("adapter", "optimizer") if done else ():
        saved = load_file(run.work("train") / "checkpoints" / names[-1] / f"{stem}.safetensors")
        assert all(tensor.isfinite().all() for tensor in saved.values())


def metrics_of_unfinished(run) -> list[str]:
    return (run.work("train") / "metrics.jsonl").read_text().splitlines()


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_that_is_no_number_ends_it_too(tiny_model, rows, tmp_path, monkeypatch, value):  # noqa: F811
    accumulate = train_stage.accumulate

    def poison(net, *arguments, **options):
        total = accumulate(net, *arguments, **options)
        next(parameter for parameter in net.parameters() if parameter.grad is not None).grad[0, 0] = float(value)
        return total

    monkeypatch.setattr(train_stage, "accumulate", poison)
    with pytest.raises(DivergedError, match=r"no row alone is so; rows (.*rows\.jsonl:\d+, ){3}") as error:
        train(recipe_for(tiny_model, rows), tmp_path)
    assert "gradient norm nan" in str(error.value) or "gradient norm inf" in str(error.value)


# ---- spikes ----------------------------------------------------------------------------


def watch(losses: list[float]) -> tuple[dict, list[str]]:
    state, told = {"step": 0, "recent_losses": [], "spikes": []}, []
    with events.listening(lambda event: told.append(event.text)):
        for step, loss in enumerate(losses):
            state["step"] = step
            assert divergence.watch_for_spike(state, loss, ["rows.jsonl:3", "rows.jsonl:9"]) \
                == (step + 1 in [spike["step"] for spike in state["spikes"]])
    return state, told


def test_a_spike_is_told_with_its_rows():
    steady = [2.0 + 0.1 * (-1) ** step for step in range(15)]
    state, told = watch([*steady, 7.5, *steady])
    assert state["spikes"] == [{"step": 16, "loss": 7.5, "rows": "rows.jsonl:3, rows.jsonl:9"}]
    assert told == ["loss spike at step 16: 7.5, where the last 15 steps had 2.007 (rows rows.jsonl:3, rows.jsonl:9)"]


@pytest.mark.parametrize("losses", [
    [3.0 - 0.1 * step for step in range(20)], [2.0] * 5 + [9.0], [0.1, 0.2] * 10 + [0.25], [2.0] * 12 + [2.9],
], ids=["falling", "too early to tell", "small losses jump", "under half more"])
def test_what_is_no_spike(losses):
    assert watch(losses)[0]["spikes"] == []


def test_what_it_is_compared_with_goes_on_with_the_run():
    state, _ = watch([float(step) for step in range(30)])
    assert state["recent_losses"] == [float(step) for step in range(10, 30)]
    assert len(state["recent_losses"]) == divergence.REMEMBERED
