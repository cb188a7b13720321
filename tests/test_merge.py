"""The merge and its certificate: right merges pass, planted faults fail, each by the measure meant for it."""

import json
import shutil

import numpy as np
import pytest

from lora_kit import certificate, events, merge
from lora_kit.errors import ModelError, RecipeError
from tests import fake_run, tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, _ = tiny.save_model(tmp_path_factory.mktemp("merge") / "base", dtype="bfloat16", initializer_range=0.1)
    (folder / "gguf_tokenizer.json").write_text('{"tokenizer.ggml.pre": "gpt-2"}')
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return fake_run.save_adapter(base, tmp_path_factory.mktemp("merge") / "adapter", size=0.1)


@pytest.fixture(scope="module")
def rows(base, tmp_path_factory):
    from lora_kit.chat import load_tokenizer

    data = fake_run.save_rows(tmp_path_factory.mktemp("merge") / "data", load_tokenizer(base))
    return certificate.held_out_rows(data, 600)["rows"]


@pytest.fixture(scope="module")
def merged(base, adapter, tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge") / "model"
    folder.mkdir()
    merge.merge_to_folder(str(base), str(adapter), str(base), str(folder), "bf16")
    return folder


def certify(base, adapter, folder, rows, dtype="bf16", **files):
    return merge.certify(str(base), str(adapter), str(base), str(folder), dtype, rows, str(folder), **files)


def outcomes(base, adapter, folder, rows, dtype="bf16", **files):
    measured = certify(base, adapter, folder, rows, dtype, **files)
    return [verdict.outcome for verdict in merge.judge(measured, dtype)], measured


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def expected_weights(base, adapter, dtype="bfloat16"):
    """W + alpha/r B A in float64, by hand."""
    import torch

    config = json.loads((adapter / "adapter_config.json").read_text())
    from safetensors.torch import load_file

    factors, found = load_file(adapter / "adapter_model.safetensors"), {}
    for name, tensor in weights_of(base).items():
        place = f"base_model.model.{name.removesuffix('.weight')}"
        found[name] = tensor.double()
        if f"{place}.lora_A.weight" in factors:
            a, b = (factors[f"{place}.lora_{part}.weight"].double() for part in "AB")
            found[name] = found[name] + config["lora_alpha"] / config["r"] * (b @ a)
    return {name: tensor.to(getattr(torch, dtype)) for name, tensor in found.items()}


def test_merged_weights_are_the_sum_cast_once(base, adapter, merged):
    expected, found = expected_weights(base, adapter), weights_of(merged)
    assert found.keys() == expected.keys()
    different = sum(int((found[name] != expected[name]).sum()) for name in found)
    total = sum(tensor.numel() for tensor in found.values())
    assert different / total < 1e-4  # float64 here, float32 there: at most ties of the rounding
    assert sum(int((found[name] != weights_of(base)[name]).sum()) for name in found) > total / 2


def test_the_folder_is_plain_and_whole(base, merged):
    config = json.loads((merged / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "gguf_tokenizer.json",
                 "generation_config.json"):
        assert (merged / name).read_bytes() == (base / name).read_bytes()
    assert not list(merged.glob("adapter*"))


def test_a_right_merge_passes(base, adapter, merged, rows):
    found, measured = outcomes(base, adapter, merged, rows)
    assert found == ["PASS"] * 4
    assert measured["stored"]["num_wrong"] == 0 and measured["stored"]["num_tensors"] == len(weights_of(merged))
    assert 0 < measured["floor"]["mean_kl"] < measured["adapter_change"]["mean_kl"] / 10
    assert measured["exact"]["max_log_prob_difference"] < 1e-4
    assert list(merged.glob(".certificate*")) == []


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"use_dora": True}, {"targets": ["q_proj", "down_proj"]}])
def test_other_loras_pass_too(config, base, rows, tmp_path):
    adapter = fake_run.save_adapter(base, tmp_path / "adapter", size=0.1, **config)
    (tmp_path / "model").mkdir()
    merge.merge_to_folder(str(base), str(adapter), str(base), str(tmp_path / "model"), "bf16")
    assert outcomes(base, adapter, tmp_path / "model", rows)[0] == ["PASS"] * 4


