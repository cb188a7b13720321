"""An artifact measured against the one that it was made from.

The reference answers the run's held-out tokens first, its log-probabilities go to a
temporary file, and it is closed; then the candidate answers the same tokens and each
position is compared. So memory holds one model and one row of logits at a time. The
arithmetic is float64, position by position: KL divergence of the candidate from the
reference (nats per token), agreement of the first choice, perplexity of the answers.

Shape suffixes: T positions of one row that predict a next token, V vocabulary.
Reads artifacts and the run's token files; writes a temporary file in the folder it is given.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit import hardware, tokens
from lora_kit.engines import Engine, open_engine
from lora_kit.errors import DataError, MachineError, ModelError
from lora_kit.types import Artifact

MAX_TOKENS = 2000
"""Tokens that a certificate reads, over all rows."""
MAX_ROW_TOKENS = 512
"""Longest row, so that the tokens come from several conversations; the rest of a row is cut off."""
_CHUNK = 32
_HEADROOM = 1.25


def held_out_rows(data_dir: Path, max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """The rows to measure on: held-out ones, or training rows when none were held out.

    Drawn in a fixed order from the whole split, each cut to :data:`MAX_ROW_TOKENS`, up to ``max_tokens`` together.

    Returns:
        ``split`` (``held_out`` or ``train``) and ``rows``: ``tokens``, ``trained`` (0/1 of each token), ``origin``.
    """
    for split in ("held_out", "train"):
        examples = tokens.read_examples(data_dir, split)
        rows, left = [], max_tokens
        for index in np.random.default_rng(0).permutation(len(examples)):
            example = examples[int(index)]
            length = min(len(example.tokens_T), MAX_ROW_TOKENS, left)
            if length < 2:
                continue
            rows.append({"tokens": [int(token) for token in example.tokens_T[:length]],
                         "trained": [int(flag) for flag in example.loss_mask_T[:length]], "origin": example.origin})
            left -= length
            if left < 2:
                break
        if rows:
            return {"split": split, "rows": rows}
    raise DataError(str(data_dir), "has no rows to measure on", "run the data stage again")


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A model's log-probabilities on ``rows``, in a file of float32 (positions of all rows, V)."""

    path: Path
    rows: Sequence[dict[str, Any]]
    num_tokens: int

    def of_rows(self) -> Iterator[np.ndarray]:
        """Log-probabilities (T, V) of one row after another, read from the file."""
        file = np.memmap(self.path, np.float32, "r").reshape(-1, self.num_tokens)
        first = 0
        for row in self.rows:
            num_positions = len(row["tokens"]) - 1
            yield file[first : first + num_positions]
            first += num_positions


def record(engine: Engine, rows: Sequence[dict[str, Any]], path: Path) -> Recording:
    """Write what ``engine`` says on ``rows`` to the file ``path``: 4 bytes x vocabulary for each position.

    Raises:
        MachineError: the file cannot be written.
    """
    try:
        with open(path, "wb") as file:
            for row in rows:
                engine.log_probs(row["tokens"])[:-1].astype(np.float32, copy=False).tofile(file)
    except OSError as error:
        raise MachineError(str(path), f"cannot be written ({error.strerror or error})", "free space") from None
    return Recording(path=path, rows=rows, num_tokens=engine.num_tokens)


@contextmanager
def recorded(engine: Engine, rows: Sequence[dict[str, Any]], scratch_dir: Path) -> Iterator[Recording]:
    """:func:`record` into a temporary file under ``scratch_dir`` that is gone after the block."""
    with tempfile.TemporaryDirectory(prefix=".certificate-", dir=scratch_dir) as folder:
        yield record(engine, rows, Path(folder) / "log_probs")


