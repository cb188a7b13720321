"""One artifact scored on a suite's tasks, in the process that loads it.

``evaluation.py`` calls :func:`score_artifacts` in a fresh process for each artifact; a base and its adapter share one,
and the model in it. Answers are greedy; a metric of ``metrics/`` scores them through ``evaluate``. Held-out loss is the
negative log-probability of the trained tokens, row by row, summed in float64 from the
engine's float32 log-probabilities; bits per byte of a text are the same over all of its tokens.
Engines compute in the type that is fastest for the stored weights (``dtype="fastest"`` of
``open_engine``).

Shape suffixes: T tokens, K trained positions. Reads the artifact, the data stage's held-out
tokens and ``items/*.json``; writes ``<subject>/items.jsonl``.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy

from lora_kit import (
    chat,
    items,
    lm_eval_library,
    metrics,
    multiple_choice,
    score_cache,
    template_check,
    tokens,
)
from lora_kit.engines import computes, open_engine
from lora_kit.errors import DataError, MachineError, RecipeError
from lora_kit.lm_eval_library import LibraryTask
from lora_kit.lm_eval_task import LmEvalTask
from lora_kit.rundir import writing
from lora_kit.suite import BITS, FEWSHOT, KINDS, LOSS, GenerateTask, HeldOutLossTask, TextTask
from lora_kit.types import Artifact, Example, ItemScore

SAMPLED = ("base", "merged")
"""Artifacts that answer the sample prompts."""


def score_artifacts(
    *, artifacts: list[dict[str, Any]], tools_mode: str, threads: int | None, cache: bool = False, **asked: Any,
) -> list[dict[str, Any]]:
    """Score one artifact, which is loaded in this process, or a base and then an adapter on that same model.

    Args:
        cache: look up what an artifact has answered before, and keep what it answers (``score_cache.py``).
        asked: of each, what follows here.
        tasks: ``{"name", "spec", "folder"}`` of each, in order.
        work_dir: the stage's folder with ``items/``; to ``<subject>/items.jsonl`` in it lines are added.
        samples: prompts (``messages``, ``tools``) that the base and the merged model answer.
        strict: raise when an engine is missing, in place of listing the task as not measured.
        training: the tokenizer of training as ``template_check.check`` takes it; None leaves that check out.
        only: by task, the ids of the items to score, and no other task; None: all.

    Returns:
        For each ``engines`` (task: engine's name), ``not_measured`` ([{artifact, task, why}]), ``samples``
        ([{text, stopped, num_tokens} or {error}], or None), ``check`` (of template, BOS and stop tokens, or None),
        ``task_seconds`` (by task, what scoring took without loading), ``seconds`` (with it) and ``num_known`` of
        ``num_asked`` (how many answers were in the cache).
    """
    found: list[dict[str, Any]] = []
    subject = None
    with ExitStack() as opened:
        for artifact in artifacts:
            started = time.perf_counter()
            subject = _Subject(Artifact(**artifact), tools_mode, threads, cache, base=subject)
            opened.callback(subject.close)
            found.append({**_score(subject, **asked), "seconds": time.perf_counter() - started})
    return found


def _score(
    subject: _Subject, *, tasks: list[dict[str, Any]], data_dir: str, work_dir: str, samples: list[dict[str, Any]],
    sample_tokens: int, limit: int | None, seed: int, strict: bool, training: dict[str, Any] | None = None,
    only: dict[str, list[str]] | None = None,
) -> dict[str, Any]:
    work, found = Path(work_dir), {"engines": {}, "not_measured": [], "samples": None, "check": None,
                                   "task_seconds": {}}
    tasks = [task for task in tasks if only is None or task["name"] in only]
    if training:
        found["check"] = template_check.check(subject.artifact, training)
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for task in tasks:
        name, spec = task["name"], KINDS[task["spec"]["kind"]].model_validate(task["spec"])
        chosen = None if only is None else set(only[name])
        started, loading = time.perf_counter(), subject.loading_seconds
        try:
            if isinstance(spec, HeldOutLossTask):
                lines[subject.name] += subject.held_out_loss(name, Path(data_dir), limit, seed, chosen)
            else:
                asked = json.loads((work / "items" / f"{name}.json").read_text(encoding="utf-8"))
                if chosen is not None:
                    asked["items"] = [item for item in asked["items"] if item["item_id"] in chosen]
                if isinstance(spec, TextTask):
                    lines[subject.name] += subject.texts(name, asked["items"])
                elif isinstance(spec, LibraryTask):
                    lines[subject.name] += lm_eval_library.score(
                        subject.engine(generates=True), name, spec, Path(task["folder"]), asked["items"],
                        subject.max_tokens)
                elif isinstance(spec, LmEvalTask):
                    lines[subject.name] += subject.likelihoods(name, spec, asked["items"])
                else:
                    lines[subject.name] += subject.answers(name, spec, asked["items"], [])
                if subject.name == "base" and asked["examples"]:
                    lines[FEWSHOT] += subject.answers(name, spec, asked["items"], asked["examples"])
            found["engines"][name] = subject.last_engine
            found["task_seconds"][name] = (time.perf_counter() - started) - (subject.loading_seconds - loading)
        except MachineError as error:
            if strict:
                raise
            found["not_measured"].append({"artifact": subject.name, "task": name, "why": str(error)})
    if subject.name in SAMPLED:
        found["samples"] = subject.samples(samples, sample_tokens)
    found["num_known"], found["num_asked"] = subject.counts()
    with writing(work):
        for name, scored in lines.items():
            if scored:
                (work / name).mkdir(exist_ok=True)
                text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in scored)
                with open(work / name / "items.jsonl", "a", encoding="utf-8") as file:
                    file.write(text)
    return found


class _Subject:
    """One artifact that answers; its engines are opened when a task first needs them.

    Args:
        base: what is scored already; where it is the base of this artifact, an adapter, its model is taken over.
    """

    def __init__(self, artifact: Artifact, tools_mode: str, threads: int | None, cache: bool,
                 base: _Subject | None = None) -> None:
        self.artifact, self.tools_mode, self.threads, self.cache = artifact, tools_mode, threads, cache
        self.name, self.last_engine, self.loading_seconds = artifact.name, "", 0.0
        self._base, self._engines = base, {}
        self.max_tokens = _context_length(artifact)

    def engine(self, *, generates: bool):
        # Log-probabilities of a GGUF file can also be had without llama.cpp, from its dequantized weights.
        prefer = ("llamacpp", "hf") if self.artifact.kind == "gguf" and not generates else None
        def opened():
            started = time.perf_counter()
            engine = open_engine(self.artifact, dtype="fastest", threads=self.threads, prefer=prefer,
                                 on=self._base.opened(prefer) if self._base else None)
            self.loading_seconds += time.perf_counter() - started
            return engine

        if prefer not in self._engines:
            self._engines[prefer] = opened() if not self.cache else score_cache.known(
                self.artifact, computes(self.artifact, dtype="fastest", prefer=prefer), opened)
        self.last_engine = self._engines[prefer].name
        return self._engines[prefer]

    def opened(self, prefer: Any) -> Any:
        """The engine that was opened for ``prefer``; None where nothing was or all answers were known."""
        engine = self._engines.get(prefer)
        return engine.in_memory if isinstance(engine, score_cache.KnownEngine) else engine

    def counts(self) -> tuple[int, int]:
        """How many answers were known, of how many asked; nothing is looked up without the cache."""
        engines = [engine for engine in self._engines.values() if isinstance(engine, score_cache.KnownEngine)]
        return sum(engine.num_known for engine in engines), sum(engine.num_asked for engine in engines)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()

    def held_out_loss(self, task: str, data_dir: Path, limit: int | None, seed: int, only: set[str] | None
                      ) -> list[dict[str, Any]]:
        """Mean nats per trained token of each held-out row, weighted by its trained tokens."""
        examples = tokens.read_examples(data_dir, "held_out")
        chosen = items.draw(list(range(len(examples))), limit, f"{seed} {task}")
        if only is not None:
            chosen = [row for row in chosen if held_out_id(examples.origins[row], row) in only]
        if not chosen:
            return []
        engine, scored = self.engine(generates=False), []
        for row, (loss, num_trained) in zip(chosen, trained_losses(engine, [examples[row] for row in chosen]),
                                            strict=True):
            example = examples[row]
            error = "no trained token" if not num_trained else None if math.isfinite(loss) else f"the loss is {loss}"
            score = ItemScore(item_id=held_out_id(example.origin, row), score=None if error else loss / num_trained,
                              cluster=example.origin, reason=f"{num_trained} trained tokens", error=error,
                              prompt=engine.tokenizer.decode(example.tokens_T.tolist()))
            scored.append({"task": task, "metric": LOSS, **score.as_dict(), "weight": max(num_trained, 1)})
        return scored

    def texts(self, task: str, asked: list[dict]) -> list[dict[str, Any]]:
        """Bits per byte of each text after the token that texts begin with, weighted by its bytes."""
        engine, scored = self.engine(generates=False), []
        tokenizer = engine.tokenizer
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        read = [numpy.array([first, *tokenizer(item["target"], add_special_tokens=False)["input_ids"]], numpy.int64)
                for item in asked]
        fitting = [index for index, tokens_T in enumerate(read)
                   if not self.max_tokens or len(tokens_T) <= self.max_tokens]
        sums = dict(zip(fitting, engine.summed_log_probs(
            [(read[index], numpy.arange(1, len(read[index]))) for index in fitting]), strict=True))
        for index, item in enumerate(asked):
            text = item["target"]
            num_bytes, bits, error = len(text.encode()), math.nan, None
            if index in sums:
                bits = -sums[index] / math.log(2)
                error = None if math.isfinite(bits) else f"its log-probability is {-bits}"
            else:
                error = f"a text of {len(read[index])} tokens does not fit into {self.max_tokens}"
            score = ItemScore(item_id=item["item_id"], score=None if error else bits / num_bytes, prompt=text,
                              cluster=item["cluster"], reason=f"{num_bytes} bytes", error=error)
            scored.append({"task": task, "metric": BITS, **score.as_dict(), "weight": num_bytes})
        return scored

    def likelihoods(self, task: str, spec: LmEvalTask, asked: list[dict]) -> list[dict[str, Any]]:
        """A line for each metric and item, by how likely its continuations are."""
        engine = self.engine(generates=False)
        for item in asked:
            about = item["likelihood"]
            if "messages" in about:
                about["context"] = chat.render(engine.tokenizer, about["messages"], None, add_generation_prompt=True,
                                               origin=item["item_id"])
        lines = multiple_choice.score(engine, task, spec, asked, self.max_tokens)
        if engine.likelihood_note:
            self.last_engine = f"{engine.name}, each answer read with its whole prompt ({engine.likelihood_note})"
        return lines

    def answers(self, task: str, spec: GenerateTask, asked: list[dict], examples: list[dict]) -> list[dict[str, Any]]:
        """A line for each metric and item: greedy answers, scored."""
        engine, prompts, errors = self.engine(generates=True), [], []
        for item in asked:
            if not spec.chat_template:
                prompt, error = self._plain_prompt(engine, with_examples(item, examples), spec.max_new_tokens)
            elif examples:
                prompt, error = self._prompt(engine, with_examples(item, examples), [], spec.max_new_tokens, "system")
            else:
                prompt, error = self._prompt(engine, item["messages"], item["tools"], spec.max_new_tokens)
            prompts.append(prompt)
            errors.append(error)
        fitting = [index for index, error in enumerate(errors) if error is None]
        answers = engine.generate([prompts[index] for index in fitting], max_new_tokens=spec.max_new_tokens,
                                  until=[spec.until] * len(fitting))
        generated, lines = dict(zip(fitting, answers, strict=True)), []
        for metric in spec.metrics:
            scores = score_all(metric, [answer.text for answer in answers], [asked[index] for index in fitting])
            scored = dict(zip(fitting, scores, strict=True))
            for index, item in enumerate(asked):
                value = scored.get(index) or _unscored(errors[index])
                answer = generated.get(index)
                score = ItemScore(
                    item_id=item["item_id"], score=value["score"], cluster=item["cluster"], target=item["target"],
                    reason=value["reason"], error=value["error"], prompt=engine.tokenizer.decode(prompts[index]),
                    prediction=answer.text if answer else "")
                lines.append({"task": task, "metric": metric, **score.as_dict(), "weight": 1,
                              "stopped": answer.stopped if answer else None,
                              **({"outcome": value["outcome"]} if "outcome" in value else {})})
        return lines

    def samples(self, asked: list[dict[str, Any]], max_new_tokens: int) -> list[dict[str, Any]]:
        if not asked:
            return []
        engine, found = self.engine(generates=True), []
        for item in asked:
            prompt, error = self._prompt(engine, item["messages"], item["tools"], max_new_tokens)
            if error:
                found.append({"error": error})
                continue
            answer = engine.generate([prompt], max_new_tokens=max_new_tokens)[0]
            found.append({"text": answer.text, "stopped": answer.stopped, "num_tokens": len(answer.tokens)})
        return found

    def _prompt(self, engine, messages: list[dict], tools: list[dict], new_tokens: int,
                tools_mode: str | None = None) -> tuple[list[int], str | None]:
        """Token ids of the prompt, and why it cannot be asked, if so."""
        try:
            ids = chat.prompt_ids(engine.tokenizer, messages, tools, tools_mode=tools_mode or self.tools_mode)
        except DataError as error:
            return [], str(error)
        if tools and self.tools_mode == "template":
            text = engine.tokenizer.decode(ids)
            if any(name not in text for name in items.function_names(tools)):
                raise RecipeError("data.tools", "the model's chat template ignores tools, so no answer could call one",
                                  "set data.tools: system, which puts them into the system message")
        return ids, self._why_too_long(ids, new_tokens)

    def _plain_prompt(self, engine, messages: list[dict], new_tokens: int) -> tuple[list[int], str | None]:
        """Token ids of the messages' texts without any template, with what the tokenizer itself begins a text with."""
        ids = engine.tokenizer("\n\n".join(message["content"] or "" for message in messages))["input_ids"]
        return list(ids), self._why_too_long(ids, new_tokens)

    def _why_too_long(self, ids: list[int], new_tokens: int) -> str | None:
        if not self.max_tokens or len(ids) + new_tokens <= self.max_tokens:
            return None
        return f"a prompt of {len(ids)} tokens and {new_tokens} new ones do not fit into {self.max_tokens}"


def held_out_id(origin: str, row: int) -> str:
    """What an item of a ``held_out_loss`` task is called: one conversation may have become several rows."""
    return f"{origin} [{row}]"


def with_examples(item: dict[str, Any], examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages of ``item`` with ``examples`` as earlier turns, after its system message if it has one.

    Functions stand in the user turn that they are for, the item's own too, and calls are written as text, whatever
    ``data.tools`` says: the strongest of three forms tried on the default base. It named the right function in 10 of
    16 questions; with the item's functions in the system message in 0 of 16, with all of them there in 0 of 10.
    """
    messages = list(item["messages"])
    system = [messages.pop(0)] if messages and messages[0]["role"] == "system" else []
    turns = [turn for example in (*examples, {"messages": messages, "tools": item["tools"]})
             for turn in _functions_in_user_turn(example["messages"], example["tools"])]
    return system + turns


def _functions_in_user_turn(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if not tools:
        return messages
    functions = json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)
    first = next(index for index, message in enumerate(messages) if message["role"] == "user")
    asked = {**messages[first], "content": f"{chat.TOOL_PROMPT}{functions}\n\n{messages[first]['content']}"}
    return [*messages[:first], asked, *messages[first + 1:]]


def trained_losses(engine, examples: Sequence[Example]) -> list[tuple[float, int]]:
    """Summed nats over the trained tokens of each example and their number; a first token is predicted by nothing."""
    positions = [numpy.flatnonzero(example.loss_mask_T[1:]) + 1 for example in examples]
    sums = engine.summed_log_probs([(numpy.asarray(example.tokens_T, dtype=numpy.int64), positions_K)
                                    for example, positions_K in zip(examples, positions, strict=True)])
    return [(-value if len(positions_K) else 0.0, len(positions_K))
            for value, positions_K in zip(sums, positions, strict=True)]


def score_all(name: str, predictions: list[str], asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``score``, ``reason``, ``error`` (where an item cannot be scored) and, of a corpus metric, ``outcome``.

    Args:
        name: the metric.
        asked: the items, each with ``target`` (a text, or several references) and ``inputs`` as texts.
    """
    if not predictions:
        return []
    metric = metrics.load(name)
    inputs = metrics.inputs_of(metric)
    ready = [index for index, item in enumerate(asked) if all(key in item["inputs"] for key in inputs)]
    found = [_unscored(f"metric {name} needs {', '.join(inputs)}")] * len(asked)
    if not ready:
        return found
    targets = [asked[index]["target"] for index in ready]
    if any(isinstance(target, list) for target in targets):  # a column of evaluate has one type
        targets = [target if isinstance(target, list) else [target] for target in targets]
    columns = {key: [asked[index]["inputs"][key] for index in ready] for key in inputs}
    try:
        computed = metric.build().compute(predictions=[predictions[index] for index in ready], references=targets,
                                          **columns)
        outcomes = computed.get("outcomes") or [None] * len(ready)
        for index, *scored in zip(ready, computed["item_scores"], computed["reasons"], outcomes, strict=True):
            found[index] = _scored(*scored)
    except DataError:  # some target cannot be scored against: the others can
        for index, target in zip(ready, targets, strict=True):
            given = {key: asked[index]["inputs"][key] for key in inputs}
            try:
                value, reason = metrics.score_item(metric, predictions[index], target, **given)
                outcome = metric.outcome(predictions[index], target) if hasattr(metric, "corpus") else None
                found[index] = _scored(value, reason, outcome)
            except DataError as error:
                found[index] = _unscored(str(error))
    return found


def _scored(score: float, reason: str, outcome: Any) -> dict[str, Any]:
    return {"score": score, "reason": reason, "error": None} | ({} if outcome is None else {"outcome": outcome})


def _unscored(error: str) -> dict[str, Any]:
    return {"score": None, "reason": "", "error": error}


def _context_length(artifact: Artifact) -> int | None:
    """Most tokens that the model's positions reach, from its config.json; None when it does not say."""
    for folder in (artifact.path, artifact.base, artifact.tokenizer):
        path = Path(folder or "") / "config.json"
        if folder and path.is_file():
            return json.loads(path.read_text(encoding="utf-8")).get("max_position_embeddings")
    return None
