"""An artifact measured against the one that it was made from.

The reference answers held-out rows of the run and fourteen paragraphs of plain prose first, and is closed; then the
candidate answers the same tokens and each position is compared. Of the reference are kept, at each position, its
:data:`TOP_K` likeliest tokens, the log-probability of all others together, and that of the token that follows:
megabytes where all logits would be gigabytes. The divergence over these groups is never more than over all tokens, and
what it lacks is measured where everything is kept, at up to :data:`WHOLE_POSITIONS` positions. The arithmetic is
float64: KL divergence of the candidate from the reference (nats per token), agreement of the first choice, perplexity
of the answers.

Shape suffixes: T positions of one row that predict a next token, N those of all rows, K likeliest tokens, V vocabulary.
Reads artifacts and the run's token files; writes the folder that it is given.
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

from lora_kit import greedy, hardware, tokens
from lora_kit.engines import Engine, open_engine
from lora_kit.errors import DataError, MachineError, ModelError
from lora_kit.types import Artifact

MAX_TOKENS = 2000
"""Tokens of the run's rows that a certificate reads."""
MAX_ROW_TOKENS = 512
"""Longest row, so that the tokens come from several conversations; the rest of a row is cut off."""
TOP_K = 1024
"""Tokens whose log-probability is kept at each position, 12 bytes each."""
WHOLE_POSITIONS = 64
"""Positions at which all log-probabilities are kept (4 bytes each), to measure what the others lack."""
SETS = ("rows", "prose")
_CHUNK = 32
_HEADROOM = 1.25
_PROSE = Path(__file__).parent / "prose.txt"


def held_out_rows(data_dir: Path, max_tokens: int = MAX_TOKENS) -> dict[str, Any]:
    """The rows to measure on: held-out ones, or training rows when none were held out.

    Drawn in a fixed order from the whole split, each cut to :data:`MAX_ROW_TOKENS`, up to ``max_tokens`` together.

    Returns:
        ``split`` (``held_out`` or ``train``) and ``rows``: ``tokens``, ``trained`` (0/1 of each token), ``origin``,
        ``set``.
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
                         "trained": [int(flag) for flag in example.loss_mask_T[:length]], "origin": example.origin,
                         "set": "rows"})
            left -= length
            if left < 2:
                break
        if rows:
            return {"split": split, "rows": rows}
    raise DataError(str(data_dir), "has no rows to measure on", "run the data stage again")


def prose_rows(tokenizer) -> list[dict[str, Any]]:
    """The paragraphs of ``prose.txt`` as rows, nothing of them trained. They were written for lora-kit, and so stand in
    no training data."""
    start = [] if tokenizer.bos_token_id is None else list(tokenizer("")["input_ids"][:1])
    return [{"tokens": start + tokenizer(text.strip(), add_special_tokens=False)["input_ids"][:MAX_ROW_TOKENS],
             "trained": None, "origin": f"prose.txt:{number}", "set": "prose"}
            for number, text in enumerate(_PROSE.read_text(encoding="utf-8").split("\n\n"), 1) if text.strip()]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What a model said on ``rows``, in the folder ``path``: memory-mapped arrays, positions of all rows in order.

    ``ids`` and ``log_probs`` (N, K) of the likeliest tokens, ``rest`` (N,) of all others together, ``first`` (N,) the
    first choice, ``next`` (N,) of the token that follows; ``whole`` (W, V) at the positions ``whole_at`` (W,).
    """

    path: Path
    rows: Sequence[dict[str, Any]]
    num_tokens: int

    def load(self, name: str) -> np.ndarray:
        return np.load(self.path / f"{name}.npy", mmap_mode="r")

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.glob("*.npy"))


