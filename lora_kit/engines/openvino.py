"""Run a GGUF file with OpenVINO GenAI, on the CPU (an extra).

It reads quantized llama, qwen2 and qwen3 files directly and computes in types of its own choice (on a CPU in
bf16 where that has units for it, with keys and values in 8 bits). It answers, one prompt at a time, and gives no
log-probabilities: `lora-kit bench --engine openvino` measures with it, and evaluation does not.

Nothing is kept from one prompt to the next: the pipeline with its own plain attention has no prefix cache. An answer's
times are taken by this process's clock as its tokens come; what OpenVINO counts of the same answer is beside them
(:meth:`OpenVinoEngine.counters`). Reads the .gguf file; writes nothing.
"""

from __future__ import annotations

import importlib.util
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lora_kit.engines import Engine, opened_gguf, threads_of
from lora_kit.errors import MachineError, ModelError
from lora_kit.types import Artifact

_INSTALL = 'pip install "lora-kit[openvino]"'
_END = object()


def missing() -> str | None:
    """None when openvino-genai is installed, else the command that installs it."""
    return None if importlib.util.find_spec("openvino_genai") else _INSTALL


def load(
    artifact: Artifact, *, dtype: str = "auto", threads: int | None = None, device: str | None = None
) -> OpenVinoEngine:
    """The GGUF file ``artifact`` in OpenVINO GenAI, on the CPU.

    Args:
        dtype: ``auto``: OpenVINO computes in types of its own choice.
        device: None or ``cpu``.

    Raises:
        MachineError: openvino-genai is not installed.
        ModelError: it cannot read the file, or no tokenizer is named beside it.
    """
    tokenizer, stop_ids = opened_gguf(artifact, "openvino", "openvino-genai")
    return OpenVinoEngine(artifact.path, tokenizer, stop_ids=stop_ids, threads=threads)


def computes(artifact: Artifact, *, dtype: str = "auto", device: str | None = None) -> dict[str, str]:
    """OpenVINO computes in types of its own choice, on the CPU."""
    return {"dtype": "auto", "device": "cpu"}


