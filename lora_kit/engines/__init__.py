"""Engines: one file for each way to run an artifact.

To add one, write ``lora_kit/engines/<name>.py`` with

* ``missing() -> str | None``: None, or the command that installs what the engine needs;
* ``load(artifact, *, dtype, threads, device) -> Engine``: the artifact, ready to run;
* ``computes(artifact, *, dtype, device) -> dict``: the type and the device that ``load`` would take, as JSON;

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
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit.errors import MachineError, ModelError, RecipeError
from lora_kit.model_files import configured_stop_ids as configured_stop_ids
from lora_kit.types import Artifact, Generation, Likelihood, Question

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
    likelihood_noise: float = 1e-4
    """Nats by which rounding moves the log-probability of a text: measured, or what fp32 comes to."""
    likelihood_note: str = ""
    """Why :meth:`likelihoods` takes a slower way than it could."""
    batches_likelihoods: bool = False
    """Whether :meth:`likelihoods` depends, by rounding, on which questions it is given together."""

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, ignore_stop: bool = False,
        until: Sequence[Sequence[str]] = (),
    ) -> list[Generation]:
        """Greedy answers to ``prompts`` (token ids), in their order.

        An answer ends before a stop token or a stop string (``stopped`` is then True) or after ``max_new_tokens``;
        with ``ignore_stop`` always after ``max_new_tokens``. An engine that can answer several together has its own.

        Args:
            until: the stop strings of each prompt; empty: none has any. Text after the first of them is not kept; of
                the tokens those that it stands in are.
        """
        answers, stops = [], stop_strings(self.tokenizer, until, len(prompts), ignore_stop)
        for prompt, strings in zip(prompts, stops, strict=True):
            # One by one: an answer does not depend on what it shares a batch with.
            tokens, stopped = [], False
            for token in self.tokens_after(prompt, max_new_tokens):
                stopped = token in self.stop_ids and not ignore_stop
                if stopped:
                    break
                tokens.append(token)
                if strings.reached(tokens):
                    break
            text, cut = strings.cut(self.tokenizer.decode(tokens, skip_special_tokens=True))
            answers.append(Generation(tokens=tuple(tokens), stopped=stopped or cut, text=text))
        return answers


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

    def summed_log_probs(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """For each of ``texts``, as :meth:`token_log_probs` takes them, the sum of what it gives, in float64.

        An engine that can read several texts together has its own.
        """
        return [float(self.token_log_probs(tokens_T, positions_K).sum(dtype=np.float64))
                for tokens_T, positions_K in texts]

    def likelihoods(self, questions: Sequence[Question], *, greedy: bool = False,
                    apart: bool = False) -> list[list[Likelihood]]:
        """How likely each continuation of each question is; the log-probabilities of its tokens, summed.

        An engine that can read what continuations share once has its own.

        Args:
            greedy: also say whether each token of a continuation is the most likely one.
            apart: no two questions in one batch.
        """
        return [[self._likelihood(question.context, continuation) for continuation in question.continuations]
                for question in questions]

    def _likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        # The last token is predicted, not read.
        rows_KV = self.log_probs([*context, *continuation[:-1]])[-len(continuation):]
        chosen_K = rows_KV[np.arange(len(continuation)), list(continuation)]
        return Likelihood(log_prob=float(chosen_K.sum(dtype=np.float64)),
                          greedy=bool((rows_KV.argmax(1) == np.asarray(continuation)).all()))

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


class StopStrings:
    """Whether an answer that grows token by token has come to one of its stop strings.

    Args:
        strings: none of them empty.
    """

    _SPARE = 4
    """Tokens beyond one for each byte of the longest string: special ones, which have no text, may stand between."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer, self._strings = tokenizer, tuple(strings)
        self._window = max((len(text.encode()) for text in strings), default=0) + self._SPARE

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether the text of ``tokens`` has a stop string, which it had not before the last token."""
        if not self._strings:
            return False
        # The end alone is decoded at each token; a hit is looked at in the whole, as a tokenizer may begin otherwise.
        end = self._text(tokens[-self._window:])
        return any(text in end for text in self._strings) and self.cut(self._text(tokens))[1]

    def cut(self, text: str) -> tuple[str, bool]:
        """``text`` up to the first stop string in it, and whether there is one."""
        found = [place for place in (text.find(each) for each in self._strings) if place >= 0]
        return (text[:min(found)], True) if found else (text, False)

    def _text(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


def stop_strings(tokenizer: Any, until: Sequence[Sequence[str]], num_prompts: int, ignore_stop: bool
                 ) -> list[StopStrings]:
    """The stop strings of each of ``num_prompts`` prompts; none where stops are ignored."""
    given = [()] * num_prompts if ignore_stop or not until else until
    if len(given) != num_prompts:
        raise ValueError(f"{len(given)} lists of stop strings for {num_prompts} prompts")
    return [StopStrings(tokenizer, strings) for strings in given]


def opened_gguf(artifact: Artifact, engine: str, package: str) -> tuple[Any, set[int]]:
    """(tokenizer, ids that end an answer) of the GGUF file ``artifact``, for an engine that needs ``package``.

    The ids are not the file's own list, which engines make by the tokens' names: every engine stops at the same.

    Raises:
        MachineError: the package is not installed.
        ModelError: it is no GGUF file, or no tokenizer is named beside it.
    """
    from lora_kit.chat import load_tokenizer, stop_token_ids

    owed = missing(engine)
    if owed:
        raise MachineError(f"engine {engine}", f"{package} is not installed", owed)
    if artifact.kind != "gguf":
        raise ModelError(artifact.path, "is not a GGUF file", "quantize the model to GGUF first")
    if artifact.tokenizer is None:
        raise ModelError(artifact.path, "names no tokenizer folder", "name the folder of the model it was made from")
    tokenizer = load_tokenizer(artifact.tokenizer)
    return tokenizer, {*stop_token_ids(tokenizer), *configured_stop_ids(Path(artifact.tokenizer))}


def threads_of(threads: int | None) -> int:
    """``threads``, or OMP_NUM_THREADS, or as many as the process may use.

    As torch does: a second thread on a core that someone else keeps busy costs more than it gives.
    """
    from lora_kit.hardware import usable_cores

    return threads or int(os.environ.get("OMP_NUM_THREADS") or usable_cores())


def checked_positions(tokens_T: Sequence[int], positions_K: Sequence[int]) -> np.ndarray:
    """``positions_K`` (K,) in int64; ValueError where one of them is no token that others come before."""
    positions_K = np.asarray(positions_K, dtype=np.int64)
    if len(positions_K) and not 0 < positions_K.min() <= positions_K.max() < len(tokens_T):
        raise ValueError(f"positions must lie in 1 to {len(tokens_T) - 1}")
    return positions_K


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
    on: Engine | None = None,
) -> Engine:
    """Load ``artifact`` into the engine of its kind.

    Args:
        dtype: ``auto`` (as stored), ``fp32``, ``bf16``, ``fp16``, or ``fastest``: the same weights, computed in
            fp32 where a CPU is slower in 16 bits and its memory holds them. llama.cpp computes in its own.
        threads: CPU threads; None leaves what the environment says.
        device: where to run; None takes the first CUDA device, else the CPU.
        prefer: an engine's name, or several: the first that is installed is taken. ``hf`` reads a
            GGUF file by dequantizing its weights: right for log-probabilities, not for speed.
        on: an engine that has the base of an adapter in memory, as this one would load it: the adapter is put onto
            that model, and the engine is closed. Only for :func:`shares_model`.

    Raises:
        MachineError: the engine's package is not installed; it says how to install it.
        RecipeError: there is no engine of that name.
        ModelError: the artifact does not load.
    """
    shared = {} if on is None else {"on": on}
    return _module(_chosen(artifact, prefer)).load(artifact, dtype=dtype, threads=threads, device=device, **shared)


def shares_model(base: Artifact, artifact: Artifact) -> bool:
    """Whether ``artifact`` is an adapter that can be put onto the model of an engine of ``base``.

    Not where the base is quantized: such a model may not be what it was once it has been run.
    """
    from lora_kit.model import read_config

    return (artifact.kind == "adapter" and base.kind == "hf" and artifact.base == base.path
            and not read_config(Path(base.path)).get("quantization_config"))


def computes(artifact: Artifact, *, dtype: str = "auto", device: str | None = None,
             prefer: str | Sequence[str] | None = None) -> dict[str, str]:
    """With what ``open_engine`` of the same arguments would compute: engine, dtype, device. Errors are the same."""
    name = _chosen(artifact, prefer)
    return {"engine": name, **_module(name).computes(artifact, dtype=dtype, device=device)}


def _chosen(artifact: Artifact, prefer: str | Sequence[str] | None) -> str:
    wanted = [prefer] if isinstance(prefer, str) else list(prefer or ENGINE_OF_KIND[artifact.kind])
    owed = {name: missing(name) for name in wanted}
    for name in wanted:
        if owed[name] is None:
            return name
    raise MachineError(f"engine {wanted[0]}", "is not installed", owed[wanted[0]] or "")


def _module(name: str):
    if name not in names():
        raise RecipeError(f"engine '{name}'", "does not exist", f"there are: {', '.join(names())}")
    return importlib.import_module(f"lora_kit.engines.{name}")
