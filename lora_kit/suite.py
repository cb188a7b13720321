"""Suites, tasks and gates: what an evaluation asks, as YAML files.

A suite (``eval/suites/NAME.yaml``) names tasks and gates; a task is a folder
``eval/tasks/NAME/`` with a ``task.yaml`` and, where it brings its own, its data files, or a task file of
lm-evaluation-harness (``lm_eval_task.py``), which may also be named by its path.
A task's name is looked up in ``tasks/`` beside the suite's folder, then among those that
come with lora-kit. Every problem of a suite and its tasks is told at once, with its line.
Torch-free. Reads suite and task files; writes nothing.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from lora_kit import lm_eval_task, metrics, shipped, yaml_file
from lora_kit.assertions import Assertion
from lora_kit.claims import BASELINE, Gate, Role, problems_with_gate, problems_with_role
from lora_kit.claims import FEWSHOT as FEWSHOT
from lora_kit.errors import LoraKitError, RecipeError
from lora_kit.lm_eval_library import LibraryTask
from lora_kit.lm_eval_task import LmEvalTask
from lora_kit.recipe import Count, Recipe, Section
from lora_kit.task_source import TaskSource, as_source

LOSS = "loss"
"""Metric of a ``held_out_loss`` task: nats per trained token, lower is better."""
BITS = "bits_per_byte"
"""Metric of a ``text`` task: how many bits the model needs for a byte of text, lower is better."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict)) else value


def _as_library_tasks(value: Any) -> Any:
    entries = _as_list(value)
    return [{"task": entry} if isinstance(entry, str) else entry for entry in entries] if isinstance(
        entries, list) else entries


class HeldOutLossTask(Section):
    """Loss on the run's held-out rows: nats per trained token, each conversation a cluster."""

    kind: Literal["held_out_loss"]
    description: str = ""
    """One sentence for people."""


class GenerateTask(Section):
    """Greedy answers to the rows' last prompt, scored by metrics."""

    kind: Literal["generate"]
    description: str = ""
    """One sentence for people."""
    data: Annotated[TaskSource, BeforeValidator(as_source)]
    """The rows: `held_out`, or a source with its format."""
    target: str | None = None
    """Key of the row that metrics compare with (`answers.text`: a key within it); a list of texts is several
    references. Default: the last assistant turn, its text or its tool calls."""
    inputs: dict[str, str] = {}
    """Further inputs of the metrics: their name and the key of the row that holds them. Without an entry,
    `functions` are the tools offered."""
    metrics: Annotated[list[str], BeforeValidator(_as_list)] = Field(min_length=1)
    """Names of `lora_kit/metrics/` or of your own modules (see `docs/eval.md`); the first is what a gate means that
    names none."""
    max_new_tokens: Count = 128
    """Longest answer, in tokens."""
    until: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_list)] = []
    """Texts that end an answer; it ends before the first of them, as it does before a stop token."""
    system: str | None = None
    """System message of every prompt, in place of the row's own."""
    chat_template: bool = True
    """`false`: the prompt is the plain text of the messages, a blank line between them, as base models want it."""
    assertions: Annotated[list[Assertion], BeforeValidator(_as_list)] = []
    """What must hold of every answer, for the metric `all_assertions`; a row's own come on top, by
    `inputs: {assertions: KEY}`."""
    cluster_by: Literal["item", "function"] = "item"
    """What is independent: items, or the functions that they ask for."""
    stratify_by: str | None = None
    """Key of the row that says what kind of item it is: under `eval.budget` each batch has its share of every kind."""
    leave_out: Annotated[list[Literal["functions_in_training"]], BeforeValidator(_as_list)] = []
    """`functions_in_training`: items that offer a function which the training rows offer too."""
    num_fewshot: Annotated[int, Field(ge=0)] = 0
    """Examples from the training rows in the prompt of `base-fewshot`; 0 leaves that subject out."""


class TextTask(Section):
    """Bits per byte of texts that nobody asks for: what a model still knows of everything else."""

    kind: Literal["text"]
    description: str = ""
    """One sentence for people."""
    data: Annotated[TaskSource, BeforeValidator(as_source)]
    """The rows: a source with its format, e.g. `python:stdlib`, which every machine has."""
    text: str | None = None
    """Key of the row that holds the text. Default: what the row's format reads, its messages one below the other."""
    min_chars: Count = 300
    """Shortest text, in characters; rows with less are left out: the first words of a text say little."""
    max_chars: Count = 1200
    """Longest text, in characters; what is longer is cut at a blank."""
    limit: Count | None = None
    """Most texts, drawn by the recipe's seed."""
    cluster_by: Literal["item", "file"] = "item"
    """What is independent: texts, or the files that they stand in."""


