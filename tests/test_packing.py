"""Packing: its arithmetic, and that on every architecture packed, padded and separate rows teach the same."""

from __future__ import annotations

import numpy
import pytest

from lora_kit import packing, proof
from lora_kit.packing import first_fit_decreasing, micro_batches, packed_batch_of
from lora_kit.tokens import IGNORED, batch_of
from lora_kit.types import Example

LENGTHS = {0: 5, 1: 9, 2: 2, 3: 9, 4: 4, 5: 1}


def test_first_fit_decreasing_fills_the_first_bin_with_room():
    assert first_fit_decreasing(range(6), LENGTHS.get, 10) == [[1, 5], [3], [0, 4], [2]]
    assert first_fit_decreasing([1, 2], LENGTHS.get, 4) == [[1], [2]]  # 9 tokens do not fit into 4: a bin of its own
    assert first_fit_decreasing([], LENGTHS.get, 4) == []


@pytest.mark.parametrize("seed", range(5))
def test_bins_hold_each_row_once_within_the_budget_and_few_are_needed(seed):
    lengths = numpy.random.default_rng(seed).integers(1, 100, 200).tolist()
    bins = first_fit_decreasing(range(200), lengths.__getitem__, 128)
    assert sorted(row for one in bins for row in one) == list(range(200))
    assert all(sum(lengths[row] for row in one) <= 128 for one in bins)
    # A bin is opened only for a row that fits into none before it: no two of them would fit into one.
    totals = [sum(lengths[row] for row in one) for one in bins]
    assert all(a + b > 128 for index, a in enumerate(totals) for b in totals[:index])


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("budget", [None, 10, 30])
def test_every_process_makes_as_many_passes_and_each_row_comes_once(num_processes, budget):
    plans = [micro_batches(range(6), LENGTHS.get, micro_batch_size=2, budget=budget, process=process,
                           num_processes=num_processes) for process in range(num_processes)]
    assert sorted(row for plan in plans for micro in plan for row in micro) == list(range(6))
    assert len({len(plan) for plan in plans}) == 1
    uneven = [micro_batches(range(5), LENGTHS.get, micro_batch_size=1, budget=budget and 9, process=process,
                            num_processes=2) for process in range(2)]
    assert len(uneven[0]) == len(uneven[1]) and sorted(sum(sum(uneven, []), [])) == list(range(5))


def example(tokens, mask, origin="rows.jsonl:1") -> Example:
    return Example(tokens_T=numpy.array(tokens, numpy.int32), loss_mask_T=numpy.array(mask, numpy.uint8), origin=origin)


def test_a_packed_batch_starts_anew_with_each_row():
    batch = packed_batch_of([example([5, 6, 7], [0, 1, 1]), example([2, 2], [1, 1])], "cpu")
    assert batch.tokens_BT.tolist() == [[5, 6, 7, 2, 2]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1]]
    # The second row's first token is trained in its mask, and predicted by nothing.
    assert batch.labels_BT.tolist() == [[IGNORED, 6, 7, IGNORED, 2]]
    assert batch.document_lengths == (3, 2) and (batch.num_tokens, batch.num_trained_tokens) == (5, 3)


def test_a_shared_prefix_comes_once_and_ends_before_what_is_trained():
    several = [example([7, 8, 9, 1, 2], [0, 0, 0, 0, 1]), example([7, 8, 9, 3], [0, 0, 0, 1]),
               example([7, 8, 9, 4, 5, 6], [0, 0, 0, 0, 0, 1])]
    batch = packed_batch_of(several, "cpu", share_prefix=True)
    # The second row trains its fourth token, which the prefix must not predict: two tokens are shared, not three.
    assert batch.prefix_length == 2 and batch.document_lengths == (5, 2, 4)
    assert batch.tokens_BT.tolist() == [[7, 8, 9, 1, 2, 9, 3, 9, 4, 5, 6]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 3, 4, 2, 3, 2, 3, 4, 5]]
    assert batch.num_trained_tokens == packed_batch_of(several, "cpu").num_trained_tokens == 3
    assert packed_batch_of(several[:1], "cpu", share_prefix=True).prefix_length == 0
    assert packed_batch_of([example([1, 2], [0, 1]), example([3, 2], [0, 1])], "cpu", True).prefix_length == 0
    assert packed_batch_of([example([1, 2, 3], [1, 0, 1])] * 2, "cpu", True).prefix_length == 0
    assert packed_batch_of([example([1, 2], [0, 0])] * 2, "cpu", True).prefix_length == 1


FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 7},
    "gemma": {"num_key_value_heads": 1, "head_dim": 16},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 7},  # soft caps
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 16, "sliding_window": 7},
    "phi": {},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": {},
}


