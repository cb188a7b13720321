"""The adapter on a base: made, continued, loaded, saved, and looked at when training ends.

peft makes the LoRA and puts one from a folder on a base; what it would take in silence and get
wrong is refused here. Weights are safetensors only. First values that are computed from the base or
the data are computed in ``adapter_start.py`` and read here.

Reads and writes adapters (PEFT layout) where it is told.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_kit import merging, stopwatch
from lora_kit.errors import ModelError, RecipeError, RefusedError
from lora_kit.model import short
from lora_kit.recipe import LoraSection

CHANGED_BASES = ("pissa", "olora", "corda", "lora_ga")
"""Values of peft's ``init_lora_weights`` under which an adapter fits a changed base, not the one that it names."""


@stopwatch.part("adapter")
def add_adapter(model, section: LoraSection, seed: int, token_ids: Sequence[int] = ()):
    """``model`` with a fresh LoRA on it (peft), its parameters in fp32.

    Args:
        seed: of the adapter's initial values: torch is seeded with it right before they are drawn.
        token_ids: rows of the input embedding to train (``lora.trainable_tokens`` as ids).

    Raises:
        RecipeError: a target, pattern or other name matches nothing, or is an end of a tied model.
    """
    with stopwatch.importing():
        import torch
        from peft import get_peft_model

    for pattern in (*section.rank_pattern, *section.alpha_pattern):
        _matches(pattern, "")
    config = make_config(model, section, token_ids)
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            # What peft would only warn of is an error below or in make_config.
            warnings.filterwarnings("ignore", message=".*(did not match any targeted module|no modules were excluded)")
            warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage=False")
            net = get_peft_model(model, config)
    except ValueError as error:  # e.g. DoRA on a kind of layer that it does not know
        raise RecipeError("lora", f"peft refuses it ({short(error)})",
                          "change lora.targets or leave the option out") from None
    _check_matches(net, section)
    return net


def make_config(model, section: LoraSection, token_ids: Sequence[int] = ()):
    """peft's LoraConfig of ``section``, its names checked against ``model``; raises as :func:`add_adapter`."""
    from peft import LoraConfig

    _check_targets(model, section)
    _check_whole_modules(model, section, token_ids)
    targets: Any = list(section.targets)
    if section.targets == ["all-linear"]:
        # peft takes layers, and CorDA's preprocessing any targets, by name only: by the last part of the name, for a
        # module named in full is adapted whatever its layer.
        by_name = section.layers or section.init.startswith("corda")
        targets = _all_linear(model) if by_name else "all-linear"
    init: Any = {"default": True, "corda_kpm": "corda"}.get(section.init, section.init)
    with warnings.catch_warnings():
        # Its own conversion of such an adapter would be wrong; ours (save_adapter) scales every pattern rightly.
        warnings.filterwarnings("ignore", message="Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern")
        warnings.filterwarnings("ignore", message="`init_lora_weights` is '(eva|corda)'")
        return LoraConfig(
            r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, target_modules=targets,
            exclude_modules=list(section.exclude) or None, layers_to_transform=list(section.layers) or None,
            layers_pattern=section.layers_pattern, rank_pattern=dict(section.rank_pattern),
            alpha_pattern=dict(section.alpha_pattern), init_lora_weights=init, use_rslora=section.rslora,
            use_dora=section.dora, modules_to_save=list(section.modules_to_save) or None,
            trainable_token_indices=list(token_ids) or None, bias="none", task_type="CAUSAL_LM",
        )


def continue_adapter(model, adapter_dir: Path):
    """``model`` with the adapter in ``adapter_dir``, its parameters trainable."""
    return _with_adapter(model, adapter_dir, is_trainable=True)


def load_adapter(model, adapter_dir: Path | str):
    """``model`` with the adapter in ``adapter_dir`` on it, unmerged, in eval mode."""
    return _with_adapter(model, Path(adapter_dir), is_trainable=False).eval()


