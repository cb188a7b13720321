"""Planted faults of merged models, in variants drawn from a seed: each is caught by the certificate as it is made for
every merge, which knows nothing of the fault."""

import json
import shutil

import numpy as np
import pytest

from lora_kit import certificate, merge
from lora_kit.adapter_check import check_adapter
from lora_kit.errors import ModelError
from lora_kit.merging import Values
from tests import fake_run, tiny

SEEDS = (0, 1, 2)
pytestmark = pytest.mark.filterwarnings("ignore")  # peft and bitsandbytes warn of some of what is planted


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("faults") / "base", dtype="bfloat16", hidden=64, layers=3,
                           initializer_range=0.1)[0]


@pytest.fixture(scope="module")
def rows(base, tmp_path_factory):
    from lora_kit.chat import load_tokenizer

    data = fake_run.save_rows(tmp_path_factory.mktemp("faults") / "data", load_tokenizer(base), num=3)
    return certificate.held_out_rows(data, 300)["rows"]


class Planted:
    """A right merge of an adapter drawn from a seed, whose files a fault then changes."""

    def __init__(self, base, folder, seed, *, size=None, **config):
        self.base, self.generator = base, np.random.default_rng(seed)
        size = float(self.generator.uniform(0.05, 0.15)) if size is None else size
        rank = int(self.generator.integers(2, 9))
        self.adapter = fake_run.save_adapter(base, folder / "adapter", seed=seed, size=size, r=rank,
                                             lora_alpha=rank * int(self.generator.integers(1, 4)), **config)
        self.folder = folder / "model"
        self.folder.mkdir()
        self.made = merge.merge_to_folder(str(base), str(self.adapter), str(base), str(self.folder), "bf16")
        self.plan = check_adapter(base, self.adapter)

    def rewrite(self, change) -> None:
        """Every changed tensor as ``change(name, before, after)`` in fp32 makes it, cast to bf16; as a merger that is
        wrong would have written it, its hashes too."""
        import torch
        from safetensors.torch import load_file, save_file

        path = self.folder / "model.safetensors"
        weights = load_file(path)
        with Values(self.plan) as values:
            for target in self.plan.targets.values():
                if target.changes:
                    before, after = (read(target, 0, target.shape[0]) for read in (values.before, values.after))
                    weights[target.name] = change(target.name, before, after).to(torch.bfloat16).contiguous()
        save_file(weights, path, {"format": "pt"})
        self.made["files"] = {}

    def verdicts(self, rows):
        measured = merge.certify(str(self.base), str(self.adapter), str(self.base), str(self.folder), "bf16", rows,
                                 str(self.folder), self.made["files"])
        return {claim: verdict for claim, verdict in zip(("exact", "stored", "faithful", "kept"),
                                                         merge.judge(measured, "bf16"), strict=True)}


def failed(verdicts):
    return {claim for claim, verdict in verdicts.items() if verdict.outcome == "FAIL"}


@pytest.mark.parametrize("seed", SEEDS)
def test_nothing_planted_nothing_found(seed, base, rows, tmp_path):
    assert failed(Planted(base, tmp_path, seed).verdicts(rows)) == set()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_dropped_adapter(seed, base, rows, tmp_path):
    planted = Planted(base, tmp_path, seed)
    planted.rewrite(lambda name, before, after: before)
    verdicts = planted.verdicts(rows)
    assert failed(verdicts) == {"stored", "faithful", "kept"} and "projection 0.000" in verdicts["kept"].evidence


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wrong_scaling(seed, base, rows, tmp_path):
    planted = Planted(base, tmp_path, seed)
    factor = float(planted.generator.choice([0.25, 0.5, 0.8, 1.25, 2, 4]))
    planted.rewrite(lambda name, before, after: before + factor * (after - before))
    verdicts = planted.verdicts(rows)
    assert {"stored", "kept"} <= failed(verdicts), factor
    assert f"projection {factor:.1f}" in verdicts["kept"].evidence


@pytest.mark.parametrize("seed", SEEDS)
def test_one_layers_delta_missing(seed, base, rows, tmp_path):
    planted = Planted(base, tmp_path, seed)
    layer = int(planted.generator.integers(3))
    planted.rewrite(lambda name, before, after: before if f".{layer}." in name else after)
    verdicts = planted.verdicts(rows)
    assert {"stored", "kept"} <= failed(verdicts)
    assert f"layers that differ: {layer} 0.00" in verdicts["kept"].evidence


