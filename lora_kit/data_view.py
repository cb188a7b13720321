"""What ``lora-kit data`` shows of prepared data: tables, and single examples with their mask.

Reads the token files; the tokenizer is loaded only for examples. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_kit import ledger, overlap
from lora_kit.errors import RecipeError
from lora_kit.units import count_text, number_text

Spans = list[tuple[str, bool]]


def checked(split: str, show: Sequence[str]) -> list[str]:
    """``show`` when the command line makes sense; RecipeError otherwise."""
    if split not in ledger.SPLITS:
        raise RecipeError("lora-kit data --split", f"there is no split '{split}'", f"name {' or '.join(ledger.SPLITS)}")
    for each in show:
        if each.isdigit() and int(each) == 0:
            raise RecipeError("lora-kit data --show", "examples are numbered from 1", "")
    return list(show)


def tables(found: dict[str, Any], items: list[dict[str, Any]] | None) -> Iterator[tuple[str, Sequence[str], list]]:
    """(title, columns, rows) of the tables after the ledger's own.

    Args:
        found: the ledger.
        items: overlap with the items of the recipe's evaluation, None where it was not counted.
    """
    if len(found.get("sources", ())) > len(found["splits"]):
        yield "by source", ledger.SOURCE_COLUMNS, ledger.source_rows(found)
    report = [*found.get("overlap", ()), *(items or ())]
    if report:
        yield "overlap of training rows with", overlap.COLUMNS, overlap.rows(report)
    yield "lengths", ledger.HISTOGRAM_COLUMNS, ledger.histogram_rows(found)


def lines(found: dict[str, Any], folder: Path) -> str:
    """What is said in words: duplicates, the typical length, where the files lie."""
    lengths = found["lengths"]
    return "\n".join([
        ledger.duplicate_text(found),
        f"Training examples have {number_text(lengths['median'])} tokens in the median, {count_text(lengths['max'])} "
        "at most. Padding is no data: it is made with the batches.",
        f"prepared in {folder}",
    ])


def examples(folder: Path, split: str, wanted: Sequence[str], tokenizer: str) -> Iterator[tuple[str, Spans]]:
    """(title, spans) of the wanted examples: numbers from 1, or origins, of which a split row has several.

    Raises:
        RecipeError: there is no such example.
    """
    if not wanted:
        return
    from lora_kit import chat, tokens
    from lora_kit.data import spans_of

    read = tokens.read_examples(folder, split)
    loaded = chat.load_tokenizer(tokenizer)
    for each in wanted:
        if each.isdigit():
            rows = [int(each) - 1] if int(each) <= len(read) else []
        else:
            rows = [row for row, origin in enumerate(read.origins) if origin == each]
        if not rows:
            raise RecipeError(f"lora-kit data --show {each}", f"there is no such {split.replace('_', ' ')} example",
                              f"numbers go from 1 to {len(read)}; a row that was left out has none")
        for row in rows:
            title = (f"{split.replace('_', ' ')} {row + 1} of {len(read):,}: {read.origins[row]}, "
                     f"{read.length(row):,} tokens, {read.num_trained(row):,} trained")
            yield title, spans_of(loaded, read[row])
