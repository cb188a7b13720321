"""What a served model meets beside plain answers, measured with the recipe's own prompts: speculative decoding,
retrieval, and adapters that share a base.

Each part runs in a fresh process, on the run's merged model (else the first one in Hugging Face layout), or on the
artifact that a user names. Its prompts are those of the recipe's evaluation.

Reads the run's data, its suite and its artifacts; writes nothing (``bench.py`` writes what comes back).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_kit import bench_retrieval, events, hardware, isolate, items, rows, suite
from lora_kit.errors import DataError, MachineError, RecipeError
from lora_kit.recipe import BenchSection, ModelSection, Recipe
from lora_kit.recipe_serving import RetrievalSection, SpeculativeSection
from lora_kit.report_serving import PARTS
from lora_kit.rundir import Run
from lora_kit.speed_ratio import FEWEST_PAIRS
from lora_kit.types import Artifact

KINDS = ("hf", "adapter")
"""Kinds of artifact that transformers runs as they are."""


def wanted(bench: BenchSection) -> dict[str, Any]:
    """The parts that the recipe asks for, by name, with their sections."""
    return {name: part for name in PARTS if (part := getattr(bench, name))}


def check(recipe: Recipe, relative_to: Path) -> None:
    """Find what is missing before anything is measured, or trained.

    Raises:
        ModelError, DataError: there is no such assistant, or no such corpus.
    """
    speculative, retrieval = recipe.bench.speculative, recipe.bench.retrieval
    if speculative and speculative.assistant and speculative.assistant not in recipe.artifact_names:
        from lora_kit.model import find_base

        find_base(ModelSection(base=speculative.assistant), relative_to)
    if retrieval and not retrieval.corpus.startswith("python:"):
        bench_retrieval.corpus_texts(retrieval.corpus, relative_to)


def measure(recipe: Recipe, run: Run, artifacts: Sequence[Artifact], *, only: Sequence[str] = ()) -> dict[str, Any]:
    """Every part that ``recipe.bench`` asks for, by name; ``why_not`` in place of figures that do not exist.

    Args:
        artifacts: those that are benched.
        only: the parts to measure; empty: all that are asked for.

    Raises:
        RecipeError: there is no prompt to answer, or no assistant of that name.
    """
    found: dict[str, Any] = {}
    threads = recipe.bench.threads or hardware.usable_cores()
    for name, part in wanted(recipe.bench).items():
        if only and name not in only:
            continue
        events.tell(events.Note(text=f"bench: measuring {PARTS[name].name}"))
        try:
            found[name] = _MEASURES[name](recipe, run, artifacts, part, threads)
        except MachineError as error:
            events.tell(events.Caution(text=f"{PARTS[name].name} was not measured: {error}"))
            found[name] = {"why_not": str(error)}
    return found


def _speculative(recipe: Recipe, run: Run, artifacts: Sequence[Artifact], part: SpeculativeSection, threads: int
                 ) -> dict[str, Any]:
    artifact = _served(artifacts, "speculative")
    assistant = _assistant(run, part.assistant) if part.assistant else None
    return isolate.call("lora_kit.bench_speculative:measure", {
        "artifact": artifact.as_dict(), "asked": prompts_of(recipe, run, part.prompts),
        "tools_mode": recipe.data.tools, "assistant": assistant.as_dict() if assistant else None,
        "drafted": part.drafted, "new_tokens": part.new_tokens, "threads": threads}, threads=threads).value


def _retrieval(recipe: Recipe, run: Run, artifacts: Sequence[Artifact], part: RetrievalSection, threads: int
               ) -> dict[str, Any]:
    artifact = _served(artifacts, "retrieval")
    return isolate.call("lora_kit.bench_retrieval:measure", {
        "artifact": artifact.as_dict(), "asked": prompts_of(recipe, run, part.questions),
        "tools_mode": recipe.data.tools, "texts": bench_retrieval.corpus_texts(part.corpus, run.recipe_file.folder),
        "corpus": part.corpus, "passages": part.passages, "passage_tokens": part.passage_tokens, "most": part.most,
        "embed": part.embed, "seed": recipe.seed, "threads": threads}, threads=threads).value


def _adapters(recipe: Recipe, run: Run, artifacts: Sequence[Artifact], counts: Sequence[int], threads: int
              ) -> dict[str, Any]:
    adapter, merged = (run.artifact(name).as_dict() for name in ("adapter", "merged"))
    return isolate.call("lora_kit.bench_adapters:measure", {
        "adapter": adapter, "merged": merged, "asked": prompts_of(recipe, run, FEWEST_PAIRS),
        "tools_mode": recipe.data.tools, "counts": list(counts), "new_tokens": recipe.bench.new_tokens,
        "threads": threads}, threads=threads).value


def _served(artifacts: Sequence[Artifact], part: str) -> Artifact:
    """The artifact that answers: the merged model, else the first that transformers runs."""
    able = [artifact for artifact in artifacts if artifact.kind in KINDS]
    if not able:
        raise RecipeError(f"bench.{part}", "no benched artifact is one that transformers runs",
                          "add merged to bench.artifacts")
    return next((artifact for artifact in able if artifact.name == "merged"), able[0])


_MEASURES = {"adapters": _adapters, "speculative": _speculative, "retrieval": _retrieval}


def prompts_of(recipe: Recipe, run: Run, number: int) -> list[dict[str, Any]]:
    """The first ``number`` prompts of the recipe's evaluation: messages and tools, shuffled by nothing but the drawing.

    Those of the suite's tasks that generate, in turns; else those of the held-out conversations.

    Raises:
        RecipeError: there are fewer.
    """
    held_out = rows.read_held_out(run.stage_dir("data"))
    asked: list[list[dict[str, Any]]] = []
    for task in suite.suite_of(recipe, run.recipe_file.folder).tasks:
        if isinstance(task.spec, suite.GenerateTask):
            try:
                made = items.make_items(task, recipe, run.recipe_file.folder, held_out).items
            except DataError:
                continue  # the evaluation says so
            asked.append([{"messages": item.messages, "tools": item.tools} for item in made])
    if not any(asked):
        asked = [[{"messages": messages, "tools": tools} for messages, tools in items.questions_of(held_out)]]
    found = [each for turn in range(number) for task in asked for each in task[turn:turn + 1]][:number]
    if len(found) < number:
        raise RecipeError("bench", f"the recipe's evaluation asks {len(found)} prompts where {number} are to be "
                          "answered", "raise data.held_out_rows, or name a suite with a task that generates")
    return found


def _assistant(run: Run, reference: str) -> Artifact:
    """The artifact of the run that is called so, else the model that ``reference`` names as ``model.base`` does."""
    from lora_kit.model import find_base

    known = run.artifacts().get(reference)
    if known is None:
        fields = find_base(ModelSection(base=reference), run.recipe_file.folder)["artifact"]
        return Artifact(**{**fields, "name": reference})
    if known.kind not in KINDS:
        raise RecipeError("bench.speculative.assistant", f"{reference} is not run by transformers, which drafts here",
                          "name a model in Hugging Face layout")
    return known


def parts(found: dict[str, Any]) -> Iterator[events.Event]:
    """What is shown of :func:`measure`'s figures: a table and notes for each part."""
    for name, figures in found.items():
        if "why_not" in figures:
            continue  # told when it happened
        shown = PARTS[name]
        yield events.Table(title=shown.title(figures), columns=shown.columns, rows=shown.rows(figures))
        for line in shown.lines(figures):
            yield events.Note(text=line)
