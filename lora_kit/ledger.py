"""The ledger: where every row and every token of the data went, and the recount that checks it.

For each split and each source of it::

    rows in + repeated + split       = used + unusable + dropped + left out
    tokens in + repeated             = trained + context + dropped + cut

*Repeated* are further copies by a weight above 1 and, in tokens, what the pieces of a split row
say again (its system message, the template's opening); *split* are the further examples of a row
that became several. Padding is no data: it is made with the batches, and ``padded_tokens`` counts
it for those who make them.

``recount`` reads the token files and knows nothing of how they were written; ``check_recount``
holds the ledger against it. Torch-free. Reads token files; writes nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from lora_kit.errors import InternalError, RefusedError
from lora_kit.types import Batch
from lora_kit.units import count_text

SPLITS = ("train", "held_out")
ROWS_IN = ("rows_in", "rows_repeated", "rows_split")
ROWS_OUT = ("rows_used", "rows_unusable", "rows_dropped", "rows_left_out")
TOKENS_IN = ("tokens_in", "tokens_repeated")
TOKENS_OUT = ("tokens_trained", "tokens_context", "tokens_dropped", "tokens_cut")
COUNTS = (*ROWS_IN, *ROWS_OUT, *TOKENS_IN, *TOKENS_OUT, "turns_trained")
"""Every count of the ledger, in the order in which tables show them. Turns trained are those (and the plain texts)
that are trained on through their stop token."""

NAMED_ROWS = 3
"""Rows that a reason names."""
_TOKENS_AT_ONCE = 4_000_000
_HISTOGRAM_BARS = 16


@dataclass
class _Reason:
    rows: int = 0
    tokens: int = 0
    examples: list[str] = field(default_factory=list)


class Ledger:
    """Counts by split and source, and reasons with the first rows that they befell. Memory does not grow with rows."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
        self.reasons: dict[tuple[str, str, str], _Reason] = defaultdict(_Reason)

    def count(self, split: str, source: str, **numbers: int) -> None:
        """Add ``numbers`` (names of COUNTS) to those of a source."""
        assert set(numbers) <= set(COUNTS), numbers
        self.counts[split, source].update(numbers)

    def note(self, split: str, source: str, reason: str, origins: Iterable[str], *, rows: int = 1,
             tokens: int = 0) -> None:
        """``rows`` rows were left out or changed for ``reason``; ``tokens`` were dropped or cut by it."""
        found = self.reasons[split, source, reason]
        found.rows += rows
        found.tokens += tokens
        for origin in origins:
            if len(found.examples) < NAMED_ROWS:
                found.examples.append(origin)

    def drop(self, split: str, source: str, reason: str, origin: str, tokens: int) -> None:
        """A row or a piece of one with ``tokens`` tokens is dropped."""
        self.count(split, source, rows_dropped=1, tokens_dropped=tokens)
        self.note(split, source, reason, [origin], tokens=tokens)

    def leave_out(self, split: str, source: str, reason: str, origins: Iterable[str], rows: int) -> None:
        """``rows`` usable rows are not taken; nothing is noted when there are none."""
        if rows:
            self.count(split, source, rows_left_out=rows)
            self.note(split, source, reason, origins, rows=rows)

    def total(self, split: str, name: str) -> int:
        """One count over all sources of a split."""
        return sum(counts[name] for (at, _), counts in self.counts.items() if at == split)

    def reasons_text(self, split: str) -> str:
        """The commonest reasons in a few words, for an error."""
        counted: Counter = Counter()
        for (at, _, reason), found in self.reasons.items():
            counted[reason] += found.rows if at == split else 0
        return ", ".join(f"{number} {reason}" for reason, number in counted.most_common(3) if number)

    def check_balance(self) -> None:
        """InternalError when rows or tokens of a source came in and did not go anywhere."""
        for (split, source), counts in self.counts.items():
            for unit, into, out in (("rows", ROWS_IN, ROWS_OUT), ("tokens", TOKENS_IN, TOKENS_OUT)):
                num_in, num_out = (sum(counts[name] for name in names) for names in (into, out))
                if num_in != num_out or any(counts[name] < 0 for name in (*into, *out)):
                    raise InternalError(f"data: {source}", f"the ledger of the {_words(split)} rows does not balance: "
                                        f"{num_in} {unit} in, {num_out} out ({dict(counts)})", "report it as a bug")

    def as_dict(self) -> dict[str, Any]:
        """Counts by split and by source, and the reasons, as JSON values."""
        return {
            "splits": {split: {name: self.total(split, name) for name in COUNTS} for split in SPLITS},
            "sources": [{"split": split, "source": source, **{name: counts[name] for name in COUNTS}}
                        for (split, source), counts in self.counts.items()],
            "reasons": [{"split": split, "source": source, "reason": reason, "rows": found.rows,
                         "tokens": found.tokens, "examples": found.examples}
                        for (split, source, reason), found in sorted(self.reasons.items())],
        }