@pytest.mark.parametrize("config", [{"targets": ["q_proj", "lm_head"]}, {"modules_to_save": ["embed_tokens"]},
                                    {"trainable_token_indices": [3, 5]}])
@pytest.mark.filterwarnings("ignore")  # peft warns of ends that are tied
def test_ends_that_part_and_new_tokens_pass_too(config, base, rows, tmp_path):
    adapter = fake_run.save_adapter(base, tmp_path / "adapter", size=0.1, **config)
    (tmp_path / "model").mkdir()
    merge.merge_to_folder(str(base), str(adapter), str(base), str(tmp_path / "model"), "bf16")
    found, measured = outcomes(base, adapter, tmp_path / "model", rows)
    assert found == ["PASS"] * 4, measured["stored"]


def test_a_vocabulary_that_grew_passes_too(base, rows, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    model.resize_token_embeddings(331)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    (tmp_path / "model").mkdir()
    merge.merge_to_folder(str(base), str(tmp_path / "adapter"), str(base), str(tmp_path / "model"), "bf16")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"] == 331
    certified = certify(base, tmp_path / "adapter", tmp_path / "model", rows)
    assert [verdict.outcome for verdict in merge.judge(certified, "bf16")] == ["PASS"] * 4


def test_a_faint_change_is_merged_in_fp16_by_itself_and_fails_in_bf16_if_asked_for(base, rows, tmp_path):
    faint = fake_run.save_adapter(base, tmp_path / "adapter", size=0.001)
    made = {}
    for dtype in ("auto", "bf16"):
        (tmp_path / dtype).mkdir()
        made[dtype] = merge.merge_to_folder(str(base), str(faint), str(base), str(tmp_path / dtype), dtype)
    assert made["auto"]["dtype"] == "fp16" and made["auto"]["bf16"]["projection"] < 0.95
    assert outcomes(base, faint, tmp_path / "auto", rows, "fp16")[0] == ["PASS"] * 4
    found, measured = outcomes(base, faint, tmp_path / "bf16", rows)
    assert found == ["PASS", "PASS", "PASS", "FAIL"]
    assert merge.judge(measured, "bf16")[3].evidence.endswith("merge.dtype: fp16 or auto keeps it")


def test_fp32_where_fp16_cannot_hold_a_value(base, tmp_path):
    """A weight of 10**6 fits into bf16 and fp32 alone; the change is too small for bf16."""
    from safetensors.torch import save_file

    other = shutil.copytree(base, tmp_path / "base")
    weights = weights_of(base)
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    faint = fake_run.save_adapter(other, tmp_path / "adapter", size=0.001)
    (tmp_path / "model").mkdir()
    assert merge.merge_to_folder(str(other), str(faint), str(base), str(tmp_path / "model"), "auto")["dtype"] == "fp32"


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_other_types_pass_too(dtype, base, adapter, rows, tmp_path):
    merge.merge_to_folder(str(base), str(adapter), str(base), str(tmp_path), dtype)
    found, measured = outcomes(base, adapter, tmp_path, rows, dtype)
    assert found == ["PASS"] * 4
    assert measured["engine"] == f"transformers {dtype}"


@pytest.fixture
def tampered(merged, tmp_path):
    """A copy of the merged folder, and a function that rewrites its weights."""
    from safetensors.torch import save_file

    folder = shutil.copytree(merged, tmp_path / "tampered")

    def rewrite(change):
        weights = {name: change(name, tensor).contiguous() for name, tensor in weights_of(folder).items()}
        save_file({k: v for k, v in weights.items() if v.numel()}, folder / "model.safetensors", {"format": "pt"})
        return folder

    return rewrite


def test_a_dropped_adapter_fails(base, adapter, rows, tampered):
    plain = weights_of(base)
    found, measured = outcomes(base, adapter, tampered(lambda name, tensor: plain[name]), rows)
    assert found == ["PASS", "FAIL", "FAIL", "FAIL"]
    assert measured["merged"]["mean_kl"] == pytest.approx(measured["adapter_change"]["mean_kl"], rel=0.1)


def test_half_the_scale_fails(base, adapter, rows, tampered):
    plain = weights_of(base)
    half = tampered(lambda name, tensor: ((tensor.float() + plain[name].float()) / 2).bfloat16())
    assert outcomes(base, adapter, half, rows)[0] == ["PASS", "FAIL", "FAIL", "FAIL"]


def test_one_layer_left_out_fails(base, adapter, rows, tampered):
    plain = weights_of(base)
    folder = tampered(lambda name, tensor: plain[name] if "layers.1." in name else tensor)
    assert outcomes(base, adapter, folder, rows)[0] == ["PASS", "FAIL", "FAIL", "FAIL"]


def test_one_flipped_byte_fails_though_no_logit_tells(base, adapter, rows, tampered):
    def flip(name, tensor):
        if "layers.0.mlp.up_proj" in name:
            tensor = tensor.clone()
            tensor.view(-1)[7] *= 1.0625
        return tensor

    assert outcomes(base, adapter, tampered(flip), rows)[0] == ["PASS", "FAIL", "PASS", "PASS"]


def test_a_faint_adapter_that_is_dropped_fails_by_the_tensors(base, rows, merged, tmp_path):
    faint = fake_run.save_adapter(base, tmp_path / "adapter", size=2e-4)
    folder = shutil.copytree(merged, tmp_path / "model")
    shutil.copy(base / "model.safetensors", folder)
    found, measured = outcomes(base, faint, folder, rows)
    assert measured["adapter_change"]["mean_kl"] < measured["floor"]["mean_kl"]
    assert found[1:] == ["FAIL", "PASS", "FAIL"]
    assert "too little for this measure" in merge.judge(measured, "bf16")[2].evidence


def test_a_wrong_merge_in_memory_fails_the_first_claim(base, adapter, merged, rows, monkeypatch):
    def twice(model):
        plain = model.merge_and_unload()
        plain.model.layers[0].mlp.up_proj.weight.data *= 1.01
        return plain

    monkeypatch.setattr(merge, "_merged_fp32", twice)
    assert outcomes(base, adapter, merged, rows)[0][0] == "FAIL"


def test_tensors_missing_extra_or_of_another_type(merged, tmp_path):
    import torch
    from safetensors.torch import save_file

    stored = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(2), "c": torch.ones(2, dtype=torch.bfloat16)}
    save_file(stored, tmp_path / "model.safetensors")
    expected = {"a": torch.ones(3), "b": torch.ones(2), "d": torch.ones(4)}
    found = merge.compare_tensors(expected, tmp_path, "bf16")
    assert found == {"num_tensors": 2, "num_elements": 5, "num_wrong": 2, "num_inexact": 0,
                     "names_differing": ["c", "d"]}
    expected = {"a": torch.tensor([1.0, 1.0078125, 1.03]), "b": torch.ones(2).to(torch.bfloat16)}
    counts = merge.compare_tensors(expected, tmp_path, "bf16")
    assert (counts["num_inexact"], counts["num_wrong"]) == (1, 1 + 2)