def compare(reference: Recording, candidate: Engine) -> dict[str, Any]:
    """Figures of ``candidate`` against the recorded ``reference``, over all positions but each row's last.

    Returns:
        num_rows, num_positions, num_answer_tokens (those that perplexity is over: the trained ones, or all
        where a split has none); mean_kl in nats per token with mean_kl_standard_error over rows (None for
        one row), p95_kl, p999_kl, max_kl; top1_agreement; perplexity_reference, perplexity_candidate,
        perplexity_ratio; max_log_prob_difference.

    Raises:
        ModelError: another vocabulary, or logits that are not finite.
    """
    if candidate.num_tokens != reference.num_tokens:
        raise ModelError(candidate.name, f"has {candidate.num_tokens} tokens where the reference has "
                         f"{reference.num_tokens}", "compare models of one vocabulary")
    import torch

    kl_of_rows: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    same_first = 0
    max_difference = 0.0
    any_trained = any(any(row["trained"][1:]) for row in reference.rows)
    for row, reference_TV in zip(reference.rows, reference.of_rows(), strict=True):
        candidate_TV = candidate.log_probs(row["tokens"])[:-1]
        kl_T = np.empty(len(candidate_TV))
        loss_T2 = np.empty((len(candidate_TV), 2))
        for first in range(0, len(candidate_TV), _CHUNK):
            part = slice(first, first + _CHUNK)
            # float32 log-probabilities sum to one within 1e-6 only: normalized again in float64.
            pair = [np.array(values[part]) for values in (reference_TV, candidate_TV)]
            p_TV, q_TV = (torch.from_numpy(values).double().log_softmax(dim=1) for values in pair)
            next_T1 = torch.tensor(row["tokens"][1:][part]).unsqueeze(1)
            loss_T2[part] = -torch.cat([p_TV.gather(1, next_T1), q_TV.gather(1, next_T1)], dim=1).numpy()
            same_first += int((pair[0].argmax(axis=1) == pair[1].argmax(axis=1)).sum())
            difference_TV = p_TV - q_TV
            kl_T[part] = torch.linalg.vecdot(p_TV.exp_(), difference_TV).numpy()
            max_difference = max(max_difference, float(difference_TV.abs_().max()))
        if not np.isfinite(kl_T).all():
            raise ModelError(candidate.name, "gives logits that are not finite", "use another dtype (bf16 or fp32)")
        kl_of_rows.append(kl_T)
        losses.append(loss_T2[np.asarray(row["trained"][1:]) == 1] if any_trained else loss_T2)
    kl_N, loss_N2 = np.concatenate(kl_of_rows), np.concatenate(losses)
    perplexity = np.exp(loss_N2.mean(axis=0))
    return {
        "num_rows": len(kl_of_rows),
        "num_positions": len(kl_N),
        "num_answer_tokens": len(loss_N2),
        "mean_kl": float(kl_N.mean()),
        "mean_kl_standard_error": _standard_error(kl_of_rows),
        "p95_kl": float(np.quantile(kl_N, 0.95)),
        "p999_kl": float(np.quantile(kl_N, 0.999)),
        "max_kl": float(kl_N.max()),
        "top1_agreement": same_first / len(kl_N),
        "perplexity_reference": float(perplexity[0]),
        "perplexity_candidate": float(perplexity[1]),
        "perplexity_ratio": float(perplexity[1] / perplexity[0]),
        "max_log_prob_difference": max_difference,
    }


def _standard_error(values_of_rows: Sequence[np.ndarray]) -> float | None:
    """Standard error of the mean over tokens when rows, not tokens, are independent (ratio estimator)."""
    num_rows = len(values_of_rows)
    if num_rows < 2:
        return None
    total = sum(len(values) for values in values_of_rows)
    mean = sum(float(values.sum()) for values in values_of_rows) / total
    residuals = [float(values.sum()) - mean * len(values) for values in values_of_rows]
    return math.sqrt(num_rows / (num_rows - 1) * sum(residual**2 for residual in residuals)) / total


