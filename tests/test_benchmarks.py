"""Every program in benchmarks/ runs with --quick, writes its figures, and keeps its promise there."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests import tiny_run


def quick(program: str, tmp_path, *options: str, check: bool = True) -> tuple[dict, str]:
    """The figures that ``benchmarks/PROGRAM --quick --check`` writes, and what it prints."""
    options = (*options, "--check") if check else options
    done = subprocess.run(
        [sys.executable, f"benchmarks/{program}", "--quick", *options, "--json", tmp_path / "figures.json"],
        cwd=tiny_run.ROOT, env=tiny_run.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "figures.json").read_text()), done.stdout


def test_data_memory(tmp_path):
    figures, printed = quick("data_memory.py", tmp_path)
    assert figures["gigabytes"] == 0.02 and figures["num_rows"] == figures["rows_used"] + 64
    assert 50e6 < figures["anonymous_bytes"] < 1e9 and "RssAnon" in printed


def test_train_start(tmp_path):
    figures, printed = quick("train_start.py", tmp_path, "--times", "1")
    assert {"imports", "opening the run", "data", "model", "adapter"} <= figures["parts"].keys()
    assert figures["beside"].keys() == {"proof", "held-out loss", "matrix ceiling", "rehearsal"}
    assert figures["start"]["cpu_seconds"] == pytest.approx(
        sum(spent["cpu_seconds"] for spent in figures["parts"].values()), abs=1e-6)
    # By the system's count, which is read a moment later.
    assert figures["all_parts"]["cpu_seconds"] - 0.1 < figures["outside_cpu_seconds"] \
        < figures["all_parts"]["cpu_seconds"] + 3
    assert "to the first forward pass" in printed and "warm-up (first step)" in printed


def test_train_profile(tmp_path):
    figures, printed = quick("train_profile.py", tmp_path, "--steps", "2", "--threads", "1", check=False)
    parts = figures["parts"]
    for part in ("attention", "linear layers", "norms", "activation", "head and loss", "residuals and others"):
        assert parts[f"forward, {part}"] > 0 and parts[f"backward, {part}"] > 0, part
    assert all(parts[part] > 0 for part in ("data", "clipping", "optimizer", "other"))
    # On a CPU every moment of a step belongs to something.
    assert sum(parts.values()) == pytest.approx(figures["profiled_step_seconds"], rel=0.1)
    assert 0 < figures["utilisation"] < 1 and figures["threads"] == 1
    assert figures["utilisation"] == pytest.approx(
        figures["step_flops"] / figures["step_seconds"] / figures["ceiling_flops_per_second"])
    assert "share of the ceiling" in printed


def test_losses_against_trl(tmp_path):
    figures, _ = quick("losses_against_trl.py", tmp_path)
    assert len(figures["lora_kit"]) == len(figures["trl"]) == 6 and figures["largest_difference"] < 1e-4
    assert figures["lora_kit"][0] > figures["lora_kit"][-1]


def test_train_speed(tmp_path):
    # In fp32: a CPU with matrix units trains in bf16 by itself.
    figures, printed = quick("train_speed.py", tmp_path, "--precision", "fp32")
    rows = {row["role"]: row for row in figures["threads"]["1"]["contestants"]}
    assert {"lora-kit", "defaults", "best", "hf"} <= set(rows) and not any("died" in row for row in rows.values())
    # The same rows in the same order, from the same first values: losses say it, where all is fp32.
    assert all(rows[role]["loss_distance"] < 1e-5 for role in ("lora-kit", "best", "hf"))
    for key in ("tokens_of_steps", "trained_tokens_of_steps"):
        assert len({tuple(row[key]) for row in rows.values()}) == 1
    assert all(row["peak_memory_bytes"] > 100e6 and row["useful_tokens_per_second"] > 0 for row in rows.values())
    assert rows["best"]["settings"] == "fp32+padding-free"
    assert [entry["met"] for entry in figures["claims"]] == [True] and "| TRL, its defaults " in printed


def test_fast_parts(tmp_path):
    figures, printed = quick("fast_parts.py", tmp_path)
    assert [line["setting"] for line in figures][2:] == [f"+ {part}" for part in (
        "attention", "linear", "mlp", "norm", "loss", "prefix", "kernels", "memory is kept")]
    assert len({round(line["loss"], 1) for line in figures}) == 1
    assert all(line["tokens_per_second"] > 0 for line in figures)
    assert "to padded" in printed


def test_gate_power(tmp_path):
    figures, printed = quick("gate_power.py", tmp_path)
    rows = {(row["truth"], row["verdict"]): row for row in figures["rows"]}
    assert all(row["kept"] for row in rows.values()) and "MISSED" not in printed
    assert rows["A/A, 5% flips, must improve", "FAIL"]["share"] < 0.05
    assert rows["drop of 6.4 points, 5% flips, must improve", "FAIL"]["share"] > 0.7
    assert rows["drop of 16.5 points, 4 looks", "FAIL"]["mean_items"] < 150


def test_merge(tmp_path):
    figures, printed = quick("merge.py", tmp_path)
    rows = figures["rows"]
    assert figures["num_params"] == 5_900_544 and list(rows) == ["lora-kit", "peft, fp32", "peft, bf16"]
    assert rows["peft, fp32"]["differing"] < 1e-4 and "differing" in rows["peft, bf16"]
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0.5 for row in rows.values())
    assert all(row["anonymous_bytes"] > 5e7 for row in rows.values())
    assert "elements unlike lora-kit's" in printed


def test_crash(tmp_path):
    figures, printed = quick("crash.py", tmp_path)
    assert figures["equal"] == figures["kills"] == figures["killed"] == 7
    assert "7 of 7 ended byte-equal" in printed


def test_corrupt(tmp_path):
    figures, printed = quick("corrupt.py", tmp_path)
    assert figures["caught"] == figures["mutations"] == 40
    assert all(kind["changes"] for kind in figures["kinds"].values())
    assert figures["trained_on_well"] == figures["trained_on"] == 1
    assert "40 of 40 changes caught" in printed


def test_save_time(tmp_path):
    figures, printed = quick("save_time.py", tmp_path, check=False)  # a tiny model's steps take no time
    assert figures["saves"] == 6 and figures["checkpoint_bytes"] > 10_000
    assert figures["share"] == pytest.approx(
        figures["save_seconds"] / (figures["save_seconds"] + 20 * figures["step_seconds"]))
    assert "share of time" in printed


def test_eval_parity(tmp_path):
    pytest.importorskip("lm_eval", reason="an extra")
    figures, printed = quick("eval_parity.py", tmp_path)
    assert figures["missed"] == [] and {row["task"] for row in figures["rows"]} == {
        "arc_easy", "openbook_qa", "piqa", "stdlib_prose"}
    for row in figures["rows"]:
        assert row["shots"] in (0, 5) and row["items"] == row["items_exact"] == 12
        assert row["other_requests"] == row["other_tokens"] == row["other_acc"] == row.get("other_acc_norm", 0) == 0
        assert 0 < row["largest_difference"] < 1e-4 and row["times_faster"] > 0 and not row["note"]
    assert any(0 < row["acc"] < 1 for row in figures["rows"]) and "everything is equal" in printed