def record(engine: Engine, rows: Sequence[dict[str, Any]], path: Path) -> Recording:
    """Write what ``engine`` says on ``rows`` to the new folder ``path``.

    Raises:
        MachineError: it cannot be written.
    """
    import torch

    num_positions = sum(len(row["tokens"]) - 1 for row in rows)
    kept = min(TOP_K, engine.num_tokens)
    whole_at = np.unique(np.linspace(0, num_positions - 1, min(WHOLE_POSITIONS, num_positions)).round().astype(int))
    shapes = {"ids": (np.int32, (num_positions, kept)), "log_probs": (np.float64, (num_positions, kept)),
              "rest": (np.float64, (num_positions,)), "first": (np.int32, (num_positions,)),
              "next": (np.float64, (num_positions,)), "whole": (np.float32, (len(whole_at), engine.num_tokens)),
              "whole_at": (np.int64, (len(whole_at),))}
    try:
        path.mkdir(parents=True)
        arrays = {name: np.lib.format.open_memmap(path / f"{name}.npy", "w+", dtype, shape)
                  for name, (dtype, shape) in shapes.items()}
        arrays["whole_at"][:] = whole_at
        start = 0
        for row in rows:
            values_TV = engine.log_probs(row["tokens"])[:-1]
            for first in range(0, len(values_TV), _CHUNK):
                chunk_TV = np.array(values_TV[first : first + _CHUNK])
                here = slice(start + first, start + first + len(chunk_TV))
                # float32 log-probabilities sum to one within 1e-6 only: normalized again in float64.
                p_TV = torch.from_numpy(chunk_TV).double().log_softmax(dim=1)
                top = p_TV.topk(kept, dim=1)
                next_T1 = torch.tensor(row["tokens"][1:][first : first + _CHUNK]).unsqueeze(1)
                arrays["ids"][here], arrays["log_probs"][here] = top.indices.numpy(), top.values.numpy()
                arrays["rest"][here] = _rest(p_TV, top.indices).numpy()
                arrays["first"][here] = chunk_TV.argmax(axis=1)
                arrays["next"][here] = p_TV.gather(1, next_T1)[:, 0].numpy()
                for place in np.flatnonzero((whole_at >= here.start) & (whole_at < here.stop)):
                    arrays["whole"][place] = chunk_TV[whole_at[place] - here.start]
            start += len(values_TV)
        for array in arrays.values():
            array.flush()
    except OSError as error:
        raise MachineError(str(path), f"cannot be written ({error.strerror or error})", "free space") from None
    return Recording(path=path, rows=rows, num_tokens=engine.num_tokens)


def _rest(log_probs_TV, ids_TK):
    """Log-probability (T,) of all tokens but those of ``ids_TK``; -inf where none is left."""
    return log_probs_TV.scatter(1, ids_TK.long(), -math.inf).logsumexp(dim=1)


@contextmanager
def recorded(engine: Engine, rows: Sequence[dict[str, Any]], scratch_dir: Path) -> Iterator[Recording]:
    """:func:`record` into a temporary folder under ``scratch_dir`` that is gone after the block."""
    with tempfile.TemporaryDirectory(prefix=".certificate-", dir=scratch_dir) as folder:
        yield record(engine, rows, Path(folder) / "recording")


def compare(reference: Recording, candidate: Engine) -> dict[str, Any]:
    """Figures of ``candidate`` against the recorded ``reference``, over all positions but each row's last.

    Returns:
        Of the run's rows: num_rows, num_positions, num_answer_tokens (those that perplexity is over: the trained ones,
        or all where a split has none); mean_kl in nats per token with mean_kl_standard_error over rows (None for
        one row), p95_kl, p999_kl, max_kl; top1_agreement; perplexity_reference, perplexity_candidate,
        perplexity_ratio; max_log_prob_difference (of the tokens that are kept); ``losses`` (for each row: sum over its
        answer tokens in the reference, in the candidate, and their number). ``prose``: the same of the paragraphs, with
        perplexity over all their tokens; None where no row is of them. ``kept``: top_k, mean_rest (probability of
        the other tokens together), num_whole, mean_missing and max_missing (nats by which the divergence over all
        tokens is above the one over the kept groups, where everything is kept), num_bytes.

    Raises:
        ModelError: another vocabulary, or logits that are not finite.
    """
    if candidate.num_tokens != reference.num_tokens:
        raise ModelError(candidate.name, f"has {candidate.num_tokens} tokens where the reference has "
                         f"{reference.num_tokens}", "compare models of one vocabulary")
    names = ("ids", "log_probs", "rest", "first", "next", "whole", "whole_at")
    kept, start, found, missing = {name: reference.load(name) for name in names}, 0, [], []
    for row in reference.rows:
        candidate_TV = candidate.log_probs(row["tokens"])[:-1]
        found.append(_compare_row(row, candidate_TV, kept, start, missing))
        if not np.isfinite(found[-1].kl_T).all():
            raise ModelError(candidate.name, "gives logits that are not finite", "use another dtype (bf16 or fp32)")
        start += len(candidate_TV)
    of_set = {name: [row for row, given in zip(found, reference.rows, strict=True)
                     if given.get("set", "rows") == name] for name in SETS}
    figures = {name: _figures(rows) if rows else None for name, rows in of_set.items()}
    return {**(figures["rows"] or {}), "prose": figures["prose"], "kept": {
        "top_k": kept["ids"].shape[1], "mean_rest": float(np.exp(kept["rest"]).mean()), "num_whole": len(missing),
        "mean_missing": float(np.mean(missing)), "max_missing": float(np.max(missing)),
        "num_bytes": reference.num_bytes}}