def test_a_type_that_is_too_narrow_is_an_error(base, tmp_path):
    adapter = fake_run.save_adapter(base, tmp_path / "adapter", size=1e6)
    with pytest.raises(ModelError, match="fp16: .* does not fit into it"):
        merge.merge_to_folder(str(base), str(adapter), str(base), str(tmp_path), "fp16")


def test_an_adapter_of_another_base_is_refused_before_anything_is_written(adapter, tmp_path):
    other = tiny.save_model(tmp_path / "other", layers=1)[0]
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match="which this base does not have"):
        merge.merge_to_folder(str(other), str(adapter), str(other), str(tmp_path / "out"), "bf16")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_stage_in_processes_of_its_own(base, adapter, tmp_path):
    from lora_kit.chat import load_tokenizer

    run = fake_run.FakeRun(tmp_path, base, adapter)
    fake_run.save_rows(tmp_path / "data", load_tokenizer(base), split="train", num=3)
    result = merge.stage(fake_run.recipe(merge={"dtype": "bf16"}), run)
    assert [verdict.outcome for verdict in result.verdicts] == ["PASS"] * 4
    written = json.loads((run.work("merge") / "certificate.json").read_text())
    assert written["measured_on"].endswith("3 training rows (no row is held out)")
    assert [verdict["outcome"] for verdict in written["verdicts"]] == ["PASS"] * 4
    run.publish("merge", result)
    artifact = run.artifact("merged")
    weights = run.path / "merge" / "model"
    assert (artifact.kind, artifact.path) == ("hf", str(weights))
    assert artifact.num_params == sum(tensor.numel() for tensor in weights_of(weights).values())
    assert artifact.size_bytes == (weights / "model.safetensors").stat().st_size
    json.dumps(result.figures)
    assert np.isfinite(result.figures["merged"]["mean_kl"])


