"""A model of the shape of Llama 3.2 1B, of real random values, merges in 0.8 GB of anonymous memory."""

import shutil

import pytest

from benchmarks import merge as benchmark
from lora_kit import tensor_files
from lora_kit.adapter_check import check_adapter


@pytest.mark.skipif(shutil.disk_usage(".").free < 8e9, reason="needs 8 GB of disk")
def test_a_billion_parameters_merge_in_little_memory(tmp_path):
    import torch

    base, out = tmp_path / "base", tmp_path / "out"
    try:
        num_params = benchmark.write_base(base, benchmark.SHAPES["1b"])
        assert num_params == 1_235_814_400
        adapter = benchmark.write_adapter(base, tmp_path / "adapter")
        out.mkdir()
        found = benchmark.run_apart(benchmark.CONTESTANTS["lora-kit"], base, adapter, out)
        assert found["anonymous_bytes"] <= 0.8e9
        # Of a block of some tensors, by hand in float64.
        plan, stored = check_adapter(base, adapter), tensor_files.list_tensors(out)
        assert plan.num_params == num_params == sum(tensor.num_elements for tensor in stored.values())
        with tensor_files.Reader() as reader:
            for name in ("model.layers.0.self_attn.k_proj.weight", "model.layers.15.mlp.down_proj.weight"):
                lora = plan.targets[name].lora
                a, b = (reader.whole(factor).double() for factor in (lora.a, lora.b))
                before = reader.rows(plan.targets[name].before, 100, 200).double()
                expected = (before + lora.scale * (b[100:200] @ a)).bfloat16()
                after = reader.rows(stored[name], 100, 200)
                assert (after != expected).double().mean() < 1e-4 and (after != before.bfloat16()).double().mean() > 0.5
            embedding = "model.embed_tokens.weight"
            assert torch.equal(reader.rows(stored[embedding], 9, 99),
                               reader.rows(plan.targets[embedding].before, 9, 99))
    finally:
        for folder in (base, out):
            shutil.rmtree(folder, ignore_errors=True)
