"""energy.py: counters as Linux and NVIDIA's library show them, their end, and machines without any."""

from __future__ import annotations

import ctypes

import pytest

from lora_kit import energy


def zone(folder, name, label, microjoules, most=10_000_000):
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    for file, text in (("name", label), ("energy_uj", microjoules), ("max_energy_range_uj", most)):
        (place / file).write_text(f"{text}\n")
    return place


def no_gpu():
    return None


def test_packages_and_memory_are_summed_and_parts_of_packages_are_not(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    core = zone(tmp_path, "intel-rapl:0:0", "core", 1_000_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 2_000_000)
    twice = zone(tmp_path, "intel-rapl-mmio:0", "package-0", 1_000_000)
    meter = energy.Meter(tmp_path, no_gpu)
    for place, now in ((package, 3_500_000), (core, 2_000_000), (memory, 2_250_000), (twice, 3_500_000)):
        (place / "energy_uj").write_text(str(now))
    assert meter.joules() == {"cpu": pytest.approx(2.75), "gpu": None}
    assert energy.per_token(meter.joules(), 11) == pytest.approx(0.25)


def test_a_counter_that_begins_anew(tmp_path):
    package = zone(tmp_path, "intel-rapl:0", "package-0", 9_000_000)
    meter = energy.Meter(tmp_path, no_gpu)
    (package / "energy_uj").write_text("500000")
    assert meter.joules()["cpu"] == pytest.approx(1.5)


def test_no_counter_is_no_figure(tmp_path):
    assert energy.Meter(tmp_path, no_gpu).joules() == {"cpu": None, "gpu": None}
    assert energy.per_token({"cpu": None, "gpu": None}, 5) is None and energy.per_token({"cpu": 1.0}, 0) is None
    place = zone(tmp_path, "intel-rapl:0", "package-0", "")  # what cannot be read is as good as none
    assert energy.Meter(tmp_path, no_gpu).joules()["cpu"] is None
    (place / "energy_uj").write_text("5")
    meter = energy.Meter(tmp_path, no_gpu)
    (place / "energy_uj").unlink()
    assert meter.joules()["cpu"] is None


class Nvml:
    """As much of NVIDIA's library as is asked: two GPUs of 1.5 J and 10 J, which count up by 2 J at each look."""

    def __init__(self, *, start=0, counter=0):
        self.start, self.counter, self.millijoules = start, counter, [1500, 10_000]

    def nvmlInit_v2(self):
        return self.start

    def nvmlDeviceGetCount_v2(self, count):
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle, found):
        assert isinstance(found._obj, ctypes.c_ulonglong)
        found._obj.value = self.millijoules[handle.value - 1]
        self.millijoules[handle.value - 1] += 2000
        return self.counter


def test_gpus(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert energy.Meter(tmp_path, Nvml).joules() == {"cpu": None, "gpu": pytest.approx(4.0)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert energy.Meter(tmp_path, Nvml).joules()["gpu"] == pytest.approx(2.0)
    assert energy.Meter(tmp_path, lambda: Nvml(start=9)).joules()["gpu"] is None
    assert energy.Meter(tmp_path, lambda: Nvml(counter=3)).joules()["gpu"] is None
