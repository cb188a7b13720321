"""A LoRA merged into the files of its base, block of rows by block of rows.

Memory holds one block and the factors of one module, whatever the size of the model. First a plan: which stored tensor
becomes what, from the headers of the files and the names of the modules alone, and every name and shape checked; then
the values: ``W + scale * B A`` in fp32, DoRA's magnitude over the norm of its output, trained rows and whole modules
put in place, and one cast. The arithmetic is peft's; ``certificate`` and tests hold it against peft's own merge.

Shape suffixes: O output and I input features of a module, R rank, N rows of a block. Reads the base's and the adapter's
folders; writes the merged weights where it is told.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kit.errors import ModelError
from lora_kit.model import read_config, torch_dtype
from lora_kit.tensor_files import (
    BLOCK_ELEMENTS,
    FLOATS,
    Entry,
    Reader,
    Stored,
    blocks,
    list_file,
    list_tensors,
    write_file,
    write_index,
)

_PREFIX = "base_model.model."
_PARTS = {"lora_A": "a", "lora_B": "b", "lora_embedding_A": "a", "lora_embedding_B": "b",
          "lora_magnitude_vector": "magnitude"}
_ROWS = ".token_adapter.trainable_tokens_delta"
_KIND_OF = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
_OTHER_BASE = "name the adapter's own base"


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What one module's adapter adds: ``scale * B A``, transposed where the weight is stored (in, out)."""

    a: Stored
    b: Stored
    magnitude: Stored | None
    scale: float
    transposed: bool


@dataclass(frozen=True, kw_only=True)
class Target:
    """One tensor of the merged model.

    Args:
        source: where its values start from: the base's file, or the adapter's for a module that was trained whole.
        lora: what is added to it.
        bias: what is added to a bias (``lora_bias``), with its scale.
        rows: (tensor of trained rows, their numbers): they replace the rows of the base.
        before: the base's own tensor, or None where the base has none of that shape.
    """

    name: str
    shape: tuple[int, ...]
    source: Stored
    lora: Lora | None = None
    bias: tuple[Stored, float] | None = None
    rows: tuple[Stored, tuple[int, ...]] | None = None
    before: Stored | None = None

    @property
    def is_float(self) -> bool:
        return self.source.kind in FLOATS

    @property
    def changes(self) -> bool:
        """Whether the adapter does anything to it."""
        return not (self.lora is None and self.bias is None and self.rows is None and self.source is self.before)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A merge that can be made.

    Args:
        targets: every tensor of the merged model by name.
        file_of: the file that each is written to.
        config: config.json of the merged model, but for its dtype.
        untied: whether the base's two ends were one tensor and the merged model's are two.
        left_out: tensors of the base's files that transformers does not read.
    """

    targets: dict[str, Target]
    file_of: dict[str, str]
    config: dict[str, Any]
    untied: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def num_params(self) -> int:
        return sum(target.source.num_elements for target in self.targets.values() if target.is_float)


# ---- the plan ---------------------------------------------------------------------------


@dataclass
class _Changes:
    """What an adapter's file says of one module, by the last part of the tensor's name."""

    lora: dict[str, Stored] = field(default_factory=dict)
    lora_bias: Stored | None = None
    rows: Stored | None = None
    whole: dict[str, Stored] = field(default_factory=dict)


def plan_merge(base_dir: Path, adapter_dir: Path, adapter_config: dict[str, Any]) -> Plan:
    """Which tensor becomes what; nothing but headers is read.

    Args:
        adapter_config: the adapter's adapter_config.json, which ``adapter_check`` found to be of a kind that merges.

    Raises:
        ModelError: the adapter is of another base (names or shapes), or the base's files do not hold what transformers
            makes of its config.json.
        RefusedError: a file is broken.
    """
    where, config = str(adapter_dir), read_config(base_dir)
    model = empty_model(base_dir)
    modules = dict(model.named_modules())
    stored, left_out = _base_tensors(base_dir, model)
    changes = _read_changes(where, list_file(adapter_dir / "adapter_model.safetensors"), modules)
    ends = _ends(model, modules)
    untied = bool(model.config.tie_word_embeddings) and _parts(ends, changes, adapter_config)
    if untied:
        stored[f"{ends[1]}.weight"] = stored[f"{ends[0]}.weight"]
    elif model.config.tie_word_embeddings:
        _follow_embedding(ends, changes)
    targets: dict[str, Target] = {}
    for name, tensor in stored.items():
        targets[name] = Target(name=name, shape=tensor.shape, source=tensor, before=tensor)
    for path, change in changes.items():
        for part, target in _targets_of(where, path, change, modules[path], targets, adapter_config, path in ends):
            targets[part] = target
    vocabulary = _vocabulary(where, ends, targets)
    merged_config = {key: value for key, value in config.items() if key != "quantization_config"}
    if untied:
        merged_config["tie_word_embeddings"] = False
    if vocabulary is not None:
        holder = merged_config.get("text_config") if "vocab_size" not in merged_config else merged_config
        (holder if isinstance(holder, dict) else merged_config)["vocab_size"] = vocabulary
    files = sorted({tensor.file.name for tensor in list_tensors(base_dir).values()})
    of_base = {name: target.before.file.name for name, target in targets.items() if target.before is not None}
    names = {old: new for old, new in zip(files, _file_names(len(files)), strict=True)}
    last = names[files[-1]]
    return Plan(targets=targets, config=merged_config, untied=untied, left_out=tuple(left_out),
                file_of={name: names.get(of_base.get(name, ""), last) for name in targets})


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def empty_model(folder: Path):
    """The model of a folder's config.json on torch's meta device: names, shapes and ties, no values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False))


