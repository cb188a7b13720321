"""Whether an adapter can be merged rightly into a base, told before any weights of the base are read.

peft merges some adapters wrongly without a word, and loads one of another base as far as names and
shapes happen to fit. Reads the adapter's folder and the base's config.json and file headers; writes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lora_kit.adapter import is_zero, refuse_changed_base
from lora_kit.errors import ModelError, RefusedError
from lora_kit.merging import Plan, plan_merge

REFUSED = {
    "layer_replication": "repeats layers, which peft 0.21 merges wrongly and says nothing (measured: off by 11)",
    "alora_invocation_tokens": "acts from one token of the prompt on, and weights act everywhere",
    "arrow_config": "is a router between adapters: no one set of weights says what it does",
    "use_qalora": "is for GPTQ bases alone, and those cannot be merged into",
    "kasa_config": "changed its base for good, and does not fit the one that it names",
    "use_bdlora": "is block-diagonal for one way of serving, and is not certified here",
    "monteclora_config": "draws its factors at random while it trains, and is not certified here",
    "target_parameters": "adapts bare tensors (experts in one tensor), which are not certified here",
    "megatron_config": "was made for Megatron's layers, which are not loaded here",
    "ensure_weight_tying": "is shared by both ends of a tied model, which peft 0.21 merges twice",
}
"""Settings of adapter_config.json that cannot be merged -> what is wrong with an adapter that has them."""


def check_adapter(base_dir: Path, adapter_dir: Path) -> Plan:
    """Refuse, before any weights of the base are read, an adapter that cannot be merged rightly into this base.

    Returns:
        The plan of the merge.

    Raises:
        ModelError: it is no LoRA or one of :data:`REFUSED`, is of another base (names or shapes), holds values that
            are not finite, or changes nothing.
        RefusedError: its weights are not safetensors, or not whole.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where, config = str(adapter_dir), read_adapter_config(adapter_dir)
    refuse_changed_base(adapter_dir)
    path = adapter_dir / "adapter_model.safetensors"
    if not path.exists():
        raise RefusedError(where, "has no safetensors weights, and pickled ones are not loaded",
                           "save it with safe_serialization=True")
    if config.get("peft_type") != "LORA":
        raise ModelError(where, f"is {config.get('peft_type')}, not LoRA", "merge it with peft")
    for key, what in REFUSED.items():
        if config.get(key):
            raise ModelError(where, f"({key}) {what}", "train without it")
    plan = plan_merge(base_dir, adapter_dir, config)
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise RefusedError(str(path), f"is not whole ({' '.join(str(error).split())[:200]})",
                           "fetch or train it again") from None
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(where, f"holds values that are not finite ({name})",
                             "train again with a lower learning rate")
    if is_zero(weights):
        raise ModelError(where, "changes nothing: A or B of every pair is zero", "train for more steps")
    return plan


def read_adapter_config(adapter_dir: Path) -> dict[str, Any]:
    """adapter_config.json of a PEFT folder.

    Raises:
        ModelError: there is none.
        RefusedError: it is not JSON.
    """
    path = adapter_dir / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(str(adapter_dir), "is not a PEFT adapter (no adapter_config.json)",
                         "name an adapter folder") from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise RefusedError(str(path), "is not JSON", "train the adapter again")
    return config
