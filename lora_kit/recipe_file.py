"""A recipe's YAML file: read, checked with line numbers, turned into a Recipe.

All problems are reported at once, each as ``file:line: what; what to do``: keys that
do not exist (with the nearest that does), duplicate keys, wrong types, formats and
quantizers that there are not, and keys that would have no effect. ``--set a.b=value``
overrides are laid over the file before it is checked. Torch-free. Reads the recipe file;
writes nothing.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from lora_kit import formats, yaml_file
from lora_kit.errors import LoraKitError, RecipeError
from lora_kit.recipe import DataSource, Recipe
from lora_kit.shipped import recipe_names

_EXCLUSIVE = {("train", "steps"): ("train", "epochs"), ("train", "epochs"): ("train", "steps")}


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A recipe with where it came from.

    ``folder`` is what relative paths in it are relative to; ``text`` is the file verbatim;
    ``overrides`` are the ``key=value`` texts of ``--set``, in order.
    """

    recipe: Recipe
    path: Path
    text: str
    overrides: tuple[str, ...]

    @property
    def folder(self) -> Path:
        return self.path.parent


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeFile:
    """Read and check the recipe at ``path``.

    Args:
        path: the YAML file.
        overrides: ``section.key=value`` texts, the value in YAML.

    Raises:
        RecipeError: with every problem of the file at once.
    """
    path = Path(path)
    text = yaml_file.read_text(path, "recipe", _shipped_hint(path))
    return parse_recipe(text, path.resolve(), overrides, shown_as=str(path))


def parse_recipe(
    text: str, path: Path, overrides: Sequence[str] = (), shown_as: str | None = None
) -> RecipeFile:
    """Check the YAML ``text`` as if it stood in the file ``path``; see :func:`read_recipe`."""
    shown = shown_as or str(path)
    problems: list[LoraKitError] = []
    tree = yaml_file.load_tree(text, shown, parts="sections", needed="write at least model.base and data.train",
                               start=", or start with lora-kit init", problems=problems)
    given_by_set: dict[tuple, str] = {}
    for override in overrides:
        problem = _lay_over(tree, override, given_by_set)
        if problem:
            problems.append(problem)
    values = yaml_file.plain(tree)
    values.setdefault("name", path.stem)
    place = yaml_file.Places(tree, shown, given_by_set)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += yaml_file.explain(error, Recipe, values, place)
        raise RecipeError.of(yaml_file.in_order(problems)) from None
    problems += _unknown_names(recipe, values, place) + _without_effect(recipe, values, place)
    if problems:
        raise RecipeError.of(yaml_file.in_order(problems))
    return RecipeFile(recipe=recipe, path=path, text=text, overrides=tuple(overrides))


def _lay_over(tree: dict, override: str, given: dict[tuple, str]) -> LoraKitError | None:
    """Set one ``a.b.0.c=value`` in ``tree``; list positions are numbers from zero."""
    shown = f"--set {override}"
    key, separator, raw = override.partition("=")
    if not separator or not key:
        return RecipeError(shown, "is not key=value", "write it like --set train.steps=10")
    try:
        value = YAML(typ="safe", pure=True).load(raw) if raw.strip() else None
    except (YAMLError, ValueError, RecursionError):
        return RecipeError(shown, "the value is not valid YAML", "quote it")
    parts = tuple(int(part) if part.isdecimal() else part for part in key.split("."))
    node: Any = tree
    for position, part in enumerate(parts[:-1]):
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif isinstance(node, dict) and isinstance(part, str):
            if node.get(part) is None:
                node[part] = {}
            node = node[part]
        else:
            so_far = ".".join(map(str, parts[:position + 1]))
            return RecipeError(shown, f"'{so_far}' is not in the recipe", "check the key")
    last = parts[-1]
    if isinstance(node, list) and isinstance(last, int) and last < len(node):
        node[last] = value
    elif isinstance(node, dict) and isinstance(last, str):
        node[last] = value
        rival = _EXCLUSIVE.get(parts)
        if rival and rival not in given and value is not None:
            node.pop(rival[-1], None)
    else:
        return RecipeError(shown, f"'{key}' is not in the recipe", "check the key")
    given[parts] = shown
    return None


def _unknown_names(recipe: Recipe, values: dict, place: yaml_file.Places) -> list[LoraKitError]:
    """Formats and quantization methods that no file of lora-kit is called by."""
    problems: list[LoraKitError] = []

    def check(loc: tuple, name: str, known: list[str], noun: str) -> None:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            problems.append(RecipeError(
                place.of(loc), f"'{'.'.join(map(str, loc))}' is '{name}', and there is no such {noun}",
                f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"))

    for part in ("train", "held_out"):
        for at, source in _sources(recipe, values, part):
            if source.format is not None:
                check((*at, "format"), source.format, formats.names(), "format")
    methods = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "quantizers")])]
    for index, form in enumerate(recipe.quantize):
        at = ("quantize", index) if isinstance(values["quantize"], list) else ("quantize",)
        if form.method is not None:
            check((*at, "method"), form.method, methods, "quantizer")
    return problems


