"""The base model: found, converted, loaded, described.

A GGUF base becomes, once, a plain bf16 safetensors checkpoint in the cache; training,
merging and measuring all start from that folder. transformers and bitsandbytes load the
base; ``adapter.py`` puts an adapter on it. Weights are safetensors only, remote code is refused.

Reads model folders; writes converted bases to the cache.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from lora_kit import isolate, sources, stopwatch
from lora_kit.chat import load_tokenizer, template_text
from lora_kit.errors import DataError, MachineError, ModelError, RefusedError
from lora_kit.events import Note, tell
from lora_kit.recipe import ModelSection
from lora_kit.types import Artifact

_CONVERSION = "v2"
_MODES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def torch_dtype(name: str):
    """torch's dtype for ``fp32``, ``bf16`` or ``fp16``."""
    import torch

    return getattr(torch, _MODES[name])


def find_base(section: ModelSection, relative_to: Path) -> dict[str, Any]:
    """The base as a local folder in Hugging Face layout, converted or downloaded when it has to be.

    Returns:
        JSON values for lock.json: ``reference``, ``revision``, ``sha256`` (of the .gguf file, or over config and
        weights of a local folder), ``artifact`` (Artifact fields), and ``content`` (SHA-256 of what tokenization
        depends on: tokenizer files and template).

    Raises:
        ModelError, MachineError, RefusedError, RecipeError: see :mod:`lora_kit.sources`.
    """
    try:
        resolved = sources.resolve(section.base, sha256=section.sha256, relative_to=relative_to)
    except DataError as error:
        raise ModelError(error.where, error.what, error.todo) from None
    folder, sha256 = resolved.path, resolved.sha256
    if folder.is_file():
        if folder.suffix != ".gguf":
            raise ModelError(section.base, "is a file but not a .gguf", "name a model folder or a .gguf file")
        folder = _converted_gguf(folder, sha256)
    config = read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise RefusedError(str(folder), "has no safetensors weights, and pickled ones are not loaded",
                           "save it with save_pretrained")
    if config.get("quantization_config"):
        raise ModelError(section.base, "is quantized already, and a merge into it would lose the adapter",
                         "name the 16-bit model and set model.load_in")
    if sha256 is None and resolved.revision is None:
        sha256 = _weights_sha256(folder)
    tokenizer = _tokenizer_folder(section, folder, relative_to)
    artifact = Artifact(name="base", path=str(folder), kind="hf", tokenizer=str(tokenizer),
                        size_bytes=weight_bytes(folder))
    return {"reference": section.base, "revision": resolved.revision, "sha256": sha256,
            "artifact": artifact.as_dict(), "content": tokenizer_sha256(tokenizer)}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        ModelError: there is none.
        RefusedError: it is not whole.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / "adapter_config.json").exists():
            raise ModelError(str(folder), "is an adapter, not a model", "name the base, and the adapter in "
                             "train.from_adapter") from None
        raise ModelError(str(folder), "has no config.json", "name a folder in Hugging Face layout") from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise RefusedError(str(path), "is not a JSON object", "download the model again")
    return config


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in ``folder``."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _weights_sha256(folder: Path) -> str:
    """One hash over config.json and the safetensors files; a model that changes in place opens a new run."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(f"{path.name}\0{sources.remembered_sha256(path)}\n".encode())
    return digest.hexdigest()


def tokenizer_sha256(folder: Path) -> str:
    """One hash over the tokenizer files and the template in ``folder``."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt",
                 "chat_template.jinja", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            digest.update(f"{name}\0{sources.file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()


def _converted_gguf(gguf_file: Path, sha256: str) -> Path:
    folder = sources.cache_dir() / "models" / f"{sha256[:24]}-{_CONVERSION}"
    if not folder.exists():
        tell(Note(text=f"converting {gguf_file.name} to a bf16 checkpoint, once"))
        with sources.new_cache_folder(folder) as scratch:
            isolate.call("lora_kit.model:convert_gguf", {"gguf_file": str(gguf_file), "out_dir": str(scratch)})
    return folder


def convert_gguf(gguf_file: str, out_dir: str) -> None:
    """Write the model in ``gguf_file`` to ``out_dir`` as a plain bf16 checkpoint with its tokenizer.

    transformers refuses to save a model that it read from GGUF, so the weights move into a fresh model of the
    same configuration (bit-exact, measured with transformers 5.23). What GGUF says of the tokenizer and
    transformers does not keep goes into ``gguf_tokenizer.json``, for exporting to GGUF again.
    """
    quiet_libraries()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(gguf_file)
    fields, tensor_names = _read_gguf(path)
    if "rope_freqs.weight" in tensor_names:
        # transformers 5.23 does not read these factors (Llama 3.1 and later), and would rotate wrongly in silence.
        raise ModelError(path.name, "scales its rotary frequencies in a tensor that transformers does not read",
                         "use the model's safetensors release")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        config = AutoConfig.from_pretrained(**where)
        # fp32 and then one cast: asked for bf16, transformers 5.23 keeps the weights packed and warns.
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    except (ValueError, KeyError, IndexError, NotImplementedError, OSError) as error:
        raise ModelError(path.name, f"transformers cannot read this GGUF file ({short(error)})",
                         "fetch the file again, or use the model's safetensors release") from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(out_dir)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if fields.get("tokenizer.ggml.pre") == "smollm":
        # SmolLM splits numbers into digits, which transformers' GGUF reader leaves out (measured against
        # llama.cpp: 3 of 1,481 texts differ without it, none with it).
        from tokenizers import pre_tokenizers

        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        )
    tokenizer.save_pretrained(out_dir)
    (Path(out_dir) / "gguf_tokenizer.json").write_text(json.dumps(fields, indent=1))


