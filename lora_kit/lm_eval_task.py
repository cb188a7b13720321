"""Tasks of lm-evaluation-harness, read from their YAML as they are: multiple choice and continuations by likelihood.

What a task's rows become (the text before the answer, the answers, few-shot examples, delimiters) follows
lm-evaluation-harness 0.4.13 (``lm_eval/api/task.py``, ``lm_eval/api/samplers.py``), so that its requests and ours are
the same strings; ``benchmarks/eval_parity.py`` holds them to that. Templates are rendered in a sandbox. What needs code
(``!function``, ``process_docs``) is named with its line: such a task runs through its own library (``lm_eval:`` of a
suite). Torch-free. Reads the task's rows; writes nothing.
"""

from __future__ import annotations

import ast
import functools
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from lora_kit.errors import DataError, LoraKitError, RecipeError
from lora_kit.recipe import Section
from lora_kit.task_source import TaskSource, as_source
from lora_kit.yaml_file import Places

METRICS = {"multiple_choice": ("acc", "acc_norm", "acc_bytes"), "loglikelihood": ("acc", "perplexity"),
           "loglikelihood_rolling": ("bits_per_byte",)}
"""What is scored of each output type."""
_DEFAULT_METRICS = {"multiple_choice": ["acc", "acc_norm"], "loglikelihood": ["perplexity", "acc"],
                    "loglikelihood_rolling": ["bits_per_byte"]}
LOWER_IS_BETTER = {"perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity", "brier_score"}
_SEED = 1234
"""Where lm-evaluation-harness starts drawing few-shot examples, unless its command line says otherwise."""
_MOST_RENDERED = 1_000_000
"""Characters of one rendered template at most."""
_BY_LIBRARY = "name the task under lm_eval: of the suite, which runs it through its own library"
Template = str | int
Choices = str | list[str] | dict[str, str]


class FewshotConfig(Section):
    """How few-shot examples are chosen and written, where that differs from the question."""

    sampler: Literal["default", "first_n"] = "default"
    """`first_n`: the first ones, the same in every prompt, which are then read once for all items. `default`: drawn
    anew for each item."""
    split: str | None = None
    """Split that they are taken from."""
    samples: list[dict[str, Any]] | None = None
    """The examples themselves, as rows, where no split is named."""
    doc_to_text: Template | None = None
    """As the task's, for examples."""
    doc_to_target: Template | list | None = None
    """As the task's, for examples."""
    doc_to_choice: Choices | None = None
    """As the task's, for examples."""
    fewshot_delimiter: str | None = None
    """As the task's, for examples."""
    target_delimiter: str | None = None
    """As the task's, for examples."""
    not_here: ClassVar = {"process_docs": ("is code", _BY_LIBRARY),
                          "gen_prefix": ("is not read here", _BY_LIBRARY),
                          "fewshot_indices": ("is not read (nor is it by lm-evaluation-harness 0.4.13)", "remove it")}


class MetricOfTask(Section):
    """One entry of `metric_list`."""

    metric: str
    """`acc`, `acc_norm` (divided by characters), `acc_bytes` (by bytes); of continuations `acc` (each token is the most
    likely one) and `perplexity`; of whole texts `bits_per_byte`."""
    aggregation: str | None = None
    """As lm-evaluation-harness has it by default; no other is computed."""
    higher_is_better: bool | None = None
    """As it is."""


