"""A LoRA out of a full fine-tune: what comes back, by how much energy, and what is left out."""

import json
import shutil

import pytest

from lora_kit.adapter_check import check_adapter
from lora_kit.errors import ModelError, RecipeError
from lora_kit.extraction import extract_lora, in_words
from lora_kit.merge import merge_to_folder
from tests import fake_run, tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("extraction") / "base", initializer_range=0.1)[0]


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """The base with a LoRA of ranks 2 and 4 merged in: its change has exactly these ranks."""
    path = tmp_path_factory.mktemp("extraction")
    adapter = fake_run.save_adapter(base, path / "adapter", size=0.1, rank_pattern={"down_proj": 2})
    (path / "tuned").mkdir()
    merge_to_folder(str(base), str(adapter), str(base), str(path / "tuned"), "fp32")
    return path / "tuned"


def test_a_change_of_low_rank_comes_back_whole(base, tuned, tmp_path):
    found = extract_lora(base, tuned, tmp_path / "out", energy=0.999999, reference="org/tiny")
    assert found["energy"] > 0.999999 and found["left_out"] == found["whole"] == []
    assert {rank for path, rank in found["ranks"].items() if "down_proj" in path} == {2}
    assert {rank for path, rank in found["ranks"].items() if "down_proj" not in path} == {4}
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == "org/tiny"
    check_adapter(base, tmp_path / "out")
    (tmp_path / "again").mkdir()
    merge_to_folder(str(base), str(tmp_path / "out"), str(base), str(tmp_path / "again"), "fp32")
    again, expected = weights_of(tmp_path / "again"), weights_of(tuned)
    for name, tensor in expected.items():
        assert (again[name] - tensor).abs().max() < 1e-4, name


def test_energy_and_rank_cut_where_they_say(base, tuned, tmp_path):
    import torch

    found = extract_lora(base, tuned, tmp_path / "half", energy=0.6)
    before, after = weights_of(base), weights_of(tuned)
    for path, rank in found["ranks"].items():
        values = torch.linalg.svdvals((after[f"{path}.weight"] - before[f"{path}.weight"]).double()).square()
        shares = values.cumsum(0) / values.sum()
        assert shares[rank - 1] >= 0.6 - 1e-6 and (rank == 1 or shares[rank - 2] < 0.6)
    assert 0.6 <= found["energy"] < 0.9
    least = extract_lora(base, tuned, tmp_path / "one", energy=1.0, most_rank=1)
    assert set(least["ranks"].values()) == {1} and least["energy"] < found["energy"] + 0.2


def test_what_is_no_matrix_is_named_or_kept_whole(base, tuned, tmp_path):
    from safetensors.torch import save_file

    other, weights = shutil.copytree(tuned, tmp_path / "other"), weights_of(tuned)
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        weights[name] = weights[name] * 1.5
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    assert extract_lora(base, other, tmp_path / "a")["left_out"] == [
        "model.layers.0.input_layernorm.weight", "model.norm.weight"]
    found = extract_lora(base, other, tmp_path / "b", energy=0.999999, keep_rest=True)
    assert found["left_out"] == [] and found["whole"] == ["model.layers.0.input_layernorm", "model.norm"]
    (tmp_path / "again").mkdir()
    merge_to_folder(str(base), str(tmp_path / "b"), str(base), str(tmp_path / "again"), "fp32")
    again = weights_of(tmp_path / "again")
    assert all((again[name] - tensor).abs().max() < 1e-4 for name, tensor in weights.items())


def test_what_cannot_be_extracted(base, tuned, tmp_path):
    with pytest.raises(ModelError, match="is the same as its base"):
        extract_lora(base, base, tmp_path / "out")
    wide, _ = tiny.save_model(tmp_path / "wide", hidden=32)
    with pytest.raises(ModelError, match="is of another shape than its base"):
        extract_lora(base, wide, tmp_path / "out")
    with pytest.raises(RecipeError, match="1.5 of at most 256 directions cannot be kept"):
        extract_lora(base, tuned, tmp_path / "out", energy=1.5)
    assert not (tmp_path / "out").exists()


def test_what_was_taken_in_words():
    told = {"energy": 0.99999, "ranks": {"a": 4, "b": 16}, "whole": [],
            "left_out": ["n.weight", "o.weight", "p.weight"],
            "extracted": {"mean_kl": 0.0123, "top1_agreement": 0.961}, "base_alone": {"mean_kl": 0.93}}
    assert in_words(told) == (
        "rank 4 to 16 on 2 matrices, 99.99% of the energy of their change; left out, though changed: n.weight, "
        "o.weight and 1 more; KL 0.012 from the tuned model on plain prose (the base's 0.93), 96.1% the same first "
        "choice")
    whole = in_words({**told, "energy": 1.0, "ranks": {"a": 4}, "whole": ["n"], "left_out": []})
    assert "rank 4 on 1 matrices, 100.00%" in whole and "saved whole: n; nothing that changed is left out" in whole
