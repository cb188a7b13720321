"""Every program in benchmarks/ runs with --quick, writes its figures, and keeps its promise there."""

from __future__ import annotations

import json
import subprocess
import sys

from tests import tiny_run


def quick(program: str, tmp_path) -> tuple[dict, str]:
    """The figures that ``benchmarks/PROGRAM --quick --check`` writes, and what it prints."""
    done = subprocess.run(
        [sys.executable, f"benchmarks/{program}", "--quick", "--check", "--json", tmp_path / "figures.json"],
        cwd=tiny_run.ROOT, env=tiny_run.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "figures.json").read_text()), done.stdout


def test_data_memory(tmp_path):
    figures, printed = quick("data_memory.py", tmp_path)
    assert figures["gigabytes"] == 0.02 and figures["num_rows"] == figures["rows_used"] + 64
    assert 50e6 < figures["anonymous_bytes"] < 1e9 and "RssAnon" in printed


def test_losses_against_trl(tmp_path):
    figures, _ = quick("losses_against_trl.py", tmp_path)
    assert len(figures["lora_kit"]) == len(figures["trl"]) == 6 and figures["largest_difference"] < 1e-4
    assert figures["lora_kit"][0] > figures["lora_kit"][-1]