@stopwatch.part("adapter")
def _with_adapter(model, adapter_dir: Path, is_trainable: bool):
    with stopwatch.importing():
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import SafetensorError, safe_open

    if not (adapter_dir / "adapter_config.json").exists():
        raise ModelError(str(adapter_dir), "is not a PEFT adapter (no adapter_config.json)", "name an adapter folder")
    if not (adapter_dir / "adapter_model.safetensors").exists():
        raise RefusedError(str(adapter_dir), "has no safetensors weights, and pickled ones are not loaded",
                           "save it with safe_serialization=True")
    refuse_changed_base(adapter_dir)
    try:
        with safe_open(adapter_dir / "adapter_model.safetensors", framework="pt") as file:
            saved = set(file.keys())
        merging.prepare_ends(model, adapter_dir, dict(json.loads(
            (adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))))
        adapted = PeftModel.from_pretrained(model, str(adapter_dir), is_trainable=is_trainable)
    except SafetensorError as error:
        raise RefusedError(str(adapter_dir), f"its weights are not whole ({short(error)})",
                           "fetch or train it again") from None
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ModelError(str(adapter_dir), f"does not fit the base model ({short(error)})",
                         "name the adapter's own base") from None
    # peft leaves out in silence what finds no place, such as the upper layers of a deeper model's adapter.
    homeless = saved ^ set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    homeless = {name for name in homeless if "lora_" in name}
    if homeless:
        raise ModelError(str(adapter_dir), f"does not fit the base model ({len(homeless)} of its tensors find no "
                         f"place, the first is {min(homeless)})", "name the adapter's own base")
    return adapted


def refuse_changed_base(adapter_dir: Path) -> None:
    """ModelError for an adapter that fits a changed base (PiSSA and its kin, not converted when it was saved)."""
    try:
        init = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8")).get("init_lora_weights")
    except (OSError, ValueError, AttributeError):
        return  # whoever reads the rest of it says what is wrong
    if isinstance(init, str) and init.startswith(CHANGED_BASES):
        raise ModelError(str(adapter_dir), f"was made with {init}, and fits a base that was changed for it",
                         "save it with peft's path_initial_model_for_weight_conversion, which makes it a plain LoRA")


def _adaptable(model) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules()
            if any(kind in type(module).__name__ for kind in ("Linear", "Conv1D", "Embedding"))}


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _tied_ends(model) -> list:
    return [model.get_input_embeddings(), model.get_output_embeddings()] if model.config.tie_word_embeddings else []


def _last_names(modules: dict[str, Any]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name, module in modules.items()
                   if "Embedding" not in type(module).__name__})


def _all_linear(model) -> list[str]:
    """Last names of every linear layer but the head: what peft understands by all-linear."""
    head = model.get_output_embeddings()
    return _last_names({name: module for name, module in _adaptable(model).items() if module is not head})


def _check_targets(model, section: LoraSection) -> None:
    supported, tied = _adaptable(model), _tied_ends(model)
    last = _last_names(supported)

    def matching(key: str, name: str) -> list:
        matched = [module for full, module in supported.items() if _ends(full, name)]
        if not matched:
            near = difflib.get_close_matches(name.rpartition(".")[2], last, n=1, cutoff=0.5)
            raise RecipeError(key, f"'{name}' matches no module that can be adapted",
                              (f"did you mean '{near[0]}'? " if near else "") + f"there are: {', '.join(last)}")
        return matched

    for target in section.targets:
        if target == "all-linear":
            if len(section.targets) > 1:
                raise RecipeError("lora.targets", "names all-linear beside others", "keep one of the two")
            continue
        if any(module is end for module in matching("lora.targets", target) for end in tied):
            # Measured: peft merges an adapter on a tied head wrongly, off by 10 and more.
            raise RecipeError("lora.targets", f"'{target}' is tied to the other end of this model and cannot be merged",
                              "leave it out")
    for name in section.exclude:
        matching("lora.exclude", name)
    _check_ranks(supported, section)


def _check_ranks(modules: dict[str, Any], section: LoraSection) -> None:
    """A decomposition has no more directions than the narrower side of a weight."""
    for name, module in modules.items() if section.prepared else ():
        targeted = section.targets == ["all-linear"] or any(_ends(name, target) for target in section.targets)
        if not targeted or not hasattr(module, "in_features"):
            continue
        key, rank = "lora.rank", section.rank
        for pattern, other in section.rank_pattern.items():
            if _matches(pattern, name):
                key, rank = f"lora.rank_pattern.{pattern}", other
                break
        narrow = min(module.in_features, module.out_features)
        if narrow < rank:
            raise RecipeError(key, f"init {section.init} takes {rank} directions of {name}, which has {narrow}",
                              f"set a rank of at most {narrow}, or init: default")


