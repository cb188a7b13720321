"""The fast path: each part gives the loss and gradients of plain peft, serves what it fits, and is taken back."""

from __future__ import annotations

import json

import pytest

from lora_kit import fast, packing, preparation, proof
from lora_kit.packing import packed_batch_of
from lora_kit.recipe import FAST_PARTS
from lora_kit.tokens import batch_of
from tests.test_packing import FAMILIES, OneProcess, random_model, rows

SERVED = {  # modules of two layers that each part serves; the rest is left, for a reason
    "llama": {"linear": 14, "mlp": 2, "norm": 5, "loss": 1},
    "qwen2": {"linear": 14, "mlp": 2, "norm": 5, "loss": 1},
    "qwen3": {"linear": 14, "mlp": 2, "norm": 9, "loss": 1},
    "mistral": {"linear": 14, "mlp": 2, "norm": 5, "loss": 1},
    "gemma": {"linear": 14, "mlp": 2, "norm": 5, "loss": 1},
    "gemma2": {"linear": 14, "mlp": 2, "norm": 9, "loss": 0},  # its logits are capped after the head
    "gemma3_text": {"linear": 14, "mlp": 2, "norm": 13, "loss": 1},
    "phi": {"linear": 12, "mlp": 0, "norm": 0, "loss": 1},
    "phi3": {"linear": 8, "mlp": 2, "norm": 5, "loss": 1},
    "gpt_neox": {"linear": 8, "mlp": 0, "norm": 0, "loss": 1},
}


def loss_and_gradients(net, batches):
    """Summed loss and every gradient in one row."""
    import torch

    from lora_kit.loss import loss_sum

    total = 0.0
    for batch in batches:
        loss = loss_sum(net, batch)
        loss.backward()
        total += float(loss.detach())
    gradients = torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.requires_grad])
    for parameter in net.parameters():
        parameter.grad = None
    return total, gradients


def apart(one, other) -> tuple[float, float]:
    return abs(one[0] - other[0]) / abs(one[0]), float((one[1] - other[1]).norm() / one[1].norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_gives_the_gradients_of_plain_peft(family):
    net = random_model(family, "eager" if family == "gemma2" else "sdpa")  # transformers has no other for Gemma 2
    packing.use_packing(net.get_base_model())
    packed, padded = [packed_batch_of(rows(), "cpu")], [batch_of(rows(), 0, "cpu")]
    plain = loss_and_gradients(net, packed)
    for parts in (*((part,) for part in FAST_PARTS), FAST_PARTS):
        used = fast.use_fast(net, parts)
        for part in parts:
            assert used[part].num_modules == SERVED[family].get(part, used[part].num_modules), (part, used[part].left)
        for batches in (packed, padded) if "attention" not in parts else (packed,):
            loss, gradients = apart(plain, loss_and_gradients(net, batches))
            assert loss < 1e-5 and gradients < 1e-4, parts
        fast.stop_fast(net)
    again = loss_and_gradients(net, packed)
    assert again[0] == plain[0] and bool((again[1] == plain[1]).all())


def rows_with_a_prefix():
    several = rows()
    for row in several:
        row.tokens_T[:5], row.loss_mask_T[:6] = [11, 12, 13, 14, 15], 0
    return [row for row in several if len(row.tokens_T) > 7]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
@pytest.mark.parametrize("parts", [("prefix",), FAST_PARTS])
def test_a_prefix_that_rows_share_is_computed_once_and_changes_nothing(family, parts):
    net = random_model(family)
    packing.use_packing(net.get_base_model())
    several = rows_with_a_prefix()
    once = packed_batch_of(several, "cpu", share_prefix=True)
    assert once.prefix_length == 5 and len(several) > 2
    plain = loss_and_gradients(net, [packed_batch_of(several, "cpu")])
    assert fast.use_fast(net, parts)["prefix"].num_modules == 2
    loss, gradients = apart(plain, loss_and_gradients(net, [once]))
    assert loss < 1e-5 and gradients < 1e-4


def test_a_prefix_is_not_shared_where_it_cannot_be():
    net = random_model("llama", "eager")
    assert fast.use_fast(net, ["prefix"])["prefix"].left == {"rows are not packed for sdpa": 2}
    net = random_model("llama")
    packing.use_packing(net.get_base_model())
    import torch

    for module in net.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.1)
    assert "dropout" in next(iter(fast.use_fast(net, ["prefix"])["prefix"].left))