# ---- adapters that others trained ---------------------------------------------------------


def test_any_adapter_merges_outside_of_a_run(base, tmp_path):
    from lora_kit.types import Artifact

    adapter = fake_run.save_adapter(base, tmp_path / "adapter", size=0.1)
    artifact = Artifact(name="base", path=str(base), kind="hf", tokenizer=str(base))
    summary, verdicts = merge.merge_adapter(artifact, str(base), adapter, tmp_path / "out", "auto")
    assert [verdict.outcome for verdict in verdicts] == ["PASS"] * 4 and "in bf16, KL" in summary
    written = json.loads((tmp_path / "out" / "lora_kit_certificate.json").read_text())
    assert written["measured_on"].endswith("14 paragraphs of plain prose") and written["untied"] is False
    expected, found = expected_weights(base, adapter), weights_of(tmp_path / "out")
    assert sum(int((found[name] != expected[name]).sum()) for name in found) < 10
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(RecipeError, match="exists already"):
        merge.merge_adapter(artifact, str(base), adapter, tmp_path / "out", "auto")


def test_several_adapters_merge_as_one_and_both_steps_are_said(base, tmp_path):
    from lora_kit.types import Artifact

    one, other = (fake_run.save_adapter(base, tmp_path / str(seed), size=0.1, seed=seed) for seed in (1, 2))
    for folder, text in ((one, "its own"), (other, "another")):
        shutil.copy(base / "tokenizer.json", folder)
        shutil.copy(base / "tokenizer_config.json", folder)
        (folder / "chat_template.jinja").write_text((base / "chat_template.jinja").read_text() + f"{{# {text} #}}")
    artifact, told = Artifact(name="base", path=str(base), kind="hf", tokenizer=str(base)), []
    with events.listening(told.append):
        lines, verdicts = merge.merge_adapters(artifact, str(base), [one, other], tmp_path / "out", "fp32",
                                               weights=[0.75, -0.25], method="cat")
    assert [verdict.outcome for verdict in verdicts] == ["PASS"] * 4
    assert lines[0].startswith("cat of 2 adapters: exactly the weighted sum") and "in fp32, KL" in lines[1]
    assert [event.text for event in told if isinstance(event, events.Caution)] == [
        f"tokenizer and chat template are those of {one}: others than those of {other}"]
    assert "its own" in (tmp_path / "out" / "chat_template.jinja").read_text()
    before, found = weights_of(base), weights_of(tmp_path / "out")
    ones, others = (expected_weights(base, folder, dtype="float64") for folder in (one, other))
    for name, weight in found.items():
        plain = before[name].double()
        right = plain + 0.75 * (ones[name] - plain) - 0.25 * (others[name] - plain)
        assert (weight - right).abs().max() < 1e-5, name
    with pytest.raises(RecipeError, match="exists already"):
        merge.merge_adapters(artifact, str(base), [one, other], tmp_path / "out", "auto")


@pytest.mark.parametrize(("named", "ours", "same"), [
    ("org/Tiny-1B", "other/tiny-1b", True), ("org/Tiny-1B@abc", "models/Tiny-1B/", True),
    ("org/Tiny-1B", "org/Tiny-1B-Instruct", False), ("/home/me/base", "org/tiny", True), ("", "org/tiny", True)])
def test_a_base_that_is_not_the_adapters_is_refused(named, ours, same, base, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
    if same:
        merge.check_same_base(ours, base, copy)
    else:
        with pytest.raises(ModelError, match=f"was trained on {named}, not on {ours}; name --base {named}"):
            merge.check_same_base(ours, base, copy)