class OpenVinoEngine(Engine):
    """One GGUF file in OpenVINO GenAI.

    Args:
        path: the .gguf file.
        tokenizer: Hugging Face tokenizer of the model that the file was made from.
        stop_ids: token ids that end an answer.
        threads: CPU threads; None takes OMP_NUM_THREADS, or as many as the process may use.
    """

    name = "OpenVINO GenAI"
    device = "cpu"

    def __init__(self, path: str, tokenizer: Any, *, stop_ids: Iterable[int], threads: int | None = None) -> None:
        try:
            import openvino
            import openvino_genai
        except (ImportError, OSError, RuntimeError) as error:  # installed, and its library does not load here
            raise MachineError("engine openvino", f"openvino-genai cannot be imported ({error})",
                               f"install it again: {_INSTALL} --force-reinstall") from None
        self._lib, self._tensor, self.tokenizer = openvino_genai, openvino.Tensor, tokenizer
        self.stop_ids = tuple(sorted(stop_ids))
        self.num_tokens = _vocabulary(path)
        try:
            # SDPA: the pipeline that holds one answer's keys and values. The default one keeps prompts for later
            # requests, and a repeated prompt then takes no time.
            self._pipeline = openvino_genai.LLMPipeline(
                str(path), "CPU", ATTENTION_BACKEND="SDPA",
                INFERENCE_NUM_THREADS=threads_of(threads))
        except RuntimeError as error:
            text = " ".join(str(error).split())[-200:]
            raise ModelError(str(path), f"OpenVINO GenAI cannot read this file ({text})",
                             "leave out --engine openvino: llama.cpp reads more kinds") from None
        self._counted: Any = None

    def log_probs(self, tokens: Sequence[int]) -> np.ndarray:
        raise MachineError("engine openvino", "gives no log-probabilities", "score the file with llama.cpp or "
                           "transformers: leave out the engine")

    def tokens_after(self, prompt: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        waiting: queue.Queue[Any] = queue.Queue()
        cancelled = threading.Event()

        def work() -> None:
            try:
                self._answer(prompt, max_new_tokens, waiting.put, cancelled)
                waiting.put(_END)
            except Exception as error:  # noqa: BLE001 - it is raised again by who waits
                waiting.put(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        try:
            while (token := waiting.get()) is not _END:
                if isinstance(token, Exception):
                    raise MachineError("engine openvino", f"OpenVINO failed ({' '.join(str(token).split())[:200]})",
                                       "use shorter prompts")
                yield token
        finally:
            cancelled.set()
            worker.join()

    def time_once(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, float]:
        if len(prompts) != 1:
            raise MachineError("engine openvino", "is measured with one prompt at a time here",
                               "set bench.batch_size: 1, or use another engine")
        moments: list[float] = []
        started = time.perf_counter()
        self._answer(prompts[0], new_tokens, lambda token: moments.append(time.perf_counter()), threading.Event())
        # Reading the prompt and choosing the first token are one call.
        return {"prefill_seconds": moments[0] - started, "first_token_seconds": moments[0] - started,
                "decode_seconds": moments[-1] - moments[0], "tokens_generated": len(moments)}

    def counters(self) -> dict[str, float]:
        """What OpenVINO's own metrics say of the last answer.

        Returns:
            ``prompt_tokens``, ``generated_tokens``, ``first_token_seconds``, ``per_token_seconds`` (the mean of those
            after the first).
        """
        found = self._counted
        return {"prompt_tokens": float(found.get_num_input_tokens()),
                "generated_tokens": float(found.get_num_generated_tokens()),
                "first_token_seconds": found.get_ttft().mean / 1e3, "per_token_seconds": found.get_tpot().mean / 1e3}

    def close(self) -> None:
        self._pipeline = self._counted = None

    def _answer(self, prompt: Sequence[int], new_tokens: int, take: Any, cancelled: threading.Event) -> None:
        """The greedy answer past stop tokens; ``take`` gets each token as soon as it is known."""
        library = self._lib

        class Streamer(library.StreamerBase):
            def write(self, tokens):
                for token in [tokens] if isinstance(tokens, int) else tokens:
                    take(int(token))
                return library.StreamingStatus.CANCEL if cancelled.is_set() else library.StreamingStatus.RUNNING

            def end(self) -> None:
                pass

        config = library.GenerationConfig()
        config.do_sample, config.ignore_eos = False, True
        config.max_new_tokens = config.min_new_tokens = new_tokens
        ids_1T = np.array([list(prompt)], dtype=np.int64)
        inputs = library.TokenizedInputs(self._tensor(ids_1T), self._tensor(np.ones_like(ids_1T)))
        self._counted = self._pipeline.generate(inputs, config, Streamer()).perf_metrics


def _vocabulary(path: str) -> int:
    """Rows of the file's token embedding.

    Raises:
        ModelError: it is no such file, or one whose loading ends the process.
    """
    from gguf import GGUFReader

    try:
        embedding = next(tensor for tensor in GGUFReader(str(path)).tensors if tensor.name == "token_embd.weight")
        if embedding.tensor_type.name == "F16":
            # openvino-genai 2026.4.1 loads no such file of ours and dies of SIGFPE; q8_0 and q4_1 load. Goes when a
            # release loads one (quantize a model with method gguf, type f16, and bench it with this engine).
            raise ModelError(str(path), "has weights in fp16, at which OpenVINO GenAI 2026.4 ends its process",
                             "use a quantized form such as q8_0, or leave out --engine openvino")
        return int(embedding.shape[-1])
    except (OSError, ValueError, KeyError, IndexError, StopIteration):
        raise ModelError(str(path), "is no whole GGUF file of a language model", "check the file") from None
