"""bench_adapters.py: how many adapters lie on one base, what they hold, and which one answers."""

import dataclasses

import pytest
import torch

from lora_kit import bench_adapters, report_serving
from lora_kit.types import Artifact
from tests import fake_run


@pytest.fixture
def pair(tiny_model, tmp_path) -> tuple[dict, dict]:
    adapter = fake_run.save_adapter(tiny_model, tmp_path / "adapter")
    base = Artifact(name="merged", path=str(tiny_model), kind="hf", tokenizer=str(tiny_model), size_bytes=1)
    own = dataclasses.replace(base, name="adapter", path=str(adapter), kind="adapter", base=str(tiny_model))
    return own.as_dict(), base.as_dict()


def test_each_number_is_measured_with_the_adapters_in_turn(pair, monkeypatch):
    asked = [{"messages": [{"role": "user", "content": f"say {number}"}], "tools": []} for number in range(8)]
    active = []
    once = bench_adapters.once

    def watched(engine, batch, new_tokens):
        if hasattr(engine.model, "peft_config"):
            active.append((len(engine.model.peft_config), engine.model.active_adapter))
        return once(engine, batch, new_tokens)

    monkeypatch.setattr(bench_adapters, "once", watched)
    found = bench_adapters.measure(*pair, asked=asked, tools_mode="template", counts=[3, 1], new_tokens=4,
                                   threads=torch.get_num_threads())
    one, three = found["rows"]
    assert (one["adapters"], three["adapters"]) == (1, 3)
    # One to warm up and eight that count, of each number; the adapter changes with each request.
    assert active[:9] == [(1, "default")] * 9
    assert active[9:] == [(3, ("default", "copy1", "copy2")[turn % 3]) for turn in range(9)]
    assert one["resident_bytes"] == found["base_bytes"] + found["adapter_bytes"] and found["adapter_bytes"] > 0
    assert three["resident_bytes"] == found["base_bytes"] + 3 * found["adapter_bytes"]
    assert found["merged"]["bytes"] == found["base_bytes"]
    assert one["process_bytes_added"] is None and three["process_bytes_added"] >= 0
    assert one["measured"]["num_pairs"] == 8 and found["merged"]["tokens_per_second"] > 0
    shown = report_serving.PARTS["adapters"]
    rows = shown.rows(found)
    assert [row[0] for row in rows] == ["merged", "1 on one base", "3 on one base"]
    assert {len(row) for row in rows} == {len(shown.columns)} and "3 merged models would hold" in shown.lines(found)[0]
