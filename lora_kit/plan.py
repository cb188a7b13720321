"""What a recipe will do, before it does it: rows, tokens, steps, memory, time and cost.

Rows, tokens and steps are counted from the prepared data: the very batches that training will see. Memory is
forecast from them and the model's configuration alone (``footprint.py``), for the device at hand or a named one;
time and cost from that device's rates (``plan_outlook.py``). What does not fit comes with advice (``advice.py``).
Torch-free. Reads the cache and the base's config.json; writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy

from lora_kit import advice, calibration, devices, footprint, memory, model, outlook, packing, plan_outlook, tokens
from lora_kit.activations import Pass
from lora_kit.advice import Advice
from lora_kit.devices import Device
from lora_kit.errors import ModelError, RecipeError
from lora_kit.footprint import Footprint, Where
from lora_kit.plan_outlook import Outlook
from lora_kit.prepared import Prepared
from lora_kit.recipe import CostSection, Recipe
from lora_kit.schedule import count_steps, save_interval
from lora_kit.units import bytes_text, count_text, number_text

COLUMNS = ("process", "weights", "adapter", "gradients", "optimizer", "activations", "logits", "KV cache", "program",
           "peak")
_GROUPS = (("weights", "joined weights", "mapped file", "gathered layers"), ("adapter",), ("gradients", "reduction"),
           ("optimizer",), ("activations", "allocator"), ("logits",), ("KV cache",), ("floor", "kernels"))
"""Terms under each of COLUMNS."""
_MOST_STEPS = 2000
"""Steps whose passes are looked at: the largest of so many is that of all, but for luck."""
_CANDIDATES = 4
_TOKENS_READ = 4_000_000
_STORED = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


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
    device: Device | None = None
    num_processes: int = 1
    precision: str = "bf16"
    footprints: tuple[Footprint, ...] = ()
    why_no_memory: str = ""
    passes: tuple[Pass, ...] = field(default=())
    outlook: Outlook | None = None
    advice: Advice | None = None
    """None where everything fits."""

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

    def parts(self) -> Iterator[str | tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
        """All that is shown after the ledger, in order: lines, and tables as (title, columns, rows)."""
        yield "\nplan", ("", ""), self.rows()
        if self.footprints:
            yield f"\nmemory on {self.device.name}", COLUMNS, self.memory_rows()
        yield from self.memory_lines()
        if self.advice and self.advice.steps:
            does = "make it fit" if self.advice.fits else "help, and do not do"
            yield (f"\nchanges that {does}", ("change", "training's peak", "what it costs"), self.advice.rows())
        if self.outlook:
            yield f"\ntime and cost on {self.device.name}", ("", ""), self.outlook.rows()
            yield "", self.outlook.form_columns(), self.outlook.form_rows()
            yield (f"\nwhat changes a request ({self.outlook.main_form})",
                   ("change", "one request", "times", "what is assumed"), self.outlook.change_rows())
        elif self.footprints:
            yield plan_outlook.NO_RATES

    def memory_rows(self) -> list[tuple[str, ...]]:
        """A row under COLUMNS for each process."""
        return [(found.name, *(_bytes_or_dash(found.of(*names)) for names in _GROUPS), bytes_text(found.total))
                for found in self.footprints]

    def memory_lines(self) -> list[str]:
        """Whether it fits, and what the figures stand on."""
        if not self.footprints:
            return [f"memory is not forecast: {self.why_no_memory}"] if self.why_no_memory else []
        device, most = self.device, max(self.footprints, key=lambda found: found.total)
        each = " on each device" if self.num_processes > 1 else ""
        has = f"{bytes_text(device.memory_bytes)} ({device.source})"
        verdict = (f"fits: {most.name} needs {bytes_text(most.total)}{each}, {device.name} has {has}"
                   if most.total <= device.memory_bytes else
                   f"does not fit: {most.name} needs {bytes_text(most.total)}{each}, {device.name} has {has}")
        training = self.footprints[0]
        lines = [verdict, f"training's peak is at {training.moment}, in {self.precision}; forecast, not measured: "
                          "docs/plan.md has every formula"]
        if self.advice is not None and not self.advice.fits:
            lines.append("no changes that are known here make the training fit: take a smaller base, shorter rows "
                         "(data.max_tokens with too_long: split_turns), or another device (--on)")
        return lines


def _bytes_or_dash(num_bytes: float) -> str:
    return bytes_text(num_bytes) if num_bytes else "–"


def make_plan(recipe: Recipe, found: Prepared, base: dict[str, Any], *, device: Device | None = None,
              num_processes: int = 1, cost: CostSection | None = None, corrected: bool = True) -> Plan:
    """The plan of ``recipe`` over its prepared data (``found.exists`` must hold).

    Args:
        device: what it shall run on; None: the machine at hand.
        num_processes: devices that training is spread over.
        cost: prices in place of the recipe's.
        corrected: use what was measured on the machine at hand (``calibration.py``).

    Raises:
        RecipeError: the model has no module that ``lora.targets`` names, or the batch cannot be split.
    """
    settings, device = recipe.train, device or devices.named(None)
    if settings.batch_size % num_processes:
        raise RecipeError("--gpus", f"a batch of {settings.batch_size} examples cannot be shared by {num_processes}",
                          "set train.batch_size to a multiple of it")
    examples = tokens.read_examples(found.folder, "train")
    num_steps = count_steps(settings, len(examples))
    stream = tokens.stream_of_batches(len(examples), settings.batch_size, recipe.seed, 0)
    batches = list(islice(stream, num_steps))
    seen = [row for rows in batches for row in rows]
    folder = Path(base["artifact"]["path"])
    num_params = num_trainable = None
    footprints: tuple[Footprint, ...] = ()
    passes: tuple[Pass, ...] = ()
    why, precision = "", precision_of(recipe, device)
    foreseen = advised = None
    try:
        config = model.read_config(folder)
        shape = memory.shape_of(config)
    except ModelError as error:  # an architecture without formulas: its counts are left out, not guessed
        shape, why = None, error.what
    if shape is not None:
        num_params = memory.num_params(shape)
        # An adapter that training goes on from has its own shape, and the formulas know whole layers' names only.
        if (not recipe.train.from_adapter and memory.is_counted(shape, recipe.lora)
                and not any("." in target for target in recipe.lora.targets)):
            num_trainable = _num_trainable(shape, recipe)
            held_out = tokens.read_examples(found.folder, "held_out")
            forecast = _Forecast(shape=shape, config=config, device=device, num_processes=num_processes,
                                 examples=examples, held_out=held_out, batches=batches[:_MOST_STEPS],
                                 corrected=corrected)
            try:
                passes, training = forecast.training(recipe)
                footprints = (training, *forecast.others(recipe))
                if training.total > device.memory_bytes:
                    longest = max(map(examples.length, range(len(examples))))
                    advised = advice.advise(
                        recipe, advice.candidates(recipe, shape, device, num_processes, longest),
                        lambda other: forecast.training(other)[1].total, device.memory_bytes)
            except ModelError as error:
                why = error.what
            rates = forecast.rates(precision)
            if rates is not None:
                foreseen = plan_outlook.look_ahead(
                    recipe, shape, rates, num_tokens=sum(map(examples.length, seen)),
                    num_trained=sum(map(examples.num_trained, seen)), examples=examples, held_out=held_out,
                    data_dir=found.folder, cost=cost or recipe.cost)
        else:
            why = "the adapter's size does not follow from rank and targets alone"
    return Plan(
        ledger=found.ledger(), num_steps=num_steps, num_epochs=num_steps * settings.batch_size / len(examples),
        examples_seen=len(seen), tokens_seen=sum(examples.length(row) for row in seen),
        tokens_trained=sum(examples.num_trained(row) for row in seen), num_params=num_params,
        num_trainable_params=num_trainable, base_bytes=model.weight_bytes(folder),
        save_every=save_interval(settings, num_steps), device=device, num_processes=num_processes,
        precision=precision, footprints=footprints, why_no_memory=why, passes=passes, outlook=foreseen,
        advice=advised,
    )


def _num_trainable(shape: memory.Shape, recipe: Recipe) -> int:
    try:
        return memory.num_lora_params(shape, recipe.lora)
    except ModelError as error:
        raise RecipeError(error.where, error.what, error.todo) from None


def precision_of(recipe: Recipe, device: Device) -> str:
    """The arithmetic that ``train.precision`` comes to on ``device``."""
    if recipe.train.precision != "auto":
        return recipe.train.precision
    return "bf16" if device.has_bf16 else "fp32"


def forecast_training(recipe: Recipe, base_dir: Path, data_dir: Path, device: Device, num_processes: int) -> Footprint:
    """The training process's peak alone, over prepared data, without what was measured of the machine.

    Raises:
        ModelError: it is not forecast for this base or adapter.
    """
    return _forecast_over(recipe, base_dir, data_dir, device, num_processes, corrected=False).training(recipe)[1]


def _forecast_over(recipe: Recipe, base_dir: Path, data_dir: Path, device: Device, num_processes: int, *,
                   corrected: bool) -> _Forecast:
    config = model.read_config(base_dir)
    examples, held_out = tokens.read_examples(data_dir, "train"), tokens.read_examples(data_dir, "held_out")
    stream = tokens.stream_of_batches(len(examples), recipe.train.batch_size, recipe.seed, 0)
    batches = list(islice(stream, min(_MOST_STEPS, count_steps(recipe.train, len(examples)))))
    return _Forecast(shape=memory.shape_of(config), config=config, device=device, num_processes=num_processes,
                     examples=examples, held_out=held_out, batches=batches, corrected=corrected)


def advice_for(recipe: Recipe, base_dir: Path, data_dir: Path, device: Device) -> tuple[Footprint, Advice]:
    """The forecast of training on ``device``, and what lowers its peak, for a training that ran out of memory.

    Where the forecast fits all the same, something else held memory: a tenth less than the forecast is then asked for.
    """
    forecast = _forecast_over(recipe, base_dir, data_dir, device, 1, corrected=True)
    training = forecast.training(recipe)[1]
    limit = min(device.memory_bytes, 0.9 * training.total)
    longest = max(map(forecast.examples.length, range(len(forecast.examples))))
    return training, advice.advise(recipe, advice.candidates(recipe, forecast.shape, device, 1, longest),
                                   lambda other: forecast.training(other)[1].total, limit)


def priced(recipe: Recipe, price_per_hour: float | None) -> CostSection | None:
    """The recipe's prices, with ``price_per_hour`` in place of its own when it is given."""
    if price_per_hour is None:
        return recipe.cost
    values = recipe.cost.model_dump() if recipe.cost else {}
    return CostSection.model_validate(values | {"price_per_hour": price_per_hour})