def _matches(pattern: str, name: str) -> bool:
    """Whether peft applies ``pattern`` of rank_pattern or alpha_pattern to the module ``name``."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error as error:
        raise RecipeError("lora", f"the pattern '{pattern}' is no regular expression ({error})", "correct it") from None


def _check_whole_modules(model, section: LoraSection, token_ids: Sequence[int]) -> None:
    """What is trained beside the factors: whole modules, and rows of the embedding."""
    modules, tied = dict(model.named_modules()), _tied_ends(model)
    for name in section.modules_to_save:
        matched = [module for full, module in modules.items() if _ends(full, name)]
        if not matched:
            known = sorted({full.rpartition(".")[2] for full, module in modules.items()
                            if not full.rpartition(".")[2].isdecimal() and next(module.parameters(), None) is not None})
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            raise RecipeError("lora.modules_to_save", f"'{name}' matches no module",
                              f"did you mean '{near[0]}'?" if near else f"there are: {', '.join(known)}")
        for module in matched:
            if any(part is end for part in module.modules() for end in tied):
                raise RecipeError("lora.modules_to_save", f"'{name}' is tied to the other end of this model and cannot "
                                  "be trained alone", "leave it out")
            if not all(parameter.is_floating_point() for parameter in module.parameters()):
                raise RecipeError("lora.modules_to_save", f"'{name}' is held in whole numbers and cannot be trained",
                                  "set model.load_in: 16bit or leave it out")
    if token_ids and tied:
        raise RecipeError("lora.trainable_tokens", "the input embedding is tied to the head of this model, and a merge "
                          "would part the two", "leave them out, or name an untied model")
    num_rows = model.get_input_embeddings().weight.shape[0]
    if token_ids and max(token_ids) >= num_rows:
        raise RecipeError("lora.trainable_tokens", f"{max(token_ids)} is no token: the model has {num_rows}",
                          "check the id")


def _check_matches(net, section: LoraSection) -> None:
    """Every target, layer number and pattern of ``section`` had something to act on, asked of what peft made."""
    targeted = net.base_model.targeted_module_names
    for target in section.targets if section.targets != ["all-linear"] else ():
        if not any(_ends(name, target) for name in targeted):
            raise RecipeError("lora.targets", f"no module '{target}' is adapted",
                              "check lora.exclude and lora.layers, or leave it out")
    for number in section.layers:
        if not any(re.search(rf"\.{number}\.", name) for name in targeted):
            numbers = {int(found) for name, _ in net.named_modules() for found in re.findall(r"\.(\d+)\.", name)}
            raise RecipeError("lora.layers", f"no module of layer {number} is adapted",
                              f"the layers are 0 to {max(numbers, default=0)}")
    for name in targeted if section.layers else ():
        if not any(f".{number}." in name for number in section.layers):
            raise RecipeError("lora.layers", f"{name} is adapted, which is in none of them",
                              "name targets by the last part of their name")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(section, key):
            if not any(_matches(pattern, name) for name in targeted):
                raise RecipeError(f"lora.{key}", f"'{pattern}' matches no module that is adapted",
                                  f"they end in: {', '.join(sorted({name.rsplit('.', 1)[-1] for name in targeted}))}")


def token_ids_of(tokens: Sequence[int | str], tokenizer) -> list[int]:
    """``lora.trainable_tokens`` as ids, in order and each once.

    Raises:
        RecipeError: a text that is not one token.
    """
    ids = []
    for token in tokens:
        if isinstance(token, str):
            found = tokenizer(token, add_special_tokens=False)["input_ids"]
            if len(found) != 1:
                raise RecipeError("lora.trainable_tokens", f"'{token}' is {len(found)} tokens, not one",
                                  "name the ids, or a text that is one token")
            token = found[0]
        ids.append(int(token))
    return sorted(set(ids))


def adapter_tensors(model) -> dict[str, Any]:
    """Everything that is the adapter's, in peft's names, sharded tensors gathered whole.

    To be called on every process of a sharded model.
    """
    from peft import get_peft_model_state_dict

    from lora_kit.checkpoint import whole

    ours = {name: whole(parameter.detach()) for name, parameter in model.named_parameters()
            if parameter.requires_grad or ".lora_" in name}
    # Left to itself peft asks the hub whether the base's vocabulary has changed.
    return get_peft_model_state_dict(model, state_dict=ours, save_embedding_layers=False)


def save_adapter(model, folder: Path, reference: str, tensors: dict[str, Any] | None = None,
                 start: Path | None = None) -> None:
    """Write the adapter of ``model`` to ``folder`` in PEFT layout, naming ``reference`` as its base.

    Args:
        tensors: what :func:`adapter_tensors` returned; asked of ``model`` when None.
        start: the folder of the first values, for an adapter that trains on a base less those: it is written as a plain
            LoRA of twice the rank on the base itself, W - s·B0·A0 + s·B·A = W + s·[B, -B0]·[A; A0].
    """
    from safetensors.torch import load_file, save_file

    config = copy.deepcopy(model.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = reference, True
    config.init_lora_weights, config.eva_config, config.corda_config = True, None, None
    tensors = adapter_tensors(model) if tensors is None else tensors
    if start is not None:
        tensors = _with_start(tensors, load_file(str(start / "adapter_model.safetensors")))
        scale = 2**0.5 if config.use_rslora else 2  # so that alpha/rank, or alpha/sqrt(rank), is what it was
        config.r, config.lora_alpha = 2 * config.r, scale * config.lora_alpha
        config.rank_pattern = {key: 2 * rank for key, rank in config.rank_pattern.items()}
        config.alpha_pattern = {key: scale * alpha for key, alpha in config.alpha_pattern.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
              str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _with_start(tensors: dict[str, Any], start: dict[str, Any]) -> dict[str, Any]:
    import torch

    joined = dict(tensors)
    for name, tensor in tensors.items():
        if "lora_A" in name:
            joined[name] = torch.cat([tensor.cpu(), start[name].to(tensor.dtype)], dim=0)
        elif "lora_B" in name:
            joined[name] = torch.cat([tensor.cpu(), -start[name].to(tensor.dtype)], dim=1)
    return joined


def sha256_of(tensors: dict[str, Any]) -> str:
    """One hash over names and values, to tell an adapter that training did not change."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}\0".encode())
        digest.update(tensors[name].detach().cpu().contiguous().float().numpy().tobytes())
    return digest.hexdigest()


