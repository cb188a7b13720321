"""What a recipe will take and cost, in rows: time and disk of training, seconds and price of a request, break-even.

Lengths of requests are those of the recipe's own held-out rows (of the training rows where none are held out). All
figures follow from the rates and formulas of ``outlook.py``; whether the rates were measured is said with them.
Torch-free. Reads token files; writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_kit import footprint, memory, outlook, packing
from lora_kit.memory import Shape
from lora_kit.outlook import Rates, Request
from lora_kit.recipe import CostSection, Recipe
from lora_kit.tokens import ExampleFile
from lora_kit.units import bytes_text, count_text, number_text, seconds_text

NO_RATES = ("time and cost are not forecast: nothing was measured of this machine; lora-kit plan RECIPE --calibrate "
            "measures it in five steps")
ACCEPTANCES = (0.6, 0.8)
"""Shares of drafted tokens that are accepted, in what the plan shows of speculative decoding: assumptions."""
_KEPT_CHECKPOINTS = 2
_ROWS_LOOKED_AT = 200


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of the model that is served."""

    name: str
    weight_bytes: float


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Time, disk and cost of one recipe; see :func:`look_ahead`."""

    train_seconds: float
    train_gflops_per_second: float
    request: Request
    lengths_of: str
    seconds_by_form: dict[str, outlook.RequestSeconds]
    disk_bytes: dict[str, float]
    changes: tuple[tuple[str, outlook.RequestSeconds, str], ...]
    """(change, a request's seconds with it, what is assumed), of the first form."""
    rates: Rates
    cost: CostSection | None

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each line about time and disk."""
        disk = ", ".join(f"{name} {bytes_text(size)}" for name, size in self.disk_bytes.items())
        lines = [
            ("training", f"{seconds_text(self.train_seconds)} of steps at "
                         f"{number_text(self.train_gflops_per_second, 3)} GFLOP/s; loading and held-out rows come on "
                         "top"),
            ("disk", f"{bytes_text(sum(self.disk_bytes.values()))}: {disk}"),
            ("a request", f"{count_text(self.request.input_tokens)} tokens read, "
                          f"{count_text(self.request.output_tokens)} written ({self.lengths_of})"),
            ("rates", self.rates.source),
        ]
        if self.cost:
            once, always = outlook.price_per_year(self.train_seconds, self._main.total, self.cost)
            every = f"every {self.cost.retrain_every}" if self.cost.retrain_every else "once"
            lines.append(("cost", f"training {self._money(outlook.price(self.train_seconds, self.cost))} {every}"))
            if self.cost.requests_per_day:
                lines.append(("in a year", f"training {self._money(once)}, {count_text(self.cost.requests_per_day)} "
                                           f"requests a day {self._money(always)}"))
        return lines

    def form_columns(self) -> tuple[str, ...]:
        """Titles of :meth:`form_rows`."""
        priced = ("1,000 requests", "a million read", "a million written") if self.cost else ()
        return ("form", "one request", "reading", "writing", "tokens/s", *priced, "break-even")

    def form_rows(self) -> list[tuple[str, ...]]:
        """A row for each form that is served."""
        return [self._row(name, seconds) for name, seconds in self.seconds_by_form.items()]

    def change_rows(self) -> list[tuple[str, str, str, str]]:
        """Under ``change, one request, times as long, what is assumed``."""
        return [(name, seconds_text(seconds.total), f"{seconds.total / self._main.total:.2f}", assumed)
                for name, seconds, assumed in self.changes]

    @property
    def main_form(self) -> str:
        """The form that changes are shown of."""
        return next(iter(self.seconds_by_form))

    @property
    def _main(self) -> outlook.RequestSeconds:
        return next(iter(self.seconds_by_form.values()))

    def _row(self, name: str, seconds: outlook.RequestSeconds) -> tuple[str, ...]:
        even = outlook.break_even(self.train_seconds, seconds.total, self.cost)
        when = f"{count_text(even.requests)} requests"
        if even.days is not None:
            when += f", {number_text(even.days, 3)} days"
        if even.within_period is False:
            when += " (training comes again before)"
        written = self.request.output_tokens / seconds.writing
        priced: tuple[str, ...] = ()
        if self.cost:
            read = self.request.input_tokens / seconds.reading
            priced = tuple(self._money(outlook.price(each, self.cost)) for each in (
                1000 * seconds.total, 1e6 / read, 1e6 / written))
        return (name, seconds_text(seconds.total), seconds_text(seconds.reading), seconds_text(seconds.writing),
                number_text(written, 3), *priced, when)

    def _money(self, amount: float) -> str:
        return f"{number_text(amount, 3)} {self.cost.currency}"


def look_ahead(recipe: Recipe, shape: Shape, rates: Rates, *, num_tokens: int, num_trained: int,
               examples: ExampleFile, held_out: ExampleFile, data_dir: Path, cost: CostSection | None) -> Outlook:
    """The outlook of ``recipe`` over its prepared data.

    Args:
        num_tokens: that training reads in all steps, ``num_trained`` of them trained on.
        data_dir: the prepared data, whose size counts.
        cost: prices; None: without.
    """
    mean = float(examples.offsets[-1]) / len(examples)
    seconds = outlook.train_seconds(
        shape, recipe.lora, rates, num_tokens=num_tokens, num_trained=num_trained, mean_length=mean,
        checkpointing=recipe.train.gradient_checkpointing)
    rows = held_out if len(held_out) else examples
    request = _request_of(rows)
    forms = forms_of(recipe, shape)
    by_form = {form.name: outlook.request_seconds(shape, rates, request, weight_bytes=form.weight_bytes)
               for form in forms}
    return Outlook(
        train_seconds=seconds, train_gflops_per_second=rates.train_flops_per_second / 1e9, request=request,
        lengths_of="means of the held-out rows" if len(held_out) else "means of the training rows",
        seconds_by_form=by_form, disk_bytes=_disk(recipe, shape, forms, data_dir),
        changes=tuple(_changes(recipe, shape, rates, request, rows, forms[0], cost)), rates=rates, cost=cost,
    )


def forms_of(recipe: Recipe, shape: Shape) -> list[Form]:
    """The merged model and its quantized forms, as far as their bits are known."""
    return [Form(name=name, weight_bytes=footprint.form_weight_bytes(shape, method, type_))
            for name, method, type_ in footprint.served_forms(recipe)]


def _request_of(rows: ExampleFile) -> Request:
    """Tokens before what is trained on are read, the others written: means over at most ``_ROWS_LOOKED_AT`` rows."""
    looked = range(min(len(rows), _ROWS_LOOKED_AT))
    written = sum(rows.num_trained(row) for row in looked) / len(looked)
    return Request(input_tokens=max(1.0, sum(map(rows.length, looked)) / len(looked) - written),
                   output_tokens=max(1.0, written))


def _disk(recipe: Recipe, shape: Shape, forms: Sequence[Form], data_dir: Path) -> dict[str, float]:
    adapter = memory.ADAPTER_BYTES * memory.num_lora_params(shape, recipe.lora)
    moments = memory.training_bytes(shape, recipe.lora, optimizer=recipe.train.optimizer).optimizer
    data = sum(file.stat().st_size for file in Path(data_dir).rglob("*") if file.is_file())
    return {"data": float(data), "adapter": float(adapter),
            f"{_KEPT_CHECKPOINTS} checkpoints": float(_KEPT_CHECKPOINTS * (adapter + moments)),
            **{form.name: form.weight_bytes for form in forms}}


def _changes(recipe: Recipe, shape: Shape, rates: Rates, request: Request, rows: ExampleFile, form: Form,
             cost: CostSection | None) -> list[tuple[str, outlook.RequestSeconds, str]]:
    def seconds(changed: Request, **more: float) -> outlook.RequestSeconds:
        return outlook.request_seconds(shape, rates, changed, weight_bytes=form.weight_bytes, **more)

    found = []
    shared = packing.shared_prefix([rows[row] for row in range(min(len(rows), _ROWS_LOOKED_AT))])
    if shared:
        cached = Request(input_tokens=request.input_tokens, output_tokens=request.output_tokens,
                         cached_tokens=min(float(shared), request.input_tokens - 1))
        found.append(("prefix caching", seconds(cached), f"the {shared} tokens that the rows begin with are held"))
    if cost and cost.passages:
        more = cost.passages * cost.passage_tokens
        found.append((f"retrieval of {cost.passages} passages", seconds(Request(
            input_tokens=request.input_tokens + more, output_tokens=request.output_tokens)),
            f"{more:,} more tokens read; embedding and look-up not counted: lora-kit bench --retrieval "
            f"{cost.passages} measures all of it"))
    for acceptance in ACCEPTANCES:
        found.append((
            f"speculative decoding, {acceptance:.0%} accepted",
            seconds(request, tokens_per_pass=outlook.tokens_per_pass(acceptance)),
            f"{outlook.DRAFTED} tokens drafted by prompt lookup, which costs nothing; the share is assumed"))
    return found
