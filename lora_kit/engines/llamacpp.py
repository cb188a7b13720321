"""Run a GGUF file with llama.cpp (the package llama-cpp-python, an extra).

Works on llama.cpp's own functions instead of the package's ``Llama`` class: several prompts
decode together, and logits of all positions are read without a second copy of them.
Prompts are token ids of lora-kit's tokenizer; :meth:`LlamaCppEngine.same_tokens` says whether
llama.cpp would have made the same ids of a text.

Shape suffixes: B prompts, T tokens, V vocabulary. Reads the GGUF file; writes nothing.
"""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lora_kit.engines import Engine, opened_gguf, threads_of
from lora_kit.errors import MachineError, ModelError
from lora_kit.types import Artifact, Likelihood, Question

BATCH_TOKENS = 512
"""Tokens handed to llama.cpp at once."""
_INSTALL = 'pip install "lora-kit[llamacpp]"'
MAX_SEQUENCES = 64
"""Prompts that one context can hold (llama.cpp allows 256)."""


def missing() -> str | None:
    """None when llama-cpp-python is installed, else the command that installs it."""
    return None if importlib.util.find_spec("llama_cpp") else _INSTALL


def load(
    artifact: Artifact, *, dtype: str = "auto", threads: int | None = None, device: str | None = None
) -> LlamaCppEngine:
    """The GGUF file ``artifact`` in llama.cpp, on the CPU.

    Args:
        dtype: ``auto``: llama.cpp computes in types of its own choice.
        device: None or ``cpu``.

    Raises:
        MachineError: llama-cpp-python is not installed.
        ModelError: llama.cpp cannot read the file, or no tokenizer is named beside it.
    """
    tokenizer, stop_ids = opened_gguf(artifact, "llamacpp", "llama-cpp-python")
    return LlamaCppEngine(artifact.path, tokenizer, stop_ids=stop_ids, threads=threads)


def computes(artifact: Artifact, *, dtype: str = "auto", device: str | None = None) -> dict[str, str]:
    """llama.cpp computes in types of its own choice, on the CPU."""
    return {"dtype": "auto", "device": "cpu"}


