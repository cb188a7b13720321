"""Overlap of training rows with held-out rows and with the items of an evaluation.

Two measures. *Exact*: a training row has the item's question (every message before its last
answer, but for a system message), or question and answer. *By 8-gram*: the share of an item's
word 8-grams that occur in the training rows; 70 % or more counts as overlapping. Words are
runs of letters and digits in lower case (a CJK character is a word by itself), and an 8-gram
lies within one message.

What is taken from where: GPT-2's authors looked for 8-grams of lower-cased alphanumeric words of
test sets in the training data, and gave a share for each set without a threshold (Radford et al.
2019, section 4). PaLM's called an item contaminated when at least 70 % of the 8-grams of its
question, its prompt or its target occur in the training data (Chowdhery et al. 2022, section 8).
Ours are: question and answer taken together, the share that a single training row has (which says
which row to leave out), the words of CJK, and what follows a question of at least 8 words.

Memory is bounded by the items, not by the training rows: the items' 8-grams lie in a sorted
array of 64-bit hashes, and training rows stream past it. Two 8-grams of the same hash are
taken for one; with 64 bits that is rarer than one in 10**9 rows.

Torch-free. Reads the suite's data; writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy

from lora_kit import items as eval_items
from lora_kit.recipe import Recipe
from lora_kit.suite import Suite
from lora_kit.types import Conversation

NGRAM = 8
THRESHOLD = 0.7
MAX_NGRAMS = 8_000_000
"""8-grams of items that are held at most (about 200 MB); items after that are compared exactly only."""
HELD_OUT = "held_out"
_NAMED_ITEMS = 3
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")

Said = Sequence[tuple[str, str]]
"""Messages as (role, text), system messages left out."""


@dataclass
class _Item:
    group: str
    name: str
    question_words: int
    num_ngrams: int
    same_question: bool = False
    same_both: bool = False
    best_share: float = 0.0
    best_row: str = ""

    @property
    def overlaps(self) -> bool:
        return self.same_both or (self.same_question and self.question_words >= NGRAM) or self.best_share >= THRESHOLD


@dataclass
class Probes:
    """The items to look for in training rows: add them, call :meth:`look` for every row, then :meth:`report`."""

    items: list[_Item] = field(default_factory=list)
    rows_by_group: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    num_rows: int = 0

    def __post_init__(self) -> None:
        self._questions: dict[int, list[int]] = defaultdict(list)
        self._both: dict[int, list[int]] = defaultdict(list)
        self._pair_ngrams, self._pair_items = array("Q"), array("l")
        self._sorted: tuple[numpy.ndarray, ...] | None = None

    def add(self, group: str, name: str, question: Said, answer: str) -> None:
        """Add an item; with an empty ``answer`` (tool calls, which have no one text) only its question is compared."""
        number = len(self.items)
        grams = _ngrams([*(text for _, text in question), answer])
        held = len(grams) if len(self._pair_ngrams) + len(grams) <= MAX_NGRAMS else 0
        if held:
            self._pair_ngrams.extend(grams.tolist())
            self._pair_items.extend([number] * held)
        words = sum(len(_WORD.findall(text)) for _, text in question)
        self.items.append(_Item(group=group, name=name, question_words=words, num_ngrams=held))
        digest = _digest_of(question)
        if question:
            self._questions[_key(digest)].append(number)
        if answer.strip():
            _take(digest, "assistant", answer)
            self._both[_key(digest)].append(number)

    def add_conversations(self, group: str, conversations: Iterable[Conversation]) -> None:
        """Add conversations, each an item that asks for its last answer; a ``text`` row is all answer."""
        for conversation in conversations:
            said = said_in(conversation)
            last = max((index for index, (role, _) in enumerate(said) if role == "assistant"), default=0)
            self.add(group, conversation.origin, said[:last], said[last][1] if said else "")

    def add_tasks(self, suite: Suite, recipe: Recipe, relative_to: Path, held_out: list[Conversation]) -> None:
        """Add the items that the suite's tasks will ask; tasks on held-out rows ask those, which have their own group.

        Raises:
            DataError, MachineError, RefusedError: a task's rows cannot be read.
        """
        for task in suite.own_items():
            for item in eval_items.make_items(task, recipe, relative_to, held_out).items:
                said = [(message["role"], _text_of(message.get("content"), message.get("tool_calls")))
                        for message in item.messages if message["role"] != "system"]
                # The target of a call is a form that a metric reads, not what training would say.
                target = item.target[0] if isinstance(item.target, list) else item.target
                self.add(task.name, item.item_id, said, "" if target.startswith(("[", "{")) else target)

    def look(self, conversation: Conversation) -> tuple[str, ...]:
        """Compare one training row with every item; returns the groups with an item that it overlaps."""
        self.num_rows += 1
        asked: set[int] = set()
        shares: dict[int, float] = {}
        said = said_in(conversation)
        digest = hashlib.blake2b(digest_size=8)
        for role, text in said:
            if role == "assistant":
                asked.update(self._questions.get(_key(digest), ()))
            _take(digest, role, text)
            if role == "assistant":
                for number in self._both.get(_key(digest), ()):
                    self.items[number].same_both = True
                    shares[number] = 1.0
        for number, share in self._shares(_ngrams([text for _, text in said])):
            shares[number] = max(shares.get(number, 0.0), share)
        groups = set()
        for number in asked | set(shares):
            item, share = self.items[number], shares.get(number, 0.0)
            item.same_question |= number in asked
            if share > item.best_share or not item.best_row:
                item.best_share, item.best_row = max(share, item.best_share), conversation.origin
            if share >= THRESHOLD or (number in asked and item.question_words >= NGRAM):
                groups.add(item.group)
        for group in groups:
            self.rows_by_group[group] += 1
        return tuple(sorted(groups))

    def report(self) -> list[dict[str, Any]]:
        """For each group of items what was found, as JSON values; see docs/data.md for the names."""
        found = []
        shares = self._shares_of_all()
        for group in dict.fromkeys(item.group for item in self.items):
            numbers = [number for number, item in enumerate(self.items) if item.group == group]
            mine = [self.items[number] for number in numbers]
            overlapping = sorted((item for item in mine if item.overlaps), key=lambda item: -item.best_share)
            alike = [self.items[number].name for number in numbers
                     if self.items[number].overlaps or shares[number] >= THRESHOLD]
            found.append({
                "against": group, "items": len(mine), "compared_by_ngram": sum(item.num_ngrams > 0 for item in mine),
                "same_question": sum(item.same_question for item in mine),
                "same_question_and_answer": sum(item.same_both for item in mine),
                "over_threshold": sum(bool(shares[number] >= THRESHOLD) for number in numbers),
                "overlapping_one_row": len(overlapping), "rows": self.rows_by_group[group],
                "examples": [{"item": item.name, "row": item.best_row, "share": round(item.best_share, 4)}
                             for item in overlapping[:_NAMED_ITEMS]],
                "overlapping": alike,
            })
        return found

    def _arrays(self) -> tuple[numpy.ndarray, ...]:
        """Distinct 8-grams sorted, where the items of each begin, the items, the marks of those seen in training."""
        if self._sorted is None:
            grams = numpy.array(self._pair_ngrams, numpy.uint64)
            order = numpy.argsort(grams, kind="stable")
            distinct, starts = numpy.unique(grams[order], return_index=True)
            starts = numpy.append(starts, len(grams))
            items = numpy.array(self._pair_items, numpy.int64)[order]
            self._sorted = distinct, starts, items, numpy.zeros(len(distinct), bool)
        return self._sorted

    def _shares(self, grams: numpy.ndarray) -> list[tuple[int, float]]:
        """(item, share of its 8-grams among ``grams``) of the items that have any of them."""
        distinct, starts, items, seen = self._arrays()
        if not len(grams) or not len(distinct):
            return []
        places = numpy.searchsorted(distinct, grams)
        places[places == len(distinct)] = 0
        hit = places[distinct[places] == grams]
        if not len(hit):
            return []
        seen[hit] = True
        touched = numpy.concatenate([items[starts[place]:starts[place + 1]] for place in hit])
        numbers, counts = numpy.unique(touched, return_counts=True)
        return [(int(number), int(count) / self.items[number].num_ngrams)
                for number, count in zip(numbers, counts, strict=True)]

    def _shares_of_all(self) -> numpy.ndarray:
        """Of every item the share of its 8-grams that occur anywhere in training."""
        _, starts, items, seen = self._arrays()
        found = numpy.zeros(len(self.items))
        numpy.add.at(found, items[numpy.repeat(seen, numpy.diff(starts))], 1.0)
        totals = numpy.array([max(1, item.num_ngrams) for item in self.items], float)
        return found / totals if len(found) else found


def said_in(conversation: Conversation) -> list[tuple[str, str]]:
    """(role, text) of every message but the system's; a ``text`` row is one message of the assistant."""
    if conversation.trains_all:
        return [("assistant", message.content or "") for message in conversation.messages]
    return [(message.role, _text_of(message.content, message.tool_calls)) for message in conversation.messages
            if message.role != "system"]


