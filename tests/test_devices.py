"""devices.py: names, sources, and the machine at hand."""

import pytest

from lora_kit import devices, hardware
from lora_kit.errors import RecipeError


@pytest.mark.parametrize("device", devices.TABLE.values(), ids=list(devices.TABLE))
def test_every_row_has_its_source_and_sane_figures(device):
    assert device.source and not device.at_hand
    assert 8e9 <= device.memory_bytes <= 400e9 and 2e11 < device.bandwidth_bytes_per_second < 1e13
    assert device.bf16_flops_per_second is None or device.has_bf16
    assert device.kind in ("cuda", "mps")
    if "gb" in device.name:
        assert device.memory_bytes == float(device.name.rpartition("-")[2].removesuffix("gb")) * 1e9


def test_names_as_people_write_them():
    assert devices.named("RTX 4090") is devices.TABLE["rtx4090"]
    assert devices.named("m3_max_36gb").kind == "mps"
    with pytest.raises(RecipeError, match="--on rtx4091: is no device of the table; did you mean rtx4090"):
        devices.named("rtx4091")


def test_the_machine_at_hand(monkeypatch):
    monkeypatch.setattr(hardware, "gpus", lambda: ())
    found = devices.named(None)
    assert found.kind == "cpu" and found.at_hand and found == devices.named("cpu")
    assert found.has_bf16 == hardware.cpu_supports_bf16()
    monkeypatch.setattr(hardware, "gpus", lambda: (hardware.Gpu(name="NVIDIA L4", memory_bytes=24 * 2**30),))
    assert devices.named(None).kind == "cuda" and devices.named(None).memory_bytes == 24 * 2**30
    assert devices.named("cpu").kind == "cpu"
