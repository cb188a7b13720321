"""Stage eval: what the base, the merged model and its quantized forms can do, and what that proves.

Every artifact answers the same items, made once (``items.py``), in a fresh process of its
own (``scoring.py``; an adapter in that of its base, on the same model in memory); with the base
also goes ``base-fewshot``, the base with examples in its prompt. Scores come with intervals,
differences are paired over items, gates become verdicts (``gates.py``), against artifacts of
this run or a baseline.lock (``baseline.py``). What cannot run here is listed as not measured,
with the reason; where too many items fail, the evaluation does. Each artifact's template, BOS
and stop tokens are held to training's (``template_check.py``): others are a FAIL. Scores of the
items that overlap no training row stand beside the whole (``eval_checks.py``).

Reads the data stage's folder, the run's artifacts and the suite. Writes, into the stage's
folder: ``items/<task>.json`` (the questions), ``<artifact>/items.jsonl`` and
``<artifact>/scores.json``, ``scores.json`` (everything), ``samples.json``.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_kit import (
    baseline,
    budget,
    comparison,
    eval_checks,
    events,
    isolate,
    items,
    rows,
    scoring,
    template_check,
    tokens,
)
from lora_kit.comparison import Scored
from lora_kit.engines import shares_model
from lora_kit.errors import MachineError, RecipeError
from lora_kit.formats import UnusableRow
from lora_kit.recipe import Recipe
from lora_kit.rundir import Run, write_json, writing
from lora_kit.suite import FEWSHOT, LOSS, HeldOutLossTask, Suite, Task, suite_of
from lora_kit.types import Artifact, Conversation, Result, TaskScore, Verdict
from lora_kit.units import number_text

FORMAT = 1
"""Version of ``scores.json`` and ``samples.json``."""
_SHOWN = ("base", FEWSHOT, "merged")


def stage(recipe: Recipe, run: Run) -> Result:
    """Score every artifact that ``recipe.eval`` names on its suite, and decide the suite's gates.

    Raises:
        RecipeError: the suite has mistakes, or names what this run does not have.
        DataError: a task has no usable row.
        MachineError: an artifact that ``eval.artifacts`` names cannot be run here, or more than ``eval.max_errors``
            of a task's items failed.
        RefusedError: the baseline was made from other prompts, with another tokenizer or other versions.
    """
    started = time.perf_counter()
    suite = suite_of(recipe, run.recipe_file.folder)
    names = recipe.eval.artifacts or [name for name in run.artifacts() if name != "adapter"]
    artifacts = [run.artifact(name) for name in names]
    work, data_dir = run.work("eval"), run.stage_dir("data")
    held_out = rows.read_held_out(data_dir)
    with writing(work):
        asked = _write_items(suite, recipe, run.recipe_file.folder, data_dir, held_out, work / "items")
    lock, hashes = _locked(suite, recipe, run, work, data_dir)
    # Sample answers take time that the budget is for something else.
    samples = [] if recipe.eval.budget else _sample_prompts(held_out, recipe.eval.samples)
    outcomes: dict[str, dict[str, Any]] = {}
    spent = None
    if recipe.eval.budget:
        spent = _within_budget(suite, recipe, run, artifacts, lock, hashes, outcomes, started)
    for group in [] if recipe.eval.budget else _sharing_models(artifacts):
        events.tell(events.Progress(stage="eval", done=len(outcomes), total=len(artifacts), unit="artifact",
                                    fields={"scoring": ", ".join(artifact.name for artifact in group)}))
        outcomes |= _score_apart(group, suite, recipe, samples, data_dir, work, _training(run))
    outcomes = {artifact.name: outcomes[artifact.name] for artifact in artifacts if artifact.name in outcomes}
    events.tell(events.Progress(stage="eval", done=len(artifacts), total=len(artifacts), unit="artifact"))
    scored = _all_scored(suite, outcomes, work)
    comparison.check_errors(scored, recipe.eval.max_errors, str(work))
    locked = baseline.scored(lock, hashes, scored) if lock else {}
    with writing(work):
        return _write_results(suite, asked, outcomes, scored, locked, samples, work, data_dir,
                              recipe.data.overlap == "drop", spent)


def _all_scored(suite: Suite, outcomes: dict[str, dict], work: Path) -> Scored:
    return {name: _read_scored(work / name / "items.jsonl") for name in _subjects(suite, outcomes)}


def _within_budget(suite: Suite, recipe: Recipe, run: Run, artifacts: list[Artifact], lock: dict | None, hashes: dict,
                   outcomes: dict[str, dict[str, Any]], started: float) -> budget.Spent:
    """Score in batches until every gate is decided or the time is used up; fills ``outcomes``."""
    if not suite.gates:
        raise RecipeError("eval.budget", "has no effect: the suite claims nothing that could be decided",
                          "give it roles or gates, or remove eval.budget")
    work, data_dir = run.work("eval"), run.stage_dir("data")
    by_name = {artifact.name: artifact for artifact in artifacts}
    claimed = {gate.task for gate in suite.gates}
    ordered = {task.name: budget.in_order(_questions(task, recipe, data_dir, work), f"{recipe.seed} {task.name} order")
               for task in suite.tasks if task.name in claimed}
    higher, corpus = _about_metrics(suite)

    def score(batch: budget.Batch) -> budget.Cost:
        before = outcomes.get(batch.artifact)
        training = _training(run) if batch.is_first else None
        found = _score_apart([by_name[batch.artifact]], suite, recipe, [], data_dir, work, training,
                             batch.items)[batch.artifact]
        outcomes[batch.artifact] = found if before is None else _together(before, found)
        used = sum(found["task_seconds"].values())
        return budget.Cost(fixed=max((found["seconds"] or 0.0) - used, 0.0), tasks=found["task_seconds"])

    def decide(shares, decided) -> list[Verdict]:
        scored = _all_scored(suite, outcomes, work)
        locked = baseline.scored(lock, hashes, scored) if lock else {}
        not_measured = [entry for outcome in outcomes.values() for entry in outcome["not_measured"]]
        return comparison.verdicts(scored | locked, suite.gates, higher, not_measured, corpus, shares=shares,
                                   decided=decided)

    spent = budget.spend(ordered, suite.gates, recipe.eval.budget or 0.0, score, decide, started=started,
                         tell=lambda text: events.tell(events.Note(text=text)))
    about = budget.needed(suite.gates, {})
    spent.left_out = [{"artifact": name, "task": task.name, "why": "no gate is about it, and the time is limited"}
                      for name in by_name for task in suite.tasks if task.name not in about.get(name, ())]
    return spent


def _questions(task: Task, recipe: Recipe, data_dir: Path, work: Path) -> list[budget.Question]:
    path = work / "items" / f"{task.name}.json"
    if path.exists():
        return [budget.Question(item_id=item["item_id"], cluster=item["cluster"], stratum=item.get("stratum", ""))
                for item in json.loads(path.read_text(encoding="utf-8"))["items"]]
    origins = tokens.read_examples(data_dir, "held_out").origins
    return [budget.Question(item_id=scoring.held_out_id(origins[row], row), cluster=origins[row])
            for row in items.draw(list(range(len(origins))), recipe.eval.limit, f"{recipe.seed} {task.name}")]


def _together(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """What two batches of one artifact say of themselves."""
    known = {(entry["artifact"], entry["task"]) for entry in before["not_measured"]}
    return {**before, "engines": before["engines"] | after["engines"],
            "not_measured": before["not_measured"] + [entry for entry in after["not_measured"]
                                                      if (entry["artifact"], entry["task"]) not in known],
            "seconds": _sum(before["seconds"], after["seconds"]),
            "num_known": before["num_known"] + after["num_known"],
            "num_asked": before["num_asked"] + after["num_asked"],
            "peak_memory_bytes": max(filter(None, (before["peak_memory_bytes"], after["peak_memory_bytes"])),
                                     default=None)}


def _sum(one: float | None, other: float | None) -> float | None:
    return other if one is None else one if other is None else one + other


def _about_metrics(suite: Suite) -> tuple[dict, dict]:
    """By (task, metric): whether more of it is better, and what makes the value of a corpus metric."""
    pairs = [(task, metric) for task in suite.tasks for metric in task.metrics]
    return ({(task.name, metric): task.higher_is_better(metric) for task, metric in pairs},
            {(task.name, metric): task.corpus(metric) for task, metric in pairs})


def _training(run: Run) -> dict[str, Any] | None:
    """The tokenizer that training used, as the run recorded it."""
    base = run.resolved.get("base") or {}
    artifact = base.get("artifact") or {}
    folder = artifact.get("tokenizer")
    return {"tokenizer": folder, "content": base.get("content"), "model": artifact.get("path")} if folder else None


def _locked(suite: Suite, recipe: Recipe, run: Run, work: Path, data_dir: Path) -> tuple[dict | None, dict]:
    """The recipe's baseline.lock, found to be about what is asked now, with the hashes of that; None without one."""
    if recipe.eval.baseline is None:
        return None, {}
    shown = recipe.eval.baseline
    lock = baseline.read(run.recipe_file.folder / Path(shown).expanduser(), shown)
    hashes = baseline.item_hashes(suite, work, data_dir)
    baseline.check(lock, baseline.describe(suite, run.artifacts()), hashes, shown)
    return lock, hashes