def _sources(recipe: Recipe, values: dict, part: str) -> list[tuple[tuple, DataSource]]:
    """The sources of ``data.train`` or ``data.held_out``, each with where it stands in the file."""
    listed = isinstance(values["data"].get(part), list)
    return [(("data", part, index) if listed else ("data", part), source)
            for index, source in enumerate(getattr(recipe.data, part))]


def _without_effect(recipe: Recipe, values: dict, place: yaml_file.Places) -> list[LoraKitError]:
    """Keys that were given and that this recipe would never read."""
    problems: list[LoraKitError] = []

    def given(*loc) -> bool:
        node = values
        for part in loc:
            if not isinstance(node, dict) or node.get(part) is None:
                return False
            node = node[part]
        return True

    def report(loc: tuple, why: str, todo: str) -> None:
        problems.append(RecipeError(place.of(loc), f"'{'.'.join(map(str, loc))}' has no effect: {why}", todo))

    if given("train", "steps") and given("train", "epochs"):
        report(("train", "epochs"), "train.steps is given too", "keep one of them")
    if given("data", "held_out_rows") and recipe.data.held_out:
        report(("data", "held_out_rows"), "data.held_out names its own sources", "remove one of them")
    if recipe.data.train_on == "last" and recipe.data.too_long == "split_turns":
        problems.append(RecipeError(place.of(("data", "train_on")), "'last' with too_long: split_turns would train the "
                                    "last turn of every piece", "set too_long: cut_start, or train_on: all"))
    nothing_held_out = not recipe.data.held_out and recipe.data.held_out_rows == 0
    if nothing_held_out and given("train", "eval_every"):
        report(("train", "eval_every"), "nothing is held out", "set data.held_out_rows or remove it")
    if nothing_held_out and recipe.train.keep == "best":
        report(("train", "keep"), "without held-out rows no step is best", "set data.held_out_rows or keep: last")
    for key in ("samples", "sample_tokens"):
        if given("eval", key) and nothing_held_out and recipe.eval.samples:
            report(("eval", key), "nothing is held out to answer", "set data.held_out_rows or remove it")
    if given("eval", "sample_tokens") and not recipe.eval.samples:
        report(("eval", "sample_tokens"), "eval.samples is 0", "remove one of them")
    if recipe.train.from_adapter:
        for key in type(recipe.lora).model_fields:
            if given("lora", key):
                report(("lora", key), "train.from_adapter brings its own", "remove it")
    if given("lora", "layers_pattern") and not recipe.lora.layers:
        report(("lora", "layers_pattern"), "lora.layers names no layers", "set lora.layers or remove it")
    if recipe.model.load_in != "16bit" and recipe.lora.init not in ("default", "gaussian", "eva"):
        problems.append(RecipeError(
            place.of(("lora", "init")), f"'lora.init' is '{recipe.lora.init}', which is made from or like the base's "
            f"exact weights, and model.load_in: {recipe.model.load_in} holds rounded ones",
            "set model.load_in: 16bit, or init: eva"))
    if recipe.model.load_in == "8bit" and recipe.train.shard == "fsdp":
        # Measured: fully_shard takes the scales of bitsandbytes' 8-bit weights away, and the first pass fails.
        problems.append(RecipeError(place.of(("train", "shard")), "'fsdp' cannot share weights of load_in: 8bit",
                                    "set model.load_in: 4bit or 16bit, or train.shard: none"))
    pinned = [(recipe.model.base, recipe.model.sha256, ("model", "sha256"))]
    for part in ("train", "held_out"):
        for at, source in _sources(recipe, values, part):
            pinned.append((source.source, source.sha256, (*at, "sha256")))
            if not source.source.startswith("hub:"):
                for key in ("split", "subset"):
                    if getattr(source, key) is not None:
                        report((*at, key), "only a hub: dataset has one", "remove it")
            if part == "held_out" and source.weight != 1.0:
                report((*at, "weight"), "held-out rows are read once", "remove it")
    for reference, sha256, loc in pinned:
        if sha256 and not reference.startswith("pypi:"):
            report(loc, "only a pypi: archive is checked by it", "remove it")
    named = [form.target or form.name for form in recipe.quantize]
    for index, name in enumerate(named):
        if name in named[:index]:
            report(("quantize", index), f"{name} stands twice", "remove one of them")
    if not recipe.quantize:
        for key in recipe.choose.model_fields_set:
            report(("choose", key), "no quantized form is made to choose from", "add one to quantize, or remove it")
    known = recipe.artifact_names
    for section in ("bench", "eval"):
        for index, name in enumerate(getattr(recipe, section).artifacts):
            if name not in known:
                problems.append(RecipeError(
                    place.of((section, "artifacts", index)), f"no artifact '{name}' comes of this recipe",
                    f"known: {', '.join(known)}"))
    return problems


def _shipped_hint(path: Path) -> str:
    names = recipe_names()
    near = difflib.get_close_matches(path.stem, names, n=1)
    if near:
        return f"did you mean recipes/{near[0]}.yaml? lora-kit init {near[0]} copies it here"
    return f"lora-kit init copies one of: {', '.join(names)}"
