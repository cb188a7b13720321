"""Tasks of lm-evaluation-harness run by that library itself, with lora-kit's engines as its model.

What needs the library's code (its own tasks, filters, rows made by functions) is loaded, asked and scored by it
(``lm_eval``, an extra); what the model is asked goes to the artifact's engine, whatever that is. Items have an id by
the row's number, so that artifacts are compared on them like any others. The library's tasks bring code of their own,
and most of them fetch rows from the hub.

Reads what the library reads; writes only ``datasets``' cache. The library is imported when such a task is read.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from lora_kit import multiple_choice
from lora_kit.errors import DataError, LoraKitError, MachineError, RecipeError
from lora_kit.lm_eval_task import LOWER_IS_BETTER
from lora_kit.recipe import Section
from lora_kit.types import ItemScore

INSTALL = 'pip install "lora-kit[lm-eval]"'
_SEED = 1234
"""Where the library starts drawing few-shot examples, unless its command line says otherwise."""
_MOST_NEW_TOKENS = 256
"""Longest answer where the task names none, as in the library."""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class LibraryTask(Section):
    """A task that lm-evaluation-harness runs."""

    kind: Literal["lm_eval"] = "lm_eval"
    """Not to be written."""
    task: str
    """Its name there: of a task that comes with the library, or of a file in `tasks/` beside the suite's folder."""
    metrics: Annotated[list[str], BeforeValidator(_as_list)] = Field(["acc"], min_length=1)
    """Which of its metrics, as the library calls them (`exact_match`; with a filter `exact_match,strict-match`)."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Few-shot examples in each prompt. Default: the task's own."""

    @property
    def description(self) -> str:
        return f"{self.task} of lm-evaluation-harness"


def missing() -> str | None:
    """None when the library is installed, else the command that installs it."""
    return None if importlib.util.find_spec("lm_eval") else INSTALL


def rows_of(spec: LibraryTask, folder: Path) -> list[dict[str, Any]]:
    """``number``, ``question`` and ``target`` of each row that the task asks about.

    Args:
        folder: of task files of the suite's own.

    Raises:
        MachineError: the library is not installed, or the task's rows cannot be had.
        RecipeError: it has no such task, or the task no such metric.
    """
    with _hushed():
        task = _load(spec, folder)
        known = dict(task.higher_is_better())
        for name in spec.metrics:
            metric = name.partition(",")[0]
            if metric not in known:
                raise RecipeError(f"lm_eval: {spec.task}", f"has no metric '{metric}'",
                                  f"write {{task: {spec.task}, metrics: [...]}} with some of: {', '.join(known)}")
            if known[metric] is (metric in LOWER_IS_BETTER):
                raise RecipeError(f"lm_eval: {spec.task}", f"of its metric '{metric}' "
                                  f"{'more' if known[metric] else 'less'} is better, which nobody expects",
                                  "name another metric")
        found = []
        for number, row in enumerate(task.eval_docs):
            question, target = task.doc_to_text(row), task.doc_to_target(row)
            if isinstance(target, int) and getattr(task.config, "doc_to_choice", None) is not None:
                named = task.doc_to_choice(row)
                target = named[target] if 0 <= target < len(named) else target
            found.append({"number": number, "question": str(question), "target": str(target)})
    return found


def score(engine: Any, task: str, spec: LibraryTask, folder: Path, asked: Sequence[dict[str, Any]],
          max_tokens: int | None) -> list[dict[str, Any]]:
    """A line for each metric and item, as the library scores them.

    Args:
        asked: items whose ``inputs`` have the ``number`` of their row.
        max_tokens: that the model's positions reach; an item with more has an error.
    """
    from lm_eval.evaluator import evaluate

    numbers = [int(item["inputs"]["number"]) for item in asked]
    if not numbers:
        return []
    model = _model_class()(engine, max_tokens, sorted(numbers))
    with _hushed():
        loaded = _load(spec, folder)
        results = evaluate(model, {"tasks": {spec.task: loaded}}, samples={spec.task: sorted(numbers)},
                           bootstrap_iters=0, log_samples=True)
    by_number: dict[tuple[int, str], dict[str, Any]] = {}
    for sample in results["samples"][spec.task]:
        for name in sample["metrics"]:
            for key in (name, f"{name},{sample['filter']}"):
                by_number.setdefault((sample["doc_id"], key), sample)
    lines = []
    for metric in spec.metrics:
        for item, number in zip(asked, numbers, strict=True):
            sample = by_number.get((number, metric))
            fields = {"score": None, "error": f"the library gives no {metric}", "weight": 1}
            if number in model.errors:
                fields["error"] = model.errors[number]
            elif sample is not None:
                fields |= _outcome(metric.partition(",")[0], sample)
            own = {key: value for key, value in fields.items() if key in ItemScore.__dataclass_fields__}
            more = {key: value for key, value in fields.items() if key not in own}
            line = ItemScore(**{"item_id": item["item_id"], "cluster": item["cluster"], "target": item["target"],
                                "prompt": _prompt(sample), **own})
            lines.append({"task": task, "metric": metric, **line.as_dict(), **more})
    return lines


def _outcome(metric: str, sample: dict[str, Any]) -> dict[str, Any]:
    value = sample[metric]
    found = {"error": None, "weight": 1, "prediction": _answer(sample)}
    if metric == "bits_per_byte":
        log_prob, num_bytes = value
        return found | {"score": -log_prob / num_bytes / math.log(2), "weight": num_bytes}
    if metric == "perplexity":
        return found | {"score": math.exp(min(-value, 700.0)), "outcome": float(value)}
    if isinstance(value, (bool, int, float)) or hasattr(value, "item"):
        return found | {"score": float(value)}
    return {"score": None, "error": f"{metric} is no number of single items", "weight": 1}


