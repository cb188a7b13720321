"""What is left of an adapter's change: by hand, after casts, and out of every packing."""

import pytest

from lora_kit import delta, merge, quantizers
from lora_kit.adapter_check import check_adapter
from lora_kit.merging import Values
from tests import fake_run, tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(plan, merged folder) of a random adapter on a random base of width 128."""
    path = tmp_path_factory.mktemp("delta")
    base, _ = tiny.save_model(path / "base", dtype="bfloat16", hidden=128, initializer_range=0.1)
    adapter = fake_run.save_adapter(base, path / "adapter", size=0.1)
    (path / "merged").mkdir()
    merge.merge_to_folder(str(base), str(adapter), str(base), str(path / "merged"), "bf16")
    return check_adapter(base, adapter), path / "merged"


def changed(plan, change):
    """The merged weights after ``change(name, before, after)``, as ``measure`` reads them."""
    values = Values(plan)

    def read(target, first, last):
        return change(target.name, values.before(target, first, last), values.after(target, first, last))

    return delta.measure(plan, read)


def test_all_of_it_none_of_it_and_half_of_it(made):
    plan, _ = made
    whole = changed(plan, lambda name, before, after: after)
    assert whole["projection"] == pytest.approx(1) and whole["noise"] < 1e-6 and whole["sign"] == 1
    assert whole["missing"] == [] and whole["num_tensors"] == 14
    none = changed(plan, lambda name, before, after: before)
    assert none["projection"] == none["noise"] == none["sign"] == 0
    half = changed(plan, lambda name, before, after: (before + after) / 2)
    assert half["projection"] == pytest.approx(0.5, abs=1e-6) and half["noise"] < 1e-3 and half["sign"] == 1
    against = changed(plan, lambda name, before, after: 2 * before - after)
    assert against["projection"] == pytest.approx(-1) and against["sign"] == 0


def test_figures_by_hand(made):
    import torch

    plan, _ = made
    torch.manual_seed(0)
    noisy = {}

    def with_noise(name, before, after):
        noisy.setdefault(name, after + 0.01 * torch.randn_like(after))
        return noisy[name]

    found = changed(plan, with_noise)
    with Values(plan) as values:
        pairs = [(values.after(t, 0, t.shape[0]) - values.before(t, 0, t.shape[0]),
                  noisy[t.name] - values.before(t, 0, t.shape[0])) for t in plan.targets.values() if t.changes]
        base = torch.cat([values.before(t, 0, t.shape[0]).flatten() for t in plan.targets.values() if t.changes])
    d, q = (torch.cat([pair[side].flatten() for pair in pairs]).double() for side in (0, 1))
    projection = float(q @ d / (d @ d))
    assert found["projection"] == pytest.approx(projection)
    assert found["noise"] == pytest.approx(float((q - projection * d).norm() / d.norm()), rel=1e-5)
    assert found["relative_norm"] == pytest.approx(float(d.norm() / base.double().norm()), rel=1e-5)
    moved = torch.cat([(pair[0].abs() > pair[0].pow(2).mean().sqrt()).flatten() for pair in pairs])
    assert found["sign"] == pytest.approx(float((d.sign() == q.sign())[moved].double().mean()), rel=1e-3)


def test_a_layer_without_it_stands_out(made):
    plan, _ = made
    found = changed(plan, lambda name, before, after: before if ".1." in name else after)
    assert found["by_layer"]["1"]["projection"] == 0 and found["by_layer"]["0"]["projection"] == pytest.approx(1)
    assert 0.3 < found["projection"] < 0.7 and delta.by_layer_text(found, 1) == "1 0.00"
    assert [name for name, _ in delta.layers(found)] == ["0", "1"]


def test_tensors_that_are_not_there(made):
    plan, _ = made
    found = changed(plan, lambda name, before, after: None if "q_proj" in name else after)
    assert found["missing"] == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)]
    assert found["num_tensors"] == 12


def test_a_faint_change_is_rounded_away_in_bf16(made, tmp_path):
    """The weights step by 0.4 %: of a change of 0.3 % bf16 keeps 93 % with noise half its size, fp16 all of it."""
    import torch

    base, _ = tiny.save_model(tmp_path / "base", dtype="bfloat16", hidden=128, initializer_range=0.1)
    adapter = fake_run.save_adapter(base, tmp_path / "adapter", size=0.0015)
    plan = check_adapter(base, adapter)
    in_bf16, in_fp16 = (changed(plan, lambda name, before, after, kind=kind: after.to(kind).float())
                        for kind in (torch.bfloat16, torch.float16))
    assert in_bf16["relative_norm"] == pytest.approx(0.003, rel=0.2)
    assert 0.85 < in_bf16["projection"] < 0.96 and 0.4 < in_bf16["noise"] < 0.6
    assert in_fp16["projection"] == pytest.approx(1, abs=0.01) and in_fp16["noise"] < 0.1
    assert not merge.survives(in_bf16) and merge.survives(in_fp16)


def test_blocks_of_a_few_rows_say_the_same(made, monkeypatch):
    plan, folder = made
    whole = delta.measure(plan, delta.of_folder(folder))
    real = delta.blocks
    monkeypatch.setattr(delta, "blocks", lambda shape: real(shape, 300))
    parts = delta.measure(plan, delta.of_folder(folder))
    for key in ("projection", "noise", "sign"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-6)
    assert delta.measure(plan, delta.of_folder(folder), most_blocks=2)["num_tensors"] == 14


@pytest.mark.parametrize(("method", "type", "noise"), [
    ("bitsandbytes", "int8", 0.2), ("bitsandbytes", "nf4", 2), ("gguf", "q8_0", 0.2), ("gguf", "f16", 0.02)])
def test_weights_come_out_of_every_packing(method, type, noise, made, tmp_path):
    from lora_kit.engines.hf import load
    from lora_kit.types import Artifact

    plan, folder = made
    quantizer = quantizers.load(method)
    quantizer.quantize(folder, tmp_path, type)
    if quantizer.KIND == "gguf":
        read = quantizer.reader(tmp_path / "model.gguf", plan)
    else:
        read = delta.of_model(load(Artifact(name="q", path=str(tmp_path), kind="hf")).model)
    found = delta.measure(plan, read)
    assert found["missing"] == [] and found["projection"] == pytest.approx(1, abs=0.06)
    assert noise / 20 < found["noise"] < noise


def test_int8_weights_are_read_after_they_were_computed_with(made, tmp_path):
    from lora_kit.engines.hf import load
    from lora_kit.types import Artifact

    plan, folder = made
    quantizers.load("bitsandbytes").quantize(folder, tmp_path, "int8")
    with load(Artifact(name="q", path=str(tmp_path), kind="hf")) as engine:
        engine.log_probs(list(range(3, 40)))
        found = delta.measure(plan, delta.of_model(engine.model))
    assert found["missing"] == [] and found["projection"] == pytest.approx(1, abs=0.02) and found["noise"] < 0.2


def test_a_layer_that_only_its_kernel_reads_is_read_through_it(made):
    """What a packed linear layer makes of the unit vectors is its weight."""
    import torch

    plan, folder = made

    class Packed(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.in_features, self.packed = linear.in_features, torch.nn.Parameter(linear.weight.T.contiguous())

        def forward(self, x):
            return x @ self.packed

    from lora_kit.model import load_base

    model = load_base(folder, dtype="fp32")
    plain = delta.measure(plan, delta.of_model(model))
    for layer in model.model.layers:
        layer.mlp.up_proj = Packed(layer.mlp.up_proj)
    packed = delta.measure(plan, delta.of_model(model))
    assert packed["missing"] == [] and packed["projection"] == pytest.approx(plain["projection"])
    del model.model.layers[1]
    assert len(delta.measure(plan, delta.of_model(model))["missing"]) == 7
