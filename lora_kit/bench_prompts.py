"""Prompts for a server that is measured: words at random of a wanted length, or those that a run's evaluation asks.

A server's tokenizer is not at hand, so a prompt of so many tokens is made of so many words, and how many tokens words
come to is taken from what the server counts. Every prompt of words begins with a number of its own: no prefix cache
has more of it than what the server's template puts before all prompts. Torch-free. Reads a run's folder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lora_kit import rows
from lora_kit.errors import DataError
from lora_kit.items import questions_of
from lora_kit.rundir import Run

_WORDS = ("time year people way day man thing woman life child world school state family student group country problem "
          "hand part place case week company system program question work government number night point home water "
          "room mother area money story fact month lot right study book eye job word business issue side kind head "
          "house service friend father power hour game line end member law car city community name president team "
          "minute idea kid body information back parent face others level office door health person art war history "
          "party result change morning reason research girl guy moment air teacher force education").split()
_ASK = "Write a long story about these words."
"""At the end, where no prefix cache gets to: a request to go on, for servers that stop at stop tokens."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is asked: messages, and the tools offered."""

    messages: list[dict[str, Any]]
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Length:
    """Tokens that the server counts for ``words`` words: ``fixed`` + ``each`` a word."""

    fixed: float = 0.0
    each: float = 1.0

    def words(self, tokens: int) -> int:
        """Words for a prompt of about ``tokens`` tokens; at least one."""
        return max(1, round((tokens - self.fixed) / self.each))


def of_words(words: int, seed: str) -> Iterator[Prompt]:
    """Prompts of ``words`` words without end, no two alike."""
    generator, seen = random.Random(seed), set()
    while True:
        start = str(generator.randrange(10**8, 10**9))
        if start in seen:
            continue
        seen.add(start)
        text = " ".join([start, *generator.choices(_WORDS, k=words), _ASK])
        yield Prompt(messages=[{"role": "user", "content": text}])


def length_by(count: Callable[[Prompt], int | None], tokens: int, seed: str) -> Length | None:
    """How many tokens words come to, from what ``count`` says of two prompts; None where it says nothing."""
    few, many = max(1, tokens // 4), max(8, tokens)
    found = [count(next(of_words(words, f"{seed} {words}"))) for words in (few, many)]
    if None in found:
        return None
    each = (found[1] - found[0]) / (many - few)
    return Length(fixed=found[0] - each * few, each=each) if each > 0 else None


def of_run(run: Run) -> list[Prompt]:
    """What the run's evaluation asks a model to answer; of a run without one, its held-out questions.

    Raises:
        DataError: it has neither.
    """
    found = []
    for path in sorted((run.stage_dir("eval") / "items").glob("*.json")):
        for item in json.loads(path.read_text(encoding="utf-8"))["items"]:
            if item["messages"] and not item.get("likelihood"):  # texts and choices are read, not answered
                found.append(Prompt(messages=item["messages"], tools=tuple(item["tools"])))
    if not found:
        found = [Prompt(messages=messages, tools=tuple(tools))
                 for messages, tools in questions_of(rows.read_held_out(run.stage_dir("data")))]
    distinct = {json.dumps([prompt.messages, prompt.tools], sort_keys=True): prompt for prompt in found}
    if not distinct:
        raise DataError(str(run.path), "asks nothing that could be answered", "leave out --prompts-of")
    return list(distinct.values())