def _base_tensors(base_dir: Path, model) -> tuple[dict[str, Stored], list[str]]:
    """The base's stored tensors under the names that transformers gives them, and what it does not read."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ()) \
        if model.config.tie_word_embeddings else set()
    prefix, found, left_out = model.base_model_prefix + ".", {}, []
    for name, tensor in list_tensors(base_dir).items():
        # Published folders of the bare model lack the prefix, and transformers puts it there.
        known = next((each for each in (name, prefix + name) if each in wanted), None)
        if known is None or known in tied:
            left_out.append(name)
        elif tensor.shape != wanted[known]:
            raise ModelError(str(base_dir), f"{name} is {_size(tensor.shape)} where config.json asks for "
                             f"{_size(wanted[known])}", "fetch the model again")
        elif tensor.kind.startswith("F8"):
            raise ModelError(str(base_dir), f"{name} is stored in {tensor.kind}", "name the 16-bit model")
        else:
            found[known] = tensor
    absent = sorted(set(wanted) - set(found) - tied)
    if absent:
        raise ModelError(str(base_dir), f"does not store {absent[0]} under a name that transformers has for it "
                         f"({len(absent)} such tensors), so it cannot be merged file by file",
                         "load it with transformers, save it with save_pretrained, and name that folder")
    return found, left_out


def _read_changes(where: str, tensors: list[Stored], modules: dict[str, Any]) -> dict[str, _Changes]:
    changes: dict[str, _Changes] = {}
    for tensor in tensors:
        if ".original_module." in tensor.name:  # peft saves the untrained module too where it is an end
            continue
        path, part = split_name(tensor.name)
        if path not in modules:
            raise ModelError(where, f"adapts {path}, which this base does not have", _OTHER_BASE)
        change = changes.setdefault(path, _Changes())
        if part == "rows":
            change.rows = tensor
        elif part == "lora_B.bias":
            change.lora_bias = tensor
        elif part in _PARTS:
            change.lora[_PARTS[part]] = tensor
        else:
            change.whole[part] = tensor
    return changes


def split_name(name: str) -> tuple[str, str]:
    """An adapter's tensor name as (module, part): lora_A, lora_B, lora_B.bias, ..., rows, or a parameter's name."""
    path = name.removeprefix(_PREFIX)
    if path.endswith(_ROWS):
        return path.removesuffix(_ROWS), "rows"
    if path.endswith(".lora_B.bias"):
        return path.removesuffix(".lora_B.bias"), "lora_B.bias"
    for part in _PARTS:
        if f".{part}" in path and path[path.index(f".{part}") + 1:].removesuffix(".weight") == part:
            return path[: path.index(f".{part}")], part
    module, _, part = path.rpartition(".")
    for layer in (".token_adapter.base_layer", ".base_layer", ".modules_to_save"):
        module = module.removesuffix(layer)
    return module, part


def _ends(model, modules: dict[str, Any]) -> tuple[str, str]:
    """Names of the input embedding and the head."""
    def name_of(module) -> str:
        return next((name for name, each in modules.items() if each is module), "")

    return name_of(model.get_input_embeddings()), name_of(model.get_output_embeddings())


def _parts(ends: tuple[str, str], changes: dict[str, _Changes], config: dict[str, Any]) -> bool:
    """Whether an adapter makes the two ends of a tied model two tensors.

    A LoRA on one of them does, and so does a module that was trained whole, apart from the other. Trained rows do not
    (peft ties them), nor does an embedding that is in the file because its vocabulary grew.
    """
    trained = [name for name in config.get("modules_to_save") or () if any(_ends_in(end, name) for end in ends)]
    return bool(trained) or any(changes[end].lora for end in ends if end in changes)


def _ends_in(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _follow_embedding(ends: tuple[str, str], changes: dict[str, _Changes]) -> None:
    """A head that stays tied has no change of its own: what an adapter's file says of it, it says of the embedding."""
    embedding, head = ends
    of_head = changes.pop(head, None)
    if of_head is not None:
        changes.setdefault(embedding, of_head)