# ---- what is asked ----------------------------------------------------------------------


def _write_items(suite: Suite, recipe: Recipe, folder: Path, data_dir: Path, held_out: list[Conversation],
                 items_dir: Path) -> dict[str, dict[str, Any]]:
    """Write each task's questions; returns what scores.json says of each task."""
    items_dir.mkdir()
    asked = {}
    for task in suite.tasks:
        about = {"kind": task.spec.kind, "description": task.spec.description, "metrics": task.metrics}
        if not isinstance(task.spec, HeldOutLossTask):
            made = items.make_items(task, recipe, folder, held_out)
            write_json(items_dir / f"{task.name}.json",
                       {"items": [item.as_dict() for item in made.items], "examples": made.examples})
            counts = {"num_items": len(made.items), "num_rows": made.num_rows, "num_left_out": made.num_left_out,
                      "num_not_drawn": made.num_not_drawn, "unusable": made.unusable,
                      "num_examples": len(made.examples)}
        else:
            num_rows = len(tokens.read_examples(data_dir, "held_out"))
            num_items = min(num_rows, recipe.eval.limit or num_rows)
            counts = {"num_items": num_items, "num_rows": num_rows, "num_left_out": 0,
                      "num_not_drawn": num_rows - num_items, "unusable": {}, "num_examples": 0}
        asked[task.name] = about | counts
    return asked


