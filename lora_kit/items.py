"""Eval items: what a task asks, made once from its rows and asked of every artifact alike.

An item is the prompt before a row's last assistant turn, with the tools offered, and the
target. Here items are left out (functions that training showed), drawn (``eval.limit``)
and given their clusters; here too the few-shot examples are drawn from the training rows,
never from held-out ones. Torch-free. Reads the sources; writes nothing.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_kit import assertions, lm_eval_library, lm_eval_task, metrics, prepared, rows
from lora_kit.errors import DataError
from lora_kit.formats import UnusableRow
from lora_kit.lm_eval_library import LibraryTask
from lora_kit.lm_eval_task import LmEvalTask
from lora_kit.recipe import DataSource, Recipe
from lora_kit.suite import GenerateTask, Task, TextTask
from lora_kit.types import Conversation, Message

HELD_OUT = "held_out"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question: ``messages`` and ``tools`` as templates read them; ``target`` and ``inputs`` are texts or JSON.

    ``target`` is a list where several texts are right, each as good as the others. ``stratum``: what kind it is of,
    where the task says so.
    ``likelihood`` is what a task by likelihood asks: context, continuations, choices and gold of
    ``lm_eval_task.Asked``.
    """

    item_id: str
    cluster: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    target: str | list[str]
    inputs: dict[str, str]
    stratum: str = ""
    likelihood: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "likelihood" or value}


@dataclass(frozen=True, kw_only=True)
class Items:
    """A task's items in the order of its rows, and what became of the other rows.

    ``examples`` are the few-shot conversations: ``{"messages": [user ..., assistant], "tools": [...]}``.
    """

    items: list[Item]
    examples: list[dict[str, Any]] = field(default_factory=list)
    num_rows: int
    num_left_out: int
    num_not_drawn: int
    unusable: dict[str, int] = field(default_factory=dict)


def make_items(task: Task, recipe: Recipe, relative_to: Path, held_out: list[Conversation]) -> Items:
    """The items of a task; of a ``text`` task, ``target`` is the text and nothing is asked.

    Args:
        relative_to: the recipe's folder.
        held_out: the run's held-out conversations.

    Raises:
        DataError: no row is usable, or a row lacks a key that the task names.
    """
    spec = task.spec
    if isinstance(spec, TextTask):
        return _texts(task, spec, recipe)
    if isinstance(spec, LmEvalTask):
        return _likelihoods(task, spec, recipe)
    if isinstance(spec, LibraryTask):
        return _of_library(task, spec, recipe)
    assert isinstance(spec, GenerateTask)
    made, unusable, num_rows = [], Counter(), 0
    names_of: list[set[str]] = []
    for origin, record, read in _rows(task, held_out):
        num_rows += 1
        try:
            conversation = read(record, origin)
            made.append(_item(spec, conversation, record))
            names_of.append(function_names(conversation.tools))
        except UnusableRow as problem:
            unusable[problem.reason] += 1
    if not made:
        raise DataError(f"task {task.name}", f"none of its {num_rows} rows is usable",
                        f"most: {unusable.most_common(1)[0][0]}" if unusable else "check its source")
    made = _with_own_ids(made)
    training = _Training(recipe, relative_to, held_out)
    kept = made
    if "functions_in_training" in spec.leave_out:
        shown = training.function_names()
        kept = [item for item, names in zip(made, names_of, strict=True) if not names & shown]
    drawn = draw(kept, recipe.eval.limit, f"{recipe.seed} {task.name}")
    examples = []
    if spec.num_fewshot:
        with_tools = any(item.tools for item in drawn)
        examples = training.examples(spec.num_fewshot, f"{recipe.seed} {task.name} examples", with_tools=with_tools)
    return Items(items=drawn, examples=examples, num_rows=num_rows, num_left_out=len(made) - len(kept),
                 num_not_drawn=len(kept) - len(drawn), unusable=dict(unusable))


def _texts(task: Task, spec: TextTask, recipe: Recipe) -> Items:
    """The texts of a ``text`` task, cut to its longest and drawn."""
    made, unusable, num_rows, too_short = [], Counter(), 0, 0
    source = spec.data
    if spec.text and not source.format and not source.source.startswith("python:"):
        source = source.model_copy(update={"format": "text"})  # a key is read, whatever else the rows have
    for origin, record, read in rows.rows_of(source, prepared.resolve_source(source, task.folder)):
        num_rows += 1
        try:
            text = _value(record, spec.text, origin) if spec.text else \
                "\n".join(message.content or "" for message in read(record, origin).messages)
        except UnusableRow as problem:
            unusable[problem.reason] += 1
            continue
        text = _cut(_text(text).strip(), spec.max_chars)
        if len(text) < spec.min_chars:
            too_short += 1
            continue
        cluster = origin.rpartition(":")[0] if spec.cluster_by == "file" else origin
        made.append(Item(item_id=origin, cluster=cluster, messages=[], tools=[], target=text, inputs={}))
    if not made:
        raise DataError(f"task {task.name}", f"none of its {num_rows} rows has a text of {spec.min_chars} characters",
                        "lower min_chars, or check its source")
    made = _with_own_ids(made)
    limits = [limit for limit in (spec.limit, recipe.eval.limit) if limit]
    drawn = draw(made, min(limits, default=None), f"{recipe.seed} {task.name}")
    return Items(items=drawn, num_rows=num_rows, num_left_out=too_short, num_not_drawn=len(made) - len(drawn),
                 unusable=dict(unusable))


