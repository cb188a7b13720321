"""Merged block by block, the tensors are peft's own fp32 merge cast once, for every variant that is supported."""

import json
import struct

import pytest

from lora_kit import merging, tensor_files
from lora_kit.adapter_check import check_adapter
from lora_kit.errors import ModelError, RefusedError
from tests import fake_run, tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of ends that are adapted, of patterns and of Conv1D


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases by name: a tied and an untied Llama, a Qwen2 (biases), a GPT-2 (Conv1D, tied); bf16, random."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("bases")
    tiny.save_model(folder / "tied", dtype="bfloat16", initializer_range=0.1)
    tiny.save_model(folder / "untied", dtype="bfloat16", initializer_range=0.1, tie_word_embeddings=False)
    torch.manual_seed(3)
    sizes = dict(vocab_size=320, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    models = {
        "qwen": Qwen2ForCausalLM(Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                             num_attention_heads=4, num_key_value_heads=2, **sizes)),
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=64, **sizes)),
    }
    for name, model in models.items():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        model.to(torch.bfloat16).save_pretrained(folder / name)
        tiny.save_tokenizer(folder / name)
    return folder


def save_adapter(base, folder, *, targets="all-linear", grow_to=None, save_ends=False, **config):
    """A LoRA with random values everywhere that peft trains, saved by peft itself."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if grow_to:
        model.resize_token_embeddings(grow_to)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets,
                                                "task_type": "CAUSAL_LM", **config}))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "magnitude" not in name:
            parameter.data += 0.05 * torch.randn_like(parameter)
        elif parameter.requires_grad:
            parameter.data *= 1 + 0.1 * torch.rand_like(parameter)
    model.save_pretrained(folder, save_embedding_layers=bool(grow_to) or save_ends)
    return folder


def peft_merge(base, adapter, dtype):
    """peft's own merge in fp32, cast once: the state dict of the model that it leaves, and whether it is tied.

    The base is made ready by hand as peft's documentation says (untied, resized), not by lora-kit.
    """
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    sizes = {tensor.shape[0] for name, tensor in weights.items()
             if name.endswith(".weight") and "embed_tokens" in name and "lora" not in name}
    if sizes - {model.get_input_embeddings().weight.shape[0]}:
        model.resize_token_embeddings(sizes.pop())
    ends = ("lm_head", "embed_tokens", "wte")
    named = [*(config["target_modules"] or ()), *(config["modules_to_save"] or ())]
    if model.config.tie_word_embeddings and any(end in named for end in ends):
        model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
        model.config.tie_word_embeddings = False
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True).to(dtype)
    tied = merged.config.tie_word_embeddings
    return {name: tensor for name, tensor in merged.state_dict().items()
            if not (tied and name == "lm_head.weight")}, tied


def ulps(found, expected, dtype):
    """How many units in the last place of ``expected`` apart, elementwise."""
    import torch

    exponent = torch.frexp(expected.double())[1]
    unit = torch.ldexp(torch.full_like(expected, 2.0, dtype=torch.float64) * torch.finfo(dtype).eps / 4, exponent)
    return ((found.double() - expected.double()).abs() / unit.clamp(min=torch.finfo(dtype).tiny)).ceil()


def check_merge(base, adapter, out, dtype="bf16"):
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    out.mkdir()
    plan = check_adapter(base, adapter)
    merging.write_merged(plan, out, dtype)
    expected, tied = peft_merge(base, adapter, kind)
    assert bool(plan.config.get("tie_word_embeddings", True)) == tied
    found = {}
    from safetensors.torch import load_file
    for path in out.glob("*.safetensors"):
        found |= load_file(path)
    assert found.keys() == expected.keys()
    total = sum(tensor.numel() for tensor in expected.values())
    off = 0
    for name, right in expected.items():
        assert found[name].shape == right.shape and found[name].dtype == kind, name
        apart = ulps(found[name], right, kind)
        assert apart.max() <= (1 if dtype != "fp32" else 64), name
        off += int((apart > 0).sum())
    if dtype != "fp32":
        assert off < 1e-4 * total or off <= 1, (off, total)
    from transformers import AutoModelForCausalLM

    before = AutoModelForCausalLM.from_pretrained(base, dtype=kind).state_dict()
    changed = {name for name, tensor in expected.items()
               if name not in before or tensor.shape != before[name].shape or not torch.equal(tensor, before[name])}
    return plan, changed


VARIANTS = {
    "plain": ("tied", {}),
    "rank-stabilised": ("tied", {"use_rslora": True}),
    "DoRA": ("tied", {"use_dora": True}),
    "DoRA, rank-stabilised": ("untied", {"use_dora": True, "use_rslora": True}),
    "patterns": ("tied", {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "down_proj": 6},
                          "alpha_pattern": {"layers.1.self_attn.q_proj": 20, "^model.layers.0.mlp.up_proj": 3}}),
    "patterns, rank-stabilised": ("untied", {"rank_pattern": {"down_proj": 6}, "use_rslora": True}),
    "some layers": ("tied", {"targets": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    "head": ("untied", {"targets": ["q_proj", "lm_head"]}),
    "embedding": ("untied", {"targets": ["q_proj", "embed_tokens"]}),
    "embedding, DoRA": ("untied", {"targets": ["embed_tokens", "lm_head"], "use_dora": True}),
    "tied head": ("tied", {"targets": ["q_proj", "lm_head"]}),
    "tied embedding": ("tied", {"targets": ["q_proj", "embed_tokens"]}),
    "tied, both ends, saved whole": ("tied", {"targets": ["lm_head", "embed_tokens"], "save_ends": True}),
    "a norm trained whole": ("tied", {"targets": ["q_proj"], "modules_to_save": ["input_layernorm", "o_proj"]}),
    "a head trained whole": ("untied", {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a tied head trained whole": ("tied", {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a tied embedding trained whole": ("tied", {"targets": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "new tokens": ("untied", {"targets": ["q_proj"], "trainable_token_indices": [3, 319, 7]}),
    "new tokens, tied": ("tied", {"targets": ["q_proj"], "trainable_token_indices": [3, 319, 7]}),
    "new tokens by module": ("untied", {"targets": ["v_proj"], "trainable_token_indices": {"embed_tokens": [5]}}),
    "resized": ("untied", {"targets": ["q_proj"], "grow_to": 331}),
    "resized, tied": ("tied", {"targets": ["q_proj"], "grow_to": 331}),
    "resized, trained whole": ("untied", {"targets": ["q_proj"], "grow_to": 331,
                                          "modules_to_save": ["embed_tokens", "lm_head"]}),
    "resized and new tokens": ("tied", {"targets": ["q_proj"], "grow_to": 331, "trainable_token_indices": [325, 2]}),
    "biases": ("qwen", {"bias": "all"}),
    "a bias of the factors": ("qwen", {"targets": ["q_proj", "k_proj"], "lora_bias": True}),
    "Conv1D": ("gpt2", {"targets": ["c_attn", "c_proj", "c_fc"]}),
    "Conv1D, said rightly": ("gpt2", {"targets": ["c_attn"], "fan_in_fan_out": True}),
    "Conv1D, DoRA": ("gpt2", {"targets": ["c_attn", "c_fc"], "use_dora": True}),
    "Conv1D and the tied embedding": ("gpt2", {"targets": ["c_attn", "wte"], "fan_in_fan_out": True}),
    "orthogonal": ("tied", {"init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_are_pefts_own_merge_cast_once(variant, bases, tmp_path):
    name, config = VARIANTS[variant]
    adapter = save_adapter(bases / name, tmp_path / "adapter", **config)
    plan, changed = check_merge(bases / name, adapter, tmp_path / "out")
    assert changed, "the adapter of this test changes nothing"
    assert changed <= {target.name for target in plan.targets.values() if target.changes}
    assert plan.untied == variant.startswith(("tied", "a tied", "Conv1D and the tied"))


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
def test_other_types(dtype, config, bases, tmp_path):
    adapter = save_adapter(bases / "untied", tmp_path / "adapter", **config)
    check_merge(bases / "untied", adapter, tmp_path / "out", dtype)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}])
@pytest.mark.parametrize("name", ["untied", "gpt2"])
def test_blocks_of_a_few_rows_are_the_same(name, config, bases, tmp_path, monkeypatch):
    """The tiny models fit into one block; here a block is three rows."""
    targets = {"targets": ["c_attn", "wte"]} if name == "gpt2" else {"targets": ["q_proj", "lm_head", "embed_tokens"]}
    adapter = save_adapter(bases / name, tmp_path / "adapter", **targets, **config)
    real = tensor_files.blocks
    monkeypatch.setattr(merging, "blocks", lambda shape, most=0: real(shape, 200))
    check_merge(bases / name, adapter, tmp_path / "out")


def test_shards_are_written_shard_by_shard(bases, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bases / "tied", dtype="bfloat16")
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    adapter = save_adapter(tmp_path / "base", tmp_path / "adapter", targets=["q_proj", "lm_head"])
    plan, _ = check_merge(tmp_path / "base", adapter, tmp_path / "out")
    index = json.loads((tmp_path / "out" / tensor_files.INDEX).read_text())
    assert index["weight_map"] == plan.file_of and set(index["weight_map"].values()) == {
        path.name for path in (tmp_path / "out").glob("*.safetensors")}
    (tmp_path / "out" / "config.json").write_text(json.dumps(plan.config))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="bfloat16")
    assert again.lm_head.weight.data_ptr() != again.model.embed_tokens.weight.data_ptr()


def test_a_bare_model_whose_names_lack_the_prefix(bases, tmp_path):
    from safetensors.torch import load_file, save_file

    base = tmp_path / "bare"
    base.mkdir()
    (base / "config.json").write_text((bases / "gpt2" / "config.json").read_text())
    weights = {name.removeprefix("transformer."): tensor
               for name, tensor in load_file(bases / "gpt2" / "model.safetensors").items()}
    import torch
    weights["h.0.attn.bias"] = torch.ones(1, 1, 64, 64)  # GPT-2's published files hold their masks
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    adapter = save_adapter(bases / "gpt2", tmp_path / "adapter", targets=["c_attn"])
    plan, changed = check_merge(base, adapter, tmp_path / "out")
    assert plan.left_out == ("h.0.attn.bias",) and "transformer.h.1.attn.c_attn.weight" in changed


# ---- refused before any values are read --------------------------------------------------


def refused(base, adapter, monkeypatch, what, error=ModelError):
    monkeypatch.setattr(tensor_files.Reader, "rows", lambda *a, **k: pytest.fail("values were read"))
    with pytest.raises(error, match=what):
        check_adapter(base, adapter)


def test_a_base_whose_files_are_not_what_its_config_says(bases, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((bases / "tied" / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config))
    adapter = save_adapter(bases / "tied", tmp_path / "adapter")
    weights = load_file(bases / "tied" / "model.safetensors")
    gone = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    save_file(gone, base / "model.safetensors", {"format": "pt"})
    refused(base, adapter, monkeypatch, r"does not store model.layers.1.mlp.down_proj.weight .*\(3 such tensors\)")
    save_file(weights | {"model.norm.weight": weights["model.norm.weight"][:5]}, base / "model.safetensors",
              {"format": "pt"})
    refused(base, adapter, monkeypatch, "model.norm.weight is 5 where config.json asks for 64")


def test_files_that_are_cut_off_or_missing(bases, tmp_path, monkeypatch):
    import shutil

    adapter = save_adapter(bases / "tied", tmp_path / "adapter")
    base = shutil.copytree(bases / "tied", tmp_path / "base")
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(base, adapter, monkeypatch, "is not whole", RefusedError)
    (base / tensor_files.INDEX).write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    refused(base, adapter, monkeypatch, "lacks model-00002-of-00002.safetensors, which its index names")


@pytest.mark.parametrize(("change", "what"), [
    (lambda weights: {k: v for k, v in weights.items() if "layers.1.mlp.up_proj.lora_A" not in k},
     "lacks factor A of model.layers.1.mlp.up_proj"),
    (lambda weights: {k: v[:2] if "layers.0.self_attn.q_proj.lora_A" in k else v for k, v in weights.items()},
     "is of another base: .*q_proj.lora_A.weight is 2x64 and .* at rank 4"),
    (lambda weights: weights | {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector":
                                weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][:, 0]},
     "has a DoRA magnitude of model.layers.0.self_attn.q_proj"),
    (lambda weights: weights | {"base_model.model.model.embed_tokens.weight":
                                weights["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]},
     "changes the vocabulary of one end of the model and not of the other"),
])
def test_adapters_that_are_not_whole(change, what, bases, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    adapter = save_adapter(bases / "untied", tmp_path / "adapter")
    path = adapter / "adapter_model.safetensors"
    weights = {name: tensor.clone().contiguous() for name, tensor in change(load_file(path)).items()}
    save_file(weights, path)
    refused(bases / "untied", adapter, monkeypatch, what)


def test_a_value_that_does_not_fit_the_type(bases, tmp_path):
    adapter = save_adapter(bases / "tied", tmp_path / "adapter", lora_alpha=4 * 10**7)
    with pytest.raises(ModelError, match="does not fit into it .*set merge.dtype: bf16"):
        merging.write_merged(check_adapter(bases / "tied", adapter), tmp_path, "fp16")


# ---- files --------------------------------------------------------------------------------


def test_written_files_are_read_by_safetensors_itself(tmp_path):
    import torch
    from safetensors.torch import load_file

    tensors = {"b": torch.arange(7, dtype=torch.uint8), "a": torch.randn(5, 3), "c": torch.tensor(2.5),
               "d": torch.randn(4, 2, 3).bfloat16(), "e": torch.zeros(0, 4)}
    kinds = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16"}
    entries = [tensor_files.Entry(name=name, shape=tuple(tensor.shape), kind=kinds[tensor.dtype])
               for name, tensor in tensors.items()]

    def pieces(entry):
        tensor = tensors[entry.name]
        yield from ([tensor] if not tensor.dim() else tensor.split(2) if tensor.numel() else [])

    tensor_files.write_file(tmp_path / "x.safetensors", entries, pieces)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    header = json.loads((tmp_path / "x.safetensors").read_bytes()[8:][:struct.unpack(
        "<Q", (tmp_path / "x.safetensors").read_bytes()[:8])[0]])
    assert header["a"]["data_offsets"][0] % 4 == 0 and header["__metadata__"] == {"format": "pt"}
    with pytest.raises(AssertionError, match="a: 24 bytes, not 60"):
        tensor_files.write_file(tmp_path / "y.safetensors", entries, lambda entry: [tensors[entry.name][:2]])


def test_one_name_in_two_files_is_refused(tmp_path):
    import torch
    from safetensors.torch import save_file

    for name in ("a", "b"):
        save_file({"same": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(RefusedError, match="holds same, as a.safetensors does"):
        tensor_files.list_tensors(tmp_path)


@pytest.mark.parametrize(("shape", "expected"), [((7, 2), [(0, 2), (2, 4), (4, 6), (6, 7)]), ((), [(0, 1)]),
                                                 ((3, 100), [(0, 1), (1, 2), (2, 3)]), ((0, 4), [])])
def test_blocks(shape, expected):
    assert list(tensor_files.blocks(shape, 4)) == expected


def test_the_model_that_peft_loads_is_prepared_as_the_plan_says(bases, tmp_path):
    """``load_adapter`` unties and resizes by the same rule, so that certificates measure the same model."""
    from lora_kit.adapter import load_adapter
    from lora_kit.model import load_base

    for number, (name, config) in enumerate((VARIANTS["tied head"], VARIANTS["resized, tied"],
                                             VARIANTS["a tied embedding trained whole"])):
        adapter = save_adapter(bases / name, tmp_path / str(number), **config)
        plan = check_adapter(bases / name, adapter)
        model = load_adapter(load_base(bases / name, dtype="fp32"), adapter)
        assert model.config.tie_word_embeddings == (not plan.untied)
        assert model.config.vocab_size == plan.config["vocab_size"]
        merged = model.merge_and_unload().state_dict()
        for target in plan.targets.values():
            assert merged[target.name].shape == target.shape


def test_plain_loras_of_other_trainers(bases, tmp_path):
    """peft's own layout without anything of lora-kit's beside it, in bf16, and without optional keys in the config."""
    from safetensors.torch import load_file, save_file

    adapter = fake_run.save_adapter(bases / "untied", tmp_path / "adapter", size=0.1)
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    kept = ("peft_type", "r", "lora_alpha", "target_modules", "task_type", "base_model_name_or_path",
            "modules_to_save")
    (adapter / "adapter_config.json").write_text(json.dumps({key: config[key] for key in kept}))
    check_merge(bases / "untied", adapter, tmp_path / "out")