@pytest.mark.parametrize("seed", SEEDS)
def test_a_head_tied_again(seed, base, rows, tmp_path):
    """The adapter parted the ends; the config says they are one, so that whatever loads it ties them again."""
    from safetensors.torch import load_file, save_file

    planted = Planted(base, tmp_path, seed, targets=["q_proj", "lm_head"])
    assert planted.plan.untied
    config = json.loads((planted.folder / "config.json").read_text())
    (planted.folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    gone = planted.generator.random() < 0.5  # as saved by a library that ties before it saves
    if gone:
        weights = load_file(planted.folder / "model.safetensors")
        weights.pop("lm_head.weight")
        save_file(weights, planted.folder / "model.safetensors", {"format": "pt"})
        planted.made["files"] = {}
    verdicts = planted.verdicts(rows)
    # A head that is still in the file is read by transformers 5.23, whatever the config says, and not by others.
    assert failed(verdicts) >= ({"stored", "faithful", "kept"} if gone else {"stored"})
    assert "config.json says something else of: tie_word_embeddings" in verdicts["stored"].evidence


@pytest.mark.parametrize("seed", SEEDS)
def test_a_merge_into_the_4_bit_base(seed, base, rows, tmp_path):
    """What peft's merge_and_unload leaves of a QLoRA model: base in 4 bits plus delta, in 4 bits again or not."""
    from bitsandbytes import functional

    planted = Planted(base, tmp_path, seed)
    kind = str(planted.generator.choice(["nf4", "fp4"]))
    again = planted.generator.random() < 0.5

    def in_4_bits(weight):
        packed, state = functional.quantize_4bit(weight.contiguous(), quant_type=kind)
        return functional.dequantize_4bit(packed, state)

    planted.rewrite(lambda name, before, after: in_4_bits(in_4_bits(before) + after - before) if again
                    else in_4_bits(before) + after - before)
    verdicts = planted.verdicts(rows)
    assert failed(verdicts) >= {"stored", "faithful"}, (kind, again)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("how", ["cast", "added in bf16"])
def test_a_bf16_merge_of_a_faint_delta(how, seed, base, rows, tmp_path):
    """0.3 % of the weights: rounded away by the cast, and worse where delta and sum are bf16 too."""
    import torch

    targets, (first, second) = ["q_proj", "up_proj", "down_proj"], (tmp_path / "first", tmp_path / "second")
    first.mkdir()
    second.mkdir()
    norm = relative_norm(Planted(base, first, seed, size=0.002, targets=targets))
    planted = Planted(base, second, seed, size=0.002 * 0.003 / norm, targets=targets)
    assert relative_norm(planted) == pytest.approx(0.003, rel=0.02)
    if how == "added in bf16":
        planted.rewrite(lambda name, before, after: (before.to(torch.bfloat16) + (after - before).to(torch.bfloat16)))
    verdicts = planted.verdicts(rows)
    assert "kept" in failed(verdicts)
    assert ("stored" in failed(verdicts)) == (how == "added in bf16")


def relative_norm(planted) -> float:
    from lora_kit import delta

    return delta.measure(planted.plan, delta.of_folder(planted.folder))["relative_norm"]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_stale_quantization_config(seed, base, rows, tmp_path):
    """Left over from a QLoRA base: whatever loads the folder quantizes the merged weights in silence."""
    planted = Planted(base, tmp_path, seed)
    kind = planted.generator.choice(["load_in_4bit", "load_in_8bit"])
    config = json.loads((planted.folder / "config.json").read_text())
    stale = {"quant_method": "bitsandbytes", str(kind): True, "bnb_4bit_quant_type": "nf4",
             "bnb_4bit_compute_dtype": "bfloat16"}
    (planted.folder / "config.json").write_text(json.dumps({**config, "quantization_config": stale}))
    with pytest.raises(ModelError, match="config.json says that it is quantized .bitsandbytes., and its weights are "
                                         "not"):
        planted.verdicts(rows)


@pytest.mark.parametrize("seed", range(6))
def test_one_flipped_byte_in_a_shard(seed, base, rows, tmp_path):
    """Any bits of any byte: of a value, where it may be one unit in the last place, or of the header's padding."""
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16").save_pretrained(sharded, max_shard_size="100KB")
    tiny.save_tokenizer(sharded)
    planted = Planted(sharded, tmp_path, seed)
    shards = sorted(planted.folder.glob("*.safetensors"))
    assert len(shards) > 2
    path = shards[int(planted.generator.integers(len(shards)))]
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[int(planted.generator.integers(header, len(data)))] ^= int(planted.generator.integers(1, 256))
    path.write_bytes(data)
    try:
        verdicts = planted.verdicts(rows)
    except ModelError as error:  # the model says what is not finite
        assert "not finite" in str(error)
        return
    assert "stored" in failed(verdicts)
    assert f"no longer what was written: {path.name}" in verdicts["stored"].evidence


def test_the_smallest_flip_is_seen_in_the_file_alone(base, rows, tmp_path):
    """One unit in the last place of one weight: within the tolerance of the tensors, and not of the file's hash."""
    planted = Planted(base, tmp_path, 0)
    copy = shutil.copytree(planted.folder, tmp_path / "copy")
    data = bytearray((planted.folder / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (planted.folder / "model.safetensors").write_bytes(data)
    verdicts = planted.verdicts(rows)
    assert failed(verdicts) == {"stored"} and "1 off by one unit" in verdicts["stored"].evidence
    planted.folder = copy
    assert failed(planted.verdicts(rows)) == set()
