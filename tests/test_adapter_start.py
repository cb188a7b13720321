"""Every variant of the adapter learns, merges rightly and goes on exactly; first values really are computed."""

from __future__ import annotations

import pytest

from lora_kit import adapter_start, isolate, pipeline, rundir
from lora_kit.adapter import add_adapter
from lora_kit.adapter_start import adapter_from_start, write_start
from lora_kit.errors import RecipeError
from lora_kit.model import load_base
from lora_kit.recipe import LoraSection
from lora_kit.tokens import read_examples
from tests import fake_run, tiny, tiny_run
from tests.test_train import metrics_of, recipe_for, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model whose ends are not tied."""
    return tiny.save_model(tmp_path_factory.mktemp("variants") / "model", tie_word_embeddings=False)[0]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    fake_run.save_rows(folder, tiny.save_tokenizer(folder / "tokenizer"), num=8, split="train")
    return read_examples(folder, "train")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(isolate, "call", tiny_run.call_here)


VARIANTS = {
    "gaussian": ["lora.init=gaussian"], "orthogonal": ["lora.init=orthogonal"], "olora": ["lora.init=olora"],
    "pissa": ["lora.init=pissa"], "pissa, quick": ["lora.init=pissa_niter_4"], "eva": ["lora.init=eva"],
    "corda": ["lora.init=corda"], "corda_kpm": ["lora.init=corda_kpm"], "mica": ["lora.init=mica"],
    "rslora": ["lora.rslora=true"], "dora": ["lora.dora=true"], "lora+": ["train.lora_plus_ratio=8"],
    "pissa, rslora, patterns": ["lora.init=pissa", "lora.rslora=true", "lora.rank_pattern={down_proj: 2}",
                                "lora.alpha_pattern={q_proj: 3}"],
    "pissa, dora": ["lora.init=pissa", "lora.dora=true"], "eva, dora": ["lora.init=eva", "lora.dora=true"],
    "patterns": ["lora.rank_pattern={layers.0.self_attn.q_proj: 8}", "lora.alpha_pattern={q_proj: 3}"],
    "layers": ["lora.layers=[1]", "lora.exclude=[down_proj]"],
    "whole modules": ["lora.modules_to_save=[lm_head, input_layernorm]"],
    "tokens": ["lora.trainable_tokens=[5, '<|im_end|>']"], "head": ["lora.targets=[q_proj, lm_head]"],
    "embedding": ["lora.targets=[q_proj, embed_tokens]"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_learns_and_its_merge_is_base_and_adapter(variant, model, tmp_path):
    recipe_file = recipe_for(model, write_rows(tmp_path / "rows.jsonl"), *VARIANTS[variant], learning_rate=0.005)
    run = pipeline.run_recipe(recipe_file, runs_dir=tmp_path / "runs", until="merge")
    train, merge = run.seal("train")["figures"], run.seal("merge")
    assert train["held_out_after"] < train["held_out_before"] - 0.03
    assert [verdict["outcome"] for verdict in merge["verdicts"]] == ["PASS"] * 4, merge["verdicts"]
    # The base that the adapter is told apart from is the original one, so that what training did is seen.
    assert merge["figures"]["adapter_change"]["mean_kl"] > 1e-4
    assert merge["figures"]["adapter_change"]["perplexity_ratio"] > 1


@pytest.mark.parametrize("init", ["pissa", "olora", "eva", "corda", "mica"])
def test_a_stopped_run_goes_on_exactly(init, model, tmp_path, monkeypatch):
    recipe_file = recipe_for(model, write_rows(tmp_path / "rows.jsonl"), f"lora.init={init}")

    def train(**options):
        return pipeline.run_recipe(recipe_file, runs_dir=tmp_path / "runs", until="train", **options)

    straight = train()
    with tiny_run.interrupted_at(3):
        train(fresh=True)
    assert rundir.newest(tmp_path / "runs") != straight.path
    monkeypatch.setattr(adapter_start, "write_start", lambda *_, **__: pytest.fail("computed again"))
    again = train()
    assert metrics_of(again) == metrics_of(straight)
    name = "adapter/adapter_model.safetensors"
    assert (again.stage_dir("train") / name).read_bytes() == (straight.stage_dir("train") / name).read_bytes()


def started(model, rows, folder, **section):
    section = LoraSection(rank=4, **section)
    write_start(load_base(model, dtype="fp32"), section, 0, rows, folder, reference="base", micro_batch_size=2)
    return adapter_from_start(load_base(model, dtype="fp32"), section, folder)


@pytest.mark.parametrize("init", ["pissa", "olora", "eva", "corda", "mica"])
def test_the_first_values_change_no_output_and_are_not_the_plain_ones(init, model, rows, tmp_path):
    import torch

    net = started(model, rows, tmp_path / "start", init=init)
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        assert (net(tokens).logits - load_base(model, dtype="fp32")(tokens).logits).abs().max() < 1e-4
    plain = add_adapter(load_base(model, dtype="fp32"), LoraSection(rank=4), 0)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.default.weight"
    assert not torch.allclose(dict(net.named_parameters())[name], dict(plain.named_parameters())[name])


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_changed_base_is_peft_s_own(init, model, rows, tmp_path):
    import torch

    ours, theirs = started(model, rows, tmp_path / "start", init=init).state_dict(), add_adapter(
        load_base(model, dtype="fp32"), LoraSection(rank=4, init=init), 0).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.allclose(ours[name], tensor, atol=1e-6), name


def test_eva_s_directions_are_those_of_the_data(model, rows, tmp_path):
    """A of the first layer spans what the most of its inputs' variance is in: more than a random A does."""
    import torch

    base = load_base(model, dtype="fp32")
    seen = []
    hook = base.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][0]))
    with torch.no_grad():
        for row in rows:
            base(torch.tensor(row.tokens_T[None].astype("int64")))
    hook.remove()
    inputs = torch.cat(seen)
    inputs = inputs - inputs.mean(0)

    def explained(net) -> float:
        first = net.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.detach()
        directions = torch.linalg.qr(first.T)[0]
        return float(((inputs @ directions) ** 2).sum() / (inputs**2).sum()) / directions.shape[1]

    eva = explained(started(model, rows, tmp_path / "start", init="eva"))
    assert eva > 2 * explained(add_adapter(load_base(model, dtype="fp32"), LoraSection(rank=4), 0))


def test_eva_without_enough_tokens_is_an_error_and_not_an_endless_loop(model, rows, tmp_path):
    class Few:
        """One row of five tokens."""

        def __len__(self):
            return 1

        def __getitem__(self, row):
            whole = rows[0]
            return type(whole)(tokens_T=whole.tokens_T[:5], loss_mask_T=whole.loss_mask_T[:5], origin=whole.origin)

        def length(self, row):
            return 5

    with pytest.raises(RecipeError, match="lora.init: eva needs 8 tokens for rank 4, and the training rows have fewer"):
        started(model, Few(), tmp_path / "start", init="eva")