@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("lengths", [(40,), (17, 5, 1), (16, 16), (33, 2, 20)])
def test_attention_in_blocks_of_queries_has_the_right_gradients(monkeypatch, lengths, prefix):
    import torch

    from lora_kit.fast import attention

    monkeypatch.setattr(attention, "_BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, sum(lengths), 8, generator=generator, requires_grad=True)
                         for heads in (6, 2, 2))
    wanted, _ = packing.attend_per_document(None, query, key, value, None, scaling=0.3, document_lengths=lengths,
                                            prefix_length=prefix)
    weight = torch.randn(wanted.shape, generator=generator)
    right = torch.autograd.grad((wanted * weight).sum(), (query, key, value))
    ours, _ = attention.attend(None, query, key, value, None, scaling=0.3, document_lengths=lengths,
                                            prefix_length=prefix)
    assert ours.grad_fn.name().startswith("_Node") and torch.allclose(ours, wanted, atol=1e-6)
    for mine, its in zip(torch.autograd.grad((ours * weight).sum(), (query, key, value)), right, strict=True):
        assert torch.allclose(mine, its, atol=2e-6)


@pytest.mark.parametrize("faster", [True, False])
def test_attention_is_the_one_that_was_measured_to_be_faster(monkeypatch, faster):
    from lora_kit.fast import attention

    asked = []
    monkeypatch.setattr(attention, "is_faster", lambda *given: asked.append(given) or faster)
    net = random_model("llama")
    packing.use_packing(net.get_base_model())
    used = fast.use_fast(net, ["attention"], lengths=[5, 9])["attention"]
    assert used.num_modules == (2 if faster else 0) and asked[0][:3] == (4, 2, 16) and asked[0][4] == (5, 9)
    assert net.get_base_model().config._attn_implementation == (attention.NAME if faster else packing.PER_DOCUMENT)


def test_attention_is_timed_against_torchs_own(monkeypatch):
    import time

    import torch

    from lora_kit.fast import attention

    def slow(*given, **options):
        time.sleep(0.3)  # longer than a busy machine takes for the other
        return packing.attend_per_document(*given, **options)

    quick = attention.attend
    for ours, theirs, wanted in ((quick, slow, True), (slow, packing.attend_per_document, False)):
        monkeypatch.setattr(attention, "attend", ours)
        monkeypatch.setattr(attention, "attend_per_document", theirs)
        assert attention.is_faster(4, 2, 8, torch.float32, (5, 9)) is wanted


def test_small_updates_survive_in_bf16():
    """What rounding keeps of a LoRA's first steps: nearly all here, next to nothing in peft's own order."""
    import torch

    from lora_kit.fast import linear

    net = random_model("llama").to(torch.bfloat16)
    module = next(module for module in net.modules() if hasattr(module, "lora_A"))
    for parameter in linear.adapter_parameters(module):
        parameter.data = parameter.data.float()
    with torch.no_grad():
        module.lora_B["default"].weight.copy_(torch.randn_like(module.lora_B["default"].weight) * 2e-4)
        x = torch.randn(64, module.base_layer.weight.shape[1], dtype=torch.bfloat16)
        weight = module.base_layer.weight.float()
        a, b = (parameter.detach() for parameter in linear.adapter_parameters(module))
        delta = (x.float() @ a.t()) @ b.t() * module.scaling["default"]
        base = x.float() @ weight.t()

        def kept(y) -> float:
            """Share of the delta that is found again in y, by projection."""
            return float(((y.float() - base) * delta).sum() / delta.square().sum())

        fast.use_fast(net, ["linear"])
        w = linear.weights_of(module)
        exact = torch.cat([x, (x @ w.a_RC.t())], 1).float() @ w.joined[:weight.shape[0]].float().t()
        assert kept(exact) == pytest.approx(1, abs=0.02)
        # In the mean over many roundings, one rounding of the sum keeps it; two roundings lose most of it.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours = module(x)
            fast.stop_fast(net)
            theirs = module(x)
    assert torch.equal(ours, exact.to(torch.bfloat16)) or float((ours.float() - exact).abs().max()) < 2e-2
    assert float((ours.float() - base - delta).norm()) <= float((theirs.float() - base - delta).norm())


