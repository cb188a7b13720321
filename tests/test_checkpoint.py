"""Checkpoints: exact to the bit, refused when broken, never worse than the one before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit import checkpoint
from lora_kit.checkpoint import (
    load_optimizer_tensors,
    load_tensors,
    newest,
    optimizer_tensors,
    random_state,
    restore_random_state,
    save,
)
from lora_kit.errors import MachineError, RefusedError
from lora_kit.events import listening


def tensors(step: int):
    import torch

    generator = torch.Generator().manual_seed(step)
    return {
        "adapter": {"a": torch.randn(3, 4, generator=generator), "b": torch.randn(2, generator=generator).bfloat16()},
        "optimizer": {"0.step": torch.tensor(float(step))},
    }


def save_steps(folder: Path, *steps: int) -> list[str]:
    for step in steps:
        save(folder, step, tensors(step), {"step": step})
    return sorted(path.name for path in folder.iterdir())


def newest_with_cautions(folder: Path):
    told = []
    with listening(told.append):
        found = newest(folder)
    return found, [event.text for event in told]


# ---- what is saved ---------------------------------------------------------------------


def test_tensors_and_state_come_back_to_the_bit(tmp_path):
    import torch

    saved = tensors(40)
    state = {"step": 40, "best_loss": 0.1 + 0.2, "best_step": None, "random": random_state()}
    assert save(tmp_path, 40, saved, state).name == "step-000040"
    found = newest(tmp_path)
    assert found.state == state and found.folder == tmp_path / "step-000040"
    for stem, by_name in saved.items():
        read = load_tensors(found, stem)
        assert read.keys() == by_name.keys()
        for name, tensor in by_name.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    save_steps(tmp_path, 1)
    assert {path.name for path in (tmp_path / "step-000001").iterdir()} == {
        "adapter.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


def test_adamw_goes_on_to_the_bit(tmp_path):
    """Four steps in one go equal two steps, a checkpoint, and two steps in fresh objects."""
    import torch

    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.01)

    def train(layer, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            layer(torch.randn(7, 5)).square().sum().backward()
            optimizer.step()

    torch.manual_seed(7)
    start = random_state()
    straight, optimizer = make()
    restore_random_state(start)
    train(straight, optimizer, 4)

    first, optimizer = make()
    restore_random_state(start)
    train(first, optimizer, 2)
    save(tmp_path, 2, {"adapter": dict(first.named_parameters()), "optimizer": optimizer_tensors(optimizer)},
         {"random": random_state()})

    second, optimizer = make()
    found = newest(tmp_path)
    second.load_state_dict(load_tensors(found, "adapter"))
    load_optimizer_tensors(optimizer, load_tensors(found, "optimizer"))
    restore_random_state(found.state["random"])
    train(second, optimizer, 2)

    for one, other in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(second.weight, first.weight)


def test_an_optimizer_that_has_not_stepped_has_no_state():
    import torch

    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    assert optimizer_tensors(optimizer) == {}
    load_optimizer_tensors(optimizer, {})


# ---- which are kept --------------------------------------------------------------------


def test_two_are_kept(tmp_path):
    assert checkpoint.KEPT == 2
    assert save_steps(tmp_path, 1, 2, 3) == ["step-000002", "step-000003"]
    assert newest(tmp_path).state == {"step": 3}


def test_that_of_the_lowest_loss_stays(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step, tensors(step), {"step": step}, keep_steps={1})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000003", "step-000004"]


def test_what_a_killed_process_left_is_mended(tmp_path):
    save_steps(tmp_path, 1)
    (tmp_path / "step-000001").rename(tmp_path / ".step-000001.old")  # between the two renames of a replacement
    (tmp_path / ".step-000002.working").mkdir()
    (tmp_path / ".step-000000.going").mkdir()
    assert newest(tmp_path).state == {"step": 1}
    assert save_steps(tmp_path, 3) == ["step-000001", "step-000003"]


def test_random_states_of_python_numpy_and_torch_come_back(tmp_path):
    import random

    import numpy
    import torch

    def draw():
        return random.random(), numpy.random.rand(), float(torch.rand(())), random.gauss(0, 1), numpy.random.randn()

    draw()
    save(tmp_path, 1, {}, {"random": random_state()})
    drawn = draw()
    restore_random_state(newest(tmp_path).state["random"])
    assert draw() == drawn


def test_a_step_is_saved_again_over_itself(tmp_path):
    save_steps(tmp_path, 1, 2)
    save(tmp_path, 2, tensors(2), {"step": 2, "again": True})
    assert newest(tmp_path).state == {"step": 2, "again": True}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_steps_are_sorted_as_numbers(tmp_path):
    assert save_steps(tmp_path, 999_999, 1_000_000) == ["step-1000000", "step-999999"]
    assert newest(tmp_path).state == {"step": 1_000_000}


def test_where_there_is_none_there_is_none(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nothing") is None


# ---- what is broken --------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES = {
    "a flipped bit in the adapter": lambda folder: flip(folder / "adapter.safetensors"),
    "a flipped bit in the optimizer": lambda folder: flip(folder / "optimizer.safetensors"),
    "a cut-off file": lambda folder: cut(folder / "adapter.safetensors"),
    "a cut-off state": lambda folder: cut(folder / "state.json"),
    "a cut-off manifest": lambda folder: cut(folder / "manifest.json"),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "another manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
    "a missing file": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "a missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "a file too many": lambda folder: (folder / "extra.bin").write_text("x"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
    save_steps(tmp_path, 1, 2)
    DAMAGES[damage](tmp_path / "step-000002")
    found, cautions = newest_with_cautions(tmp_path)
    assert found.state == {"step": 1}
    assert len(cautions) == 1 and str(tmp_path / "step-000002") in cautions[0]
    assert cautions[0].endswith("; the checkpoint before it is used")


def test_when_all_are_broken_the_work_is_not_thrown_away(tmp_path):
    save_steps(tmp_path, 1, 2)
    for folder in tmp_path.iterdir():
        flip(folder / "state.json")
    told = []
    with pytest.raises(RefusedError, match="none of its 2 checkpoints can be gone on from; .*--fresh") as refused:
        with listening(told.append):
            newest(tmp_path)
    assert refused.value.exit_code == 7
    assert [f"step-00000{step}" in event.text for step, event in zip((2, 1), told, strict=True)] == [True, True]


# ---- what is whole and does not belong -------------------------------------------------


def test_a_checkpoint_of_another_run_is_foreign(tmp_path):
    for run_id, step in (("ours", 1), ("theirs", 2)):
        save(tmp_path / run_id, step, tensors(step), {"step": step}, run_id=run_id)
    (tmp_path / "theirs" / "step-000002").rename(tmp_path / "ours" / "step-000002")
    told = []
    with listening(told.append):
        assert newest(tmp_path / "ours", "ours").state == {"step": 1}
    assert told[0].text.endswith("step-000002: is a checkpoint of another run; the checkpoint before it is used")


def test_two_checkpoints_that_changed_names_are_both_refused(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step-000001").rename(tmp_path / "aside")
    (tmp_path / "step-000002").rename(tmp_path / "step-000001")
    (tmp_path / "aside").rename(tmp_path / "step-000002")
    with pytest.raises(RefusedError, match="none of its 2"):
        newest(tmp_path)
    with pytest.raises(RefusedError, match="is the checkpoint of step 2"):
        checkpoint.verified(tmp_path / "step-000001", 1)


def test_a_manifest_is_written_in_one_way_only(tmp_path):
    save_steps(tmp_path, 1)
    path = tmp_path / "step-000001" / "manifest.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(RefusedError, match="does not match its own seal"):
        checkpoint.verified(path.parent, 1)


def test_what_cannot_be_gone_on_from_is_passed_over_like_a_broken_one(tmp_path):
    save_steps(tmp_path, 1, 2)

    def fits(found):
        if found.state["step"] == 2:
            raise RefusedError("metrics.jsonl", "is another")

    assert newest(tmp_path, fits=fits).state == {"step": 1}


def test_a_link_is_not_a_file_of_a_checkpoint(tmp_path):
    save_steps(tmp_path, 1)
    path = tmp_path / "step-000001" / "adapter.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RefusedError, match="adapter.safetensors: does not match"):
        checkpoint.verified(path.parent, 1)


# ---- a full disk -----------------------------------------------------------------------

FILL = """
import resource, sys
from pathlib import Path
import torch
from lora_kit.checkpoint import save
from lora_kit.errors import MachineError
folder = Path(sys.argv[1])
save(folder, 1, {"adapter": {"a": torch.zeros(10)}}, {"step": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    save(folder, 2, {"adapter": {"a": torch.zeros(100_000)}}, {"step": 2})
except MachineError as error:
    print(error.exit_code, error)
"""


@pytest.mark.skipif(os.name != "posix", reason="the limit on file sizes that stands in for a full disk is POSIX's")
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    done = subprocess.run([sys.executable, "-c", FILL, str(tmp_path), "20000"], capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent)
    assert done.stdout.startswith(f"6 {tmp_path}/"), done.stdout + done.stderr
    assert "cannot be written" in done.stdout and len(done.stdout.splitlines()) == 1
    assert newest(tmp_path).state == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"], "half a checkpoint is left"


def test_a_failure_while_writing_the_state_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "_sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(MachineError, match="No space left on device"):
        save(tmp_path, 2, tensors(2), {"step": 2})
    assert newest(tmp_path).state == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_what_the_disk_did_not_keep_is_noticed_before_an_older_checkpoint_goes(tmp_path, monkeypatch):
    save_steps(tmp_path, 1, 2)
    sync = checkpoint._sync

    def sync_and_lose_a_bit(path):
        sync(path)
        if path.name == "manifest.json":
            flip(path.parent / "adapter.safetensors")

    monkeypatch.setattr(checkpoint, "_sync", sync_and_lose_a_bit)
    with pytest.raises(RefusedError, match="does not match the checkpoint's manifest"):
        save(tmp_path, 3, tensors(3), {"step": 3})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]
