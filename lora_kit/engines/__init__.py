"""Engines: one file for each way to run an artifact.

To add one, write ``lora_kit/engines/<name>.py`` with

* ``missing() -> str | None``: None, or the command that installs what the engine needs;
* ``load(artifact, *, dtype, threads, device) -> Engine``: the artifact, ready to run;

and a class derived from :class:`Engine` with every abstract method. Which engine serves an
artifact follows from its kind (:data:`ENGINE_OF_KIND`); ``open_engine(..., prefer="<name>")``
asks for one by its file's name, so a new file is found without being registered. Its test is
``tests/engines/test_<name>.py``: log-probabilities against another engine's, greedy answers
that stop, and timing that counts every token.

Prompts are token ids of lora-kit's own tokenizer (``Artifact.tokenizer``) in every engine, so
that all artifacts read the same template. Engines never import each other. Torch-free itself.
Reads the artifact; writes nothing.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.errors import MachineError, RecipeError, RefusedError
from lora_kit.types import Artifact, Generation

ENGINE_OF_KIND = {"hf": ("hf",), "adapter": ("hf",), "gguf": ("llamacpp",)}
"""Engines that serve an artifact's kind when nothing else is asked for."""


class Engine(ABC):
    """A loaded artifact. Made by :func:`open_engine`; close it to give its memory back.

    Attributes:
        name: the engine and how it computes, as reports show it, e.g. ``transformers bf16``.
        device: ``cpu``, ``cuda:0``, ``mps``.
        tokenizer: the Hugging Face tokenizer that prompts are made with.
        stop_ids: token ids that end an answer.
        num_tokens: size of the vocabulary that log-probabilities are over.
    """

    name: str
    device: str
    tokenizer: Any
    stop_ids: tuple[int, ...]
    num_tokens: int

    @abstractmethod
    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, ignore_stop: bool = False
    ) -> list[Generation]:
        """Greedy answers to ``prompts`` (token ids), in their order.

        An answer ends before a stop token (``stopped`` is then True) or after ``max_new_tokens``;
        with ``ignore_stop`` always after ``max_new_tokens``.
        """

    @abstractmethod
    def log_probs(self, tokens: Sequence[int]) -> np.ndarray:
        """Natural log-probabilities (T, V) in float32: row t is over the token after ``tokens[: t + 1]``."""

    def token_log_probs(self, tokens_T: Sequence[int], positions_K: Sequence[int]) -> np.ndarray:
        """Natural log-probability (K,) in float32 of the token at each of ``positions_K``, given all before it.

        An engine that need not compute the logits of every position and token for it has its own.

        Raises:
            ValueError: a position is 0, which nothing comes before, or past the end.
        """
        tokens_T, positions_K = np.asarray(tokens_T, dtype=np.int64), checked_positions(tokens_T, positions_K)
        return self.log_probs(tokens_T.tolist())[positions_K - 1, tokens_T[positions_K]]

    @abstractmethod
    def time_once(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, float]:
        """Answer ``prompts`` together, greedily and past stop tokens, and time it.

        Returns:
            prefill_seconds: the forward pass over the prompts, up to the logits of the next token;
            first_token_seconds: that and the choice of the first token;
            decode_seconds: the ``new_tokens - 1`` further steps of the batch;
            tokens_generated: all of them, the first ones included (batch size x ``new_tokens``).
        """

    @abstractmethod
    def tokens_after(self, prompt: Sequence[int], max_new_tokens: int) -> Iterator[int]:
        """The ``max_new_tokens`` greedy tokens after ``prompt``, each as soon as it is known, stop tokens included."""

    def stream(self, prompt: Sequence[int], *, max_new_tokens: int) -> Iterator[str]:
        """The greedy answer to ``prompt`` in pieces of text as they come, up to a stop token."""
        tokens: list[int] = []
        shown = ""
        for token in self.tokens_after(prompt, max_new_tokens):
            if token in self.stop_ids:
                break
            tokens.append(token)
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            # A replacement character at the end: the bytes of a character are not all there yet.
            if not text.endswith("\ufffd"):
                yield text[len(shown):]
                shown = text

    def same_tokens(self, texts: Sequence[str]) -> list[str] | None:
        """Those of ``texts`` of which the engine's own tokenizer makes other tokens; None when it has none."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give the memory back; the engine cannot be used after it."""

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def checked_positions(tokens_T: Sequence[int], positions_K: Sequence[int]) -> np.ndarray:
    """``positions_K`` (K,) in int64; ValueError where one of them is no token that others come before."""
    positions_K = np.asarray(positions_K, dtype=np.int64)
    if len(positions_K) and not 0 < positions_K.min() <= positions_K.max() < len(tokens_T):
        raise ValueError(f"positions must lie in 1 to {len(tokens_T) - 1}")
    return positions_K


def configured_stop_ids(folder: Path) -> set[int]:
    """End-of-sequence ids in the generation_config.json of a model folder; empty without one."""
    try:
        ends = json.loads((folder / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
    except (FileNotFoundError, NotADirectoryError):
        return set()
    except ValueError:
        raise RefusedError(str(folder / "generation_config.json"), "is not JSON", "download the model again") from None
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def names() -> list[str]:
    """Names of the engines: the files of this folder."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def missing(name: str) -> str | None:
    """None when the engine ``name`` can run here, else the command that installs what it needs."""
    return _module(name).missing()


def open_engine(
    artifact: Artifact,
    *,
    dtype: str = "auto",
    threads: int | None = None,
    device: str | None = None,
    prefer: str | Sequence[str] | None = None,
) -> Engine:
    """Load ``artifact`` into the engine of its kind.

    Args:
        dtype: ``auto`` (as stored), ``fp32``, ``bf16``, ``fp16``, or ``fastest``: the same weights, computed in
            fp32 where a CPU is slower in 16 bits and its memory holds them. llama.cpp computes in its own.
        threads: CPU threads; None leaves what the environment says.
        device: where to run; None takes the first CUDA device, else the CPU.
        prefer: an engine's name, or several: the first that is installed is taken. ``hf`` reads a
            GGUF file by dequantizing its weights: right for log-probabilities, not for speed.

    Raises:
        MachineError: the engine's package is not installed; it says how to install it.
        RecipeError: there is no engine of that name.
        ModelError: the artifact does not load.
    """
    wanted = [prefer] if isinstance(prefer, str) else list(prefer or ENGINE_OF_KIND[artifact.kind])
    owed = {name: missing(name) for name in wanted}
    for name in wanted:
        if owed[name] is None:
            return _module(name).load(artifact, dtype=dtype, threads=threads, device=device)
    raise MachineError(f"engine {wanted[0]}", "is not installed", owed[wanted[0]] or "")


def _module(name: str):
    if name not in names():
        raise RecipeError(f"engine '{name}'", "does not exist", f"there are: {', '.join(names())}")
    return importlib.import_module(f"lora_kit.engines.{name}")