class LmEvalTask(Section):
    """A task that asks how likely a model finds texts, in the fields of lm-evaluation-harness."""

    kind: Literal["multiple_choice", "loglikelihood", "loglikelihood_rolling"]
    """lora-kit's name of `output_type`; one of the two."""
    data: Annotated[TaskSource, BeforeValidator(as_source)]
    """The rows, in place of `dataset_path` and its split: a source as other tasks have it."""
    fewshot_data: Annotated[TaskSource | None, BeforeValidator(as_source)] = None
    """Rows that few-shot examples are taken from, in place of `fewshot_split`."""
    leave_itself_out: bool | None = None
    """Whether an item is never its own example. Default: where examples come from the rows that are asked."""
    description: str = ""
    """Text before everything else in each prompt; a template."""
    doc_to_text: Template = ""
    """What stands before the answer: a key of the row, or a template over the row."""
    doc_to_target: Template | list = ""
    """The right answer: a key of the row or a template, that give the number of a choice (from 0), its text, or the
    continuation."""
    doc_to_choice: Choices | None = None
    """The choices: a key of the row, a template that gives a list, a list, or a mapping."""
    target_delimiter: str = " "
    """Between question and answer."""
    fewshot_delimiter: str = "\n\n"
    """Behind each few-shot example."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Few-shot examples in each prompt."""
    fewshot_config: FewshotConfig | None = None
    """How they are chosen and written."""
    apply_chat_template: bool = False
    """Ask as in a chat: the question as the user's turn in the model's own template, each choice as the answer, without
    `target_delimiter`. Of the harness's command line, as the next two."""
    fewshot_as_multiturn: bool = True
    """In a chat, each example is two turns of its own; else they stand in the user's turn, before the question."""
    system_instruction: str | None = None
    """Text before `description`; in a chat both are the system message."""
    metric_list: list[MetricOfTask] | None = None
    """What is scored; the first is what a gate means that names none. Default: that of lm-evaluation-harness."""
    cluster_by: str | None = None
    """Key of the row that names what is independent (a passage, say). Default: each item is."""
    task: str | None = None
    """Its name in lm-evaluation-harness; not read."""
    task_alias: str | None = None
    """Not read."""
    tag: str | list[str] | None = None
    """Not read."""
    metadata: dict[str, Any] | None = None
    """Not read."""
    should_decontaminate: bool = False
    """Not read: overlap with training rows is looked for in every task."""
    doc_to_decontamination_query: str | None = None
    """Not read."""
    repeats: Literal[1] = 1
    """A likelihood does not change when it is asked again."""
    not_here: ClassVar = {
        **{key: ("is code, which no file of lora-kit runs", _BY_LIBRARY)
           for key in ("process_docs", "process_results", "custom_dataset", "class", "unsafe_code")},
        **{key: ("is not read here", _BY_LIBRARY)
           for key in ("doc_to_image", "doc_to_audio", "use_prompt", "filter_list", "gen_prefix", "include", "group")},
        "generation_kwargs": ("has no effect: nothing is generated", "remove it"),
    }

    @property
    def metrics(self) -> list[str]:
        return [entry.metric for entry in self.metric_list or ()] or _DEFAULT_METRICS[self.kind]


def is_lm_eval(values: Mapping[str, Any]) -> bool:
    """Whether a task file is written for lm-evaluation-harness, and not for lora-kit alone."""
    return "kind" not in values and any(key in values for key in ("output_type", "dataset_path", "doc_to_text"))


def translated(values: dict[str, Any], folder: Path, places: Places) -> dict[str, Any]:
    """``values`` of a file of lm-evaluation-harness with ``kind`` and ``data`` in place of what says the same there.

    Args:
        folder: of the file. A data file is looked for there, then where lora-kit runs, as that library does.

    Raises:
        RecipeError: with what is not supported, each with its line.
    """
    values, problems = dict(values), list(_code_in(values, places, ()))
    kind = values.pop("output_type", "generate_until")
    if kind not in METRICS:
        known = ", ".join(METRICS)
        todo = f"write kind: generate, or {_BY_LIBRARY}" if kind == "generate_until" else f"known: {known}"
        problems.append(RecipeError(places.of(("output_type",)), f"output_type '{kind}' is not read here", todo))
    values["kind"] = kind
    splits = {key: values.pop(f"{key}_split", None) for key in ("training", "validation", "test", "fewshot")}
    if "data" not in values:
        try:
            config = values.get("fewshot_config")
            config = config if isinstance(config, dict) else {}
            values.update(_sources(values, config, splits, folder, places))
        except LoraKitError as error:
            problems.append(error)
    if problems:
        raise RecipeError.of(problems)
    for key in ("dataset_path", "dataset_name", "dataset_kwargs"):
        values.pop(key, None)
    return values