class LlamaCppEngine(Engine):
    """One GGUF file in llama.cpp.

    Args:
        path: the .gguf file.
        tokenizer: Hugging Face tokenizer of the model that the file was made from.
        stop_ids: token ids that end an answer.
        threads: CPU threads; None takes OMP_NUM_THREADS, or as many as the process may use.
        counts: let llama.cpp time itself, for :meth:`counters`.
    """

    device = "cpu"

    def __init__(self, path: str, tokenizer: Any, *, stop_ids: Iterable[int], threads: int | None = None,
                 counts: bool = False) -> None:
        try:
            import llama_cpp
        except (ImportError, OSError, RuntimeError) as error:  # installed, and its library does not load here
            raise MachineError("engine llamacpp", f"llama-cpp-python cannot be imported ({error})",
                               f"install it again: {_INSTALL} --force-reinstall") from None

        self._lib, self.tokenizer = llama_cpp, tokenizer
        self._threads = threads_of(threads)
        self._context, self._context_size, self._counts = None, (0, 0), counts
        self._noise: float | None = None
        self._model = None
        _silence(llama_cpp)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
            # Upstream llama.cpp #20824: on a native AMX build the first evaluation of quantized weights
            # ends the process (SIGSEGV or SIGILL), because the weights are repacked for AMX. Without
            # "extra buffer types" they are not. Goes when a release of llama-cpp-python evaluates a Q8_0
            # file on an AMX machine with the default parameters (tests/engines/test_llamacpp.py, there).
            params.use_extra_bufts = False
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise ModelError(str(path), "llama.cpp cannot read this file", "check that it is a whole GGUF file")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.num_tokens = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self.stop_ids = tuple(sorted(stop_ids))
        self.name = "llama.cpp"

    def tokens_after(self, prompt: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        self._fresh_context(len(prompt) + max_new_tokens, 1)
        token = int(self._prefill([prompt])[0].argmax())
        yield token
        for position in range(len(prompt), len(prompt) + max_new_tokens - 1):
            token = int(self._decode([(token, position, 0, True)])[0].argmax())
            yield token

    def log_probs(self, tokens: Sequence[int]) -> np.ndarray:
        self._fresh_context(len(tokens), 1)
        parts = []
        for first in range(0, len(tokens), BATCH_TOKENS):
            chunk = tokens[first : first + BATCH_TOKENS]
            logits_TV = self._decode([(token, first + i, 0, True) for i, token in enumerate(chunk)])
            parts.append(_log_softmax(logits_TV))
        return np.concatenate(parts)

    def likelihoods(self, questions: Sequence[Question], *, greedy: bool = False,
                    apart: bool = False) -> list[list[Likelihood]]:
        # A continuation is a sequence of its own that begins with the cells of the context, which is read once.
        found = [self._likelihoods(question) if len(question.continuations) < MAX_SEQUENCES and not apart
                 else super(LlamaCppEngine, self).likelihoods([question])[0] for question in questions]
        if found and self._noise is None and not apart:
            [again] = super().likelihoods(questions[:1])
            self._noise = max(abs(one.log_prob - other.log_prob)
                              for one, other in zip(found[0], again, strict=True))
        return found

    batches_likelihoods = True

    @property
    def likelihood_noise(self) -> float:
        return max(self._noise or 0.0, Engine.likelihood_noise)

    def _likelihoods(self, question: Question) -> list[Likelihood]:
        start, number = len(question.context), len(question.continuations)
        self._fresh_context(start + sum(map(len, question.continuations)), number + 1)
        first_V = self._prefill([question.context])[0]
        memory = self._lib.llama_get_memory(self._context)
        for sequence in range(1, number + 1):
            self._lib.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        # The last token is predicted, not read.
        entries = [(token, start + place, sequence, True) for sequence, each in enumerate(question.continuations, 1)
                   for place, token in enumerate(each[:-1])]
        parts = [self._decode(entries[i : i + BATCH_TOKENS]) for i in range(0, len(entries), BATCH_TOKENS)]
        rows_KV, found, row = _log_softmax(np.concatenate([first_V[None], *parts])), [], 1
        for each in question.continuations:
            own_KV = rows_KV[[0, *range(row, row + len(each) - 1)]]
            row += len(each) - 1
            chosen_K = own_KV[np.arange(len(each)), list(each)]
            found.append(Likelihood(log_prob=float(chosen_K.sum(dtype=np.float64)),
                                    greedy=bool((own_KV.argmax(1) == np.asarray(each)).all())))
        return found

    def time_once(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, float]:
        self._fresh_context(sum(len(prompt) + new_tokens for prompt in prompts), len(prompts))
        started = time.perf_counter()
        logits_BV = self._prefill(prompts)
        prefilled = time.perf_counter()
        next_B = logits_BV.argmax(axis=1)
        chosen = time.perf_counter()
        num_generated = len(next_B)
        for step in range(new_tokens - 1):
            batch = [(int(token), len(prompt) + step, row, True)
                     for row, (token, prompt) in enumerate(zip(next_B, prompts, strict=True))]
            next_B = self._decode(batch).argmax(axis=1)
            num_generated += len(next_B)
        ended = time.perf_counter()
        return {"prefill_seconds": prefilled - started, "first_token_seconds": chosen - started,
                "decode_seconds": ended - chosen, "tokens_generated": num_generated}

    def counters(self) -> dict[str, float]:
        """What llama.cpp's own counters say since the last call: seconds and tokens of prompts, and of single tokens.

        Returns:
            ``prefill_seconds``, ``prefill_tokens``, ``decode_seconds``, ``decode_tokens``.
        """
        found = self._lib.llama_perf_context(self._context)
        self._lib.llama_perf_context_reset(self._context)
        return {"prefill_seconds": found.t_p_eval_ms / 1e3, "prefill_tokens": float(found.n_p_eval),
                "decode_seconds": found.t_eval_ms / 1e3, "decode_tokens": float(found.n_eval)}

    def same_tokens(self, texts: Sequence[str]) -> list[str]:
        """Those of ``texts`` that llama.cpp and the Hugging Face tokenizer split differently (special tokens read)."""
        differing = []
        for text in texts:
            expected = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if self._tokenize(text) != list(expected):
                differing.append(text)
        return differing

    def close(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def _tokenize(self, text: str) -> list[int]:
        data = text.encode()
        room = len(data) + 16
        ids = (self._lib.llama_token * room)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), ids, room, False, True)
        assert count >= 0
        return list(ids[:count])

    def _fresh_context(self, num_tokens: int, num_sequences: int) -> None:
        """An empty KV cache with room for ``num_tokens`` in all, of ``num_sequences`` prompts."""
        if num_sequences > MAX_SEQUENCES:
            raise MachineError("engine llamacpp", f"takes at most {MAX_SEQUENCES} prompts at once",
                               "use a smaller batch")
        if self._context and self._context_size[0] >= num_tokens and self._context_size[1] >= num_sequences:
            self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
            return
        if self._context:
            self._lib.llama_free(self._context)
        size = (max(256, -(-num_tokens // 256) * 256, self._context_size[0]), max(num_sequences, self._context_size[1]))
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = size
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self._threads
        params.kv_unified = True  # one pool of cells, whatever the lengths of the sequences
        params.no_perf = not self._counts
        self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise MachineError("engine llamacpp", f"cannot make room for {num_tokens} tokens", "use shorter prompts")
        self._context_size = size

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Logits (B, V) after the last token of each prompt."""
        entries = [(int(token), position, row, position == len(prompt) - 1)
                   for row, prompt in enumerate(prompts) for position, token in enumerate(prompt)]
        chunks = [self._decode(entries[i : i + BATCH_TOKENS]) for i in range(0, len(entries), BATCH_TOKENS)]
        return np.concatenate(chunks)

    def _decode(self, entries: list[tuple[int, int, int, bool]]) -> np.ndarray:
        """Run (token, position, prompt, wants logits) entries; logits (number wanted, V) of those that want them."""
        batch = self._lib.llama_batch_init(len(entries), 0, 1)
        try:
            for i, (token, position, row, wanted) in enumerate(entries):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = wanted
            batch.n_tokens = len(entries)
            code = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if code != 0:
            raise MachineError("engine llamacpp", f"llama.cpp failed with code {code}", "use shorter prompts")
        num_wanted = sum(entry[3] for entry in entries)
        if not num_wanted:
            return np.zeros((0, self.num_tokens), np.float32)
        flat = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), shape=(num_wanted * self.num_tokens,))
        return flat.reshape(num_wanted, self.num_tokens).copy()


def _log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """Log-probabilities in place of ``logits_TV``."""
    logits_TV -= logits_TV.max(axis=1, keepdims=True)
    logits_TV -= np.log(np.exp(logits_TV).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits_TV


_no_log = None


def _silence(llama_cpp) -> None:
    """llama.cpp logs its whole loading to stderr: a callback that drops it (kept alive by this module)."""
    global _no_log
    if _no_log is None:
        _no_log = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(_no_log, ctypes.c_void_p(0))