def test_bf16_losses_are_those_of_plain_bf16_and_weights_come_back_as_they_were():
    import torch

    net = random_model("llama").to(torch.bfloat16)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    packing.use_packing(net.get_base_model())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    batches = [packed_batch_of(rows(), "cpu")]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = loss_and_gradients(net, batches)
        fast.use_fast(net, FAST_PARTS)
        ours = loss_and_gradients(net, batches)
        with torch.no_grad():  # a step: what was joined has to follow the parameters
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter += 0.05
        moved = loss_and_gradients(net, batches)
        fast.stop_fast(net)
        moved_plain = loss_and_gradients(net, batches)
    assert apart(plain, ours)[0] < 1e-2 and apart(plain, ours)[1] < 5e-2
    assert apart(moved_plain, moved)[0] < 1e-2 and abs(moved[0] - ours[0]) > 1e-3 * ours[0]
    after = net.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) or "lora_" in name
        assert after[name].is_contiguous()


def bf16_attention():
    """(net in bf16 with fast layers, its first attention module, inputs of it)."""
    import torch

    net = random_model("llama").to(torch.bfloat16)
    fast.use_fast(net, ["linear"])
    module = net.get_base_model().model.layers[0].self_attn
    return net, module, torch.randn(2, 7, module.q_proj.base_layer.weight.shape[1], dtype=torch.bfloat16)


def outputs_and_gradients(layers, x):
    import torch

    from lora_kit.fast import linear

    x = x.clone().requires_grad_()
    parameters = [parameter for layer in layers for parameter in linear.adapter_parameters(layer)]
    outputs = [layer(x) for layer in layers]
    return outputs, torch.autograd.grad(sum((0.5 + at) * output.float().square().sum()
                                            for at, output in enumerate(outputs)), [x, *parameters])


def test_layers_of_one_input_are_one_product_with_the_results_of_each():
    import torch

    net, module, x = bf16_attention()
    layers = [module.q_proj, module.k_proj, module.v_proj]
    layers[1].scaling["default"] *= 3  # each has a scale of its own
    together, gradients = outputs_and_gradients(layers, x)
    assert len({id(layer._joined) for layer in layers}) == 1 and layers[0]._joined.layers == tuple(layers)
    for layer in layers:
        layer.__dict__.pop("_siblings")
    alone, wanted = outputs_and_gradients(layers, x)
    assert len({id(layer._joined) for layer in layers}) == 3
    for one, other in zip([*together, *gradients], [*alone, *wanted], strict=True):
        assert one.shape == other.shape
        one, other = one.detach().float(), other.detach().float()
        assert float((one - other).norm()) < 1e-2 * float(other.norm()) + 1e-6
    before = [layer.base_layer.weight.clone() for layer in layers]
    fast.stop_fast(net)
    assert all(torch.equal(layer.base_layer.weight, weight) and layer.base_layer.weight.is_contiguous()
               for layer, weight in zip(layers, before, strict=True))


def test_layers_that_are_called_otherwise_part():
    import torch

    _, module, x = bf16_attention()
    q, k, v = module.q_proj, module.k_proj, module.v_proj
    other = torch.randn_like(x)
    wanted = k.base_layer(other) + (k.lora_B["default"](k.lora_A["default"](other)) * k.scaling["default"])
    q(x)
    assert "_siblings" in k.__dict__
    found = k(other)  # as in attention to another sequence
    assert not any("_siblings" in layer.__dict__ for layer in (q, k, v))
    assert torch.allclose(found.float(), wanted.float(), rtol=2e-2, atol=2e-2)


def test_layers_stay_together_after_a_pass_that_was_left_in_its_middle():
    _, module, x = bf16_attention()
    layers = [module.q_proj, module.k_proj, module.v_proj]
    layers[0](x)  # ran out of memory, say
    for layer in layers:
        layer(x)
    assert all("_siblings" in layer.__dict__ for layer in layers) and not layers[0]._siblings._untaken
    for _ in range(5):  # a model that never asks for the others
        layers[0](x)
    assert not any("_siblings" in layer.__dict__ for layer in layers)