@dataclass(frozen=True, kw_only=True)
class _Row:
    kl_T: np.ndarray
    loss_T2: np.ndarray
    is_answer_T: np.ndarray
    num_same_first: int
    max_difference: float


def _compare_row(row: dict[str, Any], candidate_TV: np.ndarray, kept: dict[str, np.ndarray], start: int,
                 missing: list[float]) -> _Row:
    """One row's figures; appends to ``missing`` where everything is kept."""
    import torch

    kl_T, loss_T2 = np.empty(len(candidate_TV)), np.empty((len(candidate_TV), 2))
    same_first, max_difference = 0, 0.0
    for first in range(0, len(candidate_TV), _CHUNK):
        part = slice(first, first + _CHUNK)
        chunk_TV = np.array(candidate_TV[part])
        here = slice(start + first, start + first + len(chunk_TV))
        q_TV = torch.from_numpy(chunk_TV).double().log_softmax(dim=1)
        ids_TK = torch.from_numpy(np.array(kept["ids"][here])).long()
        p_TK = torch.from_numpy(np.array(kept["log_probs"][here])).double()
        rest_T = torch.from_numpy(np.array(kept["rest"][here]))
        q_TK = q_TV.gather(1, ids_TK)
        # Where nothing is left (the whole vocabulary is kept) the rest is -inf on both sides and counts nothing.
        rest_difference_T = torch.where(rest_T.isinf(), 0.0, rest_T - _rest(q_TV, ids_TK))
        kl_here_T = torch.linalg.vecdot(p_TK.exp(), p_TK - q_TK) + rest_T.exp() * rest_difference_T
        kl_T[part] = kl_here_T.numpy()
        next_T1 = torch.tensor(row["tokens"][1:][part]).unsqueeze(1)
        loss_T2[part, 0] = -kept["next"][here]
        loss_T2[part, 1] = -q_TV.gather(1, next_T1)[:, 0].numpy()
        same_first += int((chunk_TV.argmax(axis=1) == kept["first"][here]).sum())
        max_difference = max(max_difference, float((p_TK - q_TK).abs().max()))
        for place in np.flatnonzero((kept["whole_at"] >= here.start) & (kept["whole_at"] < here.stop)):
            number = int(kept["whole_at"][place]) - here.start
            p_V = torch.from_numpy(np.array(kept["whole"][place])).double().log_softmax(dim=0)
            missing.append(float(torch.dot(p_V.exp(), p_V - q_TV[number])) - float(kl_here_T[number]))
    flags = row["trained"]
    is_answer_T = np.zeros(len(kl_T), bool) if flags is None else np.asarray(flags[1:]) == 1
    return _Row(kl_T=kl_T, loss_T2=loss_T2, is_answer_T=is_answer_T, num_same_first=same_first,
                max_difference=max_difference)


