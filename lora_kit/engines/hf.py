"""Run an artifact with transformers.

Serves folders in Hugging Face layout (those that bitsandbytes quantized too), a base with a
PEFT adapter on it, unmerged, and a GGUF file whose weights are dequantized when it is read.

Several prompts are answered together: what many of them begin with is run once, and an answer
that has stopped leaves its batch. Models whose cache forgets or folds what it has read
(sliding windows, recurrent layers) are answered by transformers' own `generate`.

Shape suffixes: B prompts, T tokens, K positions asked for, V vocabulary. Reads model folders; writes nothing.
"""

from __future__ import annotations

import functools
import gc
import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.adapter import load_adapter
from lora_kit.bnb_mend import keep_4bit_weights_intact
from lora_kit.chat import load_tokenizer, stop_token_ids
from lora_kit.engines import Engine, StopStrings, checked_positions, configured_stop_ids, stop_strings
from lora_kit.errors import ModelError
from lora_kit.hardware import cpu_supports_bf16, memory_bytes
from lora_kit.likelihood import Reader
from lora_kit.model import load_base, read_config, torch_dtype
from lora_kit.types import Artifact, Generation, Likelihood, Question

BATCH_ROWS = 16
"""Most prompts that are answered together; more of them come in several batches, in order of length."""
BATCH_TOKENS = 8192
"""Most tokens of a batch: its rows times the longest prompt and its answer. One prompt alone may be longer."""
SHARED_TOKENS = 32
"""Tokens that prompts must begin with before it is worth a forward pass of its own."""
SAVED_TOKENS = 512
"""Tokens that need not be read again when some of the prompts are answered apart from the others: that is worth
batches of their own, of which the last is not full."""
Ends = Callable[[Sequence[int]], bool]
"""Whether the tokens of an answer so far have come to a stop string."""
_ROWS = 128
"""Positions whose probabilities are worked out at a time: a copy of all logits in fp32 would be large."""
_ROOM = 2.5
"""Main memory to each byte of 16-bit weights, for their fp32 copy with its cache and activations."""
_NAME_OF_STORED = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def missing() -> str | None:
    """None: transformers is one of lora-kit's own requirements."""
    return None


def load(artifact: Artifact, *, dtype: str = "auto", threads: int | None = None, device: str | None = None,
         on: HfEngine | None = None) -> HfEngine:
    """``artifact`` as a transformers model in eval mode; an adapter on the model of ``on``, which is closed.

    Raises:
        ModelError: it is missing or does not load.
    """
    import torch

    if threads:
        torch.set_num_threads(threads)
    asked, folder = dtype, Path(artifact.base if artifact.kind == "adapter" else artifact.path)
    dtype, device = computes(artifact, dtype=dtype, device=device).values()
    if artifact.kind == "gguf":
        model = _load_gguf(folder, dtype).to(device).eval()
        source = f"transformers {dtype}, dequantized"
    else:
        method = (read_config(folder).get("quantization_config") or {}).get("quant_method")
        stored = stored_dtype(folder)
        if on is not None:
            model = on.handed_over()
        else:
            model = _load_quantized(folder, dtype, device) if method else load_base(folder, dtype=dtype, device=device)
        if artifact.kind == "adapter":
            model = load_adapter(model, artifact.path)
        upcast = f" (stored {stored})" if asked == "fastest" and dtype != stored else ""
        source = f"transformers {dtype}{upcast}" + (f", {method}" if method else "")
    if artifact.kind == "gguf" and artifact.tokenizer is None:
        raise ModelError(artifact.path, "names no tokenizer folder", "name the folder of the model it was made from")
    tokenizer_dir = Path(artifact.tokenizer or folder)
    tokenizer = load_tokenizer(tokenizer_dir)
    stop_ids = {*stop_token_ids(tokenizer), *configured_stop_ids(folder), *configured_stop_ids(tokenizer_dir)}
    return HfEngine(model, tokenizer, stop_ids=stop_ids, name=source)


def computes(artifact: Artifact, *, dtype: str = "auto", device: str | None = None) -> dict[str, str]:
    """``dtype`` and ``device`` that :func:`load` would compute with."""
    import torch

    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    folder = Path(artifact.base if artifact.kind == "adapter" else artifact.path)
    if artifact.kind == "gguf":
        dtype = "fp32" if dtype in ("auto", "fastest") else dtype
    elif dtype == "auto":
        dtype = stored_dtype(folder)
    elif dtype == "fastest":
        dtype = fastest_dtype(folder, device)
    return {"dtype": dtype, "device": device}