# ---- the recount -----------------------------------------------------------------------


def recount(folder: Path, split: str, stop_ids: Sequence[int] = ()) -> dict[str, int]:
    """Rows and tokens of a split, counted from its files alone, in little memory.

    Returns:
        ``rows_used``, ``tokens_trained`` (the mask without each row's first token, which nothing predicts),
        ``tokens_context`` (the other tokens), ``rows_without_trained`` and ``stops_trained`` (trained tokens that
        are one of ``stop_ids``).

    Raises:
        RefusedError: the files are missing, broken, or do not fit each other.
    """
    try:
        offsets = numpy.load(folder / f"{split}.offsets.npy", allow_pickle=False)
        mode = "r" if len(offsets) > 1 else None  # a file without tokens cannot be mapped
        tokens = numpy.load(folder / f"{split}.tokens.npy", mmap_mode=mode, allow_pickle=False)
        mask = numpy.load(folder / f"{split}.mask.npy", mmap_mode=mode, allow_pickle=False)
        if offsets[0] != 0 or (numpy.diff(offsets) <= 0).any():
            raise ValueError("the offsets do not rise")
        if not offsets[-1] == len(tokens) == len(mask):
            raise ValueError(f"{offsets[-1]} tokens by the offsets, {len(tokens)} tokens, a mask of {len(mask)}")
        trained = without = first = stops = 0
        while first < len(offsets) - 1:
            # By tokens, not by rows: numpy widens what it sums to eight bytes each.
            end = int(numpy.searchsorted(offsets, offsets[first] + _TOKENS_AT_ONCE, side="right")) - 1
            places = offsets[first:max(end, first + 1) + 1]
            first += len(places) - 1
            part, starts = mask[places[0]:places[-1]], places[:-1] - places[0]
            if part.max(initial=0) > 1:
                raise ValueError("a mask holds more than 0 and 1")
            by_row = numpy.add.reduceat(part, starts, dtype=numpy.int64) - part[starts]
            trained += int(by_row.sum())
            without += int((by_row == 0).sum())
            stops += int(numpy.isin(tokens[places[0]:places[-1]][part == 1], stop_ids).sum()) if len(stop_ids) else 0
    except (OSError, ValueError, EOFError, IndexError, TypeError) as error:
        raise RefusedError(f"{folder}/{split}.*", f"the token files are not whole ({error})",
                           "remove that folder and run again") from None
    return {"rows_used": len(offsets) - 1, "tokens_trained": trained, "tokens_context": int(offsets[-1]) - trained,
            "rows_without_trained": without, "stops_trained": stops}


def check_recount(folder: Path, ledger: dict[str, Any]) -> None:
    """RefusedError when the token files in ``folder`` do not hold what ``ledger`` (its JSON) says."""
    for split, counts in ledger["splits"].items():
        found = recount(folder, split, ledger.get("stop_ids", ()))
        for name in ("rows_used", "tokens_trained", "tokens_context"):
            if found[name] != counts[name]:
                raise RefusedError(f"{folder}/{split}.*", f"hold {found[name]:,} {_words(name)} by recount, the ledger "
                                   f"says {counts[name]:,}", "remove that folder and run again")
        # More than one to a turn is possible: an answer may say a stop token, and prompts may be trained too.
        if found["stops_trained"] < counts.get("turns_trained", 0):
            raise RefusedError(f"{folder}/{split}.*", f"train {found['stops_trained']:,} stop tokens by recount, the "
                               f"ledger says {counts['turns_trained']:,} turns end in one",
                               "remove that folder and run again")
        if found["rows_without_trained"]:
            raise RefusedError(f"{folder}/{split}.*", f"{found['rows_without_trained']:,} rows have no trained token",
                               "remove that folder and run again")


def check_batch(batch: Batch, *, num_trained: int, num_tokens: int, origins: Sequence[str]) -> None:
    """InternalError when a batch does not hold the tokens of its rows, or not those to train on.

    Counted from the tensors that the model and the loss are given, not from what made them: a label lost to padding,
    a row cut, a token that the attention mask hides or a row's first token predicted from its neighbour shows here.

    Args:
        num_trained, num_tokens: of the batch's rows, by the token files.
        origins: where those rows come from.
    """
    packed = batch.attention_mask_BT is None
    # A shared prefix stands there once, and is read by every row.
    again = batch.prefix_length * (len(batch.document_lengths) - 1)
    seen = batch.tokens_BT.numel() + again if packed else int(batch.attention_mask_BT.sum())
    trained = int((batch.labels_BT[:, 1:] >= 0).sum())
    if (trained, seen) != (num_trained, num_tokens):
        raise InternalError(f"batch of {', '.join(origins[:NAMED_ROWS])}", f"holds {trained:,} trained tokens of "
                            f"{seen:,} by recount, its rows in the token files {num_trained:,} of {num_tokens:,}",
                            "report it as a bug")