def problems_with(spec: LmEvalTask, values: Mapping[str, Any], places: Places) -> list[LoraKitError]:
    """Every mistake of a task that its fields alone do not show, with its line."""
    problems: list[LoraKitError] = []

    def report(key: Sequence, what: str, todo: str) -> None:
        problems.append(RecipeError(places.of(key), what, todo))

    for index, entry in enumerate(spec.metric_list or ()):
        at = ("metric_list", index)
        if entry.metric not in METRICS[spec.kind]:
            report((*at, "metric"), f"metric '{entry.metric}' of {spec.kind} is not computed here",
                   f"known: {', '.join(METRICS[spec.kind])}; or {_BY_LIBRARY}")
            continue
        default = entry.metric if entry.metric in LOWER_IS_BETTER else "mean"
        if entry.aggregation not in (None, default):
            report((*at, "aggregation"), f"aggregation '{entry.aggregation}' of {entry.metric} is not computed here",
                   f"write {default}; or {_BY_LIBRARY}")
        if entry.higher_is_better not in (None, entry.metric not in LOWER_IS_BETTER):
            report((*at, "higher_is_better"), f"'higher_is_better' is {entry.higher_is_better}, which {entry.metric} "
                   "is not", "correct it")
    names = spec.metrics
    if len(set(names)) < len(names):
        report(("metric_list",), "a metric stands twice", "remove one of them")
    if spec.kind == "multiple_choice" and spec.doc_to_choice is None:
        report(("kind",), "'doc_to_choice' is missing", "say which key of the row holds the choices")
    if spec.data.source == "held_out":
        report(("data",), "held-out rows have no choices", "name a source; or write kind: held_out_loss")
    texts = {"description": spec.description, "doc_to_text": spec.doc_to_text, "doc_to_target": spec.doc_to_target,
             "doc_to_choice": spec.doc_to_choice}
    for key, text in texts.items():
        if isinstance(text, str):
            try:
                _template(text)
            except ValueError as error:
                report((key,), f"'{key}' is no template that jinja2 reads ({error})", "correct it")
    config = spec.fewshot_config or FewshotConfig()
    if spec.num_fewshot and config.samples is not None and len(config.samples) < spec.num_fewshot:
        report(("num_fewshot",), f"'num_fewshot' is {spec.num_fewshot}, and fewshot_config.samples has "
               f"{len(config.samples)}", "add some, or lower it")
    return problems


def _code_in(node: Any, places: Places, loc: tuple) -> Any:
    """Values that are a tag of YAML (``!function``), each as a problem."""
    if type(node).__name__ == "TaggedScalar":
        yield RecipeError(places.of(loc), f"'{'.'.join(map(str, loc))}' is code ({node.tag.value} {node.value}), which "
                          "no file of lora-kit runs", _BY_LIBRARY)
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _code_in(value, places, (*loc, key))