def prepare_ends(model, adapter_dir: Path, config: dict[str, Any]) -> None:
    """Make the two ends of a loaded base what the adapter needs before peft puts it on: as many rows, and untied.

    peft merges a LoRA on an end of a tied model wrongly (off by 10 to 2,662 with peft 0.21.2), and an embedding that
    grew does not fit.
    """
    import torch

    modules = dict(model.named_modules())
    ends, changes = _ends(model, modules), {}
    for tensor in list_file(adapter_dir / "adapter_model.safetensors"):
        path, part = split_name(tensor.name)
        if ".original_module." in tensor.name:
            continue
        change = changes.setdefault(path, _Changes())
        if part.startswith("lora_"):
            change.lora[part] = tensor
        elif part == "weight":
            change.whole[part] = tensor
    embedding = model.get_input_embeddings()
    sizes = {changes[end].whole["weight"].shape[0] for end in ends if end in changes and changes[end].whole}
    if sizes and sizes != {embedding.weight.shape[0]}:
        model.resize_token_embeddings(max(sizes), mean_resizing=False)
    if model.config.tie_word_embeddings and _parts(ends, changes, config):
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def _targets_of(where: str, path: str, change: _Changes, module, targets: dict[str, Target], config: dict[str, Any],
                is_end: bool) -> Iterator[tuple[str, Target]]:
    """What an adapter does to the parameters of one module."""
    for part, tensor in change.whole.items():
        name = f"{path}.{part}"
        before = targets.get(name)
        if before is None:
            raise ModelError(where, f"holds {name}, which this base does not have", _OTHER_BASE)
        grows = is_end and part == "weight" and tensor.shape[1:] == before.shape[1:]
        if tensor.shape != before.shape and not grows:
            raise ModelError(where, f"is of another base: {tensor.name} is {_size(tensor.shape)} and {name} "
                             f"{_size(before.shape)}", _OTHER_BASE)
        targets[name] = Target(name=name, shape=tensor.shape, source=tensor, before=before.before)
        yield name, targets[name]
    weight = f"{path}.weight"
    if change.lora:
        target = targets.get(weight)
        if target is None or len(target.shape) != 2:
            raise ModelError(where, f"adapts {path}, which is no matrix", "merge it with peft")
        lora = _lora(where, path, change, module, target.shape, config)
        yield weight, Target(name=weight, shape=target.shape, source=target.source, before=target.before, lora=lora)
        if change.lora_bias is not None:
            bias = targets.get(f"{path}.bias")
            if bias is None:
                raise ModelError(where, f"has a bias for {path}, which has none in the base", "train without lora_bias")
            yield bias.name, Target(name=bias.name, shape=bias.shape, source=bias.source, before=bias.before,
                                    bias=(change.lora_bias, lora.scale))
    if change.rows is not None:
        target, numbers = targets[weight], _row_numbers(path, config)
        if change.rows.shape != (len(numbers), target.shape[1]):
            raise ModelError(where, f"is of another base: {change.rows.name} is {_size(change.rows.shape)} for "
                             f"{len(numbers)} rows of {path}, {_size(target.shape)}", _OTHER_BASE)
        if max(numbers) >= target.shape[0]:
            raise ModelError(where, f"trains row {max(numbers)} of {path}, which has {target.shape[0]}", _OTHER_BASE)
        yield weight, Target(name=weight, shape=target.shape, source=target.source, before=target.before,
                             rows=(change.rows, numbers))