def random_model(family: str, attention: str = "sdpa"):
    """Two random layers of ``family`` with a LoRA whose B is not zero, in fp32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                                  num_attention_heads=4, max_position_embeddings=256, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()
    net = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights="gaussian",
                                           task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return net.train()


def rows(seed: int = 0) -> list[Example]:
    generator = numpy.random.default_rng(seed)
    made = []
    for length in (19, 6, 31, 12):
        mask = generator.integers(0, 2, length)
        mask[-1] = 1
        made.append(example(generator.integers(1, 97, length), mask))
    return made


def learnt(net, batches):
    """(summed loss, all gradients end to end) of ``batches``, one backward pass each."""
    import torch

    from lora_kit.loss import loss_sum

    total = 0.0
    for batch in batches:
        loss = loss_sum(net, batch)
        loss.backward()
        total += float(loss.detach())
    gradients = torch.cat([parameter.grad.flatten() for parameter in net.parameters() if parameter.requires_grad])
    net.zero_grad(set_to_none=True)
    return total, gradients


@pytest.mark.parametrize(("family", "attention"), [
    (family, attention) for family in FAMILIES for attention in ("sdpa", "eager")
    if (family, attention) != ("gemma2", "sdpa")  # transformers itself has only eager for it
])
def test_packed_padded_separate_and_accumulated_rows_teach_the_same(family, attention):
    net = random_model(family, attention)
    assert packing.why_not_packed(net.get_base_model()) is None
    separate = learnt(net, [batch_of([row], 0, "cpu") for row in rows()])
    ways = {"padded": [batch_of(rows(), 0, "cpu")], "accumulated": [batch_of(rows()[:2], 0, "cpu"),
                                                                    batch_of(rows()[2:], 0, "cpu")]}
    packing.use_packing(net.get_base_model())
    measured = {"packed": learnt(net, [packed_batch_of(rows(), "cpu")]),
                "packed, accumulated": learnt(net, [packed_batch_of(rows()[:3], "cpu"),
                                                    packed_batch_of(rows()[3:], "cpu")])}
    packing.stop_packing(net.get_base_model())
    measured |= {name: learnt(net, batches) for name, batches in ways.items()}
    for name, (loss, gradients) in measured.items():
        assert loss == pytest.approx(separate[0], rel=1e-5), name
        assert float((gradients - separate[1]).norm() / separate[1].norm()) < 1e-4, name


# ---- the proof --------------------------------------------------------------------------


class OneProcess:
    device = "cpu"
    num_processes = 1

    @staticmethod
    def reduce(tensor, _):
        return tensor

    @staticmethod
    def autocast():
        from contextlib import nullcontext

        return nullcontext()


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_the_proof_holds_where_rows_are_kept_apart(family):
    net = random_model(family)
    packing.use_packing(net.get_base_model())
    found = proof.prove_batches(net, rows()[:2], OneProcess, "fp32", packed=True)
    assert found["holds"] and found["gradient_difference"] < 1e-4 and net.training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_proof_catches_neighbours_that_read_each_other(monkeypatch):
    net = random_model("llama")
    packing.use_packing(net.get_base_model())
    monkeypatch.setattr(packing, "attend_per_document", None)
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(packing.PER_DOCUMENT, sdpa_attention_forward)
    found = proof.prove_batches(net, rows()[:2], OneProcess, "fp32", packed=True)
    assert not found["holds"] and found["gradient_difference"] > 100 * found["bound"]


def test_the_proof_catches_positions_that_run_on(monkeypatch):
    import torch

    def running_on(examples, device, share_prefix):
        batch = packed_batch_of(examples, device, share_prefix)
        object.__setattr__(batch, "positions_BT", torch.arange(batch.num_tokens)[None])
        return batch

    monkeypatch.setattr(proof, "packed_batch_of", running_on)
    net = random_model("gpt_neox", "eager")  # eager makes its block mask from the positions
    assert not proof.prove_batches(net, rows()[:2], OneProcess, "fp32", packed=True)["holds"]


def test_a_model_with_a_state_from_row_to_row_is_not_packed():
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("mamba", vocab_size=97, hidden_size=32, num_hidden_layers=1, state_size=4)
    assert "attention" in packing.why_not_packed(AutoModelForCausalLM.from_config(config))


def test_what_sdpa_cannot_do_is_refused_rather_than_left_out():
    import torch

    tensor = torch.zeros(1, 1, 3, 4)
    with pytest.raises(ValueError, match="softcap"):
        packing.attend_per_document(None, tensor, tensor, tensor, None, softcap=30.0)


def test_auto_proves_when_it_is_cheap():
    assert proof.rows_to_prove([9, 3, 5, 4], [1, 1, 0, 2]) == [1, 3]
    assert proof.is_cheap(7, 5 * 7 * 50) and not proof.is_cheap(7, 5 * 7 * 49)


def test_rows_to_prove_train_unlike_numbers_of_tokens():
    lengths = [4, 5, 6, 7, 3]
    assert proof.rows_to_prove(lengths, [3, 4, 6, 2, 3]) == [4, 2]  # twice as many as the shortest row's 3
    assert proof.rows_to_prove(lengths, [3, 4, 5, 1, 3]) == [4, 3]  # or half and less
    assert proof.rows_to_prove(lengths, [3, 4, 5, 5, 3]) == [4, 0]  # or the two shortest
    assert proof.rows_to_prove(lengths, [0, 0, 1, 0, 0]) == [2]


def test_a_floor_that_is_high_makes_no_bound_that_any_row_meets(monkeypatch):
    net = random_model("llama")
    packing.use_packing(net.get_base_model())
    monkeypatch.setattr(proof, "FLOOR_FACTOR", 1e9)
    assert proof.prove_batches(net, rows()[:2], OneProcess, "fp32", packed=True)["bound"] == proof.LARGEST_BOUND
    found = proof.prove_batches(net, rows()[:2], OneProcess, "fp32", packed=False)
    assert found["accumulates"] and found["adds_up"] and "holds" not in found
