"""First values of an adapter that are computed: PiSSA, OLoRA, MiCA from the base, EVA and CorDA from training rows.

They are computed once, on the base as it is, and written as a PEFT folder. Training, fresh or going on,
reads that folder and does to the base what it says: PiSSA, OLoRA and CorDA train on the base less the adapter's first
product, W - s·B0·A0. So a run that was stopped has the very same base when it goes on, on any machine, whatever signs
and order a decomposition has there; and saving knows what to add back (``adapter.save_adapter``).

Reads training rows; writes the folder that it is told.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy

from lora_kit.adapter import add_adapter, continue_adapter, make_config, save_adapter
from lora_kit.errors import ModelError, RecipeError
from lora_kit.recipe import LoraSection
from lora_kit.rundir import writing
from lora_kit.tokens import ExampleFile, batch_of, order_of_epoch

MOST_EVA_ROWS = 1024
"""Training rows that EVA sees again and again until its directions stand still."""
MOST_EVA_PASSES = 1000
"""Forward passes after which EVA is given up."""
MOST_CORDA_ROWS = 256
"""Training rows that CorDA's covariances are taken over (the number of its authors: Yang et al. 2024,
arXiv:2406.05223)."""


def write_start(base, section: LoraSection, seed: int, rows: ExampleFile, folder: Path, *, reference: str,
                micro_batch_size: int, token_ids: Sequence[int] = ()) -> None:
    """Compute the first values for ``base``, which is not to be used afterwards, and write them to ``folder``.

    Args:
        rows: training rows; EVA and CorDA see the first of the order that training has.

    Raises:
        RecipeError: a name matches nothing, or there is too little data for the rank.
        ModelError: EVA finds no directions that stand still, or CorDA's covariances are not finite.
    """
    base.eval()
    order = [int(row) for row in order_of_epoch(len(rows), seed, 0)]
    if section.init.startswith("corda"):
        net = _corda(base, section, seed, rows, order[:MOST_CORDA_ROWS], token_ids)
    else:
        net = add_adapter(base, section, seed, token_ids)
        if section.init == "eva":
            _eva(net, section, rows, order[:MOST_EVA_ROWS], micro_batch_size)
    scratch = folder.with_name(f".{folder.name}.working")
    with writing(folder):
        shutil.rmtree(scratch, ignore_errors=True)
        save_adapter(net, scratch, reference)
        os.replace(scratch, folder)


def adapter_from_start(base, section: LoraSection, folder: Path):
    """``base``, changed as it must be, with the adapter that :func:`write_start` left in ``folder``, trainable."""
    import torch
    from peft.tuners.lora import LoraLayer

    net = continue_adapter(base, folder)
    with torch.no_grad():
        for module in net.modules() if section.changes_base else ():
            if isinstance(module, LoraLayer):
                weight = module.get_base_layer().weight
                weight.copy_(weight.float() - module.get_delta_weight("default").float())
    if section.init == "mica":  # arXiv:2604.01694: B holds the base's least directions and stays
        for name, parameter in net.named_parameters():
            if ".lora_B." in name:
                parameter.requires_grad_(False)
    return net


def _eva(net, section: LoraSection, rows: ExampleFile, order: list[int], micro_batch_size: int) -> None:
    from peft import initialize_lora_eva_weights
    from peft.tuners.lora import LoraLayer

    config = net.peft_config["default"]
    narrowest = min(module.in_features for module in net.modules() if isinstance(module, LoraLayer))
    rank = max([section.rank, *section.rank_pattern.values()])
    # peft looks for rho times the rank in directions of each input, and an input has no more than its width.
    config.eva_config.rho = max(1.0, min(config.eva_config.rho, narrowest / rank))
    needed = round(rank * config.eva_config.rho)
    batches, masked = _batches(rows, order, micro_batch_size, needed, trained_only=True), True
    if not batches:
        batches, masked = _batches(rows, order, micro_batch_size, needed, trained_only=False), False
    if not batches:
        raise RecipeError("lora.init", f"eva needs {needed} tokens for rank {rank}, and the training rows have fewer",
                          "set a lower lora.rank, or init: default")
    config.eva_config.use_label_mask = masked
    passes = 0

    def forward(model, inputs):
        nonlocal passes
        passes += 1
        if passes > MOST_EVA_PASSES:
            raise ModelError("lora.init", f"eva's directions did not stand still in {MOST_EVA_PASSES} forward passes",
                             "set init: default")
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the following layers were initialized with init_lora_weights=True")
        initialize_lora_eva_weights(net, batches, forward_fn=forward, gather_distributed_inputs=False,
                                    show_progress_bar=False)


def _batches(rows: ExampleFile, order: list[int], size: int, needed: int, *, trained_only: bool) -> list[dict]:
    """Batches of at least ``size`` rows and ``needed`` tokens: peft passes over one with too few, without end."""
    batches, waiting, count = [], [], 0
    for row in order:
        waiting.append(rows[row])
        count += int(rows[row].loss_mask_T.sum()) if trained_only else rows.length(row)
        if len(waiting) >= size and count >= needed:
            batches.append(_inputs(waiting))
            waiting, count = [], 0
    if not batches and count >= needed:
        batches.append(_inputs(waiting))
    return batches


def _inputs(examples: list) -> dict:
    batch = batch_of(examples, 0, "cpu")
    return {"input_ids": batch.tokens_BT, "attention_mask": batch.attention_mask_BT, "labels": batch.labels_BT}


def _corda(base, section: LoraSection, seed: int, rows: ExampleFile, order: list[int], token_ids: Sequence[int]):
    import torch
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = make_config(base, section, token_ids)
    config.corda_config = CordaConfig(corda_method="kpm" if section.init == "corda_kpm" else "ipm")

    def run_rows() -> None:
        with torch.no_grad():
            for row in order:
                tokens = torch.from_numpy(numpy.asarray(rows[row].tokens_T, numpy.int64)[None]).to(base.device)
                base(input_ids=tokens, use_cache=False)

    try:
        preprocess_corda(base, config, run_model=run_rows)
    except (ValueError, RuntimeError) as error:
        raise ModelError("lora.init", f"corda cannot be computed ({' '.join(str(error).split())[:200]})",
                         "set init: eva or init: default") from None
    return add_adapter(base, section, seed, token_ids)