def _prompt(sample: dict[str, Any] | None) -> str:
    first = sample["arguments"][0] if sample else ()
    return str(first[0]) if first else ""


def _answer(sample: dict[str, Any]) -> str:
    first = sample["filtered_resps"][0]
    if isinstance(first, str):
        return first
    # (log-probability, greedy) of each continuation.
    values = [answer[0] if isinstance(answer, (list, tuple)) else answer for answer in sample["filtered_resps"]]
    best = max(range(len(values)), key=values.__getitem__)
    arguments = sample["arguments"][best]
    return str(arguments[1]) if len(arguments) > 1 and len(values) > 1 else ""


def _load(spec: LibraryTask, folder: Path) -> Any:
    """The library's task."""
    if missing():
        raise MachineError(f"lm_eval: {spec.task}", "lm-evaluation-harness is not installed", INSTALL)
    own = _manager(folder, False)
    manager = own if spec.task in own.all_subtasks else _manager(folder, True)
    if spec.task not in manager.all_subtasks:
        kind = "a group of tasks" if spec.task in manager.all_tasks else "no task"
        raise RecipeError(f"lm_eval: {spec.task}", f"is {kind} of lm-evaluation-harness",
                          "name single tasks: lm-eval ls tasks prints them")
    try:
        task = manager.load([spec.task])["tasks"][spec.task]
    except LoraKitError:
        raise
    except Exception as error:  # noqa: BLE001 - a task's own code and data raise whatever they raise
        raise MachineError(f"lm_eval: {spec.task}", f"cannot be loaded ({type(error).__name__}: {error})",
                           "its rows may need a network or another package") from None
    if spec.num_fewshot is not None:
        task.set_config("num_fewshot", spec.num_fewshot)
    task.set_fewshot_seed(_SEED)
    return task


@functools.lru_cache(maxsize=4)
def _manager(folder: Path, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder) if folder.is_dir() else None, include_defaults=defaults)


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """The library prints, and warns of what it takes by default."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
                warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@functools.cache
def _model_class() -> type:
    """The class of the library's model over an engine of ours. (Of the library's own: made when it is there.)"""
    from lm_eval.api.model import LM

    class EngineModel(LM):
        """Answers the library's requests; ``errors`` says of a row's number why it could not be asked.

        The library counts the rows that it asks; ``numbers`` are theirs among all.
        """

        def __init__(self, engine: Any, max_tokens: int | None, numbers: list[int]) -> None:
            super().__init__()
            self.engine, self.max_tokens, self.numbers, self.errors = engine, max_tokens, numbers, {}

        def loglikelihood(self, requests):
            found = self._likelihoods([(request, *request.args) for request in requests])
            return [(each.log_prob, each.greedy) if each else (-math.inf, False) for each in found]

        def loglikelihood_rolling(self, requests):
            found = self._likelihoods([(request, "", request.args[0]) for request in requests])
            return [each.log_prob if each else -math.inf for each in found]

        def _likelihoods(self, asked: list[tuple[Any, str, str]]) -> list[Any]:
            """Requests of one context in a row are one question."""
            groups: list[list[int]] = []
            for index, (request, context, _) in enumerate(asked):
                before = asked[index - 1] if index else None
                if before and before[1] == context and before[0].doc_id == request.doc_id:
                    groups[-1].append(index)
                else:
                    groups.append([index])
            questions, kept, found = [], [], [None] * len(asked)
            for group in groups:
                request, context, _ = asked[group[0]]
                question = multiple_choice.encode(self.engine.tokenizer, context, [asked[index][2] for index in group])
                error = multiple_choice.why_not(question, self.max_tokens)
                if error:
                    self.errors[self._number(request)] = error
                    continue
                questions.append(question)
                kept.append(group)
            answers = self.engine.likelihoods(questions, greedy=True)
            for group, of_group in zip(kept, answers, strict=True):
                for index, answer in zip(group, of_group, strict=True):
                    found[index] = answer
            return found

        def generate_until(self, requests):
            found = [""] * len(requests)
            prompts: dict[int, list[tuple[int, list[int], list[str]]]] = {}
            for index, request in enumerate(requests):
                context, options = request.args
                if options.get("do_sample") and options.get("temperature", 1.0) != 0:
                    raise DataError(f"lm_eval: {request.task_name}", "asks for sampled answers, and ours are greedy",
                                    "leave this task out")
                ids = self.engine.tokenizer(context)["input_ids"]
                new = int(options.get("max_gen_toks", _MOST_NEW_TOKENS))
                if self.max_tokens and len(ids) + new > self.max_tokens:
                    self.errors[self._number(request)] = (f"a prompt of {len(ids)} tokens and {new} new ones do not "
                                                          f"fit into {self.max_tokens}")
                    continue
                until = options.get("until") or []
                prompts.setdefault(new, []).append((index, ids, [until] if isinstance(until, str) else list(until)))
            for new, group in prompts.items():
                answers = self.engine.generate([ids for _, ids, _ in group], max_new_tokens=new,
                                               until=[until for _, _, until in group])
                for (index, _, until), answer in zip(group, answers, strict=True):
                    found[index] = _cut(answer.text, until)
            return found

        def _number(self, request: Any) -> int:
            return self.numbers[request.doc_id]

    return EngineModel


def _cut(text: str, until: list[str]) -> str:
    ends = [text.find(stop) for stop in until if stop and stop in text]
    return text[:min(ends)] if ends else text
