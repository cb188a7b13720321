"""The compiled kernels: what torch gives in float64, for each type and any number of threads; or not at all."""

from __future__ import annotations

import math

import pytest
import torch

from lora_kit import fast, hardware, packing
from lora_kit.fast import attention, compiled, rotary, steady
from tests.test_packing import FAMILIES, random_model

TYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8}


@pytest.fixture(autouse=True)
def kernels():
    reason = compiled.use()
    assert reason is None, reason
    yield
    compiled.stop()


def random(*shape, dtype, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def close(ours, wanted, dtype):
    """Within rounding of the largest value of a row."""
    bound = TOLERANCE[dtype] * wanted.abs().amax(-1, keepdim=True).clamp_min(1e-3)
    return bool(((ours.double() - wanted).abs() <= bound).all())


@pytest.mark.parametrize("dtype", TYPES)
def test_norm(dtype):
    x, dy, factor = random(7, 37, dtype=dtype), random(7, 37, dtype=dtype, seed=1), torch.linspace(0.5, 2, 37)
    y, scale, dx = torch.empty_like(x), torch.empty(7), torch.empty_like(x)
    compiled.call("norm_forward", dtype, x, factor, y, scale, 7, 37, 1e-5)
    compiled.call("norm_backward", dtype, dy, x, scale, factor, dx, 7, 37)
    exact = x.double().requires_grad_()
    wanted = exact * torch.rsqrt(exact.square().mean(1, keepdim=True) + 1e-5) * factor.double()
    assert close(y, wanted.detach(), dtype)
    assert close(dx, torch.autograd.grad(wanted, exact, dy.double())[0], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("kind", "activation"), [
    (0, torch.nn.functional.silu), (1, lambda x: torch.nn.functional.gelu(x, approximate="tanh"))])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_gated_activation_of_halves_of_one_array(dtype, kind, activation, scale):
    both, dm = random(5, 46, dtype=dtype, scale=scale), random(5, 23, dtype=dtype, seed=1)
    gate, up = both.chunk(2, dim=1)
    out, again, gradients = (torch.empty_like(tensor) for tensor in (dm, dm, both))
    compiled.call("gate_forward", dtype, gate, 46, up, 46, out, out.stride(0), 5, 23, kind)
    compiled.call("gate_backward", dtype, dm, gate, 46, up, 46, gradients, gradients[:, 23:], 46, again, 5, 23, kind)
    exact = both.double().requires_grad_()
    wanted = activation(exact[:, :23]) * exact[:, 23:]
    assert close(out, wanted.detach(), dtype) and torch.equal(out, again)
    assert close(gradients, torch.autograd.grad(wanted, exact, dm.double())[0], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("before", [0, 4])
def test_attention_backward(dtype, before):
    heads, queries, keys, scale = 3, 9, 9 + before, 0.3
    score, dp = (random(heads, queries, keys, dtype=dtype, seed=seed) for seed in (0, 1))
    seen = packing.causal_mask(queries, before, None, "cpu")
    exact = (score.double() * scale).masked_fill(~seen, -torch.inf)
    log, p = exact.logsumexp(-1), exact.softmax(-1)
    delta = (p * dp.double()).sum(-1)
    ours, ds = score.clone(), dp.clone()
    compiled.call("attention_backward", dtype, ours, ds, log.float(), queries, delta.float(), queries, heads, queries,
                  keys, before, scale)
    assert close(ours, p, dtype) and close(ds, p * (dp.double() - delta[..., None]) * scale, dtype)
    assert not ours[:, ~seen].any() and not ds[:, ~seen].any()


@pytest.mark.parametrize("dtype", TYPES)
def test_loss_in_blocks(dtype):
    logits, target = random(6, 50, dtype=dtype, scale=8.0), torch.tensor([0, 49, 16, 15, 31, 7])
    largest, total, hit = torch.full((6,), -torch.inf), torch.zeros(6), torch.zeros(6)
    blocks = [(first, logits[:, first:first + 16].contiguous()) for first in range(0, 50, 16)]
    for first, block in blocks:
        compiled.call("loss_of_block", dtype, block, target, first, largest, total, hit, *block.shape)
    log = largest + total.log()
    assert torch.allclose(log.double(), logits.double().logsumexp(1), atol=1e-5)
    assert torch.equal(hit, logits.float().gather(1, target[:, None])[:, 0])
    for first, block in blocks:
        compiled.call("gradient_of_block", dtype, block, target, first, log, *block.shape)
    wanted = logits.double().softmax(1) - torch.nn.functional.one_hot(target, 50)
    assert close(torch.cat([block for _, block in blocks], 1), wanted, dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_sums_over_heads_and_rotation(dtype):
    a, b = random(5, 3, 10, dtype=dtype), random(5, 3, 10, dtype=dtype, seed=1)
    out = torch.empty(3, 5)
    compiled.call("dot_of_heads", dtype, a, b, out, 5, 3, 10)
    assert torch.allclose(out.double(), (a.double() * b.double()).sum(-1).t(), atol=1e-5)
    angles = torch.rand(5, 5).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    x = a.transpose(0, 1)[None]  # (1, H, T, D), not contiguous
    turned = rotary._turned(x, cos[None], sin[None], 1.0)
    exact = x.double()
    wanted = exact * cos.double() + torch.cat([-exact[..., 5:], exact[..., :5]], -1) * sin.double()
    assert turned.shape == x.shape and close(turned, wanted, dtype)
    back = rotary._turned(turned, cos[None], sin[None], -1.0)
    assert torch.allclose(back.double(), exact, atol=0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_no_number_stays_none(dtype):
    x = random(2, 20, dtype=dtype)
    x[0, 3] = math.nan
    y, scale, out = torch.empty_like(x), torch.empty(2), torch.empty_like(x)
    compiled.call("norm_forward", dtype, x, torch.ones(20), y, scale, 2, 20, 1e-5)
    compiled.call("gate_forward", dtype, x, 20, torch.ones_like(x), 20, out, 20, 2, 20, 0)
    assert y[0].isnan().all() and not y[1].isnan().any() and out.isnan().sum() == 1
    largest, total, hit = torch.full((2,), -torch.inf), torch.zeros(2), torch.zeros(2)
    compiled.call("loss_of_block", dtype, x, torch.tensor([0, 0]), 0, largest, total, hit, 2, 20)
    assert total[0].isnan() and not total[1].isnan()


def test_threads_change_nothing():
    x = random(64, 96, dtype=torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        y, scale = torch.empty_like(x), torch.empty(64)
        compiled.call("norm_forward", x.dtype, x, torch.ones(96), y, scale, 64, 96, 1e-5)
        torch.set_num_threads(before)
        results.append((y, scale))
    assert all(torch.equal(y, results[0][0]) and torch.equal(scale, results[0][1]) for y, scale in results)


# ---- attention by a CPU's matrix units ---------------------------------------------------

needs_matrix_units = pytest.mark.skipif(not {"amx_tile", "amx_bf16"} <= hardware.cpu_flags(),
                                        reason="this CPU has no such matrix units")


def attention_inputs(lengths, heads, groups, size):
    """Query, key, value as views of one array, as layers that are one product give them; the gradient of the output."""
    num = sum(lengths)
    whole = random(1, num, (heads + 2 * groups) * size, dtype=torch.bfloat16)
    parts = whole.split([heads * size, groups * size, groups * size], dim=2)
    return [part.unflatten(2, (-1, size)).transpose(1, 2).detach().requires_grad_() for part in parts], random(
        1, num, heads, size, dtype=torch.bfloat16, seed=1)


def attended(tensors, dout, lengths, prefix, scale=0.2):
    """What attention gives and its gradients, with the node that gave them."""
    out, _ = attention.attend(None, *tensors, None, scaling=scale, document_lengths=lengths, prefix_length=prefix)
    return type(out.grad_fn).__name__, out.detach(), torch.autograd.grad(out, tensors, dout)


def attended_exactly(tensors, dout, lengths, prefix, scale=0.2):
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in tensors)
    shared, outs, start = query.shape[1] // key.shape[1], [], 0
    for length in lengths:
        rows, before = slice(start, start + length), prefix if start else 0
        keys, values = (torch.cat([each[:, :, :before], each[:, :, rows]], 2).repeat_interleave(shared, 1)
                        for each in (key, value))
        hidden = torch.ones(length, before + length, dtype=torch.bool).triu(1 + before)
        scores = (scale * query[:, :, rows] @ keys.transpose(2, 3)).masked_fill(hidden, -torch.inf)
        outs.append((scores.softmax(-1) @ values).transpose(1, 2))
        start += length
    out = torch.cat(outs, 1)
    return out.detach(), torch.autograd.grad(out, (query, key, value), dout.double())


@needs_matrix_units
@pytest.mark.parametrize("prefix", [0, 1, 29])
@pytest.mark.parametrize(("lengths", "heads", "groups", "size"), [
    ((40,), 9, 3, 64), ((31, 32, 1, 70), 4, 4, 32), ((190, 33), 8, 2, 128), ((64, 96), 3, 1, 96)])
def test_attention_in_tiles(lengths, heads, groups, size, prefix):
    tensors, dout = attention_inputs(lengths, heads, groups, size)
    node, out, gradients = attended(tensors, dout, lengths, prefix)
    wanted, exact = attended_exactly(tensors, dout, lengths, prefix)
    assert node == "_InTilesBackward"
    # Probabilities and their gradients are rounded once, as are the results: some 2⁻⁸ of the largest.
    for ours, right in zip((out, *gradients), (wanted, *exact), strict=True):
        assert (ours.double() - right).abs().max() < 2.0**-7 * right.abs().max(), (ours, right)


@needs_matrix_units
def test_rows_in_tiles_do_not_see_each_other_nor_depend_on_threads():
    tensors, dout = attention_inputs((50, 33, 80), 4, 2, 64)
    _, out, gradients = attended(tensors, dout, (50, 33, 80), 20)
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        _, again, same = attended(tensors, dout, (50, 33, 80), 20)
        assert torch.equal(out, again) and all(map(torch.equal, gradients, same))
    torch.set_num_threads(before)
    with torch.no_grad():
        tensors[2][:, :, 60] = math.nan  # a value of the second row
        tensors[0][:, 0, 90] = math.nan  # a query of the third
    _, out, gradients = attended(tensors, dout, (50, 33, 80), 20)
    assert not out[:, :50].isnan().any() and out[:, 60:83].isnan().all() and not out[:, 83:90].isnan().any()
    assert out[:, 90, 0].isnan().all() and not out[:, 91:].isnan().any()
    assert gradients[1][:, 0, 85].isnan().all() and not gradients[1][:, 1, 85].isnan().any()


@needs_matrix_units
@pytest.mark.parametrize("why", ["fp32", "size", "no kernels"])
def test_what_tiles_do_not_fit_is_attended_otherwise(why):
    tensors, dout = attention_inputs((20, 9), 4, 2, 16 if why == "size" else 32)
    if why == "fp32":
        tensors, dout = [tensor.detach().float().requires_grad_() for tensor in tensors], dout.float()
    if why == "no kernels":
        compiled.stop()
    node, out, _ = attended(tensors, dout, (20, 9), 0)
    assert node == "_NodeBackward"
    assert (out.double() - attended_exactly(tensors, dout, (20, 9), 0)[0]).abs().max() < 0.02


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("gemma2", "gpt_neox")])
def test_attention_layers_rotate_in_one_pass(family):
    net = random_model(family)
    packing.use_packing(net.get_base_model())
    fast.use_fast(net, ["kernels"])
    assert sum(isinstance(module, rotary.Rotated) for module in net.modules()) == 2
    fast.stop_fast(net)
    assert not any(isinstance(module, rotary.Rotated) for module in net.modules())


def test_another_rotation_is_left_alone():
    assert rotary._is_known(lambda query, key, cos, sin: (query * cos[:, None], key)) is False
    assert rotary._is_known(lambda query, key: (query, key)) is False


@pytest.fixture
def nothing_compiled(monkeypatch, tmp_path):
    """Another cache folder, and nothing remembered of this process's kernels, before and after."""
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    compiled._library.cache_clear()
    yield tmp_path / "cache" / "kernels"
    compiled._library.cache_clear()


def test_without_a_compiler_torch_serves_and_it_is_said(nothing_compiled, monkeypatch):
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert compiled.use() == "there is no C compiler" and not compiled.serves(torch.ones(1))
    net = random_model("llama")
    packing.use_packing(net.get_base_model())
    used = fast.use_fast(net, ["kernels", "norm"])
    assert used["kernels"].left == {"there is no C compiler": compiled.num_kernels()} and used["norm"].num_modules == 5


@pytest.mark.parametrize(("script", "reason"), [
    ("echo 'no such target' >&2; exit 1", "the C compiler fails: no such target"),
    ('while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "what was compiled cannot be loaded")])
def test_a_compiler_that_fails_is_no_failure_of_training(nothing_compiled, monkeypatch, tmp_path, script, reason):
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert compiled.use().startswith(reason)


def test_they_are_compiled_once(nothing_compiled, monkeypatch):
    assert compiled.use() is None
    files = sorted(nothing_compiled.iterdir())
    assert len(files) == 1 and files[0].suffix == ".so"
    compiled._library.cache_clear()
    monkeypatch.setattr(compiled.subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    assert compiled.use() is None and sorted(nothing_compiled.iterdir()) == files


def test_freed_memory_stays_while_training_and_goes_afterwards():
    import gc

    frozen = gc.get_freeze_count()
    with pytest.raises(KeyError), steady.steady():
        assert gc.get_freeze_count() > frozen
        raise KeyError
    assert gc.get_freeze_count() == 0
