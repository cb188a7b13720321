"""Which rows are trained on and which are held out: limits, the split, duplicates, overlap, weights.

Each source is read once, its usable conversations go into a :class:`lora_kit.spool.Spool`, and
from then on rows are numbers there: what is decided here needs 8 bytes a row and no tokenizer.
Every draw is numpy's PCG64 with the recipe's seed, so the same recipe takes the same rows.

Torch-free. Reads the sources; writes the spool and the ledger that it is given.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy

from lora_kit import formats, suite
from lora_kit.errors import DataError, LoraKitError
from lora_kit.events import Caution, Note, tell
from lora_kit.ledger import NAMED_ROWS, Ledger
from lora_kit.overlap import HELD_OUT, Probes
from lora_kit.prepared import Prepared
from lora_kit.recipe import DataSource, Recipe
from lora_kit.rows import rows_of
from lora_kit.sources import Resolved
from lora_kit.spool import Spool
from lora_kit.types import Conversation

_TELL_EVERY_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class Part:
    """Rows of one source in the order in which they are written; those after ``num_first`` are further copies."""

    source: str
    rows: numpy.ndarray
    num_first: int


class Selection:
    """One selection: sources in, row numbers out. ``repeats`` are rows that say the same as an earlier one."""

    def __init__(self, recipe: Recipe, found: Prepared, spool: Spool, ledger: Ledger) -> None:
        self.recipe, self.found, self.spool, self.ledger = recipe, found, spool, ledger
        self.repeats = numpy.zeros(0, numpy.int64)
        self.held_out_overlap: list[dict[str, Any]] = []
        self.task_overlap: list[dict[str, Any]] | None = None

    def select(self) -> dict[str, list[Part]]:
        """The parts of each split, in order.

        Raises:
            DataError: a source has no usable row or too many unusable ones, or nothing is left to hold out.
            LoraKitError: with ``data.overlap: drop``, the rows of an evaluation cannot be read.
        """
        data = self.recipe.data
        train = [self._read("train", source, resolved)
                 for source, resolved in zip(data.train, self.found.sources["train"], strict=True)]
        held_out = [(source.source, self._read("held_out", source, resolved))
                    for source, resolved in zip(data.held_out, self.found.sources["held_out"], strict=True)]
        if not data.held_out and data.held_out_rows:
            train, held_out = self._split_off(train)
        train = self._without_held_out(train, held_out)
        train = self._without_duplicates(train)
        train = self._without_overlap(train, held_out)
        return {
            "train": [self._weighted(source, rows, index)
                      for index, (source, rows) in enumerate(zip(data.train, train, strict=True))],
            "held_out": [Part(source=source, rows=rows, num_first=len(rows)) for source, rows in held_out],
        }

    def _read(self, split: str, source: DataSource, resolved: Resolved) -> numpy.ndarray:
        """Numbers of the usable conversations of one source, its limit applied."""
        first, num_rows, unusable, first_of = len(self.spool), 0, Counter(), {}
        last_told = time.monotonic()
        for origin, record, read in rows_of(source, resolved):
            num_rows += 1
            try:
                conversation = read(record, origin)
                if not conversation.trains_all and not any(m.role == "assistant" for m in conversation.messages):
                    raise formats.UnusableRow("no assistant turn")
                self.spool.append(*_first_turns(conversation, source.max_turns))
            except formats.UnusableRow as error:
                unusable[error.reason] += 1
                first_of.setdefault(error.reason, origin)
                self.ledger.note(split, source.source, error.reason, [origin])
            if time.monotonic() - last_told > _TELL_EVERY_SECONDS:
                last_told = time.monotonic()
                tell(Note(text=f"{resolved.shown}: {num_rows:,} rows read"))
        num_unusable = sum(unusable.values())
        self.ledger.count(split, source.source, rows_in=num_rows, rows_unusable=num_unusable)
        most_common = ""
        if unusable:
            reason = unusable.most_common(1)[0][0]
            most_common = f"most: {reason}, first at {first_of[reason]}"
        usable = numpy.arange(first, len(self.spool))
        if not len(usable):
            raise DataError(source.source, f"none of its {num_rows} rows is usable", most_common)
        if num_unusable > self.recipe.data.max_dropped * num_rows:
            raise DataError(source.source, f"{num_unusable} of {num_rows} rows are unusable, over data.max_dropped "
                            f"({self.recipe.data.max_dropped:g}); {most_common}", "mend them or raise data.max_dropped")
        if source.limit and len(usable) > source.limit:
            rng = numpy.random.default_rng([self.recipe.seed, 2])
            chosen = numpy.zeros(len(usable), bool)
            chosen[rng.permutation(len(usable))[:source.limit]] = True
            self._leave_out(split, source.source, "over the source's limit", usable[~chosen])
            usable = usable[chosen]
        return usable

    def _split_off(self, train: list[numpy.ndarray]) -> tuple[list[numpy.ndarray], list[tuple[str, numpy.ndarray]]]:
        data, num_usable = self.recipe.data, sum(len(rows) for rows in train)
        if num_usable < 2:
            raise DataError("data.train", f"{num_usable} usable row, which leaves none to hold out",
                            self.ledger.reasons_text("train") or "add rows or set data.held_out_rows: 0")
        num_held_out = min(data.held_out_rows, num_usable // 2)
        chosen = numpy.zeros(num_usable, bool)
        chosen[numpy.random.default_rng([self.recipe.seed, 1]).permutation(num_usable)[:num_held_out]] = True
        position, kept, held_out = 0, [], []
        for source, rows in zip(data.train, train, strict=True):
            mine = chosen[position:position + len(rows)]
            position += len(rows)
            kept.append(rows[~mine])
            held_out.append((source.source, rows[mine]))
            moved = int(mine.sum())
            self.ledger.count("train", source.source, rows_in=-moved)
            self.ledger.count("held_out", source.source, rows_in=moved)
        return kept, held_out

    def _without_held_out(
        self, train: list[numpy.ndarray], held_out: list[tuple[str, numpy.ndarray]]
    ) -> list[numpy.ndarray]:
        """A training row that says the same as a held-out one is left out: held out means never trained on."""
        said = numpy.concatenate([self.spool.keys_of(rows) for _, rows in held_out]) if held_out \
            else numpy.zeros(0, numpy.uint64)
        return [self._keep(source, rows, ~numpy.isin(self.spool.keys_of(rows), said), "same as a held-out row")
                for source, rows in zip(self.recipe.data.train, train, strict=True)]

    def _without_duplicates(self, train: list[numpy.ndarray]) -> list[numpy.ndarray]:
        rows = numpy.concatenate(train)
        is_repeat = numpy.ones(len(rows), bool)
        is_repeat[numpy.unique(self.spool.keys_of(rows), return_index=True)[1]] = False
        self.repeats = numpy.sort(rows[is_repeat])
        if self.recipe.data.duplicates == "keep":
            return train
        return [self._keep(source, mine, ~numpy.isin(mine, self.repeats), "same as an earlier row")
                for source, mine in zip(self.recipe.data.train, train, strict=True)]

    def _without_overlap(
        self, train: list[numpy.ndarray], held_out: list[tuple[str, numpy.ndarray]]
    ) -> list[numpy.ndarray]:
        """Count what training rows share with held-out rows and with the items of the evaluation; drop them if asked.

        Where the items cannot be read now, ``task_overlap`` stays None, with a Caution.
        """
        drops = self.recipe.data.overlap == "drop"
        probes = Probes()
        numbers = [int(row) for _, rows in held_out for row in rows]
        probes.add_conversations(HELD_OUT, (self.spool.read(number)[0] for number in numbers))
        asked = suite.suite_of(self.recipe, self.found.relative_to)
        if asked.own_items():
            try:
                probes.add_tasks(asked, self.recipe, self.found.relative_to, [self.spool.read(n)[0] for n in numbers])
                self.task_overlap = []
            except LoraKitError as error:
                if drops:
                    raise
                tell(Caution(text=f"overlap with the items of suite {asked.name} is not counted: {error}"))
        else:
            self.task_overlap = []
        if not probes.items:
            return train
        kept = []
        for source, rows in zip(self.recipe.data.train, train, strict=True):
            groups = [probes.look(self.spool.read(int(row))[0]) for row in rows]
            for group in sorted({group for found in groups for group in found}) if drops else ():
                keep = numpy.array([group not in found for found in groups], bool)
                rows = self._keep(source, rows, keep, f"overlaps {group.replace('_', ' ')}")
                groups = [found for found, stays in zip(groups, keep, strict=True) if stays]
            kept.append(rows)
        report = [{**each, "dropped": drops} for each in probes.report()]
        self.held_out_overlap = [each for each in report if each["against"] == HELD_OUT]
        if self.task_overlap is not None:
            self.task_overlap = [each for each in report if each["against"] != HELD_OUT]
        return kept

    def _weighted(self, source: DataSource, rows: numpy.ndarray, index: int) -> Part:
        """``rows`` as often as the source's weight says: whole copies, and a seeded draw for the rest."""
        copies, rest = divmod(source.weight, 1)
        num_drawn = round(rest * len(rows))
        rng = numpy.random.default_rng([self.recipe.seed, 3, index])
        drawn = numpy.zeros(len(rows), bool)
        drawn[rng.permutation(len(rows))[:num_drawn]] = True
        if not copies:
            self._leave_out("train", source.source, "not drawn (weight below 1)", rows[~drawn])
            return Part(source=source.source, rows=rows[drawn], num_first=num_drawn)
        if source.weight > 1:
            repeated = int(copies - 1) * len(rows) + num_drawn
            self.ledger.count("train", source.source, rows_repeated=repeated)
        return Part(source=source.source, rows=numpy.concatenate([*[rows] * int(copies), rows[drawn]]),
                    num_first=len(rows))

    def _keep(self, source: DataSource, rows: numpy.ndarray, keep: numpy.ndarray, reason: str) -> numpy.ndarray:
        self._leave_out("train", source.source, reason, rows[~keep])
        return rows[keep]

    def _leave_out(self, split: str, source: str, reason: str, rows: numpy.ndarray) -> None:
        self.ledger.leave_out(split, source, reason, self.origins(rows[:NAMED_ROWS]), len(rows))

    def origins(self, rows: numpy.ndarray) -> Iterator[str]:
        """Where ``rows`` come from."""
        return (self.spool.read(int(row))[0].origin for row in rows)


def _first_turns(conversation: Conversation, max_turns: int | None) -> tuple[Conversation, Conversation | None]:
    """The first ``max_turns`` messages, ending with an assistant's, and the whole when that is more."""
    if max_turns is None or len(conversation.messages) <= max_turns:
        return conversation, None
    messages = list(conversation.messages[:max_turns])
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if not messages:
        raise formats.UnusableRow("no assistant turn within max_turns")
    return replace(conversation, messages=tuple(messages)), conversation
