"""The part of the command line on adapters of any origin: several that become one, and one taken out of a model.

A part of ``cli.py``, with the same rule: heavy imports stand inside the verbs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lora_kit.cli_options import DebugOption
from lora_kit.errors import RecipeError

WeightsOption = Annotated[str | None, typer.Option(
    show_default=False, help="For several ADAPTERs: a weight for each, such as 0.7,0.3. Default: equal shares of one.")]
HowOption = Annotated[Literal["cat", "linear", "svd", "ties", "dare_linear", "dare_ties"] | None, typer.Option(
    show_default=False, help="For several ADAPTERs: how they become one. Only cat is exact. Default: cat.")]
DensityOption = Annotated[float | None, typer.Option(
    show_default=False, help="Share of the values that ties and dare keep. Default: 0.5.")]
RankOption = Annotated[int | None, typer.Option(
    min=1, show_default=False, help="Rank of what svd makes. Default: the largest of the adapters'.")]
SeedOption = Annotated[int | None, typer.Option(show_default=False, help="Seed of what dare drops. Default: 0.")]


def several_of(targets: Sequence[Path], weights: str | None, how: str | None, density: float | None, rank: int | None,
               seed: int | None) -> dict[str, Any]:
    """Options of :func:`lora_kit.merge.merge_adapters` where ``targets`` are several adapters, else empty.

    Raises:
        RecipeError: a target is no adapter, or an option does not fit.
    """
    given = {"--weights": weights, "--how": how, "--density": density, "--rank": rank, "--seed": seed}
    named = [option for option, value in given.items() if value is not None]
    if len(targets) < 2:
        if named:
            raise RecipeError("merge", f"{named[0]} is for several adapters", "name two or more, or leave it out")
        return {}
    for folder in targets:
        if not (folder / "adapter_config.json").exists():
            raise RecipeError(str(folder), "is no adapter: it has no adapter_config.json",
                              "name one run, or adapters in PEFT layout alone")
    method = how or "cat"
    for option, value, methods in (("--density", density, ("ties", "dare_linear", "dare_ties")),
                                   ("--rank", rank, ("svd",)), ("--seed", seed, ("dare_linear", "dare_ties"))):
        if value is not None and method not in methods:
            raise RecipeError("merge", f"{option} has no effect on {method}", f"it is for {', '.join(methods)}")
    found: dict[str, Any] = {"weights": _numbers(weights, len(targets)) if weights else None, "method": method}
    return found | {name: value for name, value in (("density", density), ("rank", rank), ("seed", seed))
                    if value is not None}


def _numbers(text: str, many: int) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) != many or not all(map(math.isfinite, found)):
        raise RecipeError("merge --weights", f"'{text}' is not {many} numbers", "give one for each adapter, such as "
                          + ",".join(["0.5"] * many))
    return found


def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", show_default=False, help="The model that was tuned whole: a "
                                         "folder, or what model.base of a recipe takes.")],
    base: Annotated[str, typer.Option(show_default=False, help="What it was tuned from, as model.base in a recipe.")],
    out: Annotated[Path, typer.Option(show_default=False, help="The folder to write.")],
    energy: Annotated[float, typer.Option(help="Share of the energy of each matrix's change to keep, up to 1.")] = 0.95,
    rank: Annotated[int, typer.Option(min=1, help="Largest rank, whatever that leaves out.")] = 256,
    keep_rest: Annotated[bool, typer.Option("--keep-rest", help="Save what changed and is no linear layer (norms, "
                                            "embeddings) whole, in place of leaving it out.")] = False,
    debug: DebugOption = False,
) -> None:
    """Take a LoRA out of a model that was tuned whole, and say how much of the change it holds."""
    from lora_kit import adapter_verbs

    adapter_verbs.extract_adapter(tuned, base, out, energy=energy, most_rank=rank, keep_rest=keep_rest)
