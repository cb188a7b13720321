"""What the scores of all artifacts say together: task scores, differences, flips by stage, verdicts.

The stages are those of the recipe: base, adapter, merged, and from merged each quantized form. Every artifact is
compared with the base and with the stage before it, and, where there is a baseline.lock, with what that
says of it. Of what the merged model gained on a target task, each quantized form is said to keep so much.
Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_kit import gain, gates
from lora_kit.claims import BASELINE, FEWSHOT, Gate, lock_subject
from lora_kit.errors import MachineError
from lora_kit.types import TaskScore, Verdict

Scored = dict[str, dict[tuple[str, str], list[dict[str, Any]]]]
"""Lines of items.jsonl by subject (an artifact, base-fewshot, or baseline/ARTIFACT), then by (task, metric)."""
_ROAD = ("base", "adapter", "merged")


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What goes into scores.json."""

    scores: list[TaskScore]
    differences: list[dict[str, Any]]
    flips: list[dict[str, Any]]
    gains: list[dict[str, Any]]
    verdicts: list[Verdict] = field(default_factory=list)


def compare(
    scored: Scored, claims: Sequence[Gate], higher_is_better: Mapping[tuple[str, str], bool],
    not_measured: Sequence[Mapping[str, str]], corpus: Mapping[tuple[str, str], gates.Corpus | None] | None = None,
) -> Compared:
    """Everything that the scores say, in the order of artifacts and tasks.

    Args:
        higher_is_better: by (task, metric).
        corpus: what makes the value of a corpus metric, by (task, metric).
        not_measured: entries with artifact, task and why.
    """
    corpus = corpus or {}
    scores = [gates.task_score(lines, task=task, artifact=name, metric=metric, corpus=corpus.get((task, metric)),
                               higher_is_better=higher_is_better[task, metric])
              for name, by_metric in scored.items() if not _is_locked(name)
              for (task, metric), lines in by_metric.items()]
    stages = stage_pairs(list(scored))
    wanted = [(task, metric, name, "base") for name, by_metric in scored.items()
              if name != "base" and not _is_locked(name) for task, metric in by_metric]
    wanted += [(task, metric, name, before) for name, before in stages for task, metric in scored[name]]
    wanted += [(gate.task, gate.metric, gate.artifact, subject_of(gate, scored)) for gate in claims if gate.baseline]
    pairs = [pair for pair in dict.fromkeys(wanted) if all(pair[:2] in scored.get(side, {}) for side in pair[2:])]

    def about(pair: tuple[str, str, str, str]) -> dict[str, Any]:
        task, metric, name, before = pair
        return {"task": task, "metric": metric, "artifact": name, "baseline": before,
                "higher_is_better": higher_is_better[task, metric]}

    def lines(pair: tuple[str, str, str, str], side: int) -> list[dict[str, Any]]:
        return scored[pair[side]][pair[:2]]

    return Compared(
        scores=scores, gains=gains(scored, claims, higher_is_better, corpus),
        verdicts=verdicts(scored, claims, higher_is_better, not_measured, corpus),
        differences=[gates.difference(lines(pair, 2), lines(pair, 3), corpus=corpus.get(pair[:2]), **about(pair))
                     for pair in pairs],
        flips=[gates.flips(lines(pair, 2), lines(pair, 3), **about(pair)) for pair in pairs
               if (pair[2], pair[3]) in stages])


def gains(scored: Scored, claims: Sequence[Gate], higher_is_better: Mapping[tuple[str, str], bool],
          corpus: Mapping[tuple[str, str], gates.Corpus | None]) -> list[dict[str, Any]]:
    """What each quantized form keeps of the merged model's gain, on the tasks that the suite claims to get better.

    Returns:
        What :func:`lora_kit.gain.of_items` does, with task, metric, artifact and higher_is_better.
    """
    targets = dict.fromkeys((gate.task, gate.metric) for gate in claims if gate.role == "target")
    forms = [name for name, before in stage_pairs(list(scored)) if before == "merged" and name not in _ROAD]
    return [{"task": key[0], "metric": key[1], "artifact": name, "higher_is_better": higher_is_better[key],
             **gain.of_items(*(scored[side][key] for side in ("base", "merged", name)), corpus=corpus.get(key),
                             higher_is_better=higher_is_better[key])}
            for key in targets for name in forms
            if all(key in scored.get(side, {}) for side in ("base", "merged", name))]


