"""The programs in benchmarks/ about forecasts and inference, with --quick; as tests/test_benchmarks.py."""

from __future__ import annotations

import pytest

from tests.test_benchmarks import quick


def test_plan_accuracy(tmp_path):
    figures, printed = quick("plan_accuracy.py", tmp_path, check=False)
    assert [row["measured"]["precision"] for row in figures["rows"]][1] == "fp32"
    for row in figures["rows"]:
        assert 200e6 < row["measured"]["floor_bytes"] < row["measured"]["bytes"]
        assert row["forecast"]["bytes"] == pytest.approx(sum(row["forecast"]["terms"].values()))
        assert abs(row["error"]) < 0.3
    assert all(abs(error) < 0.01 for errors in figures["exact"].values() for error in errors.values())
    assert "accelerate" in printed and "none more than 5% below" in printed


def test_decode_speed(tmp_path):
    figures, printed = quick("decode_speed.py", tmp_path, check=False)
    assert figures["served"] and figures["pairs"] == 8 and figures["low"] <= figures["ratio"] <= figures["high"]
    assert figures["kl"]["ours"] <= 1.2 * figures["kl"]["generate"] + 1e-6 and "times as fast" in printed


def test_llamacpp_counters(tmp_path):
    pytest.importorskip("llama_cpp")
    figures, printed = quick("llamacpp_counters.py", tmp_path)
    # Evaluation is a part of what the engine times, and of a prompt most of it.
    assert 0.3 < figures["share"]["prefill"] <= 1.001 and 0 < figures["share"]["decode"] <= 1.001
    assert figures["tokens_per_second"]["decode"] > 0 and "of what llama.cpp counts" in printed


def test_compare_power(tmp_path):
    figures, printed = quick("compare_power.py", tmp_path, check=False)
    assert figures["num_times"] > 40 and [row["pairs"] for row in figures["rows"]] == [20, 40]
    assert all(sum(row[kind].values()) == pytest.approx(1) for row in figures["rows"] for kind in ("same", "planted"))
    assert figures["rows"][-1]["same"]["cannot tell"] >= 0.7 and "A/A cannot tell" in printed


def test_speculative(tmp_path):
    figures, printed = quick("speculative.py", tmp_path, check=False)
    assert figures["prompts"] == 8
    assert all(way["apart"] == [] for way in figures["ways"])  # in fp32 the greedy answer itself
    plain, lookup, own = figures["ways"]
    assert 1 <= lookup["tokens_per_pass"] <= 5 and lookup["accepted"] <= lookup["drafted"]
    assert own["acceptance_rate"] == 1.0 and plain["tokens_per_pass"] == 1.0
    assert own["measured"]["low"] <= own["measured"]["ratio"] <= own["measured"]["high"]
    assert "Speculative decoding of model in fp32: 8 prompts" in printed and "8 of 8" in printed
