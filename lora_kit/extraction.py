"""A LoRA taken out of a full fine-tune: the change of every matrix by its largest directions.

The change W' - W of a linear layer is cut into singular values, and as many directions are kept as hold a share of its
energy (the sum of squares), at most a rank. What was changed besides, norms and embeddings, is either saved whole or
named as left out. Reads two model folders tensor by tensor; writes an adapter in PEFT layout.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

from lora_kit import isolate
from lora_kit.errors import ModelError, RecipeError
from lora_kit.merging import empty_model
from lora_kit.model_files import copy_tokenizer
from lora_kit.rundir import write_json, writing
from lora_kit.tensor_files import Reader, list_tensors
from lora_kit.types import Artifact
from lora_kit.units import number_text

MOST_RANK = 256
"""Largest rank unless another is asked for."""


def extract_lora(base_dir: Path, tuned_dir: Path, out_dir: Path, *, energy: float = 0.95, most_rank: int = MOST_RANK,
                 reference: str | None = None, keep_rest: bool = False) -> dict[str, Any]:
    """Write the LoRA that takes the model in ``base_dir`` towards the one in ``tuned_dir``.

    Args:
        energy: share of each matrix's change that is kept, in (0, 1].
        most_rank: most directions of a matrix, whatever that leaves out.
        reference: what the adapter calls its base; the folder when None.
        keep_rest: save what is no linear layer and changed (norms, embeddings, biases) whole, as modules_to_save.

    Returns:
        ``energy`` kept of all matrices together, ``ranks`` by module, ``left_out`` (tensors that changed and are not in
        the adapter), ``whole`` (modules that are saved whole).

    Raises:
        RecipeError: ``energy`` or ``most_rank`` is out of range.
        ModelError: the two are not of one shape, or nothing differs.
    """
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    if not 0 < energy <= 1 or most_rank < 1:
        raise RecipeError("energy", f"{energy} of at most {most_rank} directions cannot be kept",
                          "give a share of at most 1 and a rank of at least 1")
    modules = dict(empty_model(base_dir).named_modules())
    before, after = list_tensors(base_dir), list_tensors(tuned_dir)
    odd = sorted(name for name in before.keys() | after.keys()
                 if name not in before or name not in after or before[name].shape != after[name].shape)
    if odd:
        raise ModelError(str(tuned_dir), f"is of another shape than its base ({len(odd)} tensors, the first is "
                         f"{odd[0]})", "name the base that it was tuned from")
    weights, ranks, left_out, whole, total, kept = {}, {}, [], [], 0.0, 0.0
    with Reader() as base, Reader() as tuned:
        for name, stored in before.items():
            change = tuned.whole(after[name]).float() - base.whole(stored).float()
            if not change.any():
                continue
            path, _, part = name.rpartition(".")
            if part != "weight" or type(modules.get(path)).__name__ != "Linear":
                if keep_rest and path in modules:
                    whole.append(path)
                    weights[f"base_model.model.{name}"] = tuned.whole(after[name]).contiguous().clone()
                else:
                    left_out.append(name)
                continue
            a_RI, b_OR, share = _largest(change, energy, most_rank)
            square = float(change.double().square().sum())
            total, kept, ranks[path] = total + square, kept + share * square, len(a_RI)
            weights[f"base_model.model.{path}.lora_A.weight"] = a_RI
            weights[f"base_model.model.{path}.lora_B.weight"] = b_OR
    if not weights:
        raise ModelError(str(tuned_dir), "is the same as its base", "name a model that was tuned from it")
    usual = max(set(ranks.values()), key=list(ranks.values()).count) if ranks else 1
    pattern = {path: rank for path, rank in ranks.items() if rank != usual}
    out_dir.mkdir(parents=True)
    save_file(weights, out_dir / "adapter_model.safetensors", {"format": "pt"})
    torch.manual_seed(0)
    LoraConfig(r=usual, lora_alpha=usual, rank_pattern=dict(pattern), alpha_pattern=dict(pattern),
               target_modules=sorted(ranks), modules_to_save=sorted(set(whole)) or None, task_type="CAUSAL_LM",
               base_model_name_or_path=reference or str(base_dir), inference_mode=True).save_pretrained(out_dir)
    return {"energy": kept / total if total else 1.0, "ranks": ranks, "left_out": left_out, "whole": whole}


def extract_certified(base: Artifact, tuned: Artifact, reference: str, out_dir: Path, **options: Any) -> str:
    """:func:`extract_lora`, with what base and adapter say held against what the tuned model says.

    Args:
        base, tuned: the two models; ``reference`` is what the adapter calls its base.
        options: ``energy``, ``most_rank``, ``keep_rest``.

    Returns:
        A line for people. ``lora_kit_extracted.json`` beside the adapter says the same in figures.

    Raises:
        RecipeError: ``out_dir`` exists, or an option is out of range.
        ModelError: the two are not of one shape, or nothing differs.
    """
    if out_dir.exists():
        raise RecipeError(str(out_dir), "exists already", "name a folder that does not")
    with writing(out_dir):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as name:
            made = Path(name) / "adapter"
            told = isolate.call("lora_kit.extraction:extract_to_folder", {
                "base_dir": base.path, "tuned_dir": tuned.path, "out_dir": str(made), "reference": reference,
                **options}).value
            told |= isolate.call("lora_kit.extraction:certify", {
                "base_dir": base.path, "tuned": tuned.as_dict(), "adapter_dir": str(made), "scratch_dir": name}).value
            # The tuned model's: whoever tunes a model whole may have given it a template.
            copy_tokenizer(Path(tuned.tokenizer or tuned.path), made)
            write_json(made / "lora_kit_extracted.json", {"base": reference, "tuned": tuned.path, **told})
            os.replace(made, out_dir)
    return in_words(told)


def extract_to_folder(base_dir: str, tuned_dir: str, out_dir: str, **options: Any) -> dict[str, Any]:
    """:func:`extract_lora` with names in place of paths; to be called in a fresh process."""
    return extract_lora(Path(base_dir), Path(tuned_dir), Path(out_dir), **options)


def certify(base_dir: str, tuned: dict[str, Any], adapter_dir: str, scratch_dir: str) -> dict[str, Any]:
    """Base and adapter against the tuned model on plain prose, in fp32; to be called in a fresh process.

    Returns:
        ``extracted`` and, for scale, ``base_alone``: figures of :func:`lora_kit.certificate.compare`.
    """
    from lora_kit import certificate
    from lora_kit.adapter import load_adapter
    from lora_kit.chat import load_tokenizer
    from lora_kit.engines.hf import HfEngine
    from lora_kit.model import load_base, weight_bytes

    folder = tuned["path"]
    tokenizer = load_tokenizer(tuned.get("tokenizer") or folder)
    rows = [{**row, "set": "rows", "trained": [0] * len(row["tokens"])} for row in certificate.prose_rows(tokenizer)]
    device = certificate.roomy_device(3 * weight_bytes(Path(folder)))

    def engine_of(model) -> HfEngine:
        return HfEngine(model, tokenizer, stop_ids=set())

    with engine_of(load_base(Path(folder), dtype="fp32", device=device)) as engine:
        recorded = certificate.record(engine, rows, Path(scratch_dir) / "recording")
    model = load_adapter(load_base(Path(base_dir), dtype="fp32", device=device), Path(adapter_dir))
    found = {"extracted": certificate.compare(recorded, engine_of(model))}
    with model.disable_adapter():
        return found | {"base_alone": certificate.compare(recorded, engine_of(model))}


def in_words(told: dict[str, Any]) -> str:
    """What :func:`extract_certified` found, as a line."""
    ranks, whole, left_out = sorted(told["ranks"].values()), told["whole"], told["left_out"]
    parts = []
    if ranks:
        spread = str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"
        energy = math.floor(1e4 * told["energy"]) / 100  # 100 % only where nothing is missing
        parts.append(f"rank {spread} on {len(ranks)} matrices, {energy:.2f}% of the energy of their change")
    parts += [f"saved whole: {_first(whole)}"] if whole else []
    parts.append(f"left out, though changed: {_first(left_out)}" if left_out else "nothing that changed is left out")
    near, base = told["extracted"], told["base_alone"]
    parts.append(f"KL {number_text(near['mean_kl'], 2)} from the tuned model on plain prose (the base's "
                 f"{number_text(base['mean_kl'], 2)}), {near['top1_agreement']:.1%} the same first choice")
    return "; ".join(parts)


def _first(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


def _largest(change, energy: float, most_rank: int):
    """A (R, I), B (O, R) with ``B A`` the largest directions of ``change``, and the share of its energy they hold."""
    import torch

    u_OK, s_K, v_KI = torch.linalg.svd(change, full_matrices=False)
    share_K = s_K.double().square().cumsum(0)
    share_K = share_K / share_K[-1]
    rank = min(most_rank, int((share_K < energy * (1 - 1e-12)).sum()) + 1, len(s_K))
    root_R = s_K[:rank].sqrt()
    a_RI, b_OR = root_R[:, None] * v_KI[:rank], u_OK[:, :rank] * root_R
    return a_RI.contiguous(), b_OR.contiguous(), float(share_K[rank - 1])
