"""GGUF: one file that llama.cpp and what is built on it read.

The ``gguf`` package packs and writes; this file says which tensor is called what, how the
rotary halves of the queries and keys are laid out, and what the tokenizer is. Only what was
proven against llama.cpp's own logits and token ids is written (tests/quantizers/test_gguf.py);
everything else is refused by name. Tensors are read, packed and written one at a time.

Types of 6 bits and fewer are made by llama.cpp itself (llama-cpp-python, an extra) out of a file in 16 bits, with an
importance matrix: the mean square of what each weight is multiplied with on training rows of the run, so that rounding
goes where it matters least. A matrix whose rows are no multiple of 256 falls back to an older type of llama.cpp's.

Reads the merged folder; writes ``model.gguf``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.chat import load_tokenizer
from lora_kit.errors import MachineError, ModelError, RecipeError
from lora_kit.hardware import usable_cores
from lora_kit.model import load_base, read_config

KIND = "gguf"
TYPES = {
    "q8_0": "8-bit weights in blocks of 32 with one fp16 scale each: 8.5 bits per weight",
    "bf16": "16-bit weights, bfloat16",
    "f16": "16-bit weights, half precision",
    "q6_k": "6-bit weights in blocks of 256: 6.56 bits per weight",
    "q5_k_m": "5-bit weights in blocks of 256, some tensors in 6: about 5.7 bits per weight",
    "q4_k_m": "4-bit weights in blocks of 256, some tensors in 6: about 4.9 bits per weight",
}
_MADE_BY_LLAMA_CPP = {"q6_k": "MOSTLY_Q6_K", "q5_k_m": "MOSTLY_Q5_K_M", "q4_k_m": "MOSTLY_Q4_K_M"}
_SUPER_BLOCK = 256
FILE_NAME = "model.gguf"
_OTHERWISE = "leave out the gguf form, or convert the merged folder with llama.cpp's own convert_hf_to_gguf.py"


@dataclass(frozen=True, kw_only=True)
class _Architecture:
    """How a transformers architecture is called in GGUF, and whether its q and k rows are interleaved there.

    llama.cpp rotates neighbouring pairs in ``llama`` and the two halves, as transformers does, in ``qwen*``.
    """

    name: str
    interleaved: bool


_ARCHITECTURES = {
    "LlamaForCausalLM": _Architecture(name="llama", interleaved=True),
    "Qwen2ForCausalLM": _Architecture(name="qwen2", interleaved=False),
    "Qwen3ForCausalLM": _Architecture(name="qwen3", interleaved=False),
}

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_SPLIT_PATTERNS = {
    _CONTRACTIONS + "\\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + "\\p{N}" + _REST: "qwen2",
}


def missing(type: str | None = None) -> str | None:
    """None when what ``type`` needs is installed, else the command that installs it."""
    from importlib.util import find_spec

    if type in _MADE_BY_LLAMA_CPP and not find_spec("llama_cpp"):
        return 'pip install "lora-kit[llamacpp]"'
    return None if find_spec("gguf") else "pip install gguf"


def check(config: dict[str, Any], type: str) -> None:
    """Raise when a model of this config.json cannot become a GGUF file of ``type``.

    Raises:
        RecipeError: there is no such type.
        ModelError: the architecture, or something that it uses, is not written by lora-kit.
    """
    if type not in TYPES:
        raise RecipeError("quantize.type", f"'{type}' is not a type of gguf", f"there are: {', '.join(TYPES)}")
    name = (config.get("architectures") or ["unknown"])[0]
    if name not in _ARCHITECTURES:
        raise ModelError("quantize gguf", f"architecture {name} is not written by lora-kit (it writes "
                         f"{', '.join(_ARCHITECTURES)})", _OTHERWISE)
    refused = [
        (config.get("quantization_config"), "a model that is quantized already"),
        (config.get("hidden_act", "silu") != "silu", f"activation {config.get('hidden_act')}"),
        (config.get("mlp_bias"), "mlp_bias"),
        (config.get("attention_bias"), "attention_bias"),
        (config.get("use_sliding_window"), "sliding-window attention"),
        (_rope(config)["type"] not in ("default", "llama3"), f"rope type {_rope(config)['type']}"),
        (_rope(config).get("partial_rotary_factor", 1.0) != 1.0, "partial rotary embedding"),
    ]
    for found, what in refused:
        if found:
            raise ModelError("quantize gguf", f"{what} is not written by lora-kit", _OTHERWISE)


def quantize(merged_dir: Path, out_dir: Path, type: str, rows: Sequence[Sequence[int]] = ()) -> str:
    """Write the model in ``merged_dir`` as ``out_dir/model.gguf``; returns what is to be known of it.

    Norms and biases stay fp32; a matrix whose rows are no multiple of the block size becomes fp16.

    Args:
        rows: token ids of training rows, for the importance matrix of a type that has one; without rows it has none.

    Raises:
        MachineError: llama.cpp could not make the file.
    """
    if type not in _MADE_BY_LLAMA_CPP:
        _write(merged_dir, out_dir / FILE_NAME, type)
        return ""
    plain, stored = out_dir / ".plain.gguf", read_config(merged_dir).get("dtype")
    try:
        _write(merged_dir, plain, {"float16": "f16", "float32": "f32"}.get(stored, "bf16"))
        importance = _importance(merged_dir, rows) if rows else {}
        _quantize_with_llama_cpp(plain, out_dir / FILE_NAME, type, importance)
    finally:
        plain.unlink(missing_ok=True)
    return _notes(out_dir / FILE_NAME, type, importance, rows)


def _quantize_with_llama_cpp(source: Path, target: Path, type: str, importance: dict[str, np.ndarray]) -> None:
    import ctypes

    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(_file_type(type))
    params.nthread = int(os.environ.get("OMP_NUM_THREADS") or usable_cores())
    arrays = {name: np.ascontiguousarray(values, np.float32) for name, values in importance.items()}
    if arrays:
        entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()  # the last one, empty, ends the list
        for entry, (name, values) in zip(entries, arrays.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        params.imatrix = ctypes.cast(entries, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    _silence(llama_cpp)
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if code != 0:
        raise MachineError(f"quantize gguf {type}", f"llama.cpp failed with code {code}",
                           "free disk space, or leave out the form")


_no_log: Any = None


def _silence(llama_cpp) -> None:
    """llama.cpp logs every tensor: a callback that drops it, which must live as long as llama.cpp may call it."""
    import ctypes

    global _no_log
    if _no_log is None:
        _no_log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(_no_log, ctypes.c_void_p(0))


def _importance(merged_dir: Path, rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """By GGUF name of a matrix: mean square of each of its inputs over the tokens of ``rows``."""
    import gguf
    import torch

    config = read_config(merged_dir)
    names = gguf.get_tensor_name_map(_model_arch(_ARCHITECTURES[config["architectures"][0]]),
                                     config["num_hidden_layers"])
    model, sums = load_base(merged_dir, dtype="bf16"), {}

    def watch(name: str, module) -> None:
        def add(_module, inputs) -> None:
            squares_I = inputs[0].detach().float().square().flatten(0, -2).sum(0)
            sums[name] = sums[name] + squares_I if name in sums else squares_I

        module.register_forward_pre_hook(add)

    head = model.get_output_embeddings()
    for path, module in model.named_modules():
        name = names.get_name(f"{path}.weight", try_suffixes=(".weight",))
        if isinstance(module, torch.nn.Linear) and name and not (module is head and config.get("tie_word_embeddings")):
            watch(name, module)
    with torch.inference_mode():
        for row in rows:
            model(input_ids=torch.tensor([list(row)]), use_cache=False, logits_to_keep=1)
    num_tokens = sum(map(len, rows))
    return {name: (sums_I / num_tokens).numpy() for name, sums_I in sums.items() if name != "output.weight"}


def _notes(path: Path, type: str, importance: dict[str, np.ndarray], rows: Sequence[Sequence[int]]) -> str:
    import gguf

    fallen = [tensor.name for tensor in gguf.GGUFReader(str(path)).tensors
              if len(tensor.shape) > 1 and tensor.shape[0] % _SUPER_BLOCK]
    notes = [f"importance matrix of {sum(map(len, rows))} training tokens" if importance else "no importance matrix"]
    if fallen:
        notes.append(f"{len(fallen)} matrices whose rows are no multiple of {_SUPER_BLOCK} fell back to older types, "
                     f"so that size and KL say little about {type} in other models")
    return "; ".join(notes)


def _file_type(type: str):
    import gguf

    names = {"q8_0": "MOSTLY_Q8_0", "bf16": "MOSTLY_BF16", "f16": "MOSTLY_F16", "f32": "ALL_F32", **_MADE_BY_LLAMA_CPP}
    return gguf.LlamaFileType[names[type]]


def _write(merged_dir: Path, path: Path, type: str) -> None:
    import gguf

    config = read_config(merged_dir)
    check(config, "bf16")
    architecture = _ARCHITECTURES[config["architectures"][0]]
    writer = gguf.GGUFWriter(path, architecture.name)
    _add_hyperparameters(writer, config, type)
    _add_tokenizer(writer, merged_dir, config["vocab_size"])
    tensors = _plan(merged_dir, config, architecture, gguf.GGMLQuantizationType[type.upper()])
    factors_D = _rope_factors(config)
    if factors_D is not None:
        writer.add_tensor_info("rope_freqs.weight", factors_D.shape, factors_D.dtype, factors_D.nbytes)
    for tensor in tensors:
        packed = gguf.quants.quant_shape_to_byte_shape(tensor.shape, tensor.kind)
        if tensor.kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            writer.add_tensor_info(tensor.name, tensor.shape, tensor.numpy_dtype, int(np.prod(packed)))
        else:
            writer.add_tensor_info(tensor.name, packed, np.dtype(np.uint8), int(np.prod(packed)), tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors_D is not None:
        writer.write_tensor_data(factors_D)
    for tensor in tensors:
        writer.write_tensor_data(gguf.quants.quantize(tensor.read(), tensor.kind))
    writer.close()


def reader(path: Path, plan):
    """Rows of the tensors of a GGUF file in fp32, under transformers' names and in its order of rows.

    Args:
        plan: the merge that the file's model came from; its config says the architecture.

    Returns:
        What :func:`lora_kit.delta.measure` reads by: (target, first, last) to a tensor, or None where there is none.
    """
    import gguf
    import torch

    config = plan.config
    architecture = _ARCHITECTURES[config["architectures"][0]]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    names = gguf.get_tensor_name_map(_model_arch(architecture), config["num_hidden_layers"])
    heads, held = _num_heads(config), {}

    def read(target, first: int, last: int):
        if target.name not in held:
            held.clear()
            held[target.name] = None
            tensor = tensors.get(names.get_name(target.name, try_suffixes=(".weight", ".bias")) or "")
            if tensor is not None:
                rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
                module = target.name.rsplit(".", 2)[-2]
                if architecture.interleaved and module in heads:
                    rows = part_rotary_rows(rows, heads[module])
                held[target.name] = torch.from_numpy(np.array(rows))
        found = held[target.name]
        return None if found is None or tuple(found.shape) != target.shape else found[first:last]

    return read


def _num_heads(config: dict[str, Any]) -> dict[str, int]:
    num_heads = config["num_attention_heads"]
    return {"q_proj": num_heads, "k_proj": config.get("num_key_value_heads") or num_heads}


@dataclass(frozen=True, kw_only=True)
class _Tensor:
    """One tensor to write: where it is read from, what it becomes. ``num_heads``: rows to interleave, or None."""

    name: str
    file: Path
    source: str
    shape: tuple[int, ...]
    kind: Any
    num_heads: int | None

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(np.float32 if self.kind.name == "F32" else np.float16)

    def read(self) -> np.ndarray:
        """The tensor in fp32, its rows in GGUF's order."""
        from safetensors import safe_open

        with safe_open(self.file, framework="pt") as file:
            weights = file.get_tensor(self.source).float().numpy()
        return weights if self.num_heads is None else interleave_rotary_rows(weights, self.num_heads)