def test_layers_part_where_the_input_is_changed_between_them():
    import torch

    _, module, x = bf16_attention()
    with torch.no_grad():
        module.q_proj(x)
        x += 1
        found = module.k_proj(x)
        wanted = module.k_proj(x.clone())
    assert torch.equal(found, wanted)


def test_an_adapter_that_is_switched_off_or_merged_is_served_by_peft():
    import torch

    net = random_model("llama").eval()
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        fast.use_fast(net, FAST_PARTS)
        adapted = net(input_ids=tokens).logits
        with net.disable_adapter():
            off = net(input_ids=tokens).logits
        net.merge_adapter()
        merged = net(input_ids=tokens).logits
        net.unmerge_adapter()
        fast.stop_fast(net)
        assert torch.allclose(adapted, net(input_ids=tokens).logits, atol=1e-5)
        with net.disable_adapter():
            assert torch.allclose(off, net(input_ids=tokens).logits, atol=1e-5)
    assert torch.allclose(merged, adapted, atol=1e-4) and not torch.allclose(off, adapted, atol=1e-3)


@pytest.mark.parametrize(("options", "reason"), [
    ({"lora_dropout": 0.1}, "dropout"),
    ({"use_dora": True}, "variant"),
])
def test_what_a_part_does_not_fit_is_left_with_its_reason(options, reason):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("llama", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                                  num_attention_heads=2)
    net = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(
        r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options))
    used = fast.use_fast(net, FAST_PARTS)
    assert used["linear"].num_modules == 0 and sum(used["linear"].left.values()) == 7
    assert all(reason in text for text in (*used["linear"].left, *used["mlp"].left))
    assert used["norm"].num_modules == 3


def test_hooks_second_adapters_and_quantized_bases_are_left():
    import torch
    from peft import LoraConfig

    net = random_model("llama")
    linears = [module for module in net.modules() if hasattr(module, "lora_A")]
    linears[0].base_layer.register_forward_hook(lambda *_: None)
    linears[1].base_layer.__class__ = type("Linear4bit", (torch.nn.Linear,), {})
    used = fast.use_fast(net, ["linear"])["linear"]
    assert used.num_modules == 12 and used.left == {"hooks": 1, "its base is a Linear4bit": 1}
    fast.stop_fast(net)
    net.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert fast.use_fast(net, ["linear"])["linear"].left["several adapters are on it"] == 2


def test_an_mlp_or_norm_of_another_formula_is_left():
    import torch
    from transformers.models.llama import modeling_llama

    net = random_model("llama")
    first = net.get_base_model().model.layers[0]

    class OtherMLP(modeling_llama.LlamaMLP):
        def forward(self, x):
            return super().forward(x) * 0.5

    class OtherRMSNorm(modeling_llama.LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x).clamp(-1, 1)

    first.mlp.__class__, first.input_layernorm.__class__ = OtherMLP, OtherRMSNorm
    first.mlp.act_fn, net.get_base_model().model.layers[1].mlp.act_fn = torch.nn.SiLU(), torch.nn.Tanh()
    used = fast.use_fast(net, ["mlp", "norm"])
    assert used["mlp"].left == {"OtherMLP has another formula": 1, "activation Tanh": 1}
    assert used["norm"].num_modules == 4 and used["norm"].left == {"OtherRMSNorm has another formula": 1}


def test_the_proof_catches_a_part_that_is_wrong(monkeypatch):
    from lora_kit.fast import linear

    net = random_model("llama")
    packing.use_packing(net.get_base_model())
    reference = proof.Proof(net, rows()[:2], OneProcess, "fp32")
    fast.use_fast(net, FAST_PARTS)
    assert reference.of_path(packed=True)["holds"]
    right = linear.backward_of_input

    def without_scale(dy, w, *others):
        blocks = tuple(block._replace(scale=1.0) for block in w.blocks)
        return right(dy, w._replace(blocks=blocks), *others)

    monkeypatch.setattr(linear, "backward_of_input", without_scale)
    assert not reference.of_path(packed=True)["holds"]


