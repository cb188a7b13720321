"""The training stage on a tiny model: its losses, its resume, its ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_kit import events, pipeline, rundir
from lora_kit.errors import DivergedError, ModelError, RecipeError, StoppedError
from lora_kit.recipe_file import parse_recipe

WORDS = "red green blue one two three sun moon tree house river stone bird fish bread salt".split()


def write_rows(path: Path, num_rows: int = 24) -> Path:
    with open(path, "w") as file:
        for row in range(num_rows):
            messages = []
            for turn in range(1 + row % 3):
                messages.append({"role": "user", "content": f"say {WORDS[(row + turn) % 16]} " * (1 + row % 4)})
                messages.append({"role": "assistant", "content": f"{WORDS[(row * 3 + turn) % 16]} {WORDS[row % 16]}"})
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def recipe_for(model: Path, data: Path, *overrides: str, **train):
    settings = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 0.01, "precision": "fp32", **train}
    lines = "\n".join(f"  {key}: {value}" for key, value in settings.items())
    text = (f"name: tiny\nmodel:\n  base: {model}\ndata:\n  train: {{source: {data}}}\n  held_out_rows: 4\n"
            f"lora: {{rank: 4, alpha: 8}}\ntrain:\n{lines}\n")
    return parse_recipe(text, data.parent / "tiny.yaml", overrides)


def metrics_of(run, key: str = "loss") -> list[float]:
    lines = (run.stage_dir("train") / "metrics.jsonl").read_text().splitlines()
    return [entry[key] for entry in map(json.loads, lines) if key in entry]


@pytest.fixture
def rows(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))


def train(recipe_file, tmp_path, **options):
    return pipeline.run_recipe(recipe_file, runs_dir=tmp_path / "runs", until="train", **options)


def test_losses_equal_the_minimal_loop(tiny_model, rows, tmp_path, capsys):
    from examples import minimal_loop

    run = train(recipe_for(tiny_model, rows, "data.held_out_rows=0"), tmp_path)
    expected = minimal_loop.main([
        "--model", str(tiny_model), "--data", str(rows), "--steps", "6", "--batch-size", "4", "--micro-batch-size", "2",
        "--learning-rate", "0.01", "--rank", "4", "--alpha", "8", "--out", str(tmp_path / "plain"),
    ])
    assert metrics_of(run) == pytest.approx(expected, rel=1e-5)
    from safetensors.torch import load_file

    ours = load_file(str(run.stage_dir("train") / "adapter" / "adapter_model.safetensors"))
    theirs = load_file(str(tmp_path / "plain" / "adapter_model.safetensors"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 1e-4, name


def test_training_lowers_held_out_loss_and_leaves_a_plain_adapter(tiny_model, rows, tmp_path):
    run = train(recipe_for(tiny_model, rows, steps=30, eval_every=10), tmp_path)
    held_out = metrics_of(run, "held_out_loss")
    assert len(held_out) == 4 and held_out[-1] < held_out[0] - 0.2
    figures = run.seal("train")["figures"]
    assert (figures["held_out_before"], figures["held_out_after"]) == (held_out[0], held_out[-1])
    from peft import AutoPeftModelForCausalLM

    folder = run.stage_dir("train") / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert AutoPeftModelForCausalLM.from_pretrained(str(folder)).peft_config["default"].r == 4


def test_the_start_is_told_in_parts_and_the_steps_with_what_they_needed(tiny_model, rows, tmp_path):
    told = []
    with events.listening(told.append):
        run = train(recipe_for(tiny_model, rows, prove="true"), tmp_path)
    figures = run.seal("train")["figures"]
    start, lines = figures["start"], [json.loads(line) for line in (
        run.stage_dir("train") / "timings.jsonl").read_text().splitlines()]
    parts = {line["part"]: line for line in lines[:-6]}
    assert {"imports", "model", "adapter", "matrix ceiling", "proof", "held-out loss"} <= parts.keys()
    assert all(line["before_step"] == 1 for line in parts.values())
    assert {name: {key: line[key] for key in ("seconds", "cpu_seconds")} for name, line in parts.items()} \
        == start["parts"]
    assert start["of_process"] is False and 0 < start["seconds"] < figures["stage_seconds"] - figures["train_seconds"]
    notes = [event.text for event in told if isinstance(event, events.Note)]
    assert sum(text.startswith("ready to train after ") and "; beside it " in text for text in notes) == 1
    steps = lines[-6:]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert figures["flops"] == pytest.approx(sum(line["flops"] for line in steps)) and figures["flops"] > 0
    assert figures["ceiling_flops_per_second"] > 1e8


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_accumulation_changes_nothing(tiny_model, rows, tmp_path, micro_batch_size):
    whole = train(recipe_for(tiny_model, rows), tmp_path)
    split = train(recipe_for(tiny_model, rows, micro_batch_size=micro_batch_size), tmp_path)
    assert whole.path != split.path
    assert metrics_of(split) == pytest.approx(metrics_of(whole), rel=1e-5)


def test_stop_saves_a_checkpoint_and_the_run_goes_on_exactly(tiny_model, rows, tmp_path):
    recipe_file = recipe_for(tiny_model, rows, "lora.dropout=0.1", steps=8)
    straight = train(recipe_file, tmp_path)

    def interrupt_at_3(event):
        if isinstance(event, events.Progress) and event.done == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with events.listening(interrupt_at_3), pytest.raises(StoppedError) as stopped:
        train(recipe_file, tmp_path, fresh=True)
    stopped_run = rundir.open_run(rundir.newest(tmp_path / "runs"))
    assert stopped_run.path != straight.path
    assert stopped.value.exit_code == 75 and str(stopped_run.path) in str(stopped.value)
    assert stopped_run.seal("train") is None
    told = []
    with events.listening(told.append):
        again = train(recipe_file, tmp_path)
    assert again.path == stopped_run.path
    assert any("going on from step-000003" in getattr(event, "text", "") for event in told)
    assert again.seal("train")["figures"]["flops"] == straight.seal("train")["figures"]["flops"]
    lines = [json.loads(line) for line in (again.stage_dir("train") / "timings.jsonl").read_text().splitlines()]
    assert {line["before_step"] for line in lines if "part" in line} == {1, 4}
    assert (again.stage_dir("train") / "metrics.jsonl").read_bytes() == (
        straight.stage_dir("train") / "metrics.jsonl").read_bytes()
    name = "adapter/adapter_model.safetensors"
    assert (again.stage_dir("train") / name).read_bytes() == (straight.stage_dir("train") / name).read_bytes()


def test_keep_best_hands_on_the_best_adapter(tiny_model, rows, tmp_path):
    # A learning rate this high overshoots, so that the last step is not the best one.
    recipe_file = recipe_for(
        tiny_model, rows, steps=24, learning_rate=0.5, schedule="constant", eval_every=2, keep="best")
    run = train(recipe_file, tmp_path)
    figures = run.seal("train")["figures"]
    held_out = metrics_of(run, "held_out_loss")[1:]
    assert figures["best_step"] == 2 * (held_out.index(min(held_out)) + 1) < 24
    from safetensors.torch import load_file

    train_dir = run.stage_dir("train")
    best = load_file(train_dir / "checkpoints" / f"step-{figures['best_step']:06d}" / "adapter.safetensors")
    kept = load_file(train_dir / "adapter" / "adapter_model.safetensors")
    assert sorted(name.replace(".default", "") for name in best) == sorted(kept)
    assert all(tensor.equal(kept[name.replace(".default", "")]) for name, tensor in best.items())


def test_from_adapter_goes_on_from_its_values(tiny_model, rows, tmp_path):
    first = train(recipe_for(tiny_model, rows, steps=20), tmp_path)
    text = recipe_for(tiny_model, rows).text.replace("lora: {rank: 4, alpha: 8}\n", "")
    adapter = first.stage_dir("train") / "adapter"
    second = train(parse_recipe(text, rows.parent / "tiny.yaml", [f"train.from_adapter={adapter}"]), tmp_path)
    assert metrics_of(second, "held_out_loss")[0] == pytest.approx(metrics_of(first, "held_out_loss")[-1], rel=1e-4)


def test_a_loss_that_is_not_finite_ends_with_its_rows(tiny_model, rows, tmp_path):
    with pytest.raises(DivergedError, match=r"rows\.jsonl:\d+") as error:
        train(recipe_for(tiny_model, rows, steps=30, learning_rate=1e30, schedule="constant", warmup=0), tmp_path)
    assert error.value.exit_code == 8


def test_a_target_that_matches_nothing_is_named(tiny_model, rows, tmp_path):
    with pytest.raises(RecipeError, match="'q_porj' matches no module.*q_proj"):
        train(recipe_for(tiny_model, rows, "lora.targets=[v_proj, q_porj]"), tmp_path)


def test_an_adapter_that_changes_nothing_is_no_success(tiny_model, rows, tmp_path):
    with pytest.raises(ModelError, match="changes nothing"):
        train(recipe_for(tiny_model, rows, steps=1, learning_rate=1e-45), tmp_path)


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_quantized_base_trains_every_factor(tiny_model, rows, tmp_path, load_in):
    run = train(recipe_for(tiny_model, rows, f"model.load_in={load_in}", steps=12), tmp_path)
    held_out = metrics_of(run, "held_out_loss")
    assert held_out[-1] < held_out[0]
    from safetensors.torch import load_file

    saved = load_file(str(run.stage_dir("train") / "adapter" / "adapter_model.safetensors"))
    second_factors = [tensor for name, tensor in saved.items() if "lora_B" in name]
    assert second_factors and all(tensor.any() for tensor in second_factors)


def test_gradients_after_an_evaluation_equal_gradients_without_one(tiny_model):
    """bitsandbytes repacks 4-bit weights in the first forward pass in eval mode on some CPUs (see bnb_mend.py)."""
    import torch
    from peft import prepare_model_for_kbit_training

    from lora_kit.adapter import add_adapter
    from lora_kit.model import load_base
    from lora_kit.recipe import LoraSection

    tokens = torch.arange(3, 60)[None]

    def gradients(evaluated: bool) -> dict:
        base = load_base(tiny_model, dtype="bf16", load_in="4bit")
        assert any(getattr(getattr(p, "quant_state", None), "nested", False) for p in base.parameters()), "not doubled"
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        net = add_adapter(base, LoraSection(rank=4), 0)
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.sin(torch.arange(parameter.numel())).view_as(parameter) / 10)
            if evaluated:
                net.eval()(tokens)
        net.train()(tokens, labels=tokens).loss.backward()
        return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.requires_grad}

    with_one, without = gradients(True), gradients(False)
    assert len(without) == 28 and all(gradient.any() for gradient in without.values())
    assert all(torch.equal(with_one[name], gradient) for name, gradient in without.items())


def test_checkpointing_and_bf16_reach_about_the_same_losses(tiny_model, rows, tmp_path):
    plain = metrics_of(train(recipe_for(tiny_model, rows), tmp_path))
    again = metrics_of(train(recipe_for(tiny_model, rows, gradient_checkpointing="true"), tmp_path))
    assert again == pytest.approx(plain, rel=1e-5)
    assert metrics_of(train(recipe_for(tiny_model, rows, precision="bf16"), tmp_path)) == pytest.approx(plain, rel=2e-2)


def _launch(num_processes: int, recipe: Path, runs: Path, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--standalone",
         "-m", "lora_kit.cli", "train", str(recipe), "--runs", str(runs), *options],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("shard", ["none", "fsdp"])
def test_two_processes_train_the_same(tiny_model, rows, tmp_path, shard):
    recipe_file = recipe_for(tiny_model, rows, shard=shard)
    alone = train(recipe_file, tmp_path)
    (tmp_path / "tiny.yaml").write_text(recipe_file.text)
    _launch(2, tmp_path / "tiny.yaml", tmp_path / "launched")
    launched = rundir.open_run(rundir.newest(tmp_path / "launched"))
    assert launched.seal("train")["figures"]["num_processes"] == 2
    assert metrics_of(launched) == pytest.approx(metrics_of(alone), rel=1e-5)
    from safetensors.torch import load_file

    name = "train/adapter/adapter_model.safetensors"
    ours, theirs = load_file(str(alone.path / name)), load_file(str(launched.path / name))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert (tensor - theirs[key]).abs().max() < 1e-4, key


def test_ctrl_c_in_the_command_line_ends_with_75_and_says_how_to_go_on(tiny_model, rows, tmp_path):
    (tmp_path / "tiny.yaml").write_text(recipe_for(tiny_model, rows, steps=4000).text)
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_kit.cli", "train", str(tmp_path / "tiny.yaml"), "--runs", str(tmp_path / "runs")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("tiny/*/train/timings.jsonl")) or not next(
            (tmp_path / "runs").glob("tiny/*/train/timings.jsonl")).stat().st_size:
        assert time.monotonic() < deadline and process.poll() is None, process.stderr.read()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and "go on with: lora-kit train" in lines[0] and "Traceback" not in stderr