def _figures(rows: list[_Row]) -> dict[str, Any]:
    any_answer = any(row.is_answer_T.any() for row in rows)
    losses = [row.loss_T2[row.is_answer_T] if any_answer else row.loss_T2 for row in rows]
    kl_N, loss_N2 = np.concatenate([row.kl_T for row in rows]), np.concatenate(losses)
    perplexity = np.exp(loss_N2.mean(axis=0))
    return {
        "num_rows": len(rows),
        "num_positions": len(kl_N),
        "num_answer_tokens": len(loss_N2),
        "mean_kl": float(kl_N.mean()),
        "mean_kl_standard_error": _standard_error([row.kl_T for row in rows]),
        "p95_kl": float(np.quantile(kl_N, 0.95)),
        "p999_kl": float(np.quantile(kl_N, 0.999)),
        "max_kl": float(kl_N.max()),
        "top1_agreement": sum(row.num_same_first for row in rows) / len(kl_N),
        "perplexity_reference": float(perplexity[0]),
        "perplexity_candidate": float(perplexity[1]),
        "perplexity_ratio": float(perplexity[1] / perplexity[0]),
        "max_log_prob_difference": max(row.max_difference for row in rows),
        "losses": [[*map(float, values.sum(axis=0)), len(values)] for values in losses],
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


def record_reference(*, artifact: dict[str, Any], rows: list[dict[str, Any]], path: str) -> dict[str, Any]:
    """Record the reference once for every candidate; to be called in a fresh process.

    Args:
        artifact: fields of an Artifact in 16 bits. It runs in fp32 where memory allows, else in its stored type.
        path: the folder to write what it says to; the caller removes it.

    Returns:
        What :func:`measure` takes as ``reference``.
    """
    dtype, device = roomy(Artifact(**artifact))
    with open_engine(Artifact(**artifact), dtype=dtype, device=device) as engine:
        return record_engine(engine, rows, Path(path))


def record_engine(engine: Engine, rows: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """:func:`record_reference` of an engine that is loaded."""
    rows = [*rows, *prose_rows(engine.tokenizer)]
    recording = record(engine, rows, path)
    return {"path": str(path), "num_tokens": recording.num_tokens, "engine": engine.name, "rows": rows,
            "answers": greedy.answer(engine, rows)}


def recording_of(reference: dict[str, Any]) -> Recording:
    """The recording that :func:`record_reference` made."""
    return Recording(path=Path(reference["path"]), rows=reference["rows"], num_tokens=reference["num_tokens"])


def measure(*, reference: dict[str, Any], candidate: dict[str, Any], prefer: list[str] | None = None) -> dict[str, Any]:
    """Load ``candidate`` and compare it with the recorded ``reference``; to be called in a fresh process.

    Args:
        reference: what :func:`record_reference` returned.
        candidate: fields of an Artifact.
        prefer: names of engines for the candidate, the first that is installed; None for that of its kind.

    Returns:
        What :func:`measure_engine` returns.
    """
    with open_engine(Artifact(**candidate), prefer=prefer) as engine:
        return measure_engine(reference, engine)


def measure_engine(reference: dict[str, Any], engine: Engine) -> dict[str, Any]:
    """What :func:`compare` returns, and: ``reference`` and ``engine`` (how each ran); ``answers`` (see
    :func:`lora_kit.greedy.compare_answers`); ``tokenizer_differences``: of how many rows' texts the engine's own
    tokenizer makes other tokens than ours (None for an engine without one).
    """
    rows, figures = reference["rows"], compare(recording_of(reference), engine)
    differing = engine.same_tokens([engine.tokenizer.decode(row["tokens"]) for row in rows])
    return figures | {
        "reference": reference["engine"], "engine": engine.name,
        "answers": greedy.compare_answers(reference["answers"], engine),
        "tokenizer_differences": None if differing is None else len(differing),
    }


def answer_losses(*, artifact: dict[str, Any], rows: list[dict[str, Any]]) -> list[float]:
    """Sum of an artifact's losses over each row's answer tokens (all of them where no row has one), in fp32 where
    memory allows; to be called in a fresh process."""
    dtype, device = roomy(Artifact(**artifact))
    any_answer = any(any(row["trained"][1:]) for row in rows)
    with open_engine(Artifact(**artifact), dtype=dtype, device=device) as engine:
        sums = []
        for row in rows:
            positions = [place for place in range(1, len(row["tokens"])) if row["trained"][place] or not any_answer]
            sums.append(-float(engine.token_log_probs(row["tokens"], positions).astype(np.float64).sum())
                        if positions else 0.0)
        return sums


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
