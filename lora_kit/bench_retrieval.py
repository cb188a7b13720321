"""What retrieval costs a request: embedding the question, the look-up, and reading the passages before it.

A corpus of real text is cut into passages of so many tokens, and each is embedded once. Then every question is asked
with and without the passages that are nearest to it (largest cosine), in turns, up to the second token. Whether the
look-up finds anything is told by passages that are looked up by a piece of themselves.

Reads the corpus and a model; writes nothing.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lora_kit import speed_ratio
from lora_kit.bench_sweep import once
from lora_kit.chat import prompt_ids
from lora_kit.errors import DataError
from lora_kit.stats import wilson
from lora_kit.types import Artifact

SUFFIXES = (".md", ".rst", ".txt")
KNOWN_ITEMS = 32
"""Passages that are looked up by a piece of themselves, of PIECE_TOKENS from their middle."""
PIECE_TOKENS = 16
_TOGETHER = 8
_NEW_TOKENS = 2


class Embedder(Protocol):
    """What makes vectors of texts."""

    def corpus(self, texts: Sequence[str]) -> Any:
        """A matrix (N, D), dense or sparse, whose rows are of length 1."""

    def question(self, text: str) -> Any:
        """A vector (D,) of length 1, dense or a sparse row."""


class WordEmbedder:
    """TF-IDF of scikit-learn: 1 + log of how often a word occurs, times the log of how rare it is."""

    def corpus(self, texts: Sequence[str]) -> Any:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer = TfidfVectorizer(sublinear_tf=True)
        return self._vectorizer.fit_transform(texts)

    def question(self, text: str) -> Any:
        return self._vectorizer.transform([text])


class ModelEmbedder:
    """Means of the last hidden states of ``model`` (of transformers), less the corpus's own mean, as directions.

    Args:
        longest: tokens of a text that are read.
    """

    def __init__(self, model: Any, tokenizer: Any, longest: int) -> None:
        self.model, self.tokenizer, self.longest = model, tokenizer, longest

    def corpus(self, texts: Sequence[str]) -> np.ndarray:
        tokens = [self._tokens(text) for text in texts]
        vectors_ND: list[Any] = [None] * len(texts)
        # Texts of one length together: nothing is padded.
        order = sorted(range(len(texts)), key=lambda row: len(tokens[row]))
        while order:
            length = len(tokens[order[0]])
            rows = [row for row in order[:_TOGETHER] if len(tokens[row]) == length]
            for row, vector_D in zip(rows, self._means([tokens[row] for row in rows]), strict=True):
                vectors_ND[row] = vector_D
            order = order[len(rows):]
        found_ND = np.stack(vectors_ND)
        self._middle_D = found_ND.mean(0)
        return _directions(found_ND - self._middle_D)

    def question(self, text: str) -> np.ndarray:
        return _directions(self._means([self._tokens(text)])[0] - self._middle_D)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"][:self.longest] or [0]

    def _means(self, tokens: list[list[int]]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            out = self.model(input_ids=torch.tensor(tokens, device=self.model.device), use_cache=False,
                             output_hidden_states=True, logits_to_keep=1)
            return out.hidden_states[-1].float().mean(1).cpu().numpy()


def _directions(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def measure(artifact: dict[str, Any], *, asked: Sequence[dict[str, Any]], tools_mode: str, texts: Sequence[str],
            corpus: str, passages: int, passage_tokens: int, most: int, embed: str, seed: int, threads: int
            ) -> dict[str, Any]:
    """Load ``artifact`` in this process and ask it with and without passages; call it in one of its own.

    Args:
        asked: prompts, each with its ``messages`` and ``tools``; the last message of a user is the question.
        texts: of the corpus, one for each of its files.

    Returns:
        What :func:`of_engine` gives, with artifact, engine, corpus and threads.
    """
    from lora_kit.engines import open_engine

    with open_engine(Artifact(**artifact), threads=threads, prefer="hf") as engine:
        pieces = cut(engine.tokenizer, texts, passage_tokens)
        if len(pieces) < passages:
            raise DataError(f"bench.retrieval.corpus: {corpus}", f"has {len(pieces)} passages of {passage_tokens} "
                            f"tokens where {passages} are to be found", "name more text, or lower passage_tokens")
        drawn = sorted(random.Random(seed).sample(range(len(pieces)), min(most, len(pieces))))
        embedder = WordEmbedder() if embed == "tfidf" else ModelEmbedder(engine.model, engine.tokenizer, passage_tokens)
        found = of_engine(engine, embedder, [pieces[row] for row in drawn], asked, tools_mode=tools_mode,
                          passages=passages)
        return {"artifact": artifact["name"], "engine": engine.name, "threads": threads, "corpus": corpus,
                "corpus_passages": len(pieces), "passage_tokens": passage_tokens, "embed": embed, **found}


def cut(tokenizer: Any, texts: Sequence[str], passage_tokens: int) -> list[str]:
    """``texts`` in pieces of ``passage_tokens`` tokens; the rest of each text that is shorter than half is left out."""
    found = []
    for text in texts:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        for start in range(0, len(offsets), passage_tokens):
            piece = offsets[start:start + passage_tokens]
            if len(piece) >= passage_tokens / 2:
                found.append(text[piece[0][0]:piece[-1][1]])
    return found


def of_engine(engine: Any, embedder: Embedder, pieces: Sequence[str], asked: Sequence[dict[str, Any]], *,
              tools_mode: str, passages: int) -> dict[str, Any]:
    """Embed ``pieces``, and ask every question of ``asked`` with and without the nearest ``passages`` of them.

    Returns:
        passages, indexed, index_seconds, index_bytes, found (of how many known items), and of the questions, one number
        each: embed_seconds, look_up_seconds, and for ``plain`` and ``read`` (with passages) prompt_tokens,
        prefill_seconds, first_token_seconds (with retrieval, embedding and look-up are in it); ``measured``: seconds to
        the first token without over those with, paired.
    """
    longest = getattr(engine.model.config, "max_position_embeddings", None)
    started = time.perf_counter()
    matrix_ND = embedder.corpus(pieces)
    index_seconds = time.perf_counter() - started
    size = matrix_ND.nbytes if isinstance(matrix_ND, np.ndarray) else \
        matrix_ND.data.nbytes + matrix_ND.indices.nbytes + matrix_ND.indptr.nbytes

    def timed(text: str) -> tuple[list[int], float, float]:
        begun = time.perf_counter()
        vector_D = embedder.question(text)
        embedded = time.perf_counter()
        rows = nearest(matrix_ND, vector_D, passages)
        return rows, embedded - begun, time.perf_counter() - embedded

    found: dict[str, Any] = {"embed_seconds": [], "look_up_seconds": [],
                             **{kind: {"prompt_tokens": [], "prefill_seconds": [], "first_token_seconds": []}
                                for kind in ("plain", "read")}}
    for number, each in enumerate([asked[0], *asked]):  # the first warms up
        rows, embedding, looking = timed(question_of(each["messages"]))
        more = with_passages(each["messages"], [pieces[row] for row in rows])
        prompts = {"plain": each["messages"], "read": more}
        for kind in (("plain", "read"), ("read", "plain"))[number % 2]:
            prompt = prompt_ids(engine.tokenizer, prompts[kind], each["tools"], tools_mode=tools_mode)
            if longest and len(prompt) + _NEW_TOKENS > longest:
                raise DataError("bench.retrieval", f"a question with its passages has {len(prompt):,} tokens, over the "
                                f"model's {longest:,}", "lower passages or passage_tokens")
            taken = once(engine, [prompt], _NEW_TOKENS)
            if number:
                own = found[kind]
                own["prompt_tokens"].append(len(prompt))
                own["prefill_seconds"].append(taken["prefill_seconds"])
                own["first_token_seconds"].append(
                    taken["first_token_seconds"] + (embedding + looking if kind == "read" else 0.0))
        if number:
            found["embed_seconds"].append(embedding)
            found["look_up_seconds"].append(looking)
    ratio = speed_ratio.of_pairs(found["plain"]["first_token_seconds"], found["read"]["first_token_seconds"])
    return {"passages": passages, "indexed": len(pieces), "index_seconds": index_seconds, "index_bytes": size,
            "found": known_items(engine.tokenizer, pieces, lambda text: timed(text)[0]), "questions": len(asked),
            "measured": {**asdict(ratio), "verdict": ratio.verdict}, **found}


def known_items(tokenizer: Any, pieces: Sequence[str], look_up: Any) -> dict[str, Any]:
    """How many passages are among those found by PIECE_TOKENS from their middle, with the share's 95 % interval."""
    step = max(1, len(pieces) // KNOWN_ITEMS)
    tried = list(range(0, len(pieces), step))[:KNOWN_ITEMS]
    hits = 0
    for row in tried:
        offsets = tokenizer(pieces[row], add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        middle = offsets[max(0, (len(offsets) - PIECE_TOKENS) // 2):][:PIECE_TOKENS]
        hits += row in look_up(pieces[row][middle[0][0]:middle[-1][1]])
    low, high = wilson(hits, len(tried))
    return {"hits": hits, "tried": len(tried), "ci_low": low, "ci_high": high}


def nearest(matrix_ND: Any, vector_D: Any, number: int) -> list[int]:
    """The ``number`` rows of largest product with the vector, the nearest first."""
    scores_N = matrix_ND @ vector_D if isinstance(matrix_ND, np.ndarray) else (matrix_ND @ vector_D.T).toarray()[:, 0]
    return np.argsort(-scores_N, kind="stable")[:number].tolist()


def question_of(messages: Sequence[dict[str, Any]]) -> str:
    """What the user said last."""
    return next((message["content"] or "" for message in reversed(messages) if message["role"] == "user"), "")


def with_passages(messages: Sequence[dict[str, Any]], passages: Sequence[str]) -> list[dict[str, Any]]:
    """``messages`` with ``passages`` before what the user said last."""
    last = max((place for place, message in enumerate(messages) if message["role"] == "user"), default=None)
    shown = "\n\n".join(f"[{number}] {text}" for number, text in enumerate(passages, start=1))
    if last is None:
        return [{"role": "user", "content": shown}, *messages]
    content = f"Passages that may help:\n\n{shown}\n\nQuestion: {messages[last]['content'] or ''}"
    return [*messages[:last], {**messages[last], "content": content}, *messages[last + 1:]]


def corpus_texts(corpus: str, relative_to: Path) -> list[str]:
    """The texts of a corpus, one for each file that has any, in order of the files' names.

    Raises:
        DataError: there is no such file or package, or it has no text.
    """
    if corpus.startswith("python:"):
        from lora_kit.formats import python_docstrings

        by_file: dict[str, list[str]] = {}
        for origin, row in python_docstrings.records_of(corpus.removeprefix("python:")):
            by_file.setdefault(origin.rpartition(":")[0], []).append(f"{row['name']}: {row['docstring']}")
        return ["\n\n".join(texts) for texts in by_file.values()]
    path = relative_to / Path(corpus).expanduser()
    files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES) if path.is_dir() else [path]
    try:
        texts = [file.read_text(encoding="utf-8") for file in files if file.is_file()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"bench.retrieval.corpus: {corpus}", f"cannot be read ({error})", "name UTF-8 text") from None
    texts = [text for text in texts if text.strip()]
    if not texts:
        what = "has no text" if path.exists() else f"no such file ({path})"
        raise DataError(f"bench.retrieval.corpus: {corpus}", what,
                        f"name a file or folder of {', '.join(SUFFIXES)}, or python:stdlib")
    return texts
