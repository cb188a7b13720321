"""What a recipe will do, before it does it: rows, tokens, steps, stages.

Everything here is counted from the prepared data and the model's configuration; the
forecast of memory and time is not part of it yet. Torch-free.
Reads the cache and the base's config.json; writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from lora_kit import memory, model, tokens
from lora_kit.errors import ModelError, RecipeError
from lora_kit.prepared import Prepared
from lora_kit.recipe import Recipe
from lora_kit.schedule import count_steps, save_interval
from lora_kit.units import bytes_text, count_text, number_text


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Counts for one recipe; tokens are exact, for the very batches that training will see."""

    ledger: dict[str, Any]
    num_steps: int
    num_epochs: float
    examples_seen: int
    tokens_seen: int
    tokens_trained: int
    num_params: int | None
    num_trainable_params: int | None
    base_bytes: int
    save_every: int

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each line of the plan's table."""
        trainable = f"{count_text(self.num_trainable_params)} trainable parameters"
        if self.num_trainable_params is None:
            trainable = "trainable parameters not counted"
        if self.num_trainable_params and self.num_params:
            trainable += f" ({self.num_trainable_params / self.num_params:.2%} of the base)"
        return [
            ("base", f"{count_text(self.num_params)} parameters, {bytes_text(self.base_bytes)} on disk"),
            ("adapter", trainable),
            ("training", f"{count_text(self.num_steps)} steps, {number_text(self.num_epochs, 3)} epochs, "
                         f"{count_text(self.examples_seen)} examples"),
            ("tokens", f"{count_text(self.tokens_seen)} read, {count_text(self.tokens_trained)} of them trained"),
            ("checkpoints", f"every {self.save_every} steps"),
        ]


def make_plan(recipe: Recipe, found: Prepared, base: dict[str, Any]) -> Plan:
    """The plan of ``recipe`` over its prepared data (``found.exists`` must hold).

    Raises:
        RecipeError: the model has no module that ``lora.targets`` names.
    """
    settings = recipe.train
    examples = tokens.read_examples(found.folder, "train")
    num_steps = count_steps(settings, len(examples))
    stream = tokens.stream_of_batches(len(examples), settings.batch_size, recipe.seed, 0)
    seen = [row for rows in islice(stream, num_steps) for row in rows]
    folder = Path(base["artifact"]["path"])
    num_params = num_trainable = None
    try:
        shape = memory.shape_of(model.read_config(folder))
    except ModelError:  # an architecture without formulas: its counts are left out, not guessed
        shape = None
    if shape is not None:
        num_params = memory.num_params(shape)
        # An adapter that training goes on from has its own shape, and the formulas know whole layers' names only.
        if (not recipe.train.from_adapter and recipe.lora.counted
                and not any("." in target for target in recipe.lora.targets)):
            num_trainable = _num_trainable(shape, recipe)
    return Plan(
        ledger=found.ledger(), num_steps=num_steps, num_epochs=num_steps * settings.batch_size / len(examples),
        examples_seen=len(seen), tokens_seen=sum(examples.length(row) for row in seen),
        tokens_trained=sum(examples.num_trained(row) for row in seen), num_params=num_params,
        num_trainable_params=num_trainable, base_bytes=model.weight_bytes(folder),
        save_every=save_interval(settings, num_steps),
    )


def _num_trainable(shape: memory.Shape, recipe: Recipe) -> int:
    try:
        return memory.num_lora_params(shape, recipe.lora)
    except ModelError as error:
        raise RecipeError(error.where, error.what, error.todo) from None