def _read_gguf(path: Path) -> tuple[dict[str, Any], set[str]]:
    """What a GGUF file says of its tokenizer beyond what transformers keeps, and the names of its tensors."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(path))
    except (ValueError, IndexError, OSError) as error:
        raise RefusedError(path.name, f"is not a whole GGUF file ({error})", "download it again") from None
    wanted = ("model", "pre", "add_bos_token", "add_eos_token", "add_space_prefix")
    names = [f"tokenizer.ggml.{name}" for name in wanted]
    fields = {name: reader.fields[name].contents() for name in names if name in reader.fields}
    return fields, {tensor.name for tensor in reader.tensors}


def _tokenizer_folder(section: ModelSection, folder: Path, relative_to: Path) -> Path:
    """The base's own folder, or a cached copy of its tokenizer with the recipe's template."""
    if section.template is None:
        return folder
    text = template_text(section.template, relative_to)
    key = hashlib.sha256((text + tokenizer_sha256(folder)).encode()).hexdigest()[:24]
    target = sources.cache_dir() / "tokenizers" / key
    if not target.exists():
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = text
        with sources.new_cache_folder(target) as scratch:
            tokenizer.save_pretrained(scratch)
            if (folder / "gguf_tokenizer.json").exists():
                shutil.copy(folder / "gguf_tokenizer.json", scratch)
    return target


@stopwatch.part("model")
def load_base(folder: Path | str, *, dtype: str, device="cpu", load_in: str = "16bit", attention: str = "sdpa"):
    """The causal LM in ``folder`` on ``device``, in eval mode.

    Args:
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        load_in: ``16bit``, or ``8bit`` / ``4bit`` through bitsandbytes (nf4 with double quantization).

    Raises:
        ModelError: it does not load, or lacks tensors (transformers would draw them at random).
        RefusedError: its weights are cut off or broken.
        MachineError: there is not enough memory, or an attention implementation is not installed.
    """
    with stopwatch.importing():
        quiet_libraries()
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": torch_dtype(dtype), "attn_implementation": attention,
                               "local_files_only": True, "trust_remote_code": False, "use_safetensors": True,
                               "output_loading_info": True, "ignore_mismatched_sizes": True}  # told below, by name
    if load_in != "16bit":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_in == "8bit", load_in_4bit=load_in == "4bit", bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch_dtype(dtype),
        )
        options["device_map"] = {"": str(device)}
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(str(folder), **options)
    except ImportError as error:
        raise MachineError("model.attention", f"{attention} cannot be used ({short(error)})",
                           "set model.attention: sdpa") from None
    except SafetensorError as error:
        raise RefusedError(str(folder), f"its weights are not whole ({short(error)})",
                           "fetch the model again") from None
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if "out of memory" in str(error).lower() or "allocate memory" in str(error):
            raise MachineError(str(folder), f"does not fit into memory ({short(error)})",
                               "set model.load_in: 4bit, or name a smaller model") from None
        raise ModelError(str(folder), f"does not load ({short(error)})", "check the model") from None
    not_read = [*loaded["missing_keys"], *(key[0] for key in loaded["mismatched_keys"])]
    if not_read:
        raise ModelError(str(folder), f"{len(not_read)} of its tensors are missing or not of the size that config.json "
                         f"says, the first is {min(not_read)}", "fetch the model again")
    if load_in == "16bit":
        model = model.to(device)
    else:
        from lora_kit.bnb_mend import keep_4bit_weights_intact

        keep_4bit_weights_intact(model)
    return model.eval()


def short(error: Exception) -> str:
    """A library's message as one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


def quiet_libraries() -> None:
    """transformers' own progress bars and advice, and those of what it imports, out of the way of ours."""
    import logging
    import warnings

    from transformers.utils import logging as hf_logging

    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # Where torchao is installed, transformers imports it, and torchao 0.18 tells of its CUDA libraries that do not load
    # on this machine and, through torch, of enums that it registers.
    for told in ("torchao", "torch.utils._pytree"):
        logging.getLogger(told).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    # peft 0.21 reads a name that transformers 5.23 deprecated; goes with a newer peft.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
