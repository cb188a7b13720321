"""The worst step first: tried for real, nothing changed by it, and what does not fit is told with what would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lora_kit import events, packing, tokens
from lora_kit.errors import MachineError
from lora_kit.rehearsal import is_out_of_memory
from tests import tiny_run
from tests.test_train import metrics_of, own_cache, recipe_for, rows, train  # noqa: F401 - fixtures


def bytes_of(run) -> dict[str, bytes]:
    return {name: (run.stage_dir("train") / name).read_bytes()
            for name in ("metrics.jsonl", "adapter/adapter_model.safetensors")}


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_a_training_that_was_rehearsed_is_the_same_to_the_byte(tiny_model, rows, tmp_path, optimizer):  # noqa: F811
    # Factors of 4,096 values and more have moments in 8 bits.
    settings = ["lora.rank=64", "lora.dropout=0.1"]
    told = []
    with events.listening(told.append):
        with_one = train(recipe_for(tiny_model, rows, *settings, optimizer=optimizer), tmp_path)
    without = train(recipe_for(tiny_model, rows, *settings, optimizer=optimizer, rehearse="false"), tmp_path)
    assert bytes_of(with_one) == bytes_of(without)
    assert without.seal("train")["figures"]["rehearsal"] is None
    assert sum("the worst of the run fits: a training pass of" in getattr(event, "text", "") for event in told) == 1
    assert not (with_one.stage_dir("train") / "checkpoints" / ".rehearsal").exists()


def test_it_takes_the_largest_pass_that_the_run_makes(tiny_model, rows, tmp_path, monkeypatch):  # noqa: F811
    sizes = []
    batch_of = packing.packed_batch_of

    def watched(chosen, *arguments, **options):
        sizes.append(sum(len(example.tokens_T) for example in chosen))
        return batch_of(chosen, *arguments, **options)

    monkeypatch.setattr(packing, "packed_batch_of", watched)
    run = train(recipe_for(tiny_model, rows, "data.max_tokens=256", pack_tokens=256, prove="false", stop_prompts=0),
                tmp_path)
    found = run.seal("train")["figures"]["rehearsal"]
    assert sizes[:2] == [found["train_tokens"], found["held_out_tokens"]]
    held_out = tokens.read_examples(run.stage_dir("data"), "held_out")
    assert found["held_out_tokens"] == max(sum(map(held_out.length, bin)) for bin in packing.first_fit_decreasing(
        range(len(held_out)), held_out.length, 256))
    assert max(sizes[2:]) == max(sizes[:2]) and sizes.count(sizes[0]) > 1
    last = run.stage_dir("train") / "checkpoints" / "step-000006"
    # The states in it are longer and shorter numbers.
    assert found["checkpoint_bytes"] == pytest.approx(sum(path.stat().st_size for path in last.iterdir()), rel=0.02)


def test_a_disk_that_is_too_small_is_told_before_the_first_step(tiny_model, rows, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(MachineError, match=r"has 100 kB left, and checkpoints of .* each need .*; free space"):
        train(recipe_for(tiny_model, rows), tmp_path)
    [run] = (tmp_path / "runs").glob("tiny/*")
    assert (run / "train" / "metrics.jsonl").read_bytes() == b""
    assert list((run / "train" / "checkpoints").iterdir()) == []


LIMITED = """
import json, resource, sys
from pathlib import Path
from lora_kit import events, pipeline, rehearsal
from lora_kit.errors import LoraKitError
from tests import killed_runs, tiny_run
killed_runs.import_all()
try_pass, limited = rehearsal._try, []

def limit_and_try(*arguments):
    if not limited:
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limited.append(resource.setrlimit(resource.RLIMIT_AS, (size + int(sys.argv[3]),) * 2))
    return try_pass(*arguments)

rehearsal._try = limit_and_try
try:
    pipeline.run_recipe(tiny_run.read(Path(sys.argv[1]), *sys.argv[4:]), runs_dir=Path(sys.argv[2]), until="train")
    print("trained")
except LoraKitError as error:
    print(error.exit_code, error)
"""


def limited_training(folder, model, megabytes: int, *settings: str) -> str:
    """What a training says that may take ``megabytes`` more than it has before its rehearsal."""
    if not (folder / "rows.jsonl").exists():
        with open(folder / "rows.jsonl", "w") as file:
            for row in range(100):
                file.write(json.dumps({"messages": [{"role": "user", "content": f"say {row}"}, {
                    "role": "assistant", "content": f"{row} is a number " * 25}]}) + "\n")
    recipe = tiny_run.write_recipe(folder, model, data={"train": "rows.jsonl", "held_out_rows": 0}, train={
        **tiny_run.SECTIONS["train"], "steps": 2, "batch_size": 96, "fast": [], "prove": False}, eval=None)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(recipe), str(folder / "runs"), str(megabytes * 1_000_000), *settings],
        cwd=tiny_run.ROOT, env=tiny_run.environment(LORA_KIT_CACHE=str(folder / "cache"), MALLOC_ARENA_MAX="1"),
        capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="counts a process's memory as Linux does")
@pytest.mark.parametrize(("settings", "key"), [
    (["train.pack_tokens=36000"], "train.pack_tokens"),
    (["train.packing=false", "train.micro_batch_size=96"], "train.micro_batch_size"),
])
def test_out_of_memory_says_what_to_lower_and_to_what_and_that_works(tiny_model, tmp_path, settings, key):
    said = limited_training(tmp_path, tiny_model, 200, *settings)
    assert said.startswith("6 train: out of memory in a training pass of ") and " (tried: it fits)" in said, said
    assert f"; lower {key} to " in said
    value = int(said.split(f"lower {key} to ")[1].split()[0])
    assert 0 < value < int(settings[-1].split("=")[1])
    # What was advised trains under the same limit.
    assert limited_training(tmp_path, tiny_model, 200, *settings[:-1], f"{key}={value}") == "trained"


def test_what_running_out_of_memory_looks_like():
    import torch

    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("size mismatch")) and not is_out_of_memory(ValueError("out of memory"))


def test_memory_that_runs_out_later_is_one_line_too(tiny_model, rows, tmp_path, monkeypatch):  # noqa: F811
    def fail(*arguments, **options):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr("lora_kit.train.accumulate", fail)
    with pytest.raises(MachineError, match=r"lower train.pack_tokens from 2048 to 1024, or set train.gradient_ch") as e:
        train(recipe_for(tiny_model, rows), tmp_path)
    assert e.value.exit_code == 6 and "\n" not in str(e.value)


