"""Run an artifact with transformers.

Serves folders in Hugging Face layout (those that bitsandbytes quantized too), a base with a
PEFT adapter on it, unmerged, and a GGUF file whose weights are dequantized when it is read.

Shape suffixes: B prompts, T tokens, V vocabulary. Reads model folders; writes nothing.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.adapter import load_adapter
from lora_kit.bnb_mend import keep_4bit_weights_intact
from lora_kit.chat import load_tokenizer, stop_token_ids
from lora_kit.engines import Engine, configured_stop_ids
from lora_kit.errors import ModelError
from lora_kit.model import load_base, read_config, torch_dtype
from lora_kit.types import Artifact, Generation

BATCH_SIZE = 8
"""Prompts that are answered together; more of them come in several batches, in order of length."""
_NAME_OF_STORED = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def missing() -> str | None:
    """None: transformers is one of lora-kit's own requirements."""
    return None


def load(artifact: Artifact, *, dtype: str = "auto", threads: int | None = None, device: str | None = None) -> HfEngine:
    """``artifact`` as a transformers model in eval mode.

    Raises:
        ModelError: it is missing or does not load.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    folder = Path(artifact.base if artifact.kind == "adapter" else artifact.path)
    if artifact.kind == "gguf":
        dtype = "fp32" if dtype == "auto" else dtype
        model = _load_gguf(folder, dtype).to(device).eval()
        source = f"transformers {dtype}, dequantized"
    else:
        method = (read_config(folder).get("quantization_config") or {}).get("quant_method")
        dtype = stored_dtype(folder) if dtype == "auto" else dtype
        model = _load_quantized(folder, dtype, device) if method else load_base(folder, dtype=dtype, device=device)
        if artifact.kind == "adapter":
            model = load_adapter(model, artifact.path)
        source = f"transformers {dtype}" + (f", {method}" if method else "")
    if artifact.kind == "gguf" and artifact.tokenizer is None:
        raise ModelError(artifact.path, "names no tokenizer folder", "name the folder of the model it was made from")
    tokenizer_dir = Path(artifact.tokenizer or folder)
    tokenizer = load_tokenizer(tokenizer_dir)
    stop_ids = {*stop_token_ids(tokenizer), *configured_stop_ids(folder), *configured_stop_ids(tokenizer_dir)}
    return HfEngine(model, tokenizer, stop_ids=stop_ids, name=source)


def stored_dtype(folder: Path) -> str:
    """The type that config.json says the weights are stored in, as ``fp32``, ``bf16`` or ``fp16``."""
    config = read_config(folder)
    return _NAME_OF_STORED.get(config.get("dtype") or config.get("torch_dtype") or "float32", "fp32")


def _load_quantized(folder: Path, dtype: str, device: str):
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch_dtype(dtype), device_map={"": device}, local_files_only=True,
            trust_remote_code=False, use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelError(str(folder), f"does not load ({error})", "quantize the merged model again") from None
    keep_4bit_weights_intact(model)
    return model.eval()


def _load_gguf(path: Path, dtype: str):
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM

    try:
        if any(tensor.name.startswith("rope_f") for tensor in GGUFReader(str(path)).tensors):
            # transformers 5.23 passes over these tensors: it would rotate wrongly, without a word.
            raise ValueError("it scales its rotary frequencies")
        return AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch_dtype(dtype), local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise ModelError(str(path), f"transformers cannot read this GGUF file ({error})",
                         "pip install \"lora-kit[llamacpp]\" to read it with llama.cpp") from None


class HfEngine(Engine):
    """A transformers model that is in memory already; :func:`load` makes one from an artifact.

    Args:
        model: a causal LM (or a PeftModel on one) in eval mode, on its device.
        tokenizer: its Hugging Face tokenizer.
        stop_ids: token ids that end an answer.
        name: how reports call it.
    """

    def __init__(self, model: Any, tokenizer: Any, *, stop_ids: Iterable[int], name: str = "transformers") -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.device = str(model.device)
        self.stop_ids = tuple(sorted(stop_ids))
        self.num_tokens = int(model.get_output_embeddings().weight.shape[0])

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, ignore_stop: bool = False
    ) -> list[Generation]:
        answers: dict[int, Generation] = {}
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        for first in range(0, len(by_length), BATCH_SIZE):
            rows = by_length[first : first + BATCH_SIZE]
            batch = self._generate_batch([prompts[row] for row in rows], max_new_tokens, ignore_stop)
            answers.update(zip(rows, batch, strict=True))
        return [answers[row] for row in range(len(prompts))]

    def _generate_batch(self, prompts: list[Sequence[int]], max_new_tokens: int, ignore_stop: bool) -> list[Generation]:
        import torch
        from transformers import GenerationConfig

        tokens_BT, mask_BT = self._left_padded(prompts)
        # A model's own generation_config may hold a repetition penalty or sampling, and transformers
        # fills what is unset from it: greedy means greedy here.
        kept, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            with torch.inference_mode():
                out_BT = self.model.generate(
                    input_ids=tokens_BT, attention_mask=mask_BT,
                    generation_config=GenerationConfig(
                        do_sample=False, max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=self._pad_id(),
                        eos_token_id=None if ignore_stop else list(self.stop_ids),
                    ),
                )
        finally:
            self.model.generation_config = kept
        return [self._generation(row[tokens_BT.shape[1] :].tolist(), ignore_stop) for row in out_BT]

    def _generation(self, tokens: list[int], ignore_stop: bool) -> Generation:
        stop = None if ignore_stop else next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        tokens = tokens[:stop]
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Generation(tokens=tuple(tokens), stopped=stop is not None, text=text)

    def log_probs(self, tokens: Sequence[int]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            tokens_1T = torch.tensor([list(tokens)], device=self.model.device)
            logits_TV = self.model(input_ids=tokens_1T, use_cache=False).logits[0]
            return torch.log_softmax(logits_TV.float(), dim=-1).cpu().numpy()

    def tokens_after(self, prompt: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        import torch

        next_11, cache = torch.tensor([list(prompt)], device=self.model.device), None
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                out = self.model(input_ids=next_11, past_key_values=cache, use_cache=True, logits_to_keep=1)
            next_11, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            yield int(next_11)

    def time_once(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, float]:
        import torch

        tokens_BT, mask_BT = self._left_padded(prompts)
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        with torch.inference_mode():
            self._wait()
            started = time.perf_counter()
            out = self.model(input_ids=tokens_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=True,
                             logits_to_keep=1)
            self._wait()
            prefilled = time.perf_counter()
            next_B1 = out.logits[:, -1:].argmax(-1)
            self._wait()
            chosen = time.perf_counter()
            position_B1 = positions_BT[:, -1:] + 1
            num_generated = next_B1.numel()
            for _ in range(new_tokens - 1):
                mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
                out = self.model(input_ids=next_B1, attention_mask=mask_BT, position_ids=position_B1, use_cache=True,
                                 past_key_values=out.past_key_values)
                next_B1 = out.logits[:, -1:].argmax(-1)
                position_B1 = position_B1 + 1
                num_generated += next_B1.numel()
            self._wait()
            ended = time.perf_counter()
        return {"prefill_seconds": prefilled - started, "first_token_seconds": chosen - started,
                "decode_seconds": ended - chosen, "tokens_generated": num_generated}

    def close(self) -> None:
        import torch

        self.model = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _left_padded(self, prompts: Sequence[Sequence[int]]):
        """tokens_BT and mask_BT; what is padding is known by length: the pad token may also be a stop token."""
        import torch

        longest = max(len(prompt) for prompt in prompts)
        tokens_BT = torch.full((len(prompts), longest), self._pad_id(), dtype=torch.int64)
        mask_BT = torch.zeros_like(tokens_BT)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, longest - len(prompt) :] = torch.tensor(list(prompt))
            mask_BT[row, longest - len(prompt) :] = 1
        return tokens_BT.to(self.model.device), mask_BT.to(self.model.device)

    def _pad_id(self) -> int:
        if self.tokenizer.pad_token_id is not None:
            return self.tokenizer.pad_token_id
        return self.stop_ids[0] if self.stop_ids else 0

    def _wait(self) -> None:
        """A GPU works behind the clock's back: wait for it."""
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        elif self.device.startswith("mps"):
            torch.mps.synchronize()