def _sample_prompts(held_out: list[Conversation], number: int) -> list[dict[str, Any]]:
    """The first held-out conversations up to their last user turn, with the answer that stood there."""
    found = []
    for conversation in held_out:
        if len(found) == number:
            break
        try:
            items.question_and_answer(conversation)
        except UnusableRow:
            continue
        last = max(i for i, message in enumerate(conversation.messages) if message.role == "user")
        answer = conversation.messages[last + 1] if last + 1 < len(conversation.messages) else None
        found.append({
            "origin": conversation.origin, "tools": list(conversation.tools),
            "messages": [message.as_dict() for message in conversation.messages[:last + 1]],
            "reference": None if answer is None else answer.content or json.dumps(
                [call["function"] for call in answer.tool_calls], ensure_ascii=False),
        })
    return found


def _sharing_models(artifacts: list[Artifact]) -> list[list[Artifact]]:
    """``artifacts`` in groups of those that one model in memory serves: a base with its adapter, else each alone."""
    groups: list[list[Artifact]] = []
    for artifact in sorted(artifacts, key=lambda each: each.kind == "adapter"):
        group = next((group for group in groups if len(group) == 1 and shares_model(group[0], artifact)), None)
        if group:
            group.append(artifact)
        else:
            groups.append([artifact])
    return groups


def _score_apart(artifacts: list[Artifact], suite: Suite, recipe: Recipe, samples: list[dict], data_dir: Path,
                 work: Path, training: dict[str, Any] | None, only: dict[str, list[str]] | None = None
                 ) -> dict[str, dict[str, Any]]:
    """What ``scoring.score_artifacts`` says in a fresh process, by name; nothing measured of what cannot run.

    The first has the process's start among its seconds; the memory is that of the process.
    """
    # A default artifact may be one that this machine cannot run; one that the recipe names has to.
    strict = bool(recipe.eval.artifacts)
    arguments = {
        "artifacts": [artifact.as_dict() for artifact in artifacts],
        "tasks": [{"name": task.name, "spec": task.spec.model_dump(mode="json"), "folder": str(task.folder)}
                  for task in suite.tasks],
        "data_dir": str(data_dir), "work_dir": str(work), "tools_mode": recipe.data.tools, "samples": samples,
        "sample_tokens": recipe.eval.sample_tokens, "threads": recipe.eval.threads, "limit": recipe.eval.limit,
        "seed": recipe.seed, "strict": strict, "training": training, "only": only,
        "cache": recipe.eval.cache,
    }
    try:
        done = isolate.call("lora_kit.scoring:score_artifacts", arguments, threads=recipe.eval.threads)
    except MachineError as error:
        if strict:
            raise
        return {artifact.name: {"engines": {}, "samples": None, "check": None, "seconds": None,
                                "peak_memory_bytes": None, "task_seconds": {}, "num_known": 0, "num_asked": 0,
                                "not_measured": [{"artifact": artifact.name, "task": task.name, "why": str(error)}
                                                 for task in suite.tasks]} for artifact in artifacts}
    found = {artifact.name: {**outcome, "peak_memory_bytes": done.peak_memory_bytes}
             for artifact, outcome in zip(artifacts, done.value, strict=True)}
    found[artifacts[0].name]["seconds"] += done.seconds - sum(outcome["seconds"] for outcome in done.value)
    return found


