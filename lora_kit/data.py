"""Stage data: rows of the recipe's sources become token files, with a ledger of every row and token.

Rows are read by ``records.py``, understood by ``formats/``, rendered and masked by
``chat.py``; `datasets` holds, maps and caches them. The result lies in the cache under a
key of everything that decides it (``prepared.py``), is checked against its hashes when it
is used again, and is linked into the run.

Reads the sources and the base's tokenizer. Writes, into the cache and the stage's folder:
``train.*`` and ``held_out.*`` token files, ``held_out.jsonl`` (the held-out
conversations), ``ledger.json``, ``preview.txt`` and ``manifest.json``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from lora_kit import chat, formats, prepared, sources, tokens
from lora_kit.errors import DataError
from lora_kit.events import Caution, tell
from lora_kit.prepared import Prepared
from lora_kit.recipe import DataSource, Recipe
from lora_kit.rows import from_json, rows_of, to_json
from lora_kit.rundir import Run, write_json, writing
from lora_kit.sources import Resolved
from lora_kit.types import Conversation, Example, Result

SECTIONS = ("data", "seed")
_NAMED_ROWS = 3
_PREVIEW_ROWS = 3
_SPLIT = "made several examples, as the chat template changes earlier turns"


def stage(recipe: Recipe, run: Run) -> Result:
    """Prepare the data, or take it from the cache, and link it into the run."""
    found = prepared.find(recipe, run.recipe_file.folder, run.resolved["base"])
    prepare(recipe, found, run.resolved["base"])
    work = run.work("data")
    with writing(work):
        for path in found.folder.iterdir():
            try:
                os.link(path, work / path.name)
            except OSError:
                shutil.copy(path, work / path.name)
    ledger = found.ledger()
    train, held_out = ledger["splits"]["train"], ledger["splits"]["held_out"]
    return Result(
        summary=f"{train['rows_used']:,} rows to train on ({train['tokens_trained']:,} of "
                f"{train['tokens_trained'] + train['tokens_context']:,} tokens trained), "
                f"{held_out['rows_used']:,} held out",
        figures={"key": found.key, "ledger": ledger},
    )


def prepare(recipe: Recipe, found: Prepared, base: dict[str, Any]) -> None:
    """Make the token files and the ledger of ``found`` unless the cache has them, whole.

    Raises:
        DataError: a source has no usable row, too many unusable ones, or rows that are too long.
        RecipeError: the chat template ignores tools that the rows bring.
        MachineError: the cache cannot be written.
    """
    if found.exists:
        if _is_whole(found.folder):
            return
        tell(Caution(text=f"{found.folder} is not what was written there; the data is prepared again"))
        with writing(found.folder):
            shutil.rmtree(found.folder)
    with sources.new_cache_folder(found.folder) as scratch:
        _Preparation(recipe, found, base, scratch).write()
        for path in scratch.iterdir():
            path.chmod(0o444)  # runs link these files: who edits one in place would edit it in all of them


def _is_whole(folder: Path) -> bool:
    """Whether the files in ``folder`` are those that its manifest names, byte for byte."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        return {path.name for path in folder.iterdir()} == {"manifest.json", *files} and all(
            sources.file_sha256(folder / name) == expected for name, expected in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class _Preparation:
    """One preparation: conversations in, token files and ledger out."""

    def __init__(self, recipe: Recipe, found: Prepared, base: dict[str, Any], out_dir: Path) -> None:
        self.recipe, self.found, self.out_dir = recipe, found, out_dir
        self.tokenizer = chat.load_tokenizer(base["artifact"]["tokenizer"])
        self.reasons: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        # id() of a conversation that max_turns cut -> itself (kept alive, so that no other takes its id) and the whole
        self.uncut: dict[int, tuple[Conversation, Conversation]] = {}
        self.used: dict[str, list[Conversation]] = {"train": [], "held_out": []}
        self.counts: dict[str, Counter] = {"train": Counter(), "held_out": Counter()}

    def write(self) -> None:
        splits = self._split()
        for split, conversations in splits.items():
            encoded = self._encode(split, conversations)
            tokens.write_examples(self.out_dir, split, encoded)
            self._check_balance(split)
        if not self.counts["train"]["rows_used"]:
            raise DataError("data.train", "no row is left to train on", self._reasons_text("train"))
        if self.recipe.data.stop_tokens == "required":
            train = tokens.read_examples(self.out_dir, "train")
            chat.check_stops(self.tokenizer, train.tokens, train.mask)
        with open(self.out_dir / "held_out.jsonl", "w", encoding="utf-8") as file:
            for conversation in self.used["held_out"]:
                file.write(to_json(conversation) + "\n")
        self._write_preview()
        write_json(self.out_dir / "ledger.json", self._ledger())
        write_json(self.out_dir / "manifest.json", {
            "key": self.found.key, "tools": self.recipe.data.tools,
            "sources": {split: [{"reference": item.reference, "sha256": item.sha256, "revision": item.revision}
                                for item in items] for split, items in self.found.sources.items()},
            "files": {path.name: sources.file_sha256(path) for path in sorted(self.out_dir.iterdir())},
        })

    def _split(self) -> dict[str, list[Conversation]]:
        """Conversations of each split; held-out rows are taken from training when they have no source.

        A training row that says the same as a held-out one is left out: held out means never trained on.
        """
        data, seed = self.recipe.data, self.recipe.seed
        by_source = [self._conversations("train", source, resolved)
                     for source, resolved in zip(data.train, self.found.sources["train"], strict=True)]
        held_out = [conversation for source, resolved in zip(data.held_out, self.found.sources["held_out"], strict=True)
                    for conversation in self._conversations("held_out", source, resolved)]
        if not data.held_out and data.held_out_rows:
            num_usable = sum(len(rows) for rows in by_source)
            if num_usable < 2:
                raise DataError("data.train", f"{num_usable} usable row, which leaves none to hold out",
                                self._reasons_text("train") or "add rows or set data.held_out_rows: 0")
            num_held_out = min(data.held_out_rows, num_usable // 2)
            chosen = set(numpy.random.default_rng([seed, 1]).permutation(num_usable)[:num_held_out].tolist())
            position, kept = 0, []
            for rows in by_source:
                kept.append([row for index, row in enumerate(rows, position) if index not in chosen])
                held_out += [row for index, row in enumerate(rows, position) if index in chosen]
                position += len(rows)
            by_source = kept
            moved = len(held_out)
            self.counts["train"]["rows_in"] -= moved
            self.counts["held_out"]["rows_in"] += moved
        held_out_texts = {_text_of(row) for row in held_out}
        for index, (source, rows) in enumerate(zip(data.train, by_source, strict=True)):
            by_source[index] = [row for row in rows if _text_of(row) not in held_out_texts]
            self._leave_out("train", source, "same as a held-out row", len(rows) - len(by_source[index]))
        train = [row for index, (source, rows) in enumerate(zip(data.train, by_source, strict=True))
                 for row in self._weighted("train", source, rows, index)]
        return {"train": train, "held_out": held_out}

    def _conversations(self, split: str, source: DataSource, resolved: Resolved) -> list[Conversation]:
        """Usable conversations of one source, its limit applied."""
        usable, num_rows, unusable = [], 0, Counter()
        for origin, record, read in rows_of(source, resolved):
            num_rows += 1
            try:
                conversation = read(record, origin)
                if not conversation.trains_all and not any(m.role == "assistant" for m in conversation.messages):
                    raise formats.UnusableRow("no assistant turn")
                usable.append(self._first_turns(conversation, source.max_turns))
            except formats.UnusableRow as error:
                unusable[error.reason] += 1
                self.reasons[split, source.source, error.reason].append(origin)
        self.counts[split]["rows_in"] += num_rows
        num_unusable = sum(unusable.values())
        self.counts[split]["rows_unusable"] += num_unusable
        most_common = f"most: {unusable.most_common(1)[0][0]}, first at " \
                      f"{self.reasons[split, source.source, unusable.most_common(1)[0][0]][0]}" if unusable else ""
        if not usable:
            raise DataError(source.source, f"none of its {num_rows} rows is usable", most_common)
        if num_unusable > self.recipe.data.max_dropped * num_rows:
            raise DataError(source.source, f"{num_unusable} of {num_rows} rows are unusable, over data.max_dropped "
                            f"({self.recipe.data.max_dropped:g}); {most_common}", "mend them or raise data.max_dropped")
        if source.limit and len(usable) > source.limit:
            rng = numpy.random.default_rng([self.recipe.seed, 2])
            chosen = sorted(rng.permutation(len(usable))[:source.limit].tolist())
            self._leave_out(split, source, "over the source's limit", len(usable) - source.limit)
            usable = [usable[index] for index in chosen]
        return usable

    def _first_turns(self, conversation: Conversation, max_turns: int | None) -> Conversation:
        """The first ``max_turns`` messages, ending with an assistant's; the whole is kept for the ledger."""
        if max_turns is None or len(conversation.messages) <= max_turns:
            return conversation
        messages = list(conversation.messages[:max_turns])
        while messages and messages[-1].role != "assistant":
            messages.pop()
        if not messages:
            raise formats.UnusableRow("no assistant turn within max_turns")
        cut = replace(conversation, messages=tuple(messages))
        self.uncut[id(cut)] = (cut, conversation)
        return cut

    def _weighted(self, split: str, source: DataSource, rows: list[Conversation], index: int) -> list[Conversation]:
        """``rows`` as often as the source's weight says: whole copies, and a seeded draw for the rest."""
        copies, rest = divmod(source.weight, 1)
        num_drawn = round(rest * len(rows))
        rng = numpy.random.default_rng([self.recipe.seed, 3, index])
        drawn = sorted(rng.permutation(len(rows))[:num_drawn].tolist())
        if not copies:
            self._leave_out(split, source, "not drawn (weight below 1)", len(rows) - num_drawn)
        elif source.weight > 1:
            self.counts[split]["rows_repeated"] += int(copies - 1) * len(rows) + num_drawn
        return rows * int(copies) + [rows[index] for index in drawn]

    def _leave_out(self, split: str, source: DataSource, reason: str, num_rows: int) -> None:
        if num_rows:
            self.counts[split]["rows_left_out"] += num_rows
            self.reasons[split, source.source, reason] += [""] * num_rows

    def _encode(self, split: str, conversations: list[Conversation]) -> Iterator[Example]:
        """Examples of ``conversations``, mapped through `datasets`; long ones treated as the recipe says."""
        data, counts = self.recipe.data, self.counts[split]
        refused: list[tuple[str, str]] = []
        for row, conversation in zip(self._mapped(conversations), conversations, strict=True):
            if row["refused"]:
                refused.append((conversation.origin, row["refused"]))
                self._leave(split, conversation.origin, row["refused"], 0)
                counts["rows_dropped"] += 1
                if len(refused) > data.max_dropped * len(conversations):
                    raise DataError(refused[0][0], f"{refused[0][1]}; that befell more rows than data.max_dropped "
                                    f"allows ({data.max_dropped:g})", row["todo"])
                continue
            if id(conversation) in self.uncut:
                counts["tokens_in"] += row["tokens_after"]
                counts["tokens_cut"] += row["tokens_after"]
                self.reasons[split, "", "messages after max_turns cut off"].append(conversation.origin)
            if len(row["tokens"]) > 1:
                self.reasons[split, "", _SPLIT].append(conversation.origin)
            num_used = 0
            for ids, mask in zip(row["tokens"], row["mask"], strict=True):
                example = Example(tokens_T=numpy.array(ids, numpy.int32), loss_mask_T=numpy.array(mask, numpy.uint8),
                                  origin=conversation.origin)
                length = len(example.tokens_T)
                counts["tokens_in"] += length
                if length > data.max_tokens:
                    example = self._shortened(split, conversation, example)
                if example is not None and not example.loss_mask_T[1:].any():
                    self._leave(split, conversation.origin, "no trained token left", len(example.tokens_T))
                    example = None
                if example is None:
                    continue
                num_trained = int(example.loss_mask_T[1:].sum())  # nothing predicts the first token
                counts.update(tokens_trained=num_trained, tokens_context=len(example.tokens_T) - num_trained)
                num_used += 1
                yield example
            counts.update(rows_used=int(num_used > 0), rows_dropped=int(num_used == 0))
            if num_used:
                self.used[split].append(conversation)

    def _mapped(self, conversations: list[Conversation]):
        """Tokens and masks of each conversation's examples, and the tokens that ``max_turns`` cut off; or why not."""
        import datasets

        datasets.disable_progress_bars()
        if not conversations:
            return []
        uncut = [self.uncut.get(id(conversation)) for conversation in conversations]
        rows = datasets.Dataset.from_dict({
            "row": [to_json(conversation) for conversation in conversations],
            "whole": [to_json(found[1]) if found else "" for found in uncut],
        })
        tokenizer, options, tools_mode = self.tokenizer, self.recipe.data.encoding, self.recipe.data.tools

        def encode(row: str, whole: str) -> dict[str, Any]:
            try:
                examples = chat.encode(tokenizer, from_json(row), **options)
                length = chat.count_tokens(tokenizer, from_json(whole), tools_mode=tools_mode) if whole else 0
            except DataError as error:
                return {"tokens": [], "mask": [], "tokens_after": 0, "refused": error.what, "todo": error.todo}
            return {"tokens": [example.tokens_T for example in examples],
                    "mask": [example.loss_mask_T for example in examples], "refused": "", "todo": "",
                    # What the template takes back from earlier turns as a conversation grows can exceed what is cut.
                    "tokens_after": max(0, length - len(examples[-1].tokens_T)) if whole else 0}

        def encode_all(batch: dict[str, list[str]]) -> dict[str, list]:
            encoded = [encode(row, whole) for row, whole in zip(batch["row"], batch["whole"], strict=True)]
            return {name: [row[name] for row in encoded] for name in features}

        features = datasets.Features({
            "tokens": datasets.List(datasets.List(datasets.Value("int32"))),
            "mask": datasets.List(datasets.List(datasets.Value("uint8"))),
            "tokens_after": datasets.Value("int32"),
            "refused": datasets.Value("string"), "todo": datasets.Value("string"),
        })
        return rows.map(encode_all, batched=True, batch_size=256, remove_columns=["row", "whole"], features=features,
                        load_from_cache_file=False)

    def _shortened(self, split: str, conversation: Conversation, example: Example) -> Example | None:
        policy, most = self.recipe.data.too_long, self.recipe.data.max_tokens
        length = len(example.tokens_T)
        if policy == "error":
            raise DataError(conversation.origin, f"has {length} tokens, over data.max_tokens ({most})",
                            "raise it, or set data.too_long: drop or cut_end")
        if policy == "drop":
            self._leave(split, conversation.origin, f"over {most} tokens", length)
            return None
        self.counts[split]["tokens_cut"] += length - most
        self.reasons[split, "", f"end cut off at {most} tokens"].append(conversation.origin)
        return Example(tokens_T=example.tokens_T[:most], loss_mask_T=example.loss_mask_T[:most], origin=example.origin)

    def _leave(self, split: str, origin: str, reason: str, num_tokens: int) -> None:
        """Note an example that is not used; its row is dropped when it has no other."""
        self.counts[split]["tokens_dropped"] += num_tokens
        self.reasons[split, "", reason].append(origin)

    def _check_balance(self, split: str) -> None:
        counts = self.counts[split]
        out = sum(counts[f"tokens_{kind}"] for kind in ("trained", "context", "dropped", "cut"))
        assert counts["tokens_in"] == out, (split, dict(counts))
        rows_out = sum(counts[f"rows_{kind}"] for kind in ("used", "unusable", "dropped", "left_out"))
        assert counts["rows_in"] + counts["rows_repeated"] == rows_out, (split, dict(counts))

    def _ledger(self) -> dict[str, Any]:
        names = ("rows_in", "rows_used", "rows_unusable", "rows_dropped", "rows_left_out", "rows_repeated",
                 "tokens_in", "tokens_trained", "tokens_context", "tokens_dropped", "tokens_cut")
        lengths = numpy.diff(tokens.read_examples(self.out_dir, "train").offsets)
        return {
            "splits": {split: {name: int(counts[name]) for name in names} for split, counts in self.counts.items()},
            "reasons": [{"split": split, "source": source, "reason": reason, "rows": len(origins),
                         "examples": [origin for origin in origins[:_NAMED_ROWS] if origin]}
                        for (split, source, reason), origins in sorted(self.reasons.items())],
            "lengths": {"median": float(numpy.median(lengths)), "max": int(lengths.max()),
                        "mean": float(lengths.mean())},
        }

    def _reasons_text(self, split: str) -> str:
        counted = Counter({reason: len(origins) for (at, _, reason), origins in self.reasons.items() if at == split})
        return ", ".join(f"{number} {reason}" for reason, number in counted.most_common(3))

    def _write_preview(self) -> None:
        examples = tokens.read_examples(self.out_dir, "train")
        parts = ["Trained tokens stand between ⟦ and ⟧; everything else is context.\n"]
        for row in range(min(_PREVIEW_ROWS, len(examples))):
            parts.append(f"--- {examples[row].origin}\n{masked_text(self.tokenizer, examples[row])}\n")
        (self.out_dir / "preview.txt").write_text("\n".join(parts), encoding="utf-8")


def _text_of(conversation: Conversation) -> str:
    """What a conversation says, without where it comes from and what of it is trained on."""
    messages = tuple(replace(message, weight=1) for message in conversation.messages)
    return to_json(replace(conversation, origin="", messages=messages))


def masked_text(tokenizer, example: Example) -> str:
    """The example's text with its trained spans between ⟦ and ⟧."""
    edges = numpy.flatnonzero(numpy.diff(example.loss_mask_T, prepend=0, append=0))
    text, position = "", 0
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        context, trained = example.tokens_T[position:start], example.tokens_T[start:end]
        text += f"{tokenizer.decode(context)}⟦{tokenizer.decode(trained)}⟧"
        position = end
    return text + tokenizer.decode(example.tokens_T[position:])