def stored_dtype(folder: Path) -> str:
    """The type that config.json says the weights are stored in, as ``fp32``, ``bf16`` or ``fp16``."""
    config = read_config(folder)
    return _NAME_OF_STORED.get(config.get("dtype") or config.get("torch_dtype") or "float32", "fp32")


def fastest_dtype(folder: Path, device: str) -> str:
    """The type to compute in where the stored weights must not change and time matters.

    fp32 on a CPU that has no matrix unit for 16-bit numbers, as the weights stay exactly what they are there, and
    as stored everywhere else: on a GPU, where main memory is short, and for folders that bitsandbytes quantized, which
    come back in the type they were stored in whatever is asked for (transformers 5.24).
    """
    stored = stored_dtype(folder)
    if device != "cpu" or stored == "fp32" or cpu_supports_bf16() or read_config(folder).get("quantization_config"):
        return stored
    weights = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return "fp32" if weights * _ROOM <= memory_bytes()[1] else stored


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
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PeftModel hides its forward
        self._options = frozenset(inspect.signature(plain.forward).parameters)
        # transformers 5.24 calls it `cache` and warns of the old name, which older ones know alone.
        self._cache_key = "cache" if "cache" in self._options else "past_key_values"
        self._lean: Any = False
        self._decodes_itself = _grows_plainly(plain) and self._options >= {
            self._cache_key, "attention_mask", "position_ids", "logits_to_keep"}
        why = "" if self._decodes_itself else "this model's cache forgets or folds what it has read"
        self._reader = Reader(model, why, _groups, self._cache_key)

    batches_likelihoods = True

    @property
    def has_own_loop(self) -> bool:
        """Whether a single answer is decoded in a quicker way than token by token through the model's forward."""
        return self._lean_decoder(1) is not None

    @property
    def likelihood_noise(self) -> float:
        import torch

        # Small models may round alike in all shapes that were tried; none knows more than its type does.
        return max(self._reader.noise or 0.0, torch.finfo(self.model.dtype).eps, 1e-6)

    @property
    def likelihood_note(self) -> str:
        return self._reader.why_plain

    def likelihoods(self, questions: Sequence[Question], *, greedy: bool = False,
                    apart: bool = False) -> list[list[Likelihood]]:
        return self._reader.read(questions, greedy=greedy, apart=apart)

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, ignore_stop: bool = False,
        until: Sequence[Sequence[str]] = (),
    ) -> list[Generation]:
        import torch

        prompts, answers = [list(prompt) for prompt in prompts], {}
        stops = stop_strings(self.tokenizer, until, len(prompts), ignore_stop)
        groups = _groups(prompts) if self._decodes_itself else [(list(range(len(prompts))), 0)]
        with torch.inference_mode():
            for group, num_shared in groups:
                shared = self._read(prompts[group[0]][:num_shared]) if num_shared else None
                for rows in _batches(prompts, group, max_new_tokens):
                    batch, ends = [prompts[row] for row in rows], [stops[row].reached for row in rows]
                    if self._decodes_itself:
                        stop_ids = () if ignore_stop else self.stop_ids
                        found = self._decode(batch, max_new_tokens, stop_ids, ends, num_shared, shared)
                    else:
                        found = self._transformers_generate(batch, max_new_tokens, ignore_stop, ends)
                    answers.update(zip(rows, found, strict=True))
        return [self._generation(answers[row], ignore_stop, stops[row]) for row in range(len(prompts))]

    def _read(self, tokens: list[int]):
        """The cache after ``tokens``, for one row."""
        import torch

        cache = _cache_with_room(self.model, len(tokens))
        self._forward(torch.tensor([tokens], device=self.model.device), cache)
        return cache

    def _decode(self, prompts: list[list[int]], max_new_tokens: int, stop_ids: Sequence[int], ends: Sequence[Ends],
                num_shared: int, shared: Any) -> list[list[int]]:
        """Greedy tokens after each prompt, with the stop token where there is one.

        Args:
            ends: of each prompt, whether its answer so far has come to a stop string.
            num_shared: how many tokens all prompts begin with, fewer than any of them has.
            shared: the cache after these; it is copied. None where ``num_shared`` is 0.
        """
        import torch

        answers: list[list[int]] = [[] for _ in prompts]
        rows = list(range(len(prompts)))
        cache = _cache_with_room(self.model, max(map(len, prompts)) + max_new_tokens)
        for index, layer in enumerate(shared.layers if shared else ()):
            cache.update(*(each.expand(len(rows), -1, -1, -1) for each in (layer.keys, layer.values)), index)
        tokens_BT, mask_BT = self._left_padded([prompt[num_shared:] for prompt in prompts])
        mask_BT = torch.cat([mask_BT.new_ones(len(rows), num_shared), mask_BT], dim=1)
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)[:, num_shared:]
        for left in reversed(range(max_new_tokens)):
            logits_BV = self._forward(tokens_BT, cache, attention_mask=mask_BT, position_ids=positions_BT)
            next_B = logits_BV.argmax(-1)
            going = []
            for place, token in enumerate(next_B.tolist()):
                row = rows[place]
                answers[row].append(token)
                if token not in stop_ids and not ends[row](answers[row]):
                    going.append(place)
            if not going or not left:
                break
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(rows), 1)], dim=1)
            tokens_BT, positions_BT = next_B[:, None], positions_BT[:, -1:] + 1
            if len(going) < len(rows):
                rows = [rows[place] for place in going]
                kept = torch.tensor(going, device=self.model.device)
                cache.batch_select_indices(kept)
                tokens_BT, positions_BT, mask_BT = tokens_BT[kept], positions_BT[kept], mask_BT[kept]
        return answers

    def _forward(self, tokens_BT, cache, **options):
        """Logits (B, V) after the last token; ``cache`` takes the tokens up."""
        return self.model(input_ids=tokens_BT, use_cache=True, logits_to_keep=1, **{self._cache_key: cache},
                          **options).logits[:, -1]

    def _transformers_generate(self, prompts: list[list[int]], max_new_tokens: int, ignore_stop: bool,
                               ends: Sequence[Ends]) -> list[list[int]]:
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        tokens_BT, mask_BT = self._left_padded(prompts)
        start = tokens_BT.shape[1]

        def ended(so_far_BT, _scores, **_):
            return torch.tensor([end(answer) for end, answer in zip(ends, so_far_BT[:, start:].tolist(), strict=True)],
                                device=so_far_BT.device)

        # A model's own generation_config may hold a repetition penalty or sampling, and transformers
        # fills what is unset from it: greedy means greedy here.
        kept, self.model.generation_config = self.model.generation_config, GenerationConfig()
        try:
            out_BT = self.model.generate(
                input_ids=tokens_BT, attention_mask=mask_BT, stopping_criteria=StoppingCriteriaList([ended]),
                generation_config=GenerationConfig(
                    do_sample=False, max_new_tokens=max_new_tokens, use_cache=True, pad_token_id=self._pad_id(),
                    eos_token_id=None if ignore_stop else list(self.stop_ids),
                ),
            )
        finally:
            self.model.generation_config = kept
        return [_up_to_its_end(answer, end) for answer, end in zip(out_BT[:, start:].tolist(), ends, strict=True)]

    def _generation(self, tokens: list[int], ignore_stop: bool, stops: StopStrings) -> Generation:
        stop = None if ignore_stop else next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        tokens = tokens[:stop]
        text, cut = stops.cut(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return Generation(tokens=tuple(tokens), stopped=cut or stop is not None, text=text)

    def log_probs(self, tokens: Sequence[int]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            tokens_1T = torch.tensor([list(tokens)], device=self.model.device)
            logits_TV = self.model(input_ids=tokens_1T, use_cache=False).logits[0]
            return torch.log_softmax(logits_TV.float(), dim=-1).cpu().numpy()

    def token_log_probs(self, tokens_T: Sequence[int], positions_K: Sequence[int]) -> np.ndarray:
        import torch

        positions_K = checked_positions(tokens_T, positions_K)
        if not len(positions_K) or "logits_to_keep" not in self._options:
            return super().token_log_probs(tokens_T, positions_K)
        with torch.inference_mode():
            device, last = self.model.device, int(positions_K.max())
            # The last token asked for is predicted, not read, and nothing after it matters.
            tokens_1T = torch.tensor([list(tokens_T)[: last + 1]], device=device)
            positions_K = torch.from_numpy(positions_K).to(device)
            logits_KV = self.model(input_ids=tokens_1T[:, :-1], use_cache=False,
                                   logits_to_keep=positions_K - 1).logits[0]
            parts = zip(logits_KV.split(_ROWS), tokens_1T[0, positions_K].split(_ROWS), strict=True)
            return torch.cat([torch.log_softmax(part_V.float(), dim=-1).gather(-1, token[:, None])[:, 0]
                              for part_V, token in parts]).cpu().numpy()

    def summed_log_probs(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        checked = [(tokens_T, checked_positions(tokens_T, positions_K)) for tokens_T, positions_K in texts]
        return self._reader.sums(checked, lambda *text: super(HfEngine, self).summed_log_probs([text])[0])

    def tokens_after(self, prompt: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        import torch

        next_11, cache = torch.tensor([list(prompt)], device=self.model.device), None
        lean = self._lean_decoder(1)
        if lean is not None:
            with torch.inference_mode():
                out = self.model(input_ids=next_11, use_cache=True, logits_to_keep=1)
                logits_1V = out.logits[:, -1]
                lean.start(getattr(out, self._cache_key), len(prompt) + max_new_tokens)
            for left in reversed(range(max_new_tokens)):
                next_1 = logits_1V.argmax(-1)
                yield int(next_1)
                if left:
                    with torch.inference_mode():
                        logits_1V = lean.step(next_1)
            return
        for _ in range(max_new_tokens):
            with torch.inference_mode():
                out = self.model(input_ids=next_11, use_cache=True, logits_to_keep=1, **{self._cache_key: cache})
            next_11, cache = out.logits[:, -1:].argmax(-1), getattr(out, self._cache_key)
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
            lean = self._lean_decoder(len(prompts))
            if lean is not None:
                lean.start(getattr(out, self._cache_key), tokens_BT.shape[1] + new_tokens)
                for _ in range(new_tokens - 1):
                    next_B1 = lean.step(next_B1[:, 0]).argmax(-1, keepdim=True)
                    num_generated += next_B1.numel()
            for _ in range(new_tokens - 1 if lean is None else 0):
                mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
                out = self.model(input_ids=next_B1, attention_mask=mask_BT, position_ids=position_B1, use_cache=True,
                                 **{self._cache_key: getattr(out, self._cache_key)})
                next_B1 = out.logits[:, -1:].argmax(-1)
                position_B1 = position_B1 + 1
                num_generated += next_B1.numel()
            self._wait()
            ended = time.perf_counter()
        return {"prefill_seconds": prefilled - started, "first_token_seconds": chosen - started,
                "decode_seconds": ended - chosen, "tokens_generated": num_generated}

    def _lean_decoder(self, num_rows: int):
        """The quick way to decode (``lean_decoder.py``) where it is one: a single row in 16 bits on a CPU."""
        import torch

        if num_rows != 1 or self.device != "cpu" or self.model.dtype not in (torch.bfloat16, torch.float16):
            return None
        if self._lean is False:
            from lora_kit import lean_decoder

            is_plain = self._decodes_itself and not hasattr(self.model, "get_base_model")
            self._lean = lean_decoder.make(self.model) if is_plain else None
        return self._lean

    def handed_over(self) -> Any:
        """The model, for another engine; this one is closed."""
        model = self.model
        self.close()
        return model

    def close(self) -> None:
        import torch

        self._reader.close()
        self.model = self._lean = None
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


def _up_to_its_end(tokens: list[int], end: Ends) -> list[int]:
    """An answer without the padding that it got while others of its batch went on."""
    return next((tokens[:number] for number in range(1, len(tokens) + 1) if end(tokens[:number])), tokens)


def _cache_with_room(model, room: int):
    """An empty cache for up to ``room`` tokens a row."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    cache.layers = [_layer_with_room()(room) for _ in cache.layers]
    return cache


@functools.cache
def _layer_with_room():
    """The class of a cache layer whose memory is taken once. (A class of transformers' own: made when it is there.)

    A plain one copies all that it holds for each new token: 60 % of the time of 16 rows of 400 tokens (a Llama of
    135 million weights on one CPU core).
    """
    from transformers.cache_utils import DynamicLayer

    class LayerWithRoom(DynamicLayer):
        """``keys`` and ``values`` are the filled part of ``held``, each (B, heads, room, width)."""

        def __init__(self, room: int) -> None:
            super().__init__()
            self.room, self.held = room, ()

        def update(self, key_states, value_states, *_args, **_options):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.held = [each.new_empty(*each.shape[:2], self.room, each.shape[3])
                             for each in (key_states, value_states)]
            start = self.get_seq_length()
            end = start + key_states.shape[2]
            for held, new in zip(self.held, (key_states, value_states), strict=True):
                held[:, :, start:end] = new
            self._fill(end)
            return self.keys, self.values

        def batch_select_indices(self, indices) -> None:
            end = self.get_seq_length()
            self.held = [held[indices] for held in self.held]
            self._fill(end)

        def _fill(self, end: int) -> None:
            self.keys, self.values = (held[:, :, :end] for held in self.held)

    return LayerWithRoom


def _grows_plainly(model) -> bool:
    """Whether keys and values of all tokens read are kept by ``model``'s own cache, and nothing else is.

    Only then may a cache be read once and copied to several rows, lose rows, and have padding between the tokens.
    False for sliding windows, recurrent layers, layers that share keys, models that prepare their inputs in a way of
    their own, and rotary frequencies that change with the longest row of the batch.
    """
    from transformers import DynamicCache, GenerationMixin
    from transformers.cache_utils import DynamicLayer

    if model.config.is_encoder_decoder or getattr(model, "_is_stateful", False):
        return False
    if getattr(type(model), "prepare_inputs_for_generation", None) is not GenerationMixin.prepare_inputs_for_generation:
        return False
    config = model.config.get_text_config(decoder=True)
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [each.get("rope_type") or "" for each in (rope, *rope.values()) if isinstance(each, dict)]
    if any("dynamic" in kind or kind == "longrope" for kind in kinds):
        return False
    layers = DynamicCache(config=model.config).layers
    return len(layers) == config.num_hidden_layers and all(type(layer) is DynamicLayer for layer in layers)


def _groups(prompts: list[list[int]]) -> list[tuple[list[int], int]]:
    """The numbers of ``prompts`` in groups, each with how many tokens its prompts begin with in common.

    A group shares at least SHARED_TOKENS, and fewer than its shortest prompt has; those left over are a group that
    shares none. The group that saves the most tokens is taken first.
    """
    # In sorted order a stretch of prompts shares what the least of its neighbours do.
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    common = [_num_common(prompts[one], prompts[other]) for one, other in itertools.pairwise(order)]
    groups, left, waiting = [], [], [(0, len(order))] if order else []
    while waiting:
        low, high = waiting.pop()
        saved, start, end, shared = _largest(common[low:high - 1])
        if saved < SAVED_TOKENS and end - start < len(order) or not saved:
            left += order[low:high]
            continue
        groups.append((order[low + start:low + end], shared))
        waiting += [(first, last) for first, last in ((low, low + start), (low + end, high)) if first < last]
    return [*groups, (left, 0)] if left else groups


def _num_common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with, less than either has; 0 for fewer than SHARED_TOKENS."""
    longest = min(len(one), len(other)) - 1
    found = next((place for place in range(longest) if one[place] != other[place]), longest)
    return found if found >= SHARED_TOKENS else 0


def _largest(common: list[int]) -> tuple[int, int, int, int]:
    """(tokens saved, start, end, tokens shared) of the stretch of prompts that saves most by reading a beginning once.

    ``common`` are the tokens shared by neighbours. What a stretch saves is the area of a rectangle under these
    heights: the largest is found with a stack of those that may still grow.
    """
    best, growing = (0, 0, 0, 0), []
    for place, height in enumerate([*common, 0]):
        start = place
        while growing and growing[-1][1] >= height:
            start, lower = growing.pop()
            best = max(best, (lower * (place - start), start, place + 1, lower))
        growing.append((start, height))
    return best


def _batches(prompts: list[list[int]], group: list[int], max_new_tokens: int) -> Iterator[list[int]]:
    """The numbers of the prompts in ``group``, each once, those of a similar length together."""
    batch: list[int] = []
    for row in sorted(group, key=lambda row: (len(prompts[row]), row)):
        # In order of length, so the newest row is the longest.
        if batch and (len(batch) == BATCH_ROWS
                      or (len(batch) + 1) * (len(prompts[row]) + max_new_tokens) > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