def _likelihoods(task: Task, spec: LmEvalTask, recipe: Recipe) -> Items:
    """The items of a task by likelihood; examples are drawn for each row, so that ``eval.limit`` changes none."""
    entries, keys = _raw_rows(spec.data, task)
    shots = None if spec.fewshot_data is None else [record for _, record in _raw_rows(spec.fewshot_data, task)[0]]
    writer, made = lm_eval_task.Writer(spec, keys, shots), []
    for origin, record in entries:
        asked = writer.ask(record, origin)
        cluster = str(_value(record, spec.cluster_by, origin)) if spec.cluster_by else origin
        made.append(Item(
            item_id=origin, cluster=cluster, tools=[], inputs={},
            target="\n".join(asked.choices[number] for number in asked.gold),
            messages=[{"role": "user", "content": asked.question}] if asked.question else [],
            likelihood=asked.as_dict()))
    made = _with_own_ids(made)
    drawn = draw(made, recipe.eval.limit, f"{recipe.seed} {task.name}")
    return Items(items=drawn, num_rows=len(made), num_left_out=0, num_not_drawn=len(made) - len(drawn))


def _of_library(task: Task, spec: LibraryTask, recipe: Recipe) -> Items:
    """The items of a task that lm-evaluation-harness asks: the numbers of its rows."""
    made = [Item(item_id=f"{task.name}:{row['number']}", cluster=f"{task.name}:{row['number']}", tools=[],
                 messages=[{"role": "user", "content": row["question"]}], target=row["target"],
                 inputs={"number": str(row["number"])})
            for row in lm_eval_library.rows_of(spec, task.folder)]
    drawn = draw(made, recipe.eval.limit, f"{recipe.seed} {task.name}")
    return Items(items=drawn, num_rows=len(made), num_left_out=0, num_not_drawn=len(made) - len(drawn))


def _raw_rows(source: Any, task: Task) -> tuple[list[tuple[str, dict[str, Any]]], list[str]]:
    """(origin, row) of each row of ``source``, and all keys that rows have; what a row lacks is None there.

    lm-evaluation-harness reads rows through Arrow, which does so.
    """
    if not source.format and not source.source.startswith("python:"):
        source = source.model_copy(update={"format": "text"})  # keys are read, whatever format they make
    found = [(origin, record) for origin, record, _ in
             rows.rows_of(source, prepared.resolve_source(source, task.folder))]
    keys = dict.fromkeys(key for _, record in found for key in record)
    return [(origin, keys | record) for origin, record in found], list(keys)


def _cut(text: str, longest: int) -> str:
    """``text`` up to ``longest`` characters, without a word that the end would go through."""
    if len(text) <= longest:
        return text
    cut = text[:longest]
    return cut if text[longest].isspace() or not any(char.isspace() for char in cut) else \
        cut[:max(index for index, char in enumerate(cut) if char.isspace())].rstrip()


def draw(entries: list, limit: int | None, seed: str) -> list:
    """At most ``limit`` of ``entries``, drawn by ``seed``, in their order."""
    if limit is None or len(entries) <= limit:
        return entries
    return [entries[index] for index in sorted(random.Random(seed).sample(range(len(entries)), limit))]


def function_names(tools: Iterable[dict[str, Any]]) -> set[str]:
    """Names of the functions in ``tools``, as OpenAI's objects or bare."""
    return {tool.get("function", tool)["name"] for tool in tools}


def question_and_answer(conversation: Conversation) -> tuple[list[Message], Message]:
    """The messages before the last assistant turn, and that turn; UnusableRow when there are none."""
    if conversation.trains_all:
        raise UnusableRow("plain text has no question")
    last = max((i for i, message in enumerate(conversation.messages) if message.role == "assistant"), default=0)
    if last == 0:
        raise UnusableRow("no question before an assistant turn")
    return list(conversation.messages[:last]), conversation.messages[last]


def questions_of(conversations: Iterable[Conversation]) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """(messages before the last assistant turn, tools offered) of those ``conversations`` that ask something."""
    for conversation in conversations:
        try:
            question, _ = question_and_answer(conversation)
        except UnusableRow:
            continue
        yield [message.as_dict() for message in question], list(conversation.tools)


def _rows(task: Task, held_out: list[Conversation]) -> Iterator[tuple[str, dict[str, Any], rows.Read]]:
    source = task.spec.data
    if source.source == HELD_OUT:
        for conversation in held_out:
            yield conversation.origin, {}, lambda _record, _origin, same=conversation: same
        return
    yield from rows.rows_of(source, prepared.resolve_source(source, task.folder))