def _sources(values: Mapping[str, Any], config: Mapping[str, Any], splits: dict[str, str | None], folder: Path,
             places: Places) -> dict[str, Any]:
    """``data`` and, where examples come from a split, ``fewshot_data``."""
    name = values.get("dataset_path")
    if name is None:
        raise RecipeError(places.of(("output_type",)), "'dataset_path' is missing",
                          "write dataset_path: json and dataset_kwargs.data_files")
    asked = splits["test"] or splits["validation"]
    if asked is None:
        raise RecipeError(places.of(("dataset_path",)), "'test_split' is missing", "say which split is asked")
    shots = config.get("split") or splits["fewshot"]
    if shots is None and not config.get("samples"):
        shots = splits["training"] or splits["validation"] or splits["test"]
    options = dict(values.get("dataset_kwargs") or {})
    options.pop("trust_remote_code", None)
    files = options.pop("data_files", None)
    if options:
        raise RecipeError(places.of(("dataset_kwargs", next(iter(options)))),
                          f"'dataset_kwargs.{next(iter(options))}' is not read here", _BY_LIBRARY)

    def source(split: str) -> dict[str, Any]:
        if name not in ("json", "csv", "parquet"):
            return {"source": f"hub:{name}", "subset": values.get("dataset_name"), "split": split, "format": "text"}
        named = files if isinstance(files, dict) else {"train": files}
        if named.get(split) is None:
            raise RecipeError(places.of(("dataset_kwargs", "data_files")), f"no file is named for split '{split}'",
                              f"there are: {', '.join(key for key, file in named.items() if file) or 'none'}")
        found = named[split] if isinstance(named[split], list) else [named[split]]
        if len(found) != 1 or "://" in str(found[0]) or any(sign in str(found[0]) for sign in "*?["):
            raise RecipeError(places.of(("dataset_kwargs", "data_files")), f"split '{split}' is not one local file",
                              f"name one; or {_BY_LIBRARY}")
        path = Path(str(found[0])).expanduser()
        beside = folder / path
        return {"source": str(path if not beside.exists() and path.exists() and not path.is_absolute()
                              and (path := path.resolve()) else path), "format": "text"}

    # As lm-evaluation-harness has it: by the names of the splits, of which either may be missing.
    made: dict[str, Any] = {"data": source(asked),
                            "leave_itself_out": (config.get("split") or splits["fewshot"]) == splits["test"]}
    if shots is not None and values.get("num_fewshot"):
        made["fewshot_data"] = source(shots)
    return made


