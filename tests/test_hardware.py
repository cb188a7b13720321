"""hardware.py: parsing on canned texts, and sane figures from this machine."""

import os
import platform
from pathlib import Path

from lora_kit import hardware

XEON = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R)  Processor
flags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16
processor\t: 1
model name\t: something else
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd bf16 i8mm\nCPU part\t: 0xd40\n"


def test_cpu_is_read_from_cpuinfo():
    assert hardware.cpu_model(XEON) == "Intel(R) Xeon(R) Processor"
    assert "amx_bf16" in hardware.cpu_flags(XEON)
    assert hardware.cpu_model(ARM) == (platform.processor() or platform.machine())


def test_bf16_needs_a_matrix_unit_for_it():
    assert hardware.cpu_supports_bf16(XEON)
    assert hardware.cpu_supports_bf16(ARM)
    assert not hardware.cpu_supports_bf16("flags : fpu avx2 avx512f avx512_bf16\n")
    assert not hardware.cpu_supports_bf16("")


def test_nvidia_smi_lines_become_gpus():
    found = hardware.parse_nvidia_smi("NVIDIA H200, 143771, 570.86\nNVIDIA GB10, [N/A], 580.1\nNo devices were found\n")
    assert [gpu.name for gpu in found] == ["NVIDIA H200", "NVIDIA GB10"]
    assert found[0].memory_bytes == 143771 * 2**20 and found[0].driver == "570.86"
    assert found[1].memory_bytes is None
    assert hardware.parse_nvidia_smi("") == ()


def test_container_limits_count(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    total, available = hardware.memory_bytes()
    cores = hardware.usable_cores()
    assert 0 < available <= total and 1 <= cores <= os.cpu_count()
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    (tmp_path / "memory.max").write_text("4000000000\n")
    (tmp_path / "memory.current").write_text("1000000000\n")
    assert hardware.usable_cores() == 1
    assert hardware.memory_bytes() == (4_000_000_000, min(available, 3_000_000_000))
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert hardware.usable_cores() == cores and hardware.memory_bytes()[0] == total


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    free = hardware.free_disk_bytes(tmp_path / "not" / "yet")
    assert 0 < free == hardware.free_disk_bytes(tmp_path) or abs(free - hardware.free_disk_bytes(tmp_path)) < 10**9
    assert not (tmp_path / "not").exists()


def test_the_description_is_json_and_calibration_is_positive():
    import json

    described = json.loads(json.dumps(hardware.describe()))
    assert described["cores"] >= 1 and described["cpu"] and described["python"] == platform.python_version()
    assert hardware.measure_matrix_gflops(size=64, seconds=0.01) > 0


def test_a_missing_program_answers_nothing(tmp_path):
    assert hardware._output_of("no-such-program-here", "--version") == ""
    assert hardware._read(Path(tmp_path / "nothing")) == ""


def test_read_bandwidth_is_that_of_memory():
    one = hardware.measure_read_bandwidth(1, num_bytes=2**24, seconds=0.05)
    assert 1e8 < one < 1e12 and hardware.measure_read_bandwidth(2, num_bytes=2**24, seconds=0.05) > 1e8
