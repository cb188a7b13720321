"""Forecasts of training set beside what runs measured, and what is learnt from that of the machine at hand.

Each finished training says in its seal how much memory its process held and how long its steps took; the forecast is
made again from the run's own recipe, base and data, without anything learnt. What is learnt is one number,
``footprint.KEPT_SHARE`` of this machine: all other terms are formulas.

Torch-free. Reads run folders; writes ``calibration.json`` in the cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from lora_kit import calibration, devices, hardware, plan, rundir
from lora_kit.errors import DataError, LoraKitError
from lora_kit.footprint import KEPT_QUANTILE
from lora_kit.units import bytes_text, count_text, seconds_text

COLUMNS = ("run", "measured peak", "forecast", "error", "measured time", "forecast", "error")
FEWEST_RUNS = 3
"""Runs that a share is learnt from, at least."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run's training: what was measured, and what the plan says of it now, without corrections."""

    run: str
    measured_bytes: float
    forecast_bytes: float
    measured_seconds: float
    forecast_seconds: float | None
    precision: str
    kept_share: float | None
    """What all other terms leave of the peak, to each byte that the layers keep; None where no step was the peak."""
    is_of_this_machine: bool

    @property
    def error(self) -> float:
        """Relative error of the forecast peak."""
        return self.forecast_bytes / self.measured_bytes - 1

    def row(self) -> tuple[str, ...]:
        """Texts under COLUMNS."""
        in_time = "–"
        if self.forecast_seconds is not None:
            in_time = f"{self.forecast_seconds / self.measured_seconds - 1:+.1%}"
        return (self.run, bytes_text(self.measured_bytes), bytes_text(self.forecast_bytes), f"{self.error:+.1%}",
                seconds_text(self.measured_seconds), seconds_text(self.forecast_seconds), in_time)


def records(runs_dir: Path) -> tuple[list[Record], list[str]]:
    """A record of every finished training under ``runs_dir``, and why others have none.

    Raises:
        DataError: there is no run.
    """
    found, left = [], []
    paths = rundir.runs_in(runs_dir)
    if not paths:
        raise DataError(str(runs_dir), "holds no run to compare forecasts with", "lora-kit run RECIPE makes one")
    for path in paths:
        name = f"{path.parent.name}/{path.name}"
        try:
            run = rundir.open_run(path)
            seal = run.seal("train")
            if seal is None:
                left.append(f"{name}: its training is not done")
                continue
            found.append(_record(name, run, seal["figures"]))
        except (LoraKitError, KeyError, OSError) as error:
            left.append(f"{name}: {error if isinstance(error, LoraKitError) else 'its seal lacks figures'}")
    return found, left


def _record(name: str, run: rundir.Run, figures: dict[str, Any]) -> Record:
    if not str(figures["device"]).startswith("cpu"):
        raise DataError(name, "was trained on a GPU, whose forecast is not compared yet")
    device = devices.named("cpu")
    if figures["precision"] == "fp32":
        device = devices.Device(name="cpu", kind="cpu", memory_bytes=device.memory_bytes, has_bf16=False, at_hand=True)
    made = plan.forecast_training(run.recipe, Path(run.resolved["base"]["artifact"]["path"]), run.stage_dir("data"),
                                  device, figures.get("num_processes") or 1)
    terms = {term.name: term.num_bytes for term in made.terms}
    kept = None
    if made.moment == "a step" and made.layers_bytes:
        kept = (figures["peak_memory_bytes"] - made.total + terms["allocator"]) / made.layers_bytes
    rates, flops = calibration.load(figures["precision"]).rates, figures.get("flops")
    machine = run.resolved.get("machine") or {}
    return Record(
        run=name, measured_bytes=figures["peak_memory_bytes"], forecast_bytes=made.total,
        measured_seconds=figures["train_seconds"], precision=figures["precision"], kept_share=kept,
        forecast_seconds=flops / rates.train_flops_per_second if rates and flops else None,
        is_of_this_machine=(machine.get("cpu"), machine.get("cores")) == (
            hardware.cpu_model(), hardware.usable_cores()),
    )


def learn(found: Sequence[Record]) -> list[str]:
    """Store the share of this machine for each precision that enough of its runs have; what was done, in words."""
    lines = []
    for precision in sorted({record.precision for record in found}):
        shares = [record.kept_share for record in found if record.precision == precision
                  and record.is_of_this_machine and record.kept_share is not None]
        if len(shares) < FEWEST_RUNS:
            lines.append(f"nothing is learnt for {precision}: {len(shares)} runs of this machine tell something, "
                         f"{FEWEST_RUNS} are needed")
            continue
        share = max(0.0, float(numpy.quantile(shares, KEPT_QUANTILE)))
        calibration.store(precision, kept_share=share, kept_from=len(shares))
        lines.append(f"learnt for {precision} on this machine: freed arrays that stay resident are {share:.2f} of what "
                     f"the layers keep ({KEPT_QUANTILE:.0%} of {len(shares)} runs have less); later plans use it")
    return lines


def summary(found: Sequence[Record]) -> str:
    """Median and worst error of the forecast peaks, in words."""
    errors = [record.error for record in found]
    return (f"{count_text(len(errors))} runs: peak memory off by {statistics.median(map(abs, errors)):.1%} in the "
            f"median, {max(errors, key=abs):+.1%} at worst; without anything learnt")


def parts(runs_dir: Path) -> Iterator[str | tuple[str, Sequence[str], Sequence[Sequence[str]]]]:
    """What ``plan --accuracy`` shows: lines, and a table as (title, columns, rows). What can be learnt is stored."""
    found, left = records(runs_dir)
    if found:
        yield "training, forecast and measured", COLUMNS, [record.row() for record in found]
        yield summary(found)
        yield from learn(found)
    yield from (f"not compared: {line}" for line in left)