class SuiteFile(Section):
    """A suite as it is written."""

    description: str = ""
    """One sentence for people."""
    tasks: Annotated[list[str], BeforeValidator(_as_list)] = []
    """Names of tasks, or paths of task files, relative to the suite's folder."""
    lm_eval: Annotated[list[LibraryTask], BeforeValidator(_as_library_tasks)] = []
    """Names of tasks that lm-evaluation-harness runs itself (`pip install "lora-kit[lm-eval]"`); `{task: NAME,
    metrics: [...], num_fewshot: N}` says more."""
    roles: Annotated[list[Role], BeforeValidator(_as_list)] = []
    """What tasks are for; claims follow from it."""
    gates: Annotated[list[Gate], BeforeValidator(_as_list)] = []
    """Further claims to decide."""


KINDS: dict[str, type[Section]] = {"held_out_loss": HeldOutLossTask, "generate": GenerateTask, "text": TextTask,
                                   **dict.fromkeys(lm_eval_task.METRICS, LmEvalTask), "lm_eval": LibraryTask}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task with its name; ``folder`` is what its paths are relative to."""

    name: str
    folder: Path
    spec: HeldOutLossTask | GenerateTask | TextTask | LmEvalTask | LibraryTask

    @property
    def metrics(self) -> list[str]:
        if isinstance(self.spec, (LmEvalTask, LibraryTask)):
            return self.spec.metrics
        if isinstance(self.spec, TextTask):
            return [BITS]
        return self.spec.metrics if isinstance(self.spec, GenerateTask) else [LOSS]

    def higher_is_better(self, metric: str) -> bool:
        """Whether more of ``metric`` is better."""
        if isinstance(self.spec, (LmEvalTask, LibraryTask)):
            return metric.partition(",")[0] not in lm_eval_task.LOWER_IS_BETTER
        return metric not in (LOSS, BITS) and metrics.load(metric).HIGHER_IS_BETTER

    def unit(self, metric: str) -> str:
        """Unit or range of the values of ``metric``."""
        if isinstance(self.spec, (LmEvalTask, LibraryTask)):
            return {BITS: "bits per byte", "perplexity": "perplexity"}.get(metric, "0 to 1")
        named = {LOSS: "nats per trained token", BITS: "bits per byte"}
        return named.get(metric) or getattr(metrics.load(metric), "UNIT", "0 to 1")

    def corpus(self, metric: str) -> Callable[[Sequence[Any]], float] | None:
        """What makes the value of ``metric`` from items' outcomes; None where the value is the mean of their scores."""
        if isinstance(self.spec, (LmEvalTask, LibraryTask)):
            return lm_eval_task.perplexity if metric.partition(",")[0] == "perplexity" else None
        return None if metric in (LOSS, BITS) else getattr(metrics.load(metric), "corpus", None)

    @property
    def num_fewshot(self) -> int:
        """Examples in the prompt of base-fewshot; those of an LmEvalTask stand in every subject's prompt."""
        return getattr(self.spec, "num_fewshot", 0) if isinstance(self.spec, GenerateTask) else 0

    def sources(self) -> list[TaskSource]:
        """Where its rows come from."""
        return [source for key in ("data", "fewshot_data") if (source := getattr(self.spec, key, None))]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite with its tasks read; ``gates`` are those of its roles and its own, with their metric filled in."""

    name: str
    tasks: tuple[Task, ...]
    gates: tuple[Gate, ...] = ()

    def own_items(self) -> list[Task]:
        """The tasks whose items are not the run's held-out rows."""
        return [task for task in self.tasks
                if not isinstance(task.spec, HeldOutLossTask)
                and all(source.source != "held_out" for source in task.sources())]

    def fingerprint(self) -> str:
        """SHA-256 of what is asked: tasks, gates, and the content of data files that lie beside a task."""
        parts: list[Any] = [gate.model_dump(mode="json") for gate in self.gates]
        for task in self.tasks:
            parts.append([task.name, task.spec.model_dump(mode="json")])
            if not isinstance(task.spec, (LmEvalTask, LibraryTask)):
                parts += [metrics.own_sha256(name) for name in getattr(task.spec, "metrics", ())]
            files = [task.folder / source.source for source in task.sources()]
            if isinstance(task.spec, LibraryTask):
                files = sorted(path for path in task.folder.rglob("*") if path.is_file())
            for path in files or [task.folder]:
                parts.append(hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def suite_of(recipe: Recipe, relative_to: Path) -> Suite:
    """The suite that ``recipe.eval`` names, checked against what the recipe makes; held-out loss when it names none.

    Args:
        relative_to: the recipe's folder.

    Raises:
        RecipeError: with every problem of the suite and its tasks.
    """
    if recipe.eval.suite is None:
        spec = HeldOutLossTask(kind="held_out_loss")
        return Suite(name="held_out_loss", tasks=(Task(name="held_out_loss", folder=relative_to, spec=spec),))
    made = ["base", "adapter", "merged", *(form.name for form in recipe.forms)]
    scored = recipe.eval.artifacts or [name for name in made if name != "adapter"]
    return read_suite(recipe.eval.suite, relative_to, scored, against=BASELINE if recipe.eval.baseline else "base")


def read_suite(name: str, relative_to: Path, scored: list[str] | None = None, against: str = "base") -> Suite:
    """Read a suite and its tasks.

    Args:
        name: of a suite that comes with lora-kit, or the path of a YAML file relative to ``relative_to``.
        scored: the artifacts that will be scored; a gate about any other is an error. None: not checked.
        against: what roles compare with that name nothing.
    """
    path = _suite_path(name, relative_to)
    suite, tree, places = _read(path, "suite", SuiteFile, "write at least tasks: [held_out_loss]")
    problems: list[LoraKitError] = []
    tasks: dict[str, Task] = {}
    unread: list[str] = []
    for index, task_name in enumerate(suite.tasks):
        at = ("tasks", index) if isinstance(tree["tasks"], list) else ("tasks",)
        try:
            task = None if task_name in tasks else _read_task(task_name, path, places.of(at))
            if task is None or task.name in tasks:
                raise RecipeError(places.of(at), f"task '{task_name}' stands twice", "remove one of them")
            tasks[task.name] = task
        except RecipeError as error:
            problems += error.problems or [error]
            unread.append(task_name)
    for index, entry in enumerate(suite.lm_eval):
        task = Task(name=entry.task, folder=path.resolve().parent.parent / "tasks", spec=entry)
        if entry.task in tasks or entry.task != Path(entry.task).name:
            at = ("lm_eval", index) if isinstance(tree["lm_eval"], list) else ("lm_eval",)
            problems.append(RecipeError(places.of(at), f"task '{entry.task}' stands twice", "remove one of them")
                            if entry.task in tasks else
                            RecipeError(places.of(at), f"'{entry.task}' is no name of a task", "write its name alone"))
        tasks.setdefault(entry.task, task)
    if not tasks and not problems:
        raise RecipeError(str(path), "names no task", "write at least tasks: [held_out_loss]")
    gates = []
    for key, entries in (("roles", suite.roles), ("gates", suite.gates)):
        for index, entry in enumerate(entries):
            at = (key, index) if isinstance(tree[key], list) else (key,)
            found = problems_with_role(entry, at, places) if isinstance(entry, Role) else []
            claims = [entry] if isinstance(entry, Gate) else [] if found else entry.gates(against)
            for gate in claims:
                found += problems_with_gate(gate, at, [*tasks, *unread], tasks, scored, places)
                if not found and gate.task in tasks:
                    gates.append(gate.model_copy(update={"metric": gate.metric or tasks[gate.task].metrics[0]}))
            # The claims of one role share its mistakes.
            problems += {str(problem): problem for problem in found}.values()
    if problems:
        raise RecipeError.of(problems)
    return Suite(name=path.stem, tasks=tuple(tasks.values()), gates=tuple(gates))


def suite_names() -> list[str]:
    """Names of the suites that come with lora-kit."""
    return sorted(path.stem for path in (shipped.folder("eval") / "suites").glob("*.yaml"))


def _suite_path(name: str, relative_to: Path) -> Path:
    if name.endswith((".yaml", ".yml")):
        path = relative_to / Path(name).expanduser()
        if not path.is_file():
            raise RecipeError(name, f"no such suite (looked in {path.parent})",
                              "check eval.suite; it is relative to the recipe")
        return path
    known = suite_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise RecipeError("eval.suite", f"no suite is called '{name}'",
                          f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}; or name a .yaml file")
    return shipped.folder("eval") / "suites" / f"{name}.yaml"


def _read(path: Path, noun: str, model: type[BaseModel], needed: str) -> tuple[Any, dict, yaml_file.Places]:
    text = yaml_file.read_text(path, noun, "check the name")
    tree = yaml_file.load_tree(text, str(path), parts="keys", needed=needed)
    values, places = yaml_file.plain(tree), yaml_file.Places(tree, str(path))
    if noun == "task":
        if lm_eval_task.is_lm_eval(values):
            values = lm_eval_task.translated(values, path.parent, places)
        kind = values.get("kind")
        if not isinstance(kind, str) or kind not in KINDS:
            what = "'kind' is missing" if "kind" not in values else f"there is no kind '{kind}'"
            raise RecipeError(places.of(("kind",)), what, f"known kinds: {', '.join(KINDS)}")
        model = KINDS[kind]
    try:
        return model.model_validate(values), values, places
    except ValidationError as error:
        raise RecipeError.of(yaml_file.explain(error, model, values, places)) from None


def _read_task(name: str, suite_path: Path, where: str) -> Task:
    folders = [suite_path.resolve().parent.parent / "tasks", shipped.folder("eval") / "tasks"]
    named = name.endswith((".yaml", ".yml"))
    # A name is one folder: with a separator in it, it could lead anywhere. A path says where it leads.
    files = [suite_path.resolve().parent / name] if named else [
        folder / name / file for folder in folders for file in ("task.yaml", f"{name}.yaml")
        if name == Path(name).name]
    for path in files:
        if path.is_file():
            spec, values, places = _read(path, "task", Section, "write at least its kind")
            if isinstance(spec, GenerateTask):
                problems = _problems_with_metrics(spec, values, places)
                if problems:
                    raise RecipeError.of(problems)
            if isinstance(spec, TextTask):
                problems = _problems_with_text(spec, places)
                if problems:
                    raise RecipeError.of(problems)
            if isinstance(spec, LmEvalTask):
                problems = lm_eval_task.problems_with(spec, values, places)
                if problems:
                    raise RecipeError.of(problems)
            own = getattr(spec, "task", None) or path.stem
            return Task(name=name if not named else own if own == Path(own).name else path.stem, folder=path.parent,
                        spec=spec)
    known = sorted({path.parent.name for folder in folders for path in folder.glob("*/task.yaml")})
    near = difflib.get_close_matches(name, known, n=1)
    raise RecipeError(where, f"there is no task '{name}'",
                      f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}")


def _problems_with_metrics(spec: GenerateTask, values: dict, places: yaml_file.Places) -> list[LoraKitError]:
    problems: list[LoraKitError] = []
    needed: set[str] = set()
    for index, name in enumerate(spec.metrics):
        where = places.of(("metrics", index) if isinstance(values["metrics"], list) else ("metrics",))
        try:
            metric = metrics.load(name)
        except RecipeError as error:
            unknown = error.where.startswith("metric ")
            what = f"there is no metric '{name}'" if unknown else f"{error.where}: {error.what}"
            problems.append(RecipeError(where, what, error.todo))
            continue
        if name in spec.metrics[:index]:
            problems.append(RecipeError(where, f"metric '{name}' stands twice", "remove one of them"))
        wanted = metrics.inputs_of(metric)
        needed.update(wanted)
        for key in wanted:
            if key not in spec.inputs and key != "functions" and not (key == "assertions" and spec.assertions):
                problems.append(RecipeError(where, f"metric '{name}' needs inputs.{key}",
                                            "say which key of the row holds it"
                                            + (", or write assertions" if key == "assertions" else "")))
    if spec.assertions and "assertions" not in needed:
        problems.append(RecipeError(places.of(("assertions",)), "'assertions' has no effect: no metric here reads them",
                                    "add all_assertions to metrics"))
    if spec.data.source == "held_out":
        for key in ("target", "inputs", "stratify_by"):
            if getattr(spec, key):
                problems.append(RecipeError(places.of((key,)), f"'{key}' has no effect: held-out rows are kept as "
                                            "conversations, without their keys", "remove it"))
        return problems
    for key in spec.inputs:
        if key not in needed:
            problems.append(RecipeError(places.of(("inputs", key)), f"'inputs.{key}' has no effect: no metric here "
                                        "reads it", "remove it"))
    return problems


def _problems_with_text(spec: TextTask, places: yaml_file.Places) -> list[LoraKitError]:
    problems: list[LoraKitError] = []
    if spec.data.source == "held_out":
        problems.append(RecipeError(places.of(("data",)), "a text task reads texts, and held-out rows are measured by "
                                    "their trained tokens", "write kind: held_out_loss"))
    if spec.max_chars < spec.min_chars:
        problems.append(RecipeError(places.of(("max_chars",)), f"'max_chars' ({spec.max_chars}) is below 'min_chars' "
                                    f"({spec.min_chars})", "raise it, or lower min_chars"))
    return problems
