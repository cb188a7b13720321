"""QLoRA: both bases are scored with the adapter, the better is merged into, and both figures are kept."""

import json

import pytest

from lora_kit import merge, quantized_base
from lora_kit.certificate import answer_losses, held_out_rows
from lora_kit.chat import load_tokenizer
from lora_kit.types import Artifact
from tests import fake_run, tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*bnb_4bit")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("qlora") / "base", dtype="bfloat16", initializer_range=0.1)[0]


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_the_unpacked_base_is_what_training_computed_with(load_in, base, tmp_path):
    import torch
    from safetensors.torch import load_file

    from lora_kit.model import load_base

    quantized_base.write_unpacked(str(base), load_in, str(tmp_path / "out"))
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        apart = float((tensor.float() - before[name].float()).norm() / before[name].float().norm())
        low, high = (0, 0) if "proj" not in name else (0.05, 0.2) if load_in == "4bit" else (0.001, 0.02)
        assert low <= apart <= high, name
    if load_in == "4bit":
        tokens = torch.arange(3, 90)[None]
        packed, plain = load_base(base, dtype="bf16", load_in=load_in), load_base(tmp_path / "out", dtype="bf16")
        with torch.inference_mode():
            assert torch.allclose(packed(tokens).logits.float(), plain(tokens).logits.float(), atol=0.05)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_both_are_scored_and_the_better_is_merged_into(base, tmp_path):
    adapter = fake_run.save_adapter(base, tmp_path / "adapter", size=0.1)
    fake_run.save_rows(tmp_path / "data", load_tokenizer(base), num=3)
    run = fake_run.FakeRun(tmp_path, base, adapter)
    result = merge.stage(fake_run.recipe(model={"base": "base", "load_in": "4bit"}), run)
    run.publish("merge", result)
    written = json.loads((tmp_path / "merge" / "certificate.json").read_text())
    candidates = {each["base"]: each for each in written["candidates"]}
    assert set(candidates) == {"16-bit base", "4-bit base, unpacked"}
    best = min(candidates.values(), key=lambda each: each["loss"])
    assert [each["chosen"] for each in candidates.values()] == [each is best for each in candidates.values()]
    assert all(verdict.outcome == "PASS" for verdict in result.verdicts)
    assert not list((tmp_path / "merge").glob(".unpacked*"))
    rows = held_out_rows(tmp_path / "data")["rows"]
    losses = answer_losses(artifact=Artifact(name="a", path=str(adapter), kind="adapter", base=str(base),
                                             tokenizer=str(base)).as_dict(), rows=rows)
    assert candidates["16-bit base"]["loss"] == pytest.approx(
        sum(losses) / sum(sum(row["trained"][1:]) for row in rows), rel=1e-3)


def test_either_may_win(base, tmp_path, monkeypatch):
    """Which one is for the losses alone to say."""
    scores = iter([3.0, 2.0, 2.0, 3.0])

    class Answer:
        def __init__(self, value):
            self.value = value

    monkeypatch.setattr(quantized_base.isolate, "call", lambda name, arguments: Answer(
        [next(scores)] if "answer_losses" in name else None))
    rows = [{"tokens": [1, 2], "trained": [0, 1]}]
    one, two = (Artifact(name=name, path=name, kind="hf") for name in ("base", "adapter"))
    for folder, chosen in ((str(tmp_path), [False, True]), ("base", [True, False])):
        found, candidates = quantized_base.choose_base(one, two, "8bit", rows, tmp_path)
        assert found == folder and [each["chosen"] for each in candidates] == chosen
        assert candidates[1]["base"] == "8-bit base, unpacked"
