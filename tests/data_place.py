"""A place to prepare data in: a recipe's folder, a tiny base, a cache; and what tests ask of the result."""

from __future__ import annotations

import json
from pathlib import Path

from lora_kit import chat, data, prepared
from lora_kit.model import find_base
from lora_kit.recipe_file import parse_recipe
from lora_kit.rows import read_held_out
from lora_kit.tokens import read_examples


def talk(*contents: str, **fields) -> dict:
    return {"messages": [{"role": ("user", "assistant")[index % 2], "content": content}
                         for index, content in enumerate(contents)], **fields}


ROWS = [talk(f"question {index}", f"answer {index}" + "!" * (index % 5)) for index in range(20)]


class Workplace:
    """A recipe's folder with data files, the tiny base, and a cache of its own."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.base_folder = folder, base
        self.write("rows.jsonl", ROWS)

    def write(self, name: str, rows: list[dict]) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def recipe_file(self, *overrides: str, train: str = "rows.jsonl"):
        text = f"model: {{base: {self.base_folder}}}\ndata:\n  train: {train}\n"
        return parse_recipe(text, self.folder / "mine.yaml", ["data.max_tokens=200", *overrides])

    def find(self, *overrides: str, **options):
        recipe_file = self.recipe_file(*overrides, **options)
        base = find_base(recipe_file.recipe.model, self.folder)
        return recipe_file.recipe, prepared.find(recipe_file.recipe, self.folder, base), base

    def prepare(self, *overrides: str, **options) -> prepared.Prepared:
        recipe, found, base = self.find(*overrides, **options)
        data.prepare(recipe, found, base)
        check(found.folder)
        return found

    def tokenizer(self):
        return chat.load_tokenizer(self.base_folder)


def check(folder: Path) -> None:
    """The ledger balances, and it says what lies in the token files."""
    for split, counts in json.loads((folder / "ledger.json").read_text())["splits"].items():
        examples = read_examples(folder, split)
        assert counts["rows_in"] + counts["rows_repeated"] + counts["rows_split"] == (
            counts["rows_used"] + counts["rows_unusable"] + counts["rows_dropped"] + counts["rows_left_out"])
        assert counts["tokens_in"] + counts["tokens_repeated"] == (
            counts["tokens_trained"] + counts["tokens_context"] + counts["tokens_dropped"] + counts["tokens_cut"])
        assert counts["rows_used"] == len(examples)
        assert counts["turns_trained"] <= counts["tokens_trained"]
        assert counts["tokens_trained"] == sum(examples.num_trained(row) for row in range(len(examples)))
        assert counts["tokens_trained"] + counts["tokens_context"] == sum(
            examples.length(row) for row in range(len(examples)))
    assert len(read_held_out(folder)) == len(read_examples(folder, "held_out"))


def counts_of(found, split: str = "train") -> dict[str, int]:
    return found.ledger()["splits"][split]


def reasons_of(found) -> dict[tuple[str, str], int]:
    return {(item["split"], item["reason"]): item["rows"] for item in found.ledger()["reasons"]}


def origins_of(found, split: str = "train") -> list[str]:
    return [example.origin for example in read_examples(found.folder, split)]