# ---- what it proves ---------------------------------------------------------------------


def _write_results(suite: Suite, asked: dict, outcomes: dict[str, dict], scored: Scored, locked: Scored,
                   samples: list[dict], work: Path, data_dir: Path, overlap_dropped: bool,
                   spent: budget.Spent | None = None) -> Result:
    """Scores, differences and verdicts from every artifact's items, written and told."""
    higher, corpus = _about_metrics(suite)
    not_measured = [entry for outcome in outcomes.values() for entry in outcome["not_measured"]]
    not_measured += spent.left_out if spent else []
    not_measured += _unanswered(suite, asked, scored, not_measured)
    found = comparison.compare(scored | locked, suite.gates, higher, not_measured, corpus)
    scores, verdicts = found.scores, spent.verdicts if spent else found.verdicts
    checks = [outcome["check"] for outcome in outcomes.values() if outcome["check"]]
    overlap = eval_checks.overlap_of(suite, scored, data_dir, drops=overlap_dropped)
    figures = {"suite": suite.name, "scores": [score.as_dict() for score in scores],
               "differences": found.differences, "flips": found.flips, "gains": found.gains,
               "not_measured": not_measured, "checks": checks, "overlap": overlap,
               "clean": eval_checks.clean_scores(overlap, scored, higher, corpus),
               "clean_differences": eval_checks.clean_differences(overlap, scored | locked, found.differences, corpus)}
    if spent:
        figures["budget"] = {"stopped": spent.stopped, "looks": spent.looks}
        events.tell(events.Note(text=f"stopped after look {len(spent.looks)}: {spent.stopped}"))
    for name in scored:
        outcome = outcomes["base" if name == FEWSHOT else name]
        (work / name).mkdir(exist_ok=True)
        write_json(work / name / "scores.json", {
            "format": FORMAT, "artifact": name, "engines": outcome["engines"], "seconds": outcome["seconds"],
            "peak_memory_bytes": outcome["peak_memory_bytes"], "num_known": outcome["num_known"],
            "num_asked": outcome["num_asked"],
            "scores": [score.as_dict() for score in scores if score.artifact == name],
            "not_measured": [entry for entry in not_measured if entry["artifact"] == name],
        })
    write_json(work / "scores.json", {
        "format": FORMAT, **figures, "tasks": asked,
        "units": {metric: task.unit(metric) for task in suite.tasks for metric in task.metrics},
        "verdicts": [verdict.as_dict() for verdict in (*verdicts, *_failed(checks))],
        "seconds": {name: outcome["seconds"] for name, outcome in outcomes.items()},
    })
    answered = {name: outcome["samples"] for name, outcome in outcomes.items() if outcome["samples"]}
    write_json(work / "samples.json", {"format": FORMAT, "samples": [
        {**sample, "answers": {name: answers[index] for name, answers in answered.items()}}
        for index, sample in enumerate(samples)]})
    reused = [f"{outcome['num_known']} of {outcome['num_asked']} of {name}" for name, outcome in outcomes.items()
              if outcome["num_known"]]
    if reused:
        events.tell(events.Note(text=f"answers from the cache: {', '.join(reused)}"))
    for why, names in _grouped(not_measured).items():
        events.tell(events.Caution(text=f"not measured: {', '.join(names)}: {why}"))
    events.tell(_as_table(scores, found.differences))
    if found.gains:
        events.tell(events.Table(title="What training gained, and what quantized forms keep of it",
                                 columns=eval_checks.GAIN_COLUMNS, rows=eval_checks.gain_rows(found.gains)))
    if found.flips:
        events.tell(_flips_table(found.flips))
    _tell_checks(figures)
    return Result(summary=_summary(suite, scores, verdicts), verdicts=(*verdicts, *_failed(checks)), figures=figures)


def _failed(checks: list[dict[str, str]]) -> list[Verdict]:
    """A verdict for each artifact that is asked in another way than it was trained."""
    return [Verdict(outcome="FAIL", claim=f"{check['artifact']}: {template_check.CLAIM}", evidence=check["evidence"])
            for check in checks if check["outcome"] == "FAIL"]