def test_the_proof_sees_errors_that_a_fresh_adapter_would_hide():
    """With B of zero, A has no gradient and the delta no value: the proof draws B, and puts the zeros back."""
    import torch

    net = random_model("llama")
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    reference = proof.Proof(net, rows()[:2], OneProcess, "fp32")
    named = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    gradients = dict(zip(named, reference.separate[1], strict=True))
    assert all(bool(gradient.any()) for name, gradient in gradients.items() if "lora_A" in name)
    assert not any(bool(parameter.any()) for name, parameter in net.named_parameters() if "lora_B" in name)


def test_kernels_of_others_are_called_as_they_want_it(monkeypatch):
    """The plumbing only, with stand-ins that compute what those kernels promise; no GPU was at hand."""
    import sys
    import types

    import torch

    from lora_kit.fast import cuda

    called = []

    def linear_cross_entropy(e, c, targets, bias=None, ignore_index=-100, softcap=None, reduction="mean", shift=0):
        called.append("loss")
        logits = torch.nn.functional.linear(e, c, bias).float()
        return torch.nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction=reduction)

    class LigerRMSNormFunction:
        @staticmethod
        def apply(x, w, eps, offset=0.0, casting_mode="llama", in_place=True):
            called.append(("norm", offset, casting_mode, in_place))
            return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype) * (w + offset)

    monkeypatch.setitem(sys.modules, "cut_cross_entropy", types.SimpleNamespace(
        linear_cross_entropy=linear_cross_entropy))
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", types.ModuleType("liger_kernel.ops"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.rms_norm", types.SimpleNamespace(
        LigerRMSNormFunction=LigerRMSNormFunction))
    monkeypatch.setattr(cuda, "applies", lambda tensor: True)
    cuda._installed.cache_clear()
    try:
        for family, norm in (("llama", ("norm", 0.0, "llama", False)), ("gemma", ("norm", 1.0, "gemma", False))):
            net = random_model(family).to(torch.bfloat16)
            packing.use_packing(net.get_base_model())
            plain = loss_and_gradients(net, [packed_batch_of(rows(), "cpu")])
            fast.use_fast(net, ["norm", "loss"])
            ours = loss_and_gradients(net, [packed_batch_of(rows(), "cpu")])
            assert apart(plain, ours)[0] < 1e-2 and {"loss", norm} <= set(called)
    finally:
        cuda._installed.cache_clear()


# ---- through the stage ------------------------------------------------------------------