@dataclass(frozen=True, kw_only=True)
class _Forecast:
    """All that a forecast of memory takes beside the recipe."""

    shape: memory.Shape
    config: dict[str, Any]
    device: Device
    num_processes: int
    examples: tokens.ExampleFile
    held_out: tokens.ExampleFile
    batches: Sequence[Sequence[int]]
    corrected: bool

    def where(self, precision: str) -> Where:
        stored = _STORED.get(str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32"), "fp32")
        known = self._known(precision)
        return Where(kind=self.device.kind, precision=precision, stored=stored, num_processes=self.num_processes,
                     floor_bytes=known.floor_bytes, kept_share=known.kept_share)

    def _known(self, precision: str) -> calibration.Calibration:
        measured = self.corrected and self.device.at_hand and self.device.kind == "cpu"
        return calibration.load(precision) if measured else calibration.Calibration()

    def rates(self, precision: str) -> outlook.Rates | None:
        """Measured rates of the machine at hand, else assumed ones of a device of the table."""
        return self._known(precision).rates or outlook.rates_of(self.device, self.num_processes)

    def training(self, recipe: Recipe) -> tuple[tuple[Pass, ...], Footprint]:
        where = self.where(precision_of(recipe, self.device))
        share_prefix = "prefix" in footprint.path_of(recipe, where).fast
        passes, most = passes_of(recipe, where, self.examples, self.batches, share_prefix=share_prefix)
        rows = range(len(self.held_out))
        evaluated, _ = passes_of(recipe, where, self.held_out, [rows] if rows else [], share_prefix=share_prefix)
        answers = None
        if recipe.train.stop_prompts and rows:
            # Prompts are what stands before the last answer: rows as a whole are a little longer.
            lengths = sorted(map(self.held_out.length, rows), reverse=True)
            lengths = lengths[:min(recipe.train.stop_prompts, footprint.ANSWER_ROWS)]
            answers = Pass(lengths=tuple(lengths), num_trained=0, num_padded=lengths[0] * len(lengths) - sum(lengths))
        looked_up = None if self.shape.tied else len(numpy.unique(self.examples.tokens[:_TOKENS_READ]))
        return tuple(passes), footprint.training(
            self.shape, recipe, where, passes=passes, held_out=evaluated, num_passes=most, answers=answers,
            num_looked_up=looked_up)

    def others(self, recipe: Recipe) -> list[Footprint]:
        """The merge and each form at inference."""
        where, bench = self.where("bf16"), recipe.bench
        shapes = {"prompt_tokens": bench.prompt_tokens, "new_tokens": bench.new_tokens,
                  "batch_size": bench.batch_size}
        served = Where(kind=self.device.kind, stored=where.stored)
        return [footprint.merging(self.shape, recipe, served), *(
            footprint.inference(self.shape, name, method, type_, served, **shapes)
            for name, method, type_ in footprint.served_forms(recipe))]


def passes_of(recipe: Recipe, where: Where, examples: tokens.ExampleFile, batches: Sequence[Sequence[int]], *,
              share_prefix: bool = False) -> tuple[list[Pass], int]:
    """The forward passes of ``batches`` that may need the most memory, and the most passes that a batch takes.

    These are the ones with the most tokens, the most trained tokens and the longest rows, as
    :func:`lora_kit.packing.micro_batches` forms them.
    """
    settings = recipe.train
    budget = packing.budget_of(recipe, where.kind, where.precision) if settings.packing else None
    most, found, num_processes = 0, {}, where.num_processes
    for rows in batches:
        plans = [packing.micro_batches(rows, examples.length, micro_batch_size=settings.micro_batch_size,
                                       budget=budget, process=process, num_processes=num_processes)
                 for process in range(num_processes)]
        most = max(most, *(len(plan) for plan in plans))
        for micro in (micro for plan in plans for micro in plan if micro):
            lengths = [examples.length(row) for row in micro]
            size = sum(lengths) if budget is not None else max(lengths) * len(lengths)
            found[tuple(micro)] = (size, sum(map(examples.num_trained, micro)), max(lengths))
    chosen = {micro for place in range(3)
              for micro in sorted(found, key=lambda micro: found[micro][place], reverse=True)[:_CANDIDATES]}
    return [_pass_of(micro, examples, budget is not None, share_prefix) for micro in sorted(chosen)], most


def _pass_of(micro: Sequence[int], examples: tokens.ExampleFile, packed: bool, share_prefix: bool) -> Pass:
    rows = [examples[row] for row in micro]
    lengths, trained = [len(row.tokens_T) for row in rows], sum(map(examples.num_trained, micro))
    if packed:
        shared = packing.shared_prefix(rows) if share_prefix else 0
        lengths = [length - (shared if place else 0) for place, length in enumerate(lengths)]
        return Pass(lengths=tuple(lengths), num_trained=trained)
    longest = max(lengths)
    kept = numpy.zeros(longest, bool)
    for row in rows:
        kept[:len(row.tokens_T)] |= numpy.asarray(row.loss_mask_T) == 1
    return Pass(lengths=tuple(lengths), num_trained=trained, num_padded=longest * len(rows) - sum(lengths),
                num_logits=int(kept[1:].sum()) * len(rows))
