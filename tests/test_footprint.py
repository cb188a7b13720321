"""footprint.py: the terms of a process, and what moves them."""

from __future__ import annotations

import pathlib

import pytest

from lora_kit import activations, footprint, memory
from lora_kit.activations import Pass
from lora_kit.footprint import Where
from lora_kit.recipe_file import parse_recipe

SMOLLM2 = memory.shape_of({"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                           "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                           "tie_word_embeddings": True})
UNTIED = memory.shape_of({"model_type": "llama", "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 2816,
                          "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 4})
WORK = Pass(lengths=(250, 250, 250, 250), num_trained=320)
TRAINED = memory.num_lora_params(SMOLLM2, parse_recipe(
    "model: {base: m}\ndata: {train: r.jsonl}\n", pathlib.Path(__file__)).recipe.lora)


def recipe_of(*overrides: str):
    return parse_recipe("model: {base: m}\ndata: {train: r.jsonl}\n", pathlib.Path(__file__), overrides).recipe


def training(*overrides: str, shape=SMOLLM2, where=None, **options) -> footprint.Footprint:
    return footprint.training(shape, recipe_of(*overrides), where or Where(), passes=[WORK], num_passes=2, **options)


def test_a_step_of_the_default_recipe_term_by_term():
    found = training()
    assert found.moment == "a step" and found.total == sum(term.num_bytes for term in found.terms)
    assert found.of("weights") == 2 * memory.num_params(SMOLLM2)
    # W, A and B of each layer in one array: (O + r)·(C + r) values.
    joined = sum(2 * 30 * (o + 16) * (c + 16) for o, c in memory.linear_sizes(SMOLLM2).values())
    assert found.of("joined weights") == joined
    assert found.of("gradients") == 4 * TRAINED and found.of("optimizer") == 8 * TRAINED
    outputs = 30 * sum(o for o, _ in memory.linear_sizes(SMOLLM2).values())
    assert found.of("adapter") == 4 * TRAINED + 2 * 16 * outputs
    path = activations.path_of(recipe_of(), "bf16")
    kept = activations.kept_bytes(SMOLLM2, recipe_of().lora, path, WORK)
    assert found.of("activations") + found.of("logits") == pytest.approx(
        activations.pass_bytes(SMOLLM2, recipe_of().lora, path, WORK))
    assert found.of("kernels") == footprint.KERNEL_BYTES
    layers = 30 * activations.layer_bytes(SMOLLM2, recipe_of().lora, path, WORK)
    assert found.layers_bytes == layers and found.of("allocator") == footprint.KEPT_SHARE["fast"] * layers
    assert found.of("logits") == activations.head_moment_bytes(SMOLLM2, path, WORK) and found.of("activations") == kept


def test_what_saves_memory_does_and_what_costs_it_does():
    base = training().total
    for less in ("train.gradient_checkpointing=true", "lora.rank=4", "train.optimizer=adamw_8bit",
                 "lora.targets=[q_proj, v_proj]"):
        assert training(less).total < base, less
    for more in ("train.fast=[]", "train.precision=fp32", "lora.rank=64"):
        where = Where(precision="fp32") if "fp32" in more else None
        assert training(more, where=where).total > base, more


def test_weights_that_are_cast_come_with_their_file():
    found = training(where=Where(precision="fp32", stored="bf16"))
    assert found.of("weights") == 4 * memory.num_params(SMOLLM2) and not found.of("joined weights")
    small = footprint.training(SMOLLM2, recipe_of(), Where(precision="fp32"), passes=[
        Pass(lengths=(8,), num_trained=4)])
    assert small.moment == "loading" and small.of("mapped file") == 2 * memory.num_params(SMOLLM2)


def test_of_an_untied_embedding_only_the_rows_that_are_looked_up_are_read():
    size = 2 * 32000 * 1024
    whole, some = training(shape=UNTIED).of("weights"), training(shape=UNTIED, num_looked_up=40).of("weights")
    assert whole == 2 * memory.num_params(UNTIED)
    assert whole - size < some < whole - size + 40 * 65536


def test_a_gpu_holds_the_joined_weights_alone():
    found = training(where=Where(kind="cuda"))
    assert not found.of("allocator", "kernels") and found.of("floor") == footprint.CUDA_CONTEXT_BYTES
    joined = sum(2 * 30 * (o + 16) * (c + 16) for o, c in memory.linear_sizes(SMOLLM2).values())
    assert found.of("weights") == pytest.approx(
        2 * (memory.num_params(SMOLLM2) - memory.num_linear_params(SMOLLM2)) + joined)


def test_several_processes():
    one, ddp = training(where=Where(kind="cuda")), training(where=Where(kind="cuda", num_processes=4))
    assert ddp.total == pytest.approx(one.total + 4 * TRAINED)
    fsdp = training("train.shard=fsdp", where=Where(kind="cuda", num_processes=4))
    assert fsdp.of("weights") == memory.num_params(SMOLLM2) * 2 / 4
    assert fsdp.of("optimizer") == 8 * TRAINED / 4 and fsdp.of("gathered layers") > 0


def test_a_quantized_base():
    found = training("model.load_in=4bit", where=Where(kind="cuda"))
    rest = memory.num_params(SMOLLM2) - memory.num_linear_params(SMOLLM2)
    assert found.of("weights") == pytest.approx(4 * rest + memory.num_linear_params(SMOLLM2) * (
        0.5 + 1 / 64 + 4 / 64 / 256), rel=1e-4)
    assert not found.of("joined weights")


def test_many_answers_after_a_short_training_are_the_peak():
    answers = Pass(lengths=(900,) * 16, num_trained=0)
    found = footprint.training(SMOLLM2, recipe_of(), Where(), passes=[Pass(lengths=(16,), num_trained=4)],
                               answers=answers)
    assert found.moment == "the answers after training"
    assert found.of("KV cache") == memory.kv_bytes(SMOLLM2, 900 + 64, num_sequences=16)


@pytest.mark.parametrize(("method", "type_", "bits"), [
    ("hf", "bf16", 16), ("hf", "fp32", 32), ("gguf", "q8_0", 8.5), ("gguf", "q4_0", 4.5)])
def test_the_weights_of_each_form(method, type_, bits):
    num_bytes = footprint.form_weight_bytes(SMOLLM2, method, type_)
    assert num_bytes == pytest.approx(memory.num_params(SMOLLM2) * bits / 8, rel=0.002)
    where = Where()
    found = footprint.inference(SMOLLM2, "form", method, type_, where, prompt_tokens=512, new_tokens=128, batch_size=3)
    assert found.of("weights") == num_bytes
    width = 4 if type_ == "fp32" else 2
    assert found.of("KV cache") == 3 * 640 * 2 * 30 * 3 * 64 * width


def test_the_merge_holds_fp32():
    found = footprint.merging(SMOLLM2, recipe_of(), Where())
    assert found.of("weights") == 4 * memory.num_params(SMOLLM2) and found.moment == "its certificate"
    assert found.of("mapped file") == 2 * memory.num_params(SMOLLM2)


def test_checkpointing_leaves_holes_all_the_same():
    found = training("train.gradient_checkpointing=true")
    assert found.of("allocator") == training().of("allocator")
    assert found.of("activations") < 0.3 * training().of("activations")
    assert not training(where=Where(precision="fp32")).of("kernels")
    assert training(where=Where(kept_share=0.0)).of("allocator") == 0


def test_forms_that_are_served():
    found = footprint.served_forms(recipe_of("quantize=[{method: gguf, type: q8_0}, {target: gpu}]"))
    assert found == [("merged", "hf", "bf16"), ("gguf-q8_0", "gguf", "q8_0"),
                     ("bitsandbytes-int8", "bitsandbytes", "int8"), ("bitsandbytes-nf4", "bitsandbytes", "nf4")]
    assert footprint.served_forms(recipe_of("merge.dtype=fp32")) == [("merged", "hf", "fp32")]
    unknown = recipe_of("quantize=[{method: auto_round, type: w4}, {method: torchao, type: int8}]")
    assert [name for name, _, _ in footprint.served_forms(unknown)] == ["merged"]
