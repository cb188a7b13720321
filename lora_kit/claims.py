"""What a suite claims of the models that it scores: gates, and roles from which gates follow.

A gate is one claim. A role says what a task is for, and the claims follow: a ``target`` task must get
better than the baseline, a ``retain`` task must not get worse than it by more than a margin, and either
may have a floor. The baseline is an artifact of the same run, or ``baseline``: what a committed
baseline.lock says of the same artifact (``baseline/NAME``: of the one called NAME).
Torch-free; reads and writes nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lora_kit.errors import LoraKitError, RecipeError
from lora_kit.recipe import Section
from lora_kit.yaml_file import Places

FEWSHOT = "base-fewshot"
"""The subject beside the artifacts: the base, with examples from the training rows in its prompt."""
BASELINE = "baseline"
"""The subject that a baseline.lock stands for."""
_FORMS = ("better_than", "no_worse_than", "at_least", "at_most")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Gate(Section):
    """A claim that the evaluation decides: PASS, FAIL or INCONCLUSIVE. It has exactly one of the four forms."""

    task: str
    """One of the suite's tasks."""
    metric: str | None = None
    """One of the task's metrics. Default: its first."""
    artifact: str = "merged"
    """What the claim is about."""
    better_than: str | None = None
    """PASS when the whole interval of the improvement over this artifact (or `base-fewshot`, or `baseline`) is above
    zero, FAIL when none of it is."""
    no_worse_than: str | None = None
    """PASS when the whole interval lies above minus `margin`, FAIL when none of it does."""
    margin: Annotated[float, Field(gt=0)] | None = None
    """Largest loss that `no_worse_than` accepts, in the metric's own unit."""
    at_least: float | None = None
    """PASS when the whole interval of the score lies above this, FAIL when none of it does."""
    at_most: float | None = None
    """The same the other way round, for metrics of which less is better."""

    @property
    def baseline(self) -> str | None:
        """The subject that the claim compares with; None where it is about a score alone."""
        return self.better_than or self.no_worse_than

    @property
    def role(self) -> str:
        """What kind of claim it is: ``target``, ``retain`` or ``floor``."""
        return "target" if self.better_than else "retain" if self.no_worse_than else "floor"

    @property
    def bound(self) -> float:
        """What the interval has to leave behind, of the improvement (of the score where there is no baseline)."""
        floor = self.at_least if self.at_most is None else self.at_most
        return floor if floor is not None else 0.0 if self.better_than else -(self.margin or 0.0)


class Role(Section):
    """What a task is for; claims follow from it."""

    task: str
    """One of the suite's tasks."""
    role: Literal["target", "retain"]
    """`target`: must get better than the baseline. `retain`: must not get worse than it by more than `margin`."""
    metric: str | None = None
    """One of the task's metrics. Default: its first."""
    artifacts: Annotated[list[str], BeforeValidator(_as_list)] = Field(["merged"], min_length=1)
    """What has to hold it: a claim for each."""
    against: str | None = None
    """The baseline: an artifact, `base-fewshot`, or `baseline`. Default: base, or the baseline.lock where
    `eval.baseline` (or `--baseline`) names one."""
    margin: Annotated[float, Field(gt=0)] | None = None
    """Largest loss that a `retain` task accepts, in the metric's own unit."""
    at_least: float | None = None
    """A floor for the score itself: one more claim."""
    at_most: float | None = None
    """A ceiling, for metrics of which less is better."""

    def gates(self, against: str) -> list[Gate]:
        """The claims that follow, against ``against`` where the role itself names nothing."""
        found = []
        for artifact in self.artifacts:
            about = {"task": self.task, "metric": self.metric, "artifact": artifact}
            if self.role == "target":
                found.append(Gate(**about, better_than=self.against or against))
            else:
                found.append(Gate(**about, no_worse_than=self.against or against, margin=self.margin))
            if self.at_least is not None or self.at_most is not None:
                found.append(Gate(**about, at_least=self.at_least, at_most=self.at_most))
        return found


def lock_subject(name: str, artifact: str) -> str | None:
    """Which artifact of a baseline.lock the baseline ``name`` means for a claim about ``artifact``; None: no lock."""
    if name == BASELINE:
        return artifact
    return name.removeprefix(f"{BASELINE}/") if name.startswith(f"{BASELINE}/") else None


def problems_with_role(role: Role, at: tuple, places: Places) -> list[LoraKitError]:
    """The mistakes of a role that its gates would not show at the right line."""
    if role.role == "retain" and role.margin is None:
        return [RecipeError(places.of((*at, "role")), "'margin' is missing",
                            "say how much worse is still no worse, in the metric's unit")]
    if role.role == "target" and role.margin is not None:
        what = "'margin' has no effect: a target must get better"
        return [RecipeError(places.of((*at, "margin")), what, "remove it")]
    return []


def problems_with_gate(
    gate: Gate, at: tuple, names: Sequence[str], tasks: Mapping[str, Any], scored: Sequence[str] | None, places: Places,
) -> list[LoraKitError]:
    """Every mistake of a gate, each with its line.

    Args:
        at: where it stands in the file: of a gate, or of the role that it follows from.
        names: of the suite's tasks; ``tasks`` has those of them that could be read.
        scored: the artifacts that will be scored; None: not checked.
    """
    problems: list[LoraKitError] = []

    def report(key: str, what: str, todo: str) -> None:
        problems.append(RecipeError(places.of((*at, key)), what, todo))

    if gate.task not in names:
        near = difflib.get_close_matches(gate.task, names, n=1)
        report("task", f"the {at[0][:-1]}'s task '{gate.task}' is not among the suite's",
               f"did you mean '{near[0]}'?" if near else f"the suite has: {', '.join(names)}")
    task = tasks.get(gate.task)
    if task and gate.metric is not None and gate.metric not in task.metrics:
        report("metric", f"task '{gate.task}' has no metric '{gate.metric}'", f"it has: {', '.join(task.metrics)}")
        task = None
    given = [form for form in _FORMS if getattr(gate, form) is not None]
    if len(given) != 1:
        report((given or ["better_than"])[0], "a gate has one of better_than, no_worse_than, at_least, at_most",
               "give one")
        return problems
    if gate.no_worse_than is not None and gate.margin is None:
        report("no_worse_than", "'margin' is missing", "say how much worse is still no worse, in the metric's unit")
    if gate.no_worse_than is None and gate.margin is not None:
        report("margin", f"'margin' has no effect: {given[0]} has none", "remove it")
    if task and given[0] in ("at_least", "at_most"):
        metric = gate.metric or task.metrics[0]
        right = "at_least" if task.higher_is_better(metric) else "at_most"
        if given[0] != right:
            report(given[0], f"'{given[0]}' is no floor: of {metric}, {'more' if right == 'at_least' else 'less'} is "
                   "better", f"write {right}")
    if gate.artifact == gate.baseline:
        report("artifact" if at[0] == "gates" else "against", f"the gate compares {gate.artifact} with itself",
               "name another")
    for key in ("artifact", "better_than", "no_worse_than"):
        name = getattr(gate, key)
        if name is None or (key != "artifact" and lock_subject(name, gate.artifact)):
            continue
        if name == FEWSHOT and task and not task.num_fewshot:
            report(key, f"task '{gate.task}' has no few-shot form", "set num_fewshot in its task.yaml")
        if scored is None:
            continue
        if name == FEWSHOT and "base" not in scored:
            report(key, "base is not scored by this recipe", "add it to eval.artifacts")
        if name != FEWSHOT and name not in scored:
            report(key, f"'{name}' is not scored by this recipe", f"scored are: {', '.join(scored)}")
    return problems