def rows(report: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A report as rows of a table; see COLUMNS."""
    return [(each["against"].replace("_", " "), str(each["items"]), str(each["same_question"]),
             str(each["same_question_and_answer"]), f"{each['over_threshold']} of {each['compared_by_ngram']}",
             f"{each['rows']}, left out" if each["rows"] and each.get("dropped") else str(each["rows"]),
             ", ".join(f"{example['item']} in {example['row']}" for example in each["examples"][:1]) or "–")
            for each in report]


COLUMNS = ("against", "items", "same question", "and answer", "8-grams over 70 %", "training rows", "for example")
"""Columns of :func:`rows`."""


def _text_of(content: str | None, tool_calls: Sequence[dict[str, Any]] | None) -> str:
    calls = [call.get("function", call) for call in tool_calls or ()]
    parts = [content or "", *(json.dumps([call.get("name"), call.get("arguments")], ensure_ascii=False)
                              for call in calls)]
    return "\n".join(part for part in parts if part)


def _digest_of(said: Said) -> hashlib.blake2b:
    digest = hashlib.blake2b(digest_size=8)
    for role, text in said:
        _take(digest, role, text)
    return digest


def _take(digest: hashlib.blake2b, role: str, text: str) -> None:
    digest.update(f"\0{role}\0{text.strip()}".encode("utf-8", "surrogatepass"))


def _key(digest: hashlib.blake2b) -> int:
    return int.from_bytes(digest.digest(), "little")


def _ngrams(texts: Iterable[str]) -> numpy.ndarray:
    """Distinct hashes (uint64) of the word 8-grams of each text."""
    found = []
    for text in texts:
        words = _WORD.findall(text.lower())
        if len(words) >= NGRAM:
            found.append(_ngram_hashes(words))
    return numpy.unique(numpy.concatenate(found)) if found else numpy.zeros(0, numpy.uint64)


def _ngram_hashes(words: list[str]) -> numpy.ndarray:
    codes = numpy.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], numpy.uint64)
    # The words' own lengths are mixed in, then splitmix64's finalizer spreads the 32 bits over 64.
    codes ^= numpy.array([len(word) for word in words], numpy.uint64) << numpy.uint64(32)
    codes = (codes ^ (codes >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    codes = (codes ^ (codes >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    codes ^= codes >> numpy.uint64(31)
    num = len(words) - NGRAM + 1
    hashes = numpy.zeros(num, numpy.uint64)
    for place in range(NGRAM):  # a polynomial modulo 2**64
        hashes = hashes * numpy.uint64(0x9E3779B97F4A7C15) + codes[place:place + num]
    return hashes