def padded_tokens(lengths: Sequence[int] | Mapping[int, int], micro_batches: Iterable[Sequence[int]]) -> int:
    """Padding of ``micro_batches`` (row numbers each): every row is filled up to the longest of its micro-batch.

    For the loop that makes the batches; a packed row has no padding, and 0 is the right count there.
    """
    return sum(max(lengths[row] for row in rows) * len(rows) - sum(lengths[row] for row in rows)
               for rows in micro_batches if rows)


# ---- lengths ---------------------------------------------------------------------------


def lengths_of(offsets: dict[str, numpy.ndarray]) -> dict[str, Any]:
    """What the ledger says of lengths: ``lengths`` of the training examples, ``histogram`` of both splits.

    Args:
        offsets: of each split, of length rows + 1.

    Returns:
        ``histogram.edges`` has one entry more than the counts of a split; a bar holds lengths from its edge up to,
        not including, the next.
    """
    lengths = {split: numpy.diff(each) for split, each in offsets.items()}
    longest = max((int(each.max()) for each in lengths.values() if len(each)), default=1)
    width = _round_up((longest + 1) / _HISTOGRAM_BARS)
    edges = [width * index for index in range(-(-(longest + 1) // width) + 1)]
    train = lengths["train"]
    return {
        "lengths": {"median": float(numpy.median(train)), "max": int(train.max()), "mean": float(train.mean())},
        "histogram": {"edges": edges, **{split: numpy.histogram(each, edges)[0].tolist()
                                         for split, each in lengths.items()}},
    }


def _round_up(width: float) -> int:
    """The next of 1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64 ... that is not below ``width``: edges that read well."""
    steps = [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64]
    power = 1
    while True:
        for step in steps:
            if step * power >= width:
                return step * power
        power *= 10


# ---- tables ----------------------------------------------------------------------------


def split_rows(ledger: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table: the name of a count, and the count of each split; counts that are zero everywhere left out."""
    splits = ledger["splits"]
    names = list(dict.fromkeys(name for counts in splits.values() for name in counts))
    return [(_words(name), *(count_text(counts.get(name, 0)) for counts in splits.values()))
            for name in names if any(counts.get(name) for counts in splits.values())]


def source_rows(ledger: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table: split, source, rows in and used, then tokens in, trained, context, dropped and cut."""
    return [(_words(item["split"]), item["source"],
             *(count_text(item[name]) for name in ("rows_in", "rows_used", "tokens_in", *TOKENS_OUT)))
            for item in ledger.get("sources", ())]


SOURCE_COLUMNS = ("", "source", "rows in", "used", "tokens in", "trained", "context", "dropped", "cut")
"""Columns of :func:`source_rows`."""


def reason_rows(ledger: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table: split, reason, rows, tokens, source, the first rows."""
    return [(_words(item["split"]), item["reason"], count_text(item["rows"]), count_text(item.get("tokens", 0)),
             item.get("source") or "–", ", ".join(item["examples"]) or "–") for item in ledger["reasons"]]


REASON_COLUMNS = ("", "reason", "rows", "tokens", "source", "first")
"""Columns of :func:`reason_rows`."""


def histogram_rows(ledger: dict[str, Any], width: int = 40) -> list[tuple[str, ...]]:
    """Rows of a table: a range of lengths in tokens, training examples, held-out ones, a bar of both together."""
    found = ledger.get("histogram")
    if not found:
        return []
    edges, train, held_out = found["edges"], found["train"], found["held_out"]
    most = max(a + b for a, b in zip(train, held_out, strict=True)) or 1
    rows = []
    for low, high, in_train, in_held_out in zip(edges, edges[1:], train, held_out, strict=False):
        # A bar is never shorter than a character where there is an example.
        length = -(-width * (in_train + in_held_out) // most)
        rows.append((f"{low:,} to {high - 1:,}", count_text(in_train), count_text(in_held_out), "█" * length))
    return rows


HISTOGRAM_COLUMNS = ("tokens", "train", "held out", "")
"""Columns of :func:`histogram_rows`."""


def duplicate_text(ledger: dict[str, Any]) -> str:
    """One sentence on duplicates within train."""
    found = ledger.get("duplicates")
    if not found:
        return "Duplicates were not counted."
    if not found["rows"] and not found["examples"]:
        return "No training row says the same as another, none has the same tokens as another."
    first = f" (the first: {', '.join(found['origins'])})" if found["origins"] else ""
    done = "left out" if found["dropped"] else "kept"
    return (f"{count_text(found['rows'])} training rows say the same as an earlier one, "
            f"{count_text(found['examples'])} more have the same tokens as one; {done}{first}.")


def _words(name: str) -> str:
    return name.replace("_", " ")
