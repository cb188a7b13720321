"""Stage data: rows of the recipe's sources become token files, with a ledger of every row and token.

Rows are read by ``records.py``, understood by ``formats/``, chosen by ``selection.py``,
rendered and masked by ``chat.py``, one after another: data may be larger than memory. What
came out is counted again from the files (``ledger.py``). The result lies in the cache under a
key of everything that decides it (``prepared.py``), is checked against its hashes when it
is used again, and is linked into the run.

Reads the sources and the base's tokenizer. Writes, into the cache and the stage's folder:
``train.*`` and ``held_out.*`` token files, ``held_out.jsonl`` (the held-out
conversations), ``ledger.json``, ``preview.txt`` and ``manifest.json``; and ``overlap.json``,
which depends on the recipe's evaluation as well and so has its own place in the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any, TextIO

import numpy

from lora_kit import chat, prepared, shorten, sources, tokens
from lora_kit.errors import DataError
from lora_kit.events import Caution, Progress, tell
from lora_kit.ledger import NAMED_ROWS, Ledger, check_recount, lengths_of
from lora_kit.prepared import Prepared
from lora_kit.recipe import Recipe
from lora_kit.rows import to_json
from lora_kit.rundir import Run, write_json, writing
from lora_kit.selection import Part, Selection
from lora_kit.spool import Spool
from lora_kit.types import Conversation, Example, Result

SECTIONS = ("data", "seed")
_PREVIEW_ROWS = 3
_TELL_EVERY_SECONDS = 5.0
_BY_TEMPLATE = "made several examples, as the chat template changes earlier turns"


def stage(recipe: Recipe, run: Run) -> Result:
    """Prepare the data, or take it from the cache, and link it into the run.

    Raises:
        RefusedError: the token files are not what the ledger says, by recount.
    """
    found = prepared.find(recipe, run.recipe_file.folder, run.resolved["base"])
    prepare(recipe, found, run.resolved["base"])
    work = run.work("data")
    overlap = found.overlap_path(recipe)
    with writing(work):
        for path in [*found.folder.iterdir(), *([overlap] if overlap.exists() else [])]:
            target = work / ("overlap.json" if path == overlap else path.name)
            try:
                os.link(path, target)
            except OSError:
                shutil.copy(path, target)
    ledger = found.ledger()
    check_recount(work, ledger)
    train, held_out = ledger["splits"]["train"], ledger["splits"]["held_out"]
    return Result(
        summary=f"{train['rows_used']:,} rows to train on ({train['tokens_trained']:,} of "
                f"{train['tokens_trained'] + train['tokens_context']:,} tokens trained), "
                f"{held_out['rows_used']:,} held out",
        figures={"key": found.key, "ledger": ledger},
    )


def prepare(recipe: Recipe, found: Prepared, base: dict[str, Any]) -> None:
    """Make the token files and the ledger of ``found`` unless the cache has them, whole; count overlap with the suite.

    Raises:
        DataError: a source has no usable row, too many unusable ones, or rows that are too long.
        RecipeError: the chat template ignores tools that the rows bring.
        RefusedError: what was written is not what the ledger says, by recount.
        MachineError: the cache cannot be written.
    """
    wrong = _what_is_wrong(recipe, found, base) if found.exists else None
    if wrong:
        tell(Caution(text=f"{found.folder} {wrong}; the data is prepared again"))
        with writing(found.folder):
            shutil.rmtree(found.folder)
    if found.exists:
        if found.overlap(recipe) is None:
            _write_overlap(recipe, found, _task_overlap(recipe, found))
        return
    with sources.new_cache_folder(found.folder) as scratch:
        overlap = _Preparation(recipe, found, base, scratch).write()
        check_recount(scratch, json.loads((scratch / "ledger.json").read_text(encoding="utf-8")))
        for path in scratch.iterdir():
            path.chmod(0o444)  # runs link these files: who edits one in place would edit it in all of them
    _write_overlap(recipe, found, overlap)


def _made_of(recipe: Recipe, found: Prepared, base: dict[str, Any]) -> dict[str, Any]:
    """What decides the token files, part by part, as the manifest says it: a check on the key, which is one hash."""
    return {
        "key": found.key, "data": recipe.section_json("data", "seed"), "tokenizer": base["content"],
        "sources": {split: [{"reference": item.reference, "sha256": item.sha256, "revision": item.revision}
                            for item in items] for split, items in found.sources.items()},
        "code": prepared.code_sha256(), "libraries": prepared.library_versions(),
    }


def _what_is_wrong(recipe: Recipe, found: Prepared, base: dict[str, Any]) -> str | None:
    """None when ``found.folder`` holds the files that its manifest names, byte for byte, made of what there is now."""
    folder, now = found.folder, _made_of(recipe, found, base)
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files = manifest["files"]
        if {path.name for path in folder.iterdir()} != {"manifest.json", *files} or not all(
                sources.file_sha256(folder / name) == expected for name, expected in files.items()):
            return "is not what was written there"
        others = [name for name in now if manifest.get(name) != now[name]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "is not what was written there"
    return f"was made of other things ({', '.join(others)})" if others else None


def _task_overlap(recipe: Recipe, found: Prepared) -> list[dict[str, Any]] | None:
    """Overlap with the items of the recipe's suite, counted again for data that is prepared already."""
    with tempfile.TemporaryDirectory() as scratch, Spool(Path(scratch)) as spool:
        selection = Selection(recipe, found, spool, Ledger())
        selection.select()
    return selection.task_overlap