def is_zero(weights: dict[str, Any]) -> bool:
    """Whether an adapter's tensors leave every output as it is: A or B of every pair is all zero, and nothing else
    is trained."""
    seconds = [name for name in weights if "lora_B" in name or "lora_embedding_B" in name]
    if any("lora_" not in name for name in weights):
        return False
    firsts = [name.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A") for name in seconds]
    return not any(weights[second].any() and weights[first].any()
                   for first, second in zip(firsts, seconds, strict=True) if first in weights)


def check_trained(folder: Path, start_sha256: str | None, start: Path | None = None) -> None:
    """ModelError for an adapter in ``folder`` that is not finite or changes nothing: no success is claimed for one.

    Args:
        start_sha256: :func:`sha256_of` the tensors before the first step, where it is known.
        start: as in :func:`save_adapter`.
    """
    from safetensors.torch import load_file

    todo = "train for more steps or raise the learning rate"
    saved = load_file(str(folder / "adapter_model.safetensors"))
    if not all(tensor.isfinite().all() for tensor in saved.values()):
        raise ModelError(str(folder), "has values that are not finite", "lower train.learning_rate")
    if is_zero(saved):
        raise ModelError(str(folder), "changes nothing: A or B of every pair is zero", todo)
    if start is not None:  # the trained half of what _with_start joined
        saved = {name: tensor.chunk(2, dim=0)[0] if "lora_A" in name else
                 tensor.chunk(2, dim=1)[0] if "lora_B" in name else tensor for name, tensor in saved.items()}
    if start_sha256 is not None and sha256_of(saved) == start_sha256:
        raise ModelError(str(folder), "is what it was before the first step", todo)