def _lora(where: str, path: str, change: _Changes, module, shape: tuple[int, ...], config: dict[str, Any]) -> Lora:
    gone = {"a", "b"} - set(change.lora)
    if gone:
        raise ModelError(where, f"lacks factor {gone.pop().upper()} of {path}", "fetch or train it again")
    # Embeddings and GPT-2's Conv1D hold (in, out); peft corrects a wrong fan_in_fan_out by the layer's kind too.
    transposed = any(kind in type(module).__name__ for kind in ("Conv1D", "Embedding"))
    num_out, num_in = reversed(shape) if transposed else shape
    rank, alpha = (_pattern(config.get(key), path, config[default]) for key, default in (
        ("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
    expected = {"a": (rank, num_in), "b": (num_out, rank), "magnitude": (num_out,)}
    for part, tensor in change.lora.items():
        if tensor.shape != expected[part]:
            raise ModelError(where, f"is of another base: {tensor.name} is {_size(tensor.shape)} and {path} "
                             f"{_size(shape)} at rank {rank}", _OTHER_BASE)
    if bool(config.get("use_dora")) != ("magnitude" in change.lora):
        raise ModelError(where, f"{'lacks' if config.get('use_dora') else 'has'} a DoRA magnitude of {path}, against "
                         "its adapter_config.json", "fetch or train it again")
    return Lora(a=change.lora["a"], b=change.lora["b"], magnitude=change.lora.get("magnitude"), transposed=transposed,
                scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pattern(patterns: dict[str, Any] | None, path: str, default: Any) -> Any:
    """The value of the first pattern that matches, as peft's ``get_pattern_key`` finds it."""
    return next((value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", path)),
                default)


def _row_numbers(path: str, config: dict[str, Any]) -> tuple[int, ...]:
    indices = config.get("trainable_token_indices") or []
    if isinstance(indices, dict):
        indices = next((numbers for name, numbers in indices.items() if _ends_in(path, name)), [])
    return tuple(int(number) for number in indices)


def _vocabulary(where: str, ends: tuple[str, str], targets: dict[str, Target]) -> int | None:
    """Rows of both ends where the adapter changed their number, else None."""
    sizes = {end: targets[f"{end}.weight"].shape[0] for end in ends if f"{end}.weight" in targets}
    if len(set(sizes.values())) > 1:
        raise ModelError(where, "changes the vocabulary of one end of the model and not of the other: "
                         + ", ".join(f"{end} has {size}" for end, size in sizes.items()),
                         "save both ends in it (save_embedding_layers=True)")
    before = targets[f"{ends[0]}.weight"].before
    size = next(iter(sizes.values()))
    return size if before is not None and before.shape[0] != size else None


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a number"


# ---- the values -------------------------------------------------------------------------


class Values:
    """The values of a plan's tensors in fp32, in row blocks: before the merge and after it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._reader, self._of_adapter = Reader(), Reader()
        self._held: tuple[str, Any] = ("", None)

    def __enter__(self) -> Values:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()
        self._of_adapter.close()
        self._held = ("", None)

    def before(self, target: Target, first: int, last: int):
        """Rows of the base in fp32; zeros for rows that the base does not have."""
        import torch

        num_rows = target.before.shape[0] if target.before is not None and target.before.shape else 0
        if target.before is None or not target.before.shape:
            return self._read(target.before, 0, 1) if target.before is not None else torch.zeros(target.shape)
        rows = self._read(target.before, min(first, num_rows), min(last, num_rows))
        missing = last - max(first, num_rows)
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing > 0 else rows

    def after(self, target: Target, first: int, last: int):
        """The same rows merged, in fp32."""
        block = self._read(target.source, first, last)
        if target.lora is not None:
            block = self._with_lora(target, target.lora, block, first, last)
        if target.bias is not None:
            bias, scale = target.bias
            block = block + scale * self._of_adapter.whole(bias).float()[first:last]
        if target.rows is not None:
            block, rows = block.clone(), self._of_adapter.whole(target.rows[0]).float()
            for place, number in enumerate(target.rows[1]):
                if first <= number < last:
                    block[number - first] = rows[place]
        return block

    def _read(self, stored: Stored, first: int, last: int):
        return self._reader.rows(stored, first, last).float()

    def _factors(self, target: Target, lora: Lora):
        """A (R, I), B (O, R) and what DoRA multiplies each output by (O,), of one module at a time."""
        if self._held[0] != target.name:
            a_RI, b_OR = (self._of_adapter.whole(factor).float() for factor in (lora.a, lora.b))
            self._held = (target.name, None)  # the last module's go before this one's norms are taken
            factor_O = None
            if lora.magnitude is not None and lora.transposed:
                factor_O = self._of_adapter.whole(lora.magnitude).float() / self._column_norms(target, lora, a_RI, b_OR)
            self._held = (target.name, (a_RI, b_OR, factor_O))
        return self._held[1]

    def _column_norms(self, target: Target, lora: Lora, a_RI, b_OR):
        """Norm of each output's weights (O,) where outputs are columns: over all row blocks, in float64."""
        import torch

        squares_O = torch.zeros(target.shape[1], dtype=torch.float64)
        for first, last in blocks(target.shape):
            block = self._read(target.source, first, last) + _delta(lora, a_RI, b_OR, first, last)
            squares_O += block.double().square_().sum(dim=0)
        return squares_O.sqrt_().float()

    def _with_lora(self, target: Target, lora: Lora, block_N, first: int, last: int):
        import torch

        a_RI, b_OR, factor_O = self._factors(target, lora)
        block_N = block_N + _delta(lora, a_RI, b_OR, first, last)
        if lora.magnitude is None:
            return block_N
        if lora.transposed:
            return block_N * factor_O
        magnitude_N = self._of_adapter.whole(lora.magnitude).float()[first:last]
        return block_N * (magnitude_N / torch.linalg.norm(block_N, dim=1)).view(-1, 1)


def _delta(lora: Lora, a_RI, b_OR, first: int, last: int):
    """Rows ``first`` to ``last`` of ``scale * B A`` as the weight is stored."""
    delta = a_RI[:, first:last].T @ b_OR.T if lora.transposed else b_OR[first:last] @ a_RI
    return delta.mul_(lora.scale)


def write_merged(plan: Plan, out_dir: Path, dtype: str) -> dict[str, str]:
    """Write the merged weights to ``out_dir``, cast once to ``dtype``, file after file; returns the SHA-256 of each.

    Raises:
        ModelError: a value does not fit into ``dtype``.
        OSError: a file cannot be written.
    """
    import torch

    kind, total, hashes = torch_dtype(dtype), 0, {}
    with Values(plan) as values:
        def pieces(entry: Entry) -> Iterator[Any]:
            target = plan.targets[entry.name]
            if not target.is_float:
                yield values._reader.whole(target.source)
                return
            for first, last in blocks(target.shape, BLOCK_ELEMENTS):
                block = values.after(target, first, last).to(kind)
                if not torch.isfinite(block).all():
                    raise ModelError(f"merge.dtype: {dtype}", f"{entry.name} does not fit into it (infinite after the "
                                     "cast)", "set merge.dtype: bf16")
                yield block

        for file in sorted(set(plan.file_of.values())):
            entries = [Entry(name=name, shape=target.shape, kind=_KIND_OF[dtype] if target.is_float
                             else target.source.kind)
                       for name, target in plan.targets.items() if plan.file_of[name] == file]
            hashes[file] = write_file(out_dir / file, entries, pieces)
            total += (out_dir / file).stat().st_size
    if len(set(plan.file_of.values())) > 1:
        write_index(out_dir, plan.file_of, total)
    return hashes