def _tell_checks(figures: dict[str, Any]) -> None:
    same = [check["artifact"] for check in figures["checks"] if check["outcome"] == "PASS"]
    if same:
        events.tell(events.Note(text=f"{template_check.CLAIM}: {', '.join(same)}"))
    for verdict in _failed(figures["checks"]):
        events.tell(events.Caution(text=f"FAIL: {verdict.claim}: {verdict.evidence}"))
    if text := eval_checks.overlap_text(figures["overlap"]):
        events.tell(events.Note(text=text))
    if figures["clean"]:
        events.tell(events.Table(title="Without the items that overlap training rows",
                                 columns=eval_checks.CLEAN_COLUMNS,
                                 rows=eval_checks.clean_rows(figures["clean"], figures["scores"])))
    if figures["clean_differences"]:
        events.tell(events.Table(
            title="Differences without these items", columns=eval_checks.DIFFERENCE_COLUMNS,
            rows=eval_checks.clean_difference_rows(figures["clean_differences"], figures["differences"])))


def _subjects(suite: Suite, outcomes: dict[str, dict]) -> Iterator[str]:
    for name in outcomes:
        yield name
        if name == "base" and any(task.num_fewshot for task in suite.tasks):
            yield FEWSHOT


def _read_scored(path: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    if path.exists():
        with open(path, encoding="utf-8") as file:
            for line in file:
                item = json.loads(line)
                found[item["task"], item["metric"]].append(item)
    return dict(found)


def _unanswered(suite: Suite, asked: dict, scored: Scored, known: list[dict[str, str]]) -> list[dict[str, str]]:
    """Tasks on which a subject has no score at all, beyond those that are known."""
    seen, found = {(entry["artifact"], entry["task"]) for entry in known}, []
    for name, by_metric in scored.items():
        for task in suite.tasks:
            lines = by_metric.get((task.name, task.metrics[0]), [])
            if (name, task.name) in seen or any(line["score"] is not None for line in lines):
                continue
            if name == FEWSHOT and not task.num_fewshot:
                continue
            if lines:
                why = f"no item has a score; the first: {lines[0]['error']}"
            elif not asked[task.name]["num_items"]:
                why = "no item is left" if asked[task.name]["num_rows"] else "nothing is held out"
            elif name == FEWSHOT and not asked[task.name]["num_examples"]:
                why = "no training row serves as an example"
            else:
                why = "base was not measured"
            found.append({"artifact": name, "task": task.name, "why": why})
    return found


def _grouped(not_measured: list[dict[str, str]]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for entry in not_measured:
        grouped[entry["why"]].append(f"{entry['artifact']} on {entry['task']}")
    return grouped


def _as_table(scores: list[TaskScore], differences: list[dict]) -> events.Table:
    to_base = {(entry["task"], entry["metric"], entry["artifact"]): entry for entry in differences
               if entry["baseline"] == "base"}
    lines = []
    for score in scores:
        change = to_base.get((score.task, score.metric, score.artifact))
        lines.append([
            f"{score.task} {score.metric}", score.artifact, number_text(score.value, 3),
            _interval(score.ci_low, score.ci_high),
            number_text(change["difference"], 3) if change else "",
            _interval(change["ci_low"], change["ci_high"]) if change else "",
            f"{score.num_items}" + (f" ({score.num_errors} errors)" if score.num_errors else ""),
        ])
    return events.Table(title="Scores", rows=lines, columns=[
        "task", "artifact", "score", "95 % interval", "difference to base", "95 % interval", "items"])


def _flips_table(flips: list[dict]) -> events.Table:
    return events.Table(title="Items that changed, stage by stage", rows=[[
        f"{each['task']} {each['metric']}", f"{each['baseline']} → {each['artifact']}",
        f"{each['num_worse']}", f"{each['num_better']}",
        f"{each['num_items']}" + (f" ({each['num_numeric']} flips numeric)" if each["num_numeric"] else "")]
        for each in flips],
        columns=["task", "stage", "worse (right → wrong)", "better (wrong → right)", "items"])


def _interval(low: float | None, high: float | None) -> str:
    return "–" if low is None else f"{number_text(low, 3)} to {number_text(high, 3)}"


def _summary(suite: Suite, scores: list[TaskScore], verdicts: list[Verdict]) -> str:
    if not any(score.value is not None for score in scores):
        return "nothing was measured"
    parts = []
    for task in suite.tasks:
        values = [f"{score.artifact} {number_text(score.value, 3)}" for score in scores
                  if score.task == task.name and score.metric == task.metrics[0] and score.artifact in _SHOWN]
        title = task.name if task.metrics == [LOSS] else f"{task.name} {task.metrics[0]}"
        parts += [f"{title}: {', '.join(values)}"] if values else []
    if verdicts:
        parts.append(f"{sum(verdict.outcome == 'PASS' for verdict in verdicts)} of {len(verdicts)} gates pass")
    return "; ".join(parts)