def _item(spec: GenerateTask, conversation: Conversation, record: dict[str, Any]) -> Item:
    question, answer = question_and_answer(conversation)
    called = [call["function"]["name"] for call in answer.tool_calls]
    offered = [tool.get("function", tool)["name"] for tool in conversation.tools]
    cluster = conversation.origin
    if spec.cluster_by == "function":
        cluster = next(iter(called + offered), cluster)
    inputs = {key: _text(_value(record, row_key, conversation.origin)) for key, row_key in spec.inputs.items()}
    if conversation.tools and "functions" not in inputs:
        inputs["functions"] = _text(list(conversation.tools))
    if spec.assertions or "assertions" in inputs:
        own = assertions.read(_value(record, spec.inputs["assertions"], conversation.origin), conversation.origin) \
            if "assertions" in spec.inputs else []
        inputs["assertions"] = assertions.as_json([*spec.assertions, *own])
    if spec.system is not None:
        question = [Message(role="system", content=spec.system),
                    *(message for message in question if message.role != "system")]
    target = _value(record, spec.target, conversation.origin) if spec.target else _target(answer, conversation.tools)
    return Item(item_id=conversation.origin, cluster=cluster, messages=[message.as_dict() for message in question],
                tools=list(conversation.tools), target=_references(target, spec), inputs=inputs,
                stratum=_text(_value(record, spec.stratify_by, conversation.origin)) if spec.stratify_by else "")


def _references(target: Any, spec: GenerateTask) -> str | list[str]:
    """A target as metrics read it: a list of texts is several references, unless a metric reads values."""
    several = isinstance(target, list) and target and all(isinstance(each, str) for each in target)
    if several and not any(getattr(metrics.load(name), "STRUCTURED", False) for name in spec.metrics):
        return target
    return _text(target)


def _target(answer: Message, tools: tuple[dict[str, Any], ...]) -> Any:
    """The answer's text; of tool calls, the form that tool_call reads, with one accepted value each."""
    if not answer.tool_calls:
        return answer.content or ""
    schemas = {tool.get("function", tool)["name"]: tool.get("function", tool).get("parameters") or {} for tool in tools}
    calls = []
    for call in answer.tool_calls:
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        properties = schemas.get(name, {}).get("properties") or {}
        calls.append({name: {key: [_accepted(value, properties.get(key) or {})] for key, value in arguments.items()}})
    return calls


def _accepted(value: Any, schema: dict[str, Any]) -> Any:
    """``value`` as an accepted one: an object that is matched key by key holds a list of accepted values for each."""
    if isinstance(value, dict) and schema.get("type") in ("object", "dict"):
        return {key: [inner] for key, inner in value.items()}
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [_accepted(element, {"type": schema["items"].get("type")}) for element in value]
    return value


def _value(record: dict[str, Any], key: str, origin: str) -> Any:
    if key in record:
        return record[key]
    value: Any = record
    for part in key.split("."):  # answers.text of SQuAD's rows
        if not isinstance(value, dict) or part not in value:
            raise DataError(origin, f"the row has no '{key}', which the task reads", f"it has: {', '.join(record)}")
        value = value[part]
    return value


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _with_own_ids(made: list[Item]) -> list[Item]:
    """Items with ids that differ: pairs are made by them."""
    seen: Counter = Counter()
    unique = []
    for item in made:
        seen[item.item_id] += 1
        number = seen[item.item_id]
        unique.append(item if number == 1 else replace(item, item_id=f"{item.item_id} ({number})"))
    return unique


class _Training:
    """The recipe's training rows, as far as evals ask about them."""

    def __init__(self, recipe: Recipe, relative_to: Path, held_out: list[Conversation]) -> None:
        self.recipe, self.relative_to = recipe, relative_to
        self.held_out = {conversation.origin for conversation in held_out}

    def conversations(self) -> Iterator[Conversation]:
        source: DataSource
        for source in self.recipe.data.train:
            for origin, record, read in rows.rows_of(source, prepared.resolve_source(source, self.relative_to)):
                try:
                    yield read(record, origin)
                except UnusableRow:
                    continue

    def function_names(self) -> set[str]:
        return {name for conversation in self.conversations() for name in function_names(conversation.tools)}

    def examples(self, number: int, seed: str, *, with_tools: bool) -> list[dict[str, Any]]:
        """``number`` first exchanges of training rows that are not held out, drawn by ``seed``."""
        generator, chosen, seen = random.Random(seed), [], 0
        for conversation in self.conversations():
            example = self._first_exchange(conversation, with_tools)
            if example is None:
                continue
            # Reservoir sampling: one pass, and only what is chosen is kept.
            seen += 1
            if len(chosen) < number:
                chosen.append(example)
            elif (place := generator.randrange(seen)) < number:
                chosen[place] = example
        return chosen

    def _first_exchange(self, conversation: Conversation, with_tools: bool) -> dict[str, Any] | None:
        if conversation.trains_all or conversation.origin in self.held_out:
            return None
        end = next(i for i, message in enumerate(conversation.messages) if message.role == "assistant")
        if bool(conversation.messages[end].tool_calls) != with_tools:
            return None
        turns = [message for message in conversation.messages[:end + 1] if message.role != "system"]
        return {"messages": [message.as_dict() for message in turns], "tools": list(conversation.tools)}
