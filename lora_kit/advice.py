"""Changes of a recipe that make its training fit, the cheapest first, and what each costs.

Tried in the order of what they cost: first what changes nothing that is learnt, then what takes time, then what may
take quality. Each is laid on top of those before it until the forecast fits; then those that are not needed after all
are taken back. The arithmetic is that of ``plan.py``, and training's own out-of-memory message uses it too.

Torch-free. Reads the cache; writes a recipe where it is told.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_kit import memory, recipe_file
from lora_kit.devices import Device
from lora_kit.errors import LoraKitError, RecipeError
from lora_kit.memory import Shape
from lora_kit.recipe import Recipe
from lora_kit.rundir import writing
from lora_kit.units import bytes_text


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change: ``key`` set to ``value``, and what that costs, in words."""

    key: str
    value: Any
    cost: str

    @property
    def text(self) -> str:
        return f"{self.key}: {str(self.value).lower() if isinstance(self.value, bool) else self.value}"


@dataclass(frozen=True, kw_only=True)
class Advice:
    """Changes that make the training fit together, each with the peak after it and those before it."""

    steps: tuple[tuple[Change, float], ...]
    fits: bool

    @property
    def changes(self) -> list[Change]:
        return [change for change, _ in self.steps]

    def rows(self) -> list[tuple[str, str, str]]:
        """Under ``change, peak after it, what it costs``."""
        return [(change.text, bytes_text(peak), change.cost) for change, peak in self.steps]


def candidates(recipe: Recipe, shape: Shape, device: Device, num_processes: int, longest: int) -> list[Change]:
    """Every change that may help ``recipe``, the cheapest first.

    Args:
        longest: tokens of the longest example.
    """
    settings, found = recipe.train, []

    def add(key: str, value: Any, cost: str) -> None:
        found.append(Change(key=key, value=value, cost=cost))

    if num_processes > 1 and settings.shard == "none":
        add("train.shard", "fsdp", "nothing that is learnt; weights travel between devices in each pass")
    if settings.packing:
        budget = settings.pack_tokens or settings.micro_batch_size * recipe.data.max_tokens
        for share in (2, 4):
            smaller = max(longest, budget // share)
            if smaller < budget and all(change.value != smaller for change in found):
                add("train.pack_tokens", smaller, "nothing that is learnt; more and smaller passes a step")
    elif settings.micro_batch_size > 1:
        add("train.micro_batch_size", 1, "nothing that is learnt; more and smaller passes a step")
    if "auto" not in settings.fast and "loss" not in settings.fast:
        add("train.fast", ["auto"], "nothing: the fast path is proven on the model before it is used")
    if settings.precision == "fp32" and device.has_bf16:
        add("train.precision", "bf16", "rounding; the adapter stays in fp32")
    if settings.optimizer == "adamw":
        add("train.optimizer", "adamw_8bit", "moments in 8 bits; wants bitsandbytes")
    if not settings.gradient_checkpointing:
        flops = [memory.training_flops_per_token(shape, recipe.lora, context=longest / 2, checkpointing=again)
                 for again in (False, True)]
        add("train.gradient_checkpointing", True, f"about {flops[1] / flops[0] - 1:.0%} more operations a step")
    if recipe.model.load_in == "16bit":
        for load_in in ("8bit", "4bit"):
            add("model.load_in", load_in, f"the base is trained on as {load_in} shows it, and passes take longer")
    if recipe.lora.rank > 8:
        add("lora.rank", 8, f"an adapter of {8 / recipe.lora.rank:.0%} of the size; the gates tell what that costs")
    return found


def advise(recipe: Recipe, options: Sequence[Change], peak_of: Callable[[Recipe], float], limit: float) -> Advice:
    """The first of ``options`` that make ``recipe`` fit, without those that turn out not to be needed.

    Args:
        peak_of: the forecast of a recipe, in bytes.
        limit: bytes that there are.
    """
    taken: list[Change] = []
    peak = peak_of(recipe)
    for change in options:
        if peak <= limit:
            break
        tried = [*(other for other in taken if other.key != change.key), change]
        after = _peak(recipe, tried, peak_of)
        if after is not None and after < peak:
            taken, peak = tried, after
    if peak <= limit:
        for change in list(reversed(taken)):
            without = [other for other in taken if other is not change]
            after = _peak(recipe, without, peak_of)
            if after is not None and after <= limit:
                taken = without
    steps = [(change, _peak(recipe, taken[:number + 1], peak_of)) for number, change in enumerate(taken)]
    return Advice(steps=tuple(steps), fits=peak <= limit)


def _peak(recipe: Recipe, changes: Sequence[Change], peak_of: Callable[[Recipe], float]) -> float | None:
    try:
        return peak_of(changed(recipe, changes))
    except LoraKitError:
        return None


def changed(recipe: Recipe, changes: Sequence[Change]) -> Recipe:
    """``recipe`` with ``changes``, checked anew."""
    values = recipe.model_dump()
    for change in changes:
        section, _, key = change.key.partition(".")
        values[section][key] = change.value
    return Recipe.model_validate(values)


def write(source: recipe_file.RecipeFile, changes: Sequence[Change], target: Path) -> None:
    """Write the recipe with ``changes`` to ``target``, comments and all; overrides of the command line go into it.

    Raises:
        RecipeError: ``target`` stands in another folder (a recipe's paths are relative to it), or is there already.
        MachineError: it cannot be written.
    """
    from ruamel.yaml import YAML

    if target.resolve().parent != source.folder.resolve():
        raise RecipeError(f"--write {target}", "stands in another folder, and a recipe's paths are relative to it",
                          f"write it beside {source.path.name}")
    if target.exists():
        raise RecipeError(f"--write {target}", "is there already", "name another file, or remove it")
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 120
    tree = yaml.load(source.text)
    plain = YAML(typ="safe", pure=True)
    given = [(key, plain.load(raw)) for key, _, raw in (text.partition("=") for text in source.overrides)]
    for key, value in [*given, *((change.key, change.value) for change in changes)]:
        place = tree
        *sections, last = key.split(".")
        for section in sections:
            place = place[int(section)] if section.isdigit() else place.setdefault(section, {})
        place[last] = value
    text = io.StringIO()
    yaml.dump(tree, text)
    recipe_file.parse_recipe(text.getvalue(), target.resolve())  # what is written can be read
    with writing(target):
        target.write_text(text.getvalue(), encoding="utf-8")