def interleave_rotary_rows(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows (heads, 2 halves, D/2) to (heads, D/2, pairs): from transformers' rotary layout to llama.cpp's."""
    rows, rest = weights.shape[0], weights.shape[1:]
    parted = weights.reshape(num_heads, 2, rows // num_heads // 2, *rest)
    return np.ascontiguousarray(parted.swapaxes(1, 2).reshape(weights.shape))


def part_rotary_rows(weights: np.ndarray, num_heads: int) -> np.ndarray:
    """The other way round: from llama.cpp's rotary layout to transformers'."""
    rows, rest = weights.shape[0], weights.shape[1:]
    paired = weights.reshape(num_heads, rows // num_heads // 2, 2, *rest)
    return np.ascontiguousarray(paired.swapaxes(1, 2).reshape(weights.shape))


def _plan(merged_dir: Path, config: dict[str, Any], architecture: _Architecture, kind) -> list[_Tensor]:
    import gguf
    from safetensors import safe_open

    names = gguf.get_tensor_name_map(_model_arch(architecture), config["num_hidden_layers"])
    heads = _num_heads(config)
    planned = []
    for path in sorted(merged_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for source in file.keys():  # noqa: SIM118 - safe_open has no __iter__
                if source == "lm_head.weight" and config.get("tie_word_embeddings"):
                    continue
                name = names.get_name(source, try_suffixes=(".weight", ".bias"))
                if name is None:
                    raise ModelError("quantize gguf", f"tensor {source} has no place in a {architecture.name} GGUF "
                                     "file", _OTHERWISE)
                shape = tuple(file.get_slice(source).get_shape())
                module = source.rsplit(".", 2)[-2]
                planned.append(_Tensor(
                    name=name, file=path, source=source, shape=shape, kind=_kind_of(shape, kind),
                    num_heads=heads.get(module) if architecture.interleaved else None,
                ))
    return planned


def _kind_of(shape: tuple[int, ...], kind):
    import gguf

    if len(shape) == 1:
        return gguf.GGMLQuantizationType.F32
    block_size = gguf.GGML_QUANT_SIZES[kind][0]
    return kind if shape[-1] % block_size == 0 else gguf.GGMLQuantizationType.F16


def _model_arch(architecture: _Architecture):
    import gguf

    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)


def _add_hyperparameters(writer, config: dict[str, Any], type: str) -> None:
    import gguf

    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    writer.add_type("model")
    writer.add_name("merged by lora-kit")
    writer.add_file_type(_file_type(type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or num_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(_rope(config)["theta"])
    writer.add_vocab_size(config["vocab_size"])


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings of config.json, of transformers 5 (rope_parameters) and of earlier ones."""
    fields = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    return {**fields, "type": fields.get("rope_type") or fields.get("type") or "default",
            "theta": float(fields.get("rope_theta") or config.get("rope_theta") or 10000.0)}


def _rope_factors(config: dict[str, Any]) -> np.ndarray | None:
    """What llama.cpp divides each rotary frequency by (D/2,), for Llama 3.1's rope type; None for the plain one.

    Source: transformers' ``_compute_llama3_parameters``.
    """
    rope = _rope(config)
    if rope["type"] != "llama3":
        return None
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    wavelengths_D = 2 * np.pi * rope["theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    context = rope["original_max_position_embeddings"]
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth_D = np.clip((context / wavelengths_D - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth_D) / factor + smooth_D)).astype(np.float32)


def _add_tokenizer(writer, folder: Path, vocab_size: int) -> None:
    tokenizer = load_tokenizer(folder)
    if not tokenizer.is_fast:
        raise ModelError("quantize gguf", "the tokenizer has no tokenizer.json", _OTHERWISE)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    kept_path = folder / "gguf_tokenizer.json"
    kept = json.loads(kept_path.read_text(encoding="utf-8")) if kept_path.exists() else {}
    if spec["model"]["type"] != "BPE" or spec["model"].get("byte_fallback") or kept.get(
            "tokenizer.ggml.model", "gpt2") != "gpt2":
        raise ModelError("quantize gguf", "only byte-level BPE tokenizers are written by lora-kit", _OTHERWISE)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kept.get("tokenizer.ggml.pre") or pre_tokenizer_name(spec))
    tokens, types = _tokens(tokenizer, spec, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    # llama.cpp refuses a file without merges. This one never applies: words start as single characters.
    writer.add_token_merges(merges or [f"{tokens[0]} {tokens[0]}"])
    for name, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id),
                      ("unk", writer.add_unk_token_id), ("pad", writer.add_pad_token_id)):
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is not None:
            add(token_id)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(kept.get("tokenizer.ggml.add_bos_token", first == [tokenizer.bos_token_id]))
    writer.add_add_eos_token(kept.get("tokenizer.ggml.add_eos_token", False))
    writer.add_add_space_prefix(kept.get("tokenizer.ggml.add_space_prefix", False))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(tokenizer, spec: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Token texts and types of all ``vocab_size`` rows of the embedding; rows without a token are unused ones."""
    import gguf

    kinds = {added["id"]: gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
             for added in spec["added_tokens"]}
    text_of = {token_id: text for text, token_id in tokenizer.get_vocab().items()}
    if max(text_of) >= vocab_size:
        raise ModelError("quantize gguf", f"the tokenizer has token {max(text_of)} and the embedding {vocab_size} rows",
                         "use the tokenizer that the model was trained with")
    tokens = [text_of.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [kinds.get(i, gguf.TokenType.NORMAL if i in text_of else gguf.TokenType.UNUSED) for i in range(vocab_size)]
    return tokens, [int(kind) for kind in types]


def pre_tokenizer_name(spec: dict[str, Any]) -> str:
    """llama.cpp's name for how this tokenizer.json cuts text before BPE.

    Raises:
        ModelError: it is cut in a way that lora-kit has not proven; a wrong name tokenizes wrongly in silence.
    """
    parts = _flat(spec.get("pre_tokenizer"))
    kinds = [part["type"] for part in parts]
    byte_level = parts[-1] if kinds and kinds[-1] == "ByteLevel" and not parts[-1].get("add_prefix_space") else None
    if byte_level is not None:
        own_regex, plain = byte_level.get("use_regex", True), spec.get("normalizer") is None
        if kinds == ["ByteLevel"] and own_regex and plain:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and own_regex and plain and parts[0]["individual_digits"]:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not own_regex and parts[0]["behavior"] == "Isolated":
            name = _SPLIT_PATTERNS.get(parts[0]["pattern"].get("Regex"))
            if name is not None and (name == "llama-bpe") == bool(spec["model"].get("ignore_merges")):
                return name
    raise ModelError("quantize gguf", f"pre-tokenizer {' + '.join(kinds) or 'none'} of this tokenizer is not known to "
                     "lora-kit (it knows those of gpt-2, smollm, llama-bpe and qwen2)", _OTHERWISE)


def _flat(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part["pretokenizers"] if part["type"] == "Sequence" else [part]