# ---- a row as requests ------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked about one row.

    ``question`` is the row's own part of ``context``; ``continuations`` begin with the delimiter, ``choices`` are
    without it (both of one entry where the row has one target); ``gold`` are the numbers of the right choices.
    In a chat ``messages`` are asked, and the context is what the model's template makes of them.
    """

    question: str
    context: str
    continuations: list[str]
    choices: list[str]
    gold: list[int]
    messages: list[dict[str, str]] | None = None

    def as_dict(self) -> dict[str, Any]:
        """What an item keeps."""
        keys = ("context" if self.messages is None else "messages", "continuations", "choices", "gold")
        return {key: getattr(self, key) for key in keys}


class Writer:
    """Turns rows of a task into what is asked, in their order: examples may be drawn anew for each.

    Args:
        keys: all keys that the rows have.
        shots: rows that examples are taken from; None: the spec's own samples.
    """

    def __init__(self, spec: LmEvalTask, keys: Sequence[str], shots: Sequence[dict] | None) -> None:
        self.spec, self.keys = spec, set(keys)
        self.leaves_out = spec.fewshot_data == spec.data if spec.leave_itself_out is None else spec.leave_itself_out
        self.config = spec.fewshot_config or FewshotConfig()
        self.shots = list(self.config.samples or [] if shots is None else shots)
        self.random = random.Random(_SEED)
        self._fixed: list[tuple[str, str]] | None = None

    def ask(self, row: Mapping[str, Any], origin: str) -> Asked:
        """What is asked about ``row``.

        Raises:
            DataError: it lacks a key, a template fails, or its target is none of the choices.
        """
        spec = self.spec
        if spec.kind == "loglikelihood_rolling":
            text = self._target(row, origin, spec.doc_to_target, spec.doc_to_choice)
            return Asked(question="", context="", continuations=[_text(text, origin)], choices=[_text(text, origin)],
                         gold=[0])
        question = self._value(row, spec.doc_to_text, origin)
        if not isinstance(question, str) or (question.isdigit() and spec.doc_to_choice is not None):
            raise DataError(origin, f"doc_to_text gives {question!r}, the number of a context to choose, which is not "
                            "read here", _BY_LIBRARY)
        description = str(self._value(row, spec.description, origin)) if spec.description else ""
        system = _joined(spec.system_instruction or "", description, spec.fewshot_delimiter)
        # Turns with what stands behind them in plain text: (question and delimiter, answer and delimiter).
        examples = self._examples(row, origin)
        context = system + "".join(text for turn in examples for text in turn) + question
        messages = self._messages(system, examples, question) if spec.apply_chat_template else None
        target = self._target(row, origin, spec.doc_to_target, spec.doc_to_choice)
        if spec.kind == "loglikelihood":
            text = _text(target[0] if isinstance(target, list) else target, origin)
            return Asked(question=question, context=context, continuations=[text], choices=[text], gold=[0],
                         messages=messages)
        choices = self._choices(row, origin, spec.doc_to_choice)
        delimiter = "" if spec.apply_chat_template else spec.target_delimiter
        return Asked(question=question, context=context, choices=choices, gold=_gold(target, choices, origin),
                     continuations=[delimiter + choice for choice in choices], messages=messages)

    def _messages(self, system: str, examples: list[tuple[str, str]], question: str) -> list[dict[str, str]]:
        turns = [{"role": "system", "content": system}] if system else []
        if not self.spec.fewshot_as_multiturn:
            text = "".join(part for turn in examples for part in turn) + question
            return [*turns, {"role": "user", "content": text}]
        for asked, answered in examples:
            ends = self._delimiters() if answered else ("", "")
            turns.append({"role": "user", "content": asked[:len(asked) - len(ends[0])]})
            turns += [{"role": "assistant", "content": answered[:len(answered) - len(ends[1])]}] if answered else []
        return [*turns, {"role": "user", "content": question}]

    def _delimiters(self) -> tuple[str, str]:
        """Of examples: before the answer, and behind it."""
        config, spec = self.config, self.spec
        return (spec.target_delimiter if config.target_delimiter is None else config.target_delimiter,
                spec.fewshot_delimiter if config.fewshot_delimiter is None else config.fewshot_delimiter)

    def _examples(self, row: Mapping[str, Any], origin: str) -> list[tuple[str, str]]:
        number, itself = self.spec.num_fewshot or 0, row if self.leaves_out else None
        if not number:
            return []
        if self.config.sampler == "first_n":
            pool = [shot for shot in self.shots if shot != itself]
            if self._fixed is None or itself is not None:
                self._fixed = [self._example(shot, origin) for shot in self._enough(pool, number)[:number]]
            return self._fixed
        wanted = number + (itself is not None)
        drawn = self.random.sample(self._enough(self.shots, wanted), wanted)
        drawn = [shot for shot in drawn if itself is None or shot != itself][:number]
        if len(drawn) < number:
            pool = [shot for shot in self.shots if shot != itself]
            drawn = self.random.sample(self._enough(pool, number), number)
        return [self._example(shot, origin) for shot in drawn]

    def _enough(self, pool: list, number: int) -> list:
        if len(pool) < number:
            raise DataError("few-shot examples", f"there are {len(pool)}, and {number} are needed", "lower num_fewshot")
        return pool

    def _example(self, shot: Mapping[str, Any], origin: str) -> tuple[str, str]:
        spec, config, where = self.spec, self.config, f"few-shot example for {origin}"
        choose = spec.doc_to_choice if config.doc_to_choice is None else config.doc_to_choice
        question = _text(self._value(shot, spec.doc_to_text if config.doc_to_text is None else config.doc_to_text,
                                     where), where)
        answer = self._target(shot, where, spec.doc_to_target if config.doc_to_target is None else
                              config.doc_to_target, choose)
        if answer is None or answer == "":
            return question, ""
        if isinstance(answer, int) and choose is not None:
            choices = self._choices(shot, where, choose)
            if not -len(choices) <= answer < len(choices):
                raise DataError(where, f"its target {answer} is none of {len(choices)} choices", "correct it")
            answer = choices[answer]
        elif isinstance(answer, list):
            answer = answer[0]
        before, behind = self._delimiters()
        return question + before, _text(answer, where) + behind

    def _target(self, row: Mapping[str, Any], origin: str, target: Any, choose: Choices | None) -> Any:
        """A number, a text, or a list of them."""
        if not isinstance(target, str) or target in self.keys:
            return row.get(target) if isinstance(target, str) else target
        text = _rendered(target, row, origin)
        if text.isdigit() and choose is not None:
            return int(text)
        if len(text) >= 2 and text[0] == "[" and text[-1] == "]":
            try:
                return ast.literal_eval(text)
            except (SyntaxError, ValueError):
                return text
        return text

    def _choices(self, row: Mapping[str, Any], origin: str, choose: Choices | None) -> list[str]:
        found: Any = list(choose.values()) if isinstance(choose, dict) else choose
        if isinstance(choose, str) and choose in self.keys:
            found = row.get(choose)
        elif isinstance(choose, str):
            try:
                found = ast.literal_eval(_rendered(choose, row, origin))
            except (SyntaxError, ValueError):
                found = None
        if not isinstance(found, (list, tuple)) or not found or not all(isinstance(each, str) for each in found):
            raise DataError(origin, "doc_to_choice gives no list of texts", "correct doc_to_choice or the row")
        return list(found)

    def _value(self, row: Mapping[str, Any], key: Template, origin: str) -> Any:
        if isinstance(key, str) and key in self.keys:
            return row.get(key)
        return _rendered(key, row, origin) if isinstance(key, str) else key


def _joined(first: str, second: str, delimiter: str) -> str:
    """Both texts, with ``delimiter`` between them unless there is white space."""
    if first and second and not first[-1].isspace() and not second[0].isspace():
        return first + delimiter + second
    return first + second


def _gold(target: Any, choices: list[str], origin: str) -> list[int]:
    found = []
    for each in target if isinstance(target, list) else [target]:
        number = choices.index(each) if isinstance(each, str) and each in choices else each
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(choices):
            raise DataError(origin, f"its target {each!r} is none of its {len(choices)} choices",
                            "correct doc_to_target or the row")
        found.append(number)
    if not found:
        raise DataError(origin, "no choice is right", "correct doc_to_target or the row")
    return found


def _text(value: Any, origin: str) -> str:
    if not isinstance(value, str):
        raise DataError(origin, f"{value!r} stands where a text is needed", "correct doc_to_text and doc_to_target")
    return value


def _rendered(template: str, row: Mapping[str, Any], origin: str) -> str:
    try:
        text = _template(template).render(**row)
    except Exception as error:  # noqa: BLE001 - jinja raises whatever a template raises
        raise DataError(origin, f"the template {template[:60]!r} fails ({error})", "correct it, or the row") from None
    if len(text) > _MOST_RENDERED:
        raise DataError(origin, f"the template {template[:60]!r} gives over {_MOST_RENDERED:,} characters",
                        "correct it")
    return text


@functools.cache
def _template(template: str) -> Any:
    """``template`` made ready; ValueError when it is none."""
    from jinja2 import BaseLoader, StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(loader=BaseLoader(), undefined=StrictUndefined,
                                                keep_trailing_newline=True)
    environment.filters["regex_replace"] = _regex_replace
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise ValueError(str(error)) from None


def _regex_replace(string: str, pattern: str, repl: str, count: int = 0) -> str:
    return re.sub(pattern, repl, string, count=count)


def perplexity(log_probs: Sequence[float]) -> float:
    """The perplexity of texts, each counted once, as lm-evaluation-harness has it."""
    return math.exp(min(-sum(log_probs) / len(log_probs), 700.0))