def _write_overlap(recipe: Recipe, found: Prepared, overlap: list[dict[str, Any]] | None) -> None:
    if overlap is None:
        return
    path = found.overlap_path(recipe)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        write_json(path, overlap)
        path.chmod(0o444)
    for each in overlap:
        _tell_overlap(recipe, each)


def _tell_overlap(recipe: Recipe, each: dict[str, Any]) -> None:
    if each["overlapping_one_row"]:
        example = each["examples"][0]
        done = "left out" if recipe.data.overlap == "drop" else "kept (data.overlap: drop leaves them out)"
        tell(Caution(text=f"{each['rows']:,} training rows overlap {each['overlapping_one_row']:,} of "
                          f"{each['items']:,} items of {each['against'].replace('_', ' ')}, e.g. {example['row']} and "
                          f"{example['item']}: {done}"))


class _Preparation:
    """One preparation: conversations in, token files and ledger out."""

    def __init__(self, recipe: Recipe, found: Prepared, base: dict[str, Any], out_dir: Path) -> None:
        self.recipe, self.found, self.base, self.out_dir = recipe, found, base, out_dir
        self.tokenizer = chat.load_tokenizer(base["artifact"]["tokenizer"])
        self.ledger = Ledger()
        self.offsets: dict[str, numpy.ndarray] = {}
        self.first: list[Example] = []
        self.stop_ids: set[int] = set()
        self.num_refused = 0
        self.without_trained: list[str] = []
        # Of every training example but further copies: a hash of its tokens, and whether its row repeats another.
        self.token_keys, self.is_repeat = array("Q"), bytearray()
        self.seen: set[int] = set()
        self.dropped_as_same: set[tuple[int, int]] = set()

    def write(self) -> list[dict[str, Any]] | None:
        """Write every file; returns the overlap with the items of the evaluation, None where it was not counted."""
        with Spool(self.out_dir) as self.spool:
            self.selection = Selection(self.recipe, self.found, self.spool, self.ledger)
            parts = self.selection.select()
            for split in ("train", "held_out"):
                self._encode(split, parts[split])
            duplicates = self._duplicates()
        self.ledger.check_balance()
        if not self.ledger.total("train", "rows_used"):
            raise DataError("data.train", "no row is left to train on", self.ledger.reasons_text("train"))
        if self.recipe.data.stop_tokens == "required":
            train = tokens.read_examples(self.out_dir, "train")
            chat.check_stops(self.tokenizer, train.tokens, train.mask)
        self._write_preview()
        write_json(self.out_dir / "ledger.json", {
            **self.ledger.as_dict(), "stop_ids": sorted(self.stop_ids), "duplicates": duplicates,
            "overlap": self.selection.held_out_overlap, **lengths_of(self.offsets),
        })
        write_json(self.out_dir / "manifest.json", {
            **_made_of(self.recipe, self.found, self.base), "tools": self.recipe.data.tools,
            "files": {path.name: sources.file_sha256(path) for path in sorted(self.out_dir.iterdir())},
        })
        self._caution(duplicates)
        return self.selection.task_overlap

    def _encode(self, split: str, parts: list[Part]) -> None:
        """Render the rows of ``parts`` one by one and write what becomes of each."""
        self.num_refused, self.num_rows = 0, sum(len(part.rows) for part in parts)
        done, last_told = 0, time.monotonic()
        kept_path = self.out_dir / "held_out.jsonl" if split == "held_out" else Path(os.devnull)
        with tokens.ExampleWriter(self.out_dir, split) as writer, open(kept_path, "w", encoding="utf-8") as kept:
            for part in parts:
                for place, number in enumerate(part.rows.tolist()):
                    self._encode_row(split, part.source, number, place >= part.num_first, writer, kept)
                    done += 1
                    if time.monotonic() - last_told > _TELL_EVERY_SECONDS:
                        last_told = time.monotonic()
                        tell(Progress(stage="data", done=done, total=self.num_rows, unit="row"))
        self.offsets[split] = numpy.array(writer.offsets, numpy.int64)

    def _encode_row(self, split: str, source: str, number: int, is_copy: bool, writer: tokens.ExampleWriter,
                    kept: TextIO) -> None:
        conversation, whole = self.spool.read(number)
        try:
            examples = self._examples_of(conversation)
            num_tokens = [len(example.tokens_T) for example in examples]
            # What the template takes back from earlier turns as a conversation grows can exceed what is cut.
            num_after = max(0, self._count_tokens(whole) - max(num_tokens)) if whole else 0
            pieces = self._pieces(conversation, examples)
        except DataError as error:
            self._refuse(split, source, conversation.origin, error)
            return
        num_pieces, num_out = len(pieces), sum(len(example.tokens_T) for _, example in pieces)
        # What pieces say again comes in once more; what a template says of the whole only is cut.
        again = num_out - sum(num_tokens)
        self.ledger.count(split, source, tokens_in=sum(num_tokens) + num_after, tokens_cut=num_after + max(0, -again),
                          tokens_repeated=max(0, again), rows_split=num_pieces - 1)
        if num_after:
            self.ledger.note(split, source, "messages after max_turns cut off", [conversation.origin],
                             tokens=num_after)
        if len(examples) > 1:
            self.ledger.note(split, source, _BY_TEMPLATE, [conversation.origin])
        if pieces and num_pieces > len(examples):
            self.ledger.note(split, source, f"split at its turns, over {self.recipe.data.max_tokens} tokens",
                             [conversation.origin], tokens=max(0, -again))
        last_said = None
        for place, (said, example) in enumerate(pieces):
            taken = self._taken(split, source, example)
            if taken is None or split == "train" and self._is_same(source, (number, place), is_copy, taken):
                continue
            num_trained = int(taken.loss_mask_T[1:].sum())  # nothing predicts the first token
            self.ledger.count(split, source, rows_used=1, tokens_trained=num_trained,
                              tokens_context=len(taken.tokens_T) - num_trained, turns_trained=len(taken.stops))
            self.stop_ids.update(int(token) for stop in taken.stops for token in taken.tokens_T[stop:stop + 1])
            writer.append(taken)
            if split == "held_out":
                if said is not last_said:  # one conversation may have made several examples
                    kept.write(to_json(said) + "\n")
                last_said = said
            elif len(self.first) < _PREVIEW_ROWS:
                self.first.append(taken)

    def _examples_of(self, conversation: Conversation) -> list[Example]:
        return chat.encode(self.tokenizer, conversation, **self.recipe.data.encoding)

    def _count_tokens(self, conversation: Conversation) -> int:
        return chat.count_tokens(self.tokenizer, conversation, tools_mode=self.recipe.data.tools)

    def _pieces(self, conversation: Conversation, examples: list[Example]) -> list[tuple[Conversation, Example]]:
        """The examples of a row, each with what it says; of a long row its pieces, where the recipe splits."""
        data = self.recipe.data
        if data.too_long != "split_turns" or all(len(each.tokens_T) <= data.max_tokens for each in examples):
            return [(conversation, example) for example in examples]
        return shorten.split(conversation, examples, self._examples_of, data.max_tokens, self.tokenizer.decode)

    def _refuse(self, split: str, source: str, origin: str, error: DataError) -> None:
        """A row that the template cannot render is dropped, until there are too many of them."""
        self.num_refused += 1
        if self.num_refused == 1:
            self.refused = (origin, error.what)
        self.ledger.drop(split, source, error.what, origin, 0)
        if self.num_refused > self.recipe.data.max_dropped * self.num_rows:
            raise DataError(self.refused[0], f"{self.refused[1]}; that befell more rows than data.max_dropped "
                            f"allows ({self.recipe.data.max_dropped:g})", error.todo)

    def _taken(self, split: str, source: str, example: Example) -> Example | None:
        """The example, shortened when it has to be, or None when it is dropped."""
        policy, most, length = self.recipe.data.too_long, self.recipe.data.max_tokens, len(example.tokens_T)
        if length > most:
            if policy == "error":
                raise DataError(example.origin, f"has {length} tokens, over data.max_tokens ({most})",
                               "raise it, or set data.too_long: drop, cut_end, cut_start or split_turns")
            if policy in ("drop", "split_turns"):
                reason = f"over {most} tokens" if policy == "drop" else f"one exchange over {most} tokens"
                self.ledger.drop(split, source, reason, example.origin, length)
                return None
            example = shorten.cut(example, policy, most)
            self.ledger.count(split, source, tokens_cut=length - most)
            self.ledger.note(split, source, f"{policy.removeprefix('cut_')} cut off at {most} tokens",
                             [example.origin], tokens=length - most)
        if not example.loss_mask_T[1:].any():
            self.ledger.drop(split, source, "no trained token left", example.origin, len(example.tokens_T))
            self.without_trained.append(example.origin)
            return None
        return example

    def _is_same(self, source: str, place: tuple[int, int], is_copy: bool, example: Example) -> bool:
        """Whether the example is dropped because an earlier one has the same tokens; notes its hash.

        ``place`` is its row's number and its own number within the row.
        """
        if not is_copy:
            # The mask as well: the same text with other turns trained teaches something else.
            content = example.tokens_T.tobytes() + example.loss_mask_T.tobytes()
            digest = hashlib.blake2b(content, digest_size=8).digest()
            key = int.from_bytes(digest, "little")
            if self.recipe.data.duplicates == "keep":
                repeats, at = self.selection.repeats, int(numpy.searchsorted(self.selection.repeats, place[0]))
                self.token_keys.append(key)
                self.is_repeat.append(bool(at < len(repeats) and repeats[at] == place[0]))
            elif key in self.seen:
                self.dropped_as_same.add(place)
            else:
                self.seen.add(key)
        if place not in self.dropped_as_same:
            return False
        self.ledger.drop("train", source, "same tokens as an earlier row", example.origin, len(example.tokens_T))
        return True

    def _duplicates(self) -> dict[str, Any]:
        """Duplicates within train, as the ledger has them: ``rows`` by content, ``examples`` by tokens alone."""
        repeats = self.selection.repeats
        origins = list(self.selection.origins(repeats[:NAMED_ROWS]))
        if self.recipe.data.duplicates == "drop":
            return {"rows": len(repeats), "examples": len(self.dropped_as_same), "origins": origins, "dropped": True}
        again = numpy.ones(len(self.token_keys), bool)
        again[numpy.unique(numpy.array(self.token_keys, numpy.uint64), return_index=True)[1]] = False
        again &= numpy.frombuffer(bytes(self.is_repeat), numpy.uint8) == 0
        return {"rows": len(repeats), "examples": int(again.sum()), "origins": origins, "dropped": False}

    def _caution(self, duplicates: dict[str, Any]) -> None:
        if self.without_trained:
            named = ", ".join(self.without_trained[:NAMED_ROWS])
            more = ", ..." if len(self.without_trained) > NAMED_ROWS else ""
            tell(Caution(text=f"{len(self.without_trained):,} rows have no trained token left and are dropped: {named}"
                              f"{more}"))
        if (duplicates["rows"] or duplicates["examples"]) and not duplicates["dropped"]:
            first = f", first {duplicates['origins'][0]}" if duplicates["origins"] else ""
            tell(Caution(text=f"{duplicates['rows']:,} training rows say the same as an earlier one{first}, and "
                              f"{duplicates['examples']:,} more have the same tokens; data.duplicates: drop leaves "
                              "them out"))
        for each in self.selection.held_out_overlap:
            _tell_overlap(self.recipe, each)

    def _write_preview(self) -> None:
        parts = ["Trained tokens stand between ⟦ and ⟧; everything else is context.\n"]
        parts += [f"--- {example.origin}\n{masked_text(self.tokenizer, example)}\n" for example in self.first]
        (self.out_dir / "preview.txt").write_text("\n".join(parts), encoding="utf-8")


def spans_of(tokenizer, example: Example) -> list[tuple[str, bool]]:
    """The example's text in pieces, each with whether its tokens are trained on."""
    edges = numpy.flatnonzero(numpy.diff(example.loss_mask_T, prepend=0, append=0))
    spans, position = [], 0
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        spans += [(tokenizer.decode(example.tokens_T[position:start]), False),
                  (tokenizer.decode(example.tokens_T[start:end]), True)]
        position = end
    return [*spans, (tokenizer.decode(example.tokens_T[position:]), False)]


def masked_text(tokenizer, example: Example) -> str:
    """The example's text with its trained spans between ⟦ and ⟧."""
    return "".join(f"⟦{text}⟧" if trained else text for text, trained in spans_of(tokenizer, example))