def verdicts(
    scored: Scored, claims: Sequence[Gate], higher_is_better: Mapping[tuple[str, str], bool],
    not_measured: Sequence[Mapping[str, str]], corpus: Mapping[tuple[str, str], gates.Corpus | None], *,
    shares: Sequence[float] = (1.0,), decided: Mapping[int, Verdict] | None = None,
) -> list[Verdict]:
    """The verdicts alone; ``shares`` and ``decided`` as :func:`gates.decide` takes them."""
    found = [_evidence(gate, scored, higher_is_better, corpus, not_measured) for gate in claims]
    return gates.decide(claims, found, shares=shares, decided=decided)


def stage_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """(artifact, the one before it) of the recipe's stages among ``names``, and of each with its locked scores."""
    pairs, before = [], None
    for name in _ROAD:
        if name in names:
            pairs += [(name, before)] if before else []
            before = name
    last = "merged" if "merged" in names else None
    pairs += [(name, last) for name in names
              if last and name not in _ROAD and name != FEWSHOT and not _is_locked(name)]
    return pairs + [(name, f"{BASELINE}/{name}") for name in names if f"{BASELINE}/{name}" in names]


def subject_of(gate: Gate, scored: Mapping[str, Any]) -> str:
    """The subject among ``scored`` that the gate compares with; of a lock without the artifact, its base."""
    wanted = lock_subject(gate.baseline, gate.artifact)
    if wanted is None:
        return gate.baseline
    if gate.baseline == BASELINE and f"{BASELINE}/{wanted}" not in scored:
        return f"{BASELINE}/base"
    return f"{BASELINE}/{wanted}"


def check_errors(scored: Scored, most: float, where: str) -> None:
    """See that no more than the share ``most`` of any subject's items failed: what is left would be another test.

    Raises:
        MachineError: with the first error of the first task that has too many.
    """
    for name, by_metric in scored.items():
        for (task, metric), lines in by_metric.items():
            failed = [line for line in lines if line["score"] is None]
            if len(failed) > most * len(lines):
                raise MachineError(
                    f"task {task}", f"{len(failed)} of {len(lines)} items of {name} have no {metric}, more than "
                    f"eval.max_errors allows ({most * 100:.0f} %); the first: {failed[0].get('error')}",
                    f"correct it, or raise eval.max_errors; the items are in {where}/{name}/items.jsonl")


def _evidence(gate: Gate, scored: Scored, higher_is_better: Mapping, corpus: Mapping,
              not_measured: Sequence[Mapping[str, str]]) -> gates.Evidence:
    key = gate.task, gate.metric
    items, other = scored.get(gate.artifact, {}).get(key), None
    if gate.baseline:
        other = scored.get(subject_of(gate, scored), {}).get(key)
    return gates.evidence(items, other, gate, higher_is_better=higher_is_better[key], corpus=corpus.get(key),
                          why_not=_why_not(gate, scored, not_measured))


def _why_not(gate: Gate, scored: Scored, not_measured: Sequence[Mapping[str, str]]) -> str:
    for entry in not_measured:
        if entry["task"] == gate.task and entry["artifact"] in (gate.artifact, gate.baseline):
            return f"{entry['artifact']} was not measured: {entry['why']}"
    if gate.baseline and lock_subject(gate.baseline, gate.artifact) is not None:
        if not any(_is_locked(name) for name in scored):
            return "no baseline was given"
        if gate.task not in {task for task, _ in scored.get(subject_of(gate, scored), {})}:
            return f"the baseline has no scores of {lock_subject(gate.baseline, gate.artifact)} on {gate.task}"
    return ""


def _is_locked(name: str) -> bool:
    return name.startswith(f"{BASELINE}/")