def trained(tmp_path, tiny_model, name, **train):
    from tests import tiny_run

    sections = {**tiny_run.SECTIONS["train"], "steps": 6, "prove": True, **train}
    path = tiny_run.write_recipe(tmp_path, tiny_model, name=name, train=sections)
    from lora_kit import pipeline

    run = pipeline.run_recipe(tiny_run.read(path), runs_dir=tmp_path / "runs", until="train")
    lines = (run.stage_dir("train") / "metrics.jsonl").read_text().splitlines()
    return run, [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    from tests import tiny

    return tiny.save_model(tmp_path_factory.mktemp("model"))[0]


def test_a_run_has_the_losses_of_the_plain_path_and_saves_a_plain_adapter(tmp_path, tiny_model):
    from safetensors.torch import load_file

    fast_run, losses = trained(tmp_path, tiny_model, "fast")
    plain_run, plain = trained(tmp_path, tiny_model, "plain", fast=[])
    assert losses == pytest.approx(plain, rel=1e-4) and len(losses) == 6
    figures = json.loads((fast_run.stage_dir("train") / "stage.json").read_text())["figures"]["fast"]
    assert figures["proof"]["holds"] and figures["parts"]["linear"] == {"modules": 14, "left": {}}
    assert set(figures["parts"]) == set(FAST_PARTS)
    saved, wanted = (load_file(run.stage_dir("train") / "adapter" / "adapter_model.safetensors")
                     for run in (fast_run, plain_run))
    assert list(saved) == list(wanted)
    for name, tensor in wanted.items():
        assert float((saved[name] - tensor).norm()) <= 1e-2 * float(tensor.norm()) + 1e-6


@pytest.mark.parametrize("train", [{"gradient_checkpointing": True}, {"packing": False}, {"precision": "bf16"}])
def test_it_goes_with_the_other_choices_of_a_recipe(tmp_path, tiny_model, train):
    run, losses = trained(tmp_path, tiny_model, "fast", **train)
    _, plain = trained(tmp_path, tiny_model, "plain", fast=[], **train)
    figures = json.loads((run.stage_dir("train") / "stage.json").read_text())["figures"]["fast"]
    assert figures["proof"]["holds"] and figures["parts"]["linear"]["modules"] == 14
    assert losses == pytest.approx(plain, rel=2e-2 if "precision" in train else 1e-4)


def test_a_fast_path_that_fails_its_proof_is_taken_back(tmp_path, tiny_model, monkeypatch):
    from lora_kit.fast import mlp

    right = mlp._gated_backward

    def wrong(*given):
        again, gradients = right(*given)
        return again, [gradient * 0.5 for gradient in gradients]

    monkeypatch.setattr(mlp, "_gated_backward", wrong)
    run, losses = trained(tmp_path, tiny_model, "wrong")
    figures = json.loads((run.stage_dir("train") / "stage.json").read_text())["figures"]["fast"]
    assert not figures["proof"]["holds"] and "differ from plain ones" in figures["why_not"]
    assert losses == pytest.approx(trained(tmp_path, tiny_model, "plain2", fast=[])[1], rel=1e-4)


@pytest.mark.parametrize(("max_tokens", "device", "precision", "budget"), [
    (256, "cpu", "fp32", 1024), (100, "cpu", "fp32", 400), (2048, "cpu", "fp32", 2048), (2048, "cuda", "fp16", 8192),
    (768, "cpu", "bf16", 2048), (256, "cpu", "bf16", 1024)])
def test_a_pass_on_a_cpu_is_no_longer_than_it_has_to_be(max_tokens, device, precision, budget):
    from types import SimpleNamespace

    recipe = SimpleNamespace(data=SimpleNamespace(max_tokens=max_tokens), train=SimpleNamespace(
        micro_batch_size=4, pack_tokens=None))
    assert packing.budget_of(recipe, device, precision) == budget


@pytest.mark.parametrize("was_faster", [True, False])
def test_a_run_that_goes_on_computes_as_it_began(tmp_path, tiny_model, monkeypatch, was_faster):
    """Which attention is faster may be measured otherwise the next time: a run keeps what it began with, to the bit."""
    from lora_kit.fast import attention
    from tests import tiny_run

    asked = []
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(attention, "is_faster", lambda *given: asked.append(given) or was_faster)
    whole, losses = trained(tmp_path, tiny_model, "whole", save_every=3)
    sections = {**tiny_run.SECTIONS["train"], "steps": 6, "prove": True, "save_every": 3}
    path = tiny_run.write_recipe(tmp_path, tiny_model, name="stopped", train=sections)
    from lora_kit import pipeline, rundir

    with tiny_run.interrupted_at(3):
        pipeline.run_recipe(tiny_run.read(path), runs_dir=tmp_path / "runs", until="train")
    monkeypatch.setattr(attention, "is_faster", lambda *given: asked.append(given) or not was_faster)
    run = pipeline.continue_run(rundir.open_run(next((tmp_path / "runs" / "stopped").iterdir())), until="train")
    assert len(asked) == 1  # the second run has found what the first has measured
    assert (run.stage_dir("train") / "metrics.jsonl").read_bytes() == \
        (whole.stage_dir("train") / "metrics.jsonl").read_bytes()
    parts = json.loads((run.stage_dir("train") / "stage.json").read_text())["figures"]["fast"]["parts"]
    assert ("attention" in parts) is was_faster


def test_plain_takes_everything_back():
    net = random_model("llama")
    packing.use_packing(net.get_base_model())
    fast.use_fast(net, FAST_PARTS)
    preparation.plain(net)
    assert net.get_base_model().config._attn_implementation == "sdpa"
    assert not any(hasattr(type(module), "original_class") for module in net.modules())