def record_reference(
    *, artifact: dict[str, Any], rows: list[dict[str, Any]], path: str, num_samples: int = 2, sample_tokens: int = 40
) -> dict[str, Any]:
    """Record the reference once for every candidate; to be called in a fresh process.

    Args:
        artifact: fields of an Artifact in 16 bits. It runs in fp32 where memory allows, else in its stored type.
        path: the file to write the log-probabilities to; the caller removes it.
        num_samples: rows whose prompt is answered, greedily, with up to ``sample_tokens`` tokens.

    Returns:
        What :func:`measure` takes as ``reference``.
    """
    dtype, device = roomy(Artifact(**artifact))
    prompts = sample_prompts(rows, num_samples)
    with open_engine(Artifact(**artifact), dtype=dtype, device=device) as engine:
        answers = engine.generate(prompts, max_new_tokens=sample_tokens)
        recording = record(engine, rows, Path(path))
        return {"path": path, "num_tokens": recording.num_tokens, "engine": engine.name, "sample_tokens": sample_tokens,
                "samples": [{"prompt_tokens": prompt, "prompt": engine.tokenizer.decode(prompt),
                             "tokens": list(answer.tokens), "text": answer.text}
                            for prompt, answer in zip(prompts, answers, strict=True)]}


def measure(
    *, reference: dict[str, Any], candidate: dict[str, Any], prefer: list[str] | None, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Load ``candidate`` and compare it with the recorded ``reference``; to be called in a fresh process.

    Args:
        reference: what :func:`record_reference` returned for the same ``rows``.
        candidate: fields of an Artifact.
        prefer: names of engines for the candidate, the first that is installed; None for that of its kind.

    Returns:
        What :func:`compare` returns, and: ``reference`` and ``engine`` (how each ran); ``samples`` (prompt,
        reference, candidate, first_difference: index of the first token that differs, or None);
        ``tokenizer_differences``: of how many rows' texts the engine's own tokenizer makes other tokens than
        ours (None for an engine without one).
    """
    recording = Recording(path=Path(reference["path"]), rows=rows, num_tokens=reference["num_tokens"])
    samples = reference["samples"]
    with open_engine(Artifact(**candidate), prefer=prefer) as engine:
        figures = compare(recording, engine)
        answers = engine.generate([sample["prompt_tokens"] for sample in samples],
                                  max_new_tokens=reference["sample_tokens"])
        differing = engine.same_tokens([engine.tokenizer.decode(row["tokens"]) for row in rows])
        return figures | {
            "reference": reference["engine"],
            "engine": engine.name,
            "tokenizer_differences": None if differing is None else len(differing),
            "samples": [
                {"prompt": sample["prompt"], "reference": sample["text"], "candidate": answer.text,
                 "first_difference": first_difference(sample["tokens"], answer.tokens)}
                for sample, answer in zip(samples, answers, strict=True)
            ],
        }


def roomy(artifact: Artifact) -> tuple[str, str]:
    """(dtype, device) for a 16-bit artifact as a reference: fp32 where memory holds it, the GPU before the CPU."""
    needed = _HEADROOM * 2 * (artifact.size_bytes or 0)
    return ("fp32", roomy_device(needed)) if max(_free_bytes()) >= needed else ("auto", roomy_device(needed / 2))


def roomy_device(num_bytes: float) -> str:
    """``cuda:0`` when there is one with ``num_bytes`` free, else ``cpu``."""
    return "cuda:0" if _free_bytes()[0] >= max(1, num_bytes) else "cpu"


def _free_bytes() -> tuple[int, int]:
    """Free bytes of the first CUDA device (0 without one) and of main memory."""
    import torch

    return (torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0), hardware.memory_bytes()[1]


def sample_prompts(rows: Sequence[dict[str, Any]], count: int) -> list[list[int]]:
    """The tokens before the first answer of the first ``count`` rows that have both."""
    found = []
    for row in rows:
        if any(row["trained"]) and not row["trained"][0] and len(found) < count:
            found.append(row["tokens"][: row["trained"].index(1)])
    return found


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token in which two answers differ, an end included; None when they are equal."""
    if tuple(a) == tuple(b):
        return None
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
