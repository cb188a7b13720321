"""QLoRA's base as training saw it: packed into 4 or 8 bits by bitsandbytes and unpacked again, as a plain folder.

An adapter that was trained on a quantized base has learnt to live with its rounding. Merged into the 16-bit base it
meets other weights than it was trained on, and merged into the unpacked ones it carries the rounding along: which is
better is for the held-out rows to say. Reads the base; writes a folder in Hugging Face layout, in bf16, which is what
bitsandbytes unpacks to while training computes in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kit import isolate
from lora_kit.model import load_base
from lora_kit.model_files import copy_tokenizer, save_weights
from lora_kit.types import Artifact

KEPT = "16-bit base"


def write_unpacked(base_dir: str, load_in: str, out_dir: str) -> None:
    """Write the base in ``base_dir``, quantized as training loads it and unpacked; to be called in a fresh process."""
    import torch
    from peft.utils.integrations import dequantize_module_weight

    base, out = Path(base_dir), Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    packed, plain = load_base(base, dtype="bf16", device=device, load_in=load_in), load_base(base, dtype="bf16")
    with torch.no_grad():
        for name, module in packed.named_modules():
            if "Linear4bit" in type(module).__name__ or "Linear8bit" in type(module).__name__:
                plain.get_submodule(name).weight.copy_(dequantize_module_weight(module).to("cpu", torch.bfloat16))
    save_weights(plain, base, out)
    copy_tokenizer(base, out)


def choose_base(base: Artifact, adapter: Artifact, load_in: str, rows: list[dict[str, Any]], scratch: Path
                ) -> tuple[str, list[dict[str, Any]]]:
    """The folder to merge into, and what both candidates scored.

    Args:
        rows: what they are scored on: the mean loss of the answers of base and adapter, unmerged.
        scratch: where the unpacked base goes; the caller removes it.

    Returns:
        (folder, candidates): of each candidate ``base`` (in words), ``loss`` in nats per answer token, ``num_tokens``
        and ``chosen``.
    """
    isolate.call("lora_kit.quantized_base:write_unpacked", {
        "base_dir": base.path, "load_in": load_in, "out_dir": str(scratch)})
    any_answer = any(any(row["trained"][1:]) for row in rows)
    num_tokens = sum(sum(row["trained"][1:]) if any_answer else len(row["tokens"]) - 1 for row in rows)
    candidates = []
    for folder, words in ((base.path, KEPT), (str(scratch), f"{load_in.replace('bit', '-bit')} base, unpacked")):
        tuned = Artifact(name="adapter", path=adapter.path, kind="adapter", base=folder, tokenizer=adapter.tokenizer,
                         size_bytes=base.size_bytes)
        losses = isolate.call("lora_kit.certificate:answer_losses", {"artifact": tuned.as_dict(), "rows": rows}).value
        candidates.append({"folder": folder, "base": words, "loss": sum(losses) / num_tokens, "num_tokens": num_tokens})
    best = min(candidates, key=lambda each: each["loss"])
    return best["folder"], [{**{key: each[key] for key in ("base", "loss", "num_tokens")}, "chosen": each is best}
                            for each in candidates]

