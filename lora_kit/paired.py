"""Two evaluations beside each other, item by item: what changed, by how much, and where.

``A`` is what was there before, ``B`` what is to be judged; a difference is B minus A over the
items that both have a score for. Items that only one has are counted and never filled in. Items
are the same when they ask the same: an id whose prompt or target differs refuses the whole
comparison, because a difference would be one of questions and not of models.

Torch-free. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lora_kit import lm_eval_task, metrics
from lora_kit.errors import RecipeError
from lora_kit.report_document import Block, Cell, Document, Paragraph, Sample, Section, Table, Tone, Turn
from lora_kit.scored import Key, Line, Scored, change_of, is_binary
from lora_kit.stats import corpus_difference, mean_interval, paired_difference
from lora_kit.units import count_text, number_text

FORMAT = 1
"""Version of what :func:`compare` returns."""
COLUMNS = ("task", "items", "A", "B", "B - A", "95 % interval", "", "better", "worse", "only A", "only B", "errors")
"""Columns of :func:`rows`."""
_TONES: dict[str, Tone] = {"better": "pass", "worse": "fail", "cannot tell": "unsure"}
_LONGEST = 600


def compare(a: Scored, b: Scored, *, num_examples: int = 3) -> dict[str, Any]:
    """The paired comparison of ``b`` with ``a`` as JSON values.

    Args:
        num_examples: of each task and direction: items that changed, those that changed most first.

    Returns:
        ``format``; ``a`` and ``b`` (label, subject, path); ``tasks``, a list of: task, metric, higher_is_better,
        binary, ``a`` and ``b`` (means over shared items), difference, ci_low, ci_high (None where the items cannot
        tell), num_items, num_clusters, num_better, num_worse, num_same, right_to_wrong and wrong_to_right (None
        unless binary), only_a, only_b, errors_a, errors_b; and ``examples``: task, metric, change, item_id, prompt,
        target, and of ``a`` and ``b`` score, prediction, reason.

    Raises:
        RecipeError: they share no item, or an item asks something else in one than in the other.
    """
    _check_same_questions(a, b)
    keys = list(dict.fromkeys([*a.lines, *b.lines]))
    tasks, examples, with_examples = [], [], set()
    for key in keys:
        fields, changed = _one_task(key, a, b)
        tasks.append(fields)
        # A task's further metrics mostly change on the same items.
        if key[0] not in with_examples and fields["num_items"]:
            with_examples.add(key[0])
            for change in ("worse", "better"):
                examples += changed[change][:num_examples]
    return {"format": FORMAT, "a": _about(a), "b": _about(b), "tasks": tasks, "examples": examples}


def rows(compared: dict[str, Any]) -> list[tuple[str, ...]]:
    """The tasks as rows of a table; see COLUMNS. Of right and wrong items the changes are counted in those words."""
    return [(f"{each['task']} {each['metric']}", count_text(each["num_items"]), number_text(each["a"], 3),
             number_text(each["b"], 3), _signed(each["difference"]), _interval(each), direction(each),
             *_changes(each), count_text(each["only_a"]), count_text(each["only_b"]), _errors(each))
            for each in compared["tasks"]]


def direction(difference: dict[str, Any]) -> str:
    """``better`` or ``worse`` where the interval leaves zero out, ``cannot tell`` elsewhere."""
    low, high = difference["ci_low"], difference["ci_high"]
    if low is None or low <= 0 <= high:
        return "cannot tell"
    return "better" if (low > 0) == difference["higher_is_better"] else "worse"


def document(compared: dict[str, Any]) -> Document:
    """The comparison as a page, for any writer of ``report_document``."""
    sides = [f"{side.upper()} {compared[side]['label']}" for side in ("a", "b")]
    return Document(
        title="Comparison", subtitle="", facts=list(zip(("before", "after"), sides, strict=True)),
        sections=[Section(anchor="comparison", title="What changed", blocks=[table(compared)]),
                  *_example_sections(compared)])


def table(compared: dict[str, Any]) -> Table:
    """The paired table."""
    found: list[list[str | Cell]] = []
    for row in rows(compared):
        cells: list[str | Cell] = list(row)
        cells[6] = Cell(text=row[6], tone=_TONES[row[6]])
        found.append(cells)
    return Table(columns=COLUMNS, rows=found, numeric=(1, 2, 3, 4, 5, 9, 10), note=NOTE)


NOTE = ("Over the items that both have a score for: A and B are means, B - A is paired, with its 95 % interval by "
        "cluster. Better or worse only where the interval leaves zero out. Items that only one has, and errors, are "
        "in no mean.")


def _example_sections(compared: dict[str, Any]) -> list[Section]:
    sections = []
    for change in ("worse", "better"):
        found: list[Block] = [_sample(each) for each in compared["examples"] if each["change"] == change]
        if not found:
            found = [Paragraph(text=f"No item got {change}.", tone="missing")]
        sections.append(Section(anchor=change, title=f"What got {change}", blocks=found))
    return sections


def _sample(example: dict[str, Any]) -> Sample:
    answers = []
    for side in ("a", "b"):
        of = example[side]
        remark = "; ".join(filter(None, [number_text(of["score"], 3), of["reason"]]))
        answers.append((side.upper(), shortened(of["prediction"]), remark))
    return Sample(origin=f"{example['task']} {example['item_id']}", reference=shortened(example["target"]),
                  turns=[Turn(role="prompt", text=shortened(example["prompt"]))], answers=answers)


def example_lines(compared: dict[str, Any]) -> Iterable[str]:
    """The examples as lines of plain text."""
    for each in compared["examples"]:
        yield f"{each['change']}: {each['task']} {each['item_id']}"
        if each["prompt"]:
            yield f"  prompt  {_one_line(each['prompt'])}"
        if each["target"]:
            yield f"  target  {_one_line(each['target'])}"
        for side in ("a", "b"):
            of = each[side]
            reason = f" ({_one_line(of['reason'])})" if of["reason"] else ""
            answer = f"  {_one_line(of['prediction'])}" if of["prediction"] else ""
            yield f"  {side.upper()}  {number_text(of['score'], 3)}{answer}{reason}"


def shortened(text: str, longest: int = _LONGEST) -> str:
    """``text``, its middle left out where it is longer than ``longest`` characters, with how much that is."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


# ---- one task ---------------------------------------------------------------------------


def _one_task(key: Key, a: Scored, b: Scored) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The row of a task and metric, and its items that got worse and better, those that changed most first."""
    of_a, of_b = a.lines.get(key, {}), b.lines.get(key, {})
    higher = (a if key in a.lines else b).higher_is_better(key)
    both = [item for item in of_a if item in of_b]
    shared = [item for item in both if of_a[item]["score"] is not None and of_b[item]["score"] is not None]
    before, after = ([of[item]["score"] for item in shared] for of in (of_a, of_b))
    clusters = [of_a[item]["cluster"] for item in shared]
    weights: list[float] | None = [of_a[item].get("weight") or 1 for item in shared]
    weights = None if all(weight == 1 for weight in weights or ()) else weights
    found = paired_difference(after, before, clusters, weights=weights)
    fields: dict[str, Any] = {
        "task": key[0], "metric": key[1], "higher_is_better": higher, "binary": bool(shared) and is_binary(
            [*before, *after]),
        "a": mean_interval(before, clusters, weights=weights).mean,
        "b": mean_interval(after, clusters, weights=weights).mean, "difference": found.mean, "ci_low": found.ci_low,
        "ci_high": found.ci_high, "num_items": found.num_items, "num_clusters": found.num_clusters}
    corpus = _corpus(key[1])
    outcomes = [[of[item].get("outcome") for item in shared] for of in (of_a, of_b)]
    if corpus and shared and all(outcome is not None for side in outcomes for outcome in side):
        # Such a value is no mean of items.
        found = corpus_difference(corpus, outcomes[1], outcomes[0], clusters)
        fields.update(a=corpus(outcomes[0]), b=corpus(outcomes[1]), difference=found.mean, ci_low=found.ci_low,
                      ci_high=found.ci_high)
    changed: dict[str, list[dict[str, Any]]] = {"better": [], "worse": [], "same": []}
    for item in shared:
        change = change_of(of_a[item]["score"], of_b[item]["score"], higher)
        changed[change].append({
            "task": key[0], "metric": key[1], "change": change, "item_id": item,
            "prompt": text_of(of_b[item]["prompt"]), "target": text_of(of_b[item]["target"]),
            "a": _answer(of_a[item]), "b": _answer(of_b[item])})
    for items in changed.values():
        items.sort(key=lambda each: -abs(each["b"]["score"] - each["a"]["score"]))
    fields |= {f"num_{change}": len(items) for change, items in changed.items()}
    fields |= {
        "right_to_wrong": len(changed["worse"]) if fields["binary"] else None,
        "wrong_to_right": len(changed["better"]) if fields["binary"] else None,
        "only_a": len(of_a) - len(both), "only_b": len(of_b) - len(both),
        "errors_a": sum(line["score"] is None for line in of_a.values()),
        "errors_b": sum(line["score"] is None for line in of_b.values())}
    return fields, changed


def _corpus(metric: str):
    """What makes the value of a corpus metric from items' outcomes; None for a metric whose value is a mean."""
    if metric.partition(",")[0] == "perplexity":
        return lm_eval_task.perplexity
    try:
        return getattr(metrics.load(metric), "corpus", None)
    except RecipeError:  # held-out loss, or the metric of an items file from elsewhere
        return None


def _answer(line: Line) -> dict[str, Any]:
    return {"score": line["score"], "prediction": text_of(line["prediction"]), "reason": text_of(line["reason"])}


def text_of(value: Any) -> str:
    """A text of a line; several references one below the other."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _check_same_questions(a: Scored, b: Scored) -> None:
    """RecipeError unless the items that both have ask the same in both, and there is one at least."""
    num_shared, differing = 0, []
    for key in a.lines.keys() & b.lines.keys():
        for item in a.lines[key].keys() & b.lines[key].keys():
            num_shared += 1
            why = _why_another(a.lines[key][item], b.lines[key][item])
            if why:
                differing.append((key[0], item, why))
    if differing:
        task, item, why = min(differing)
        raise RecipeError(f"{a.label} and {b.label}", f"{len(differing)} of {num_shared} shared items ask something "
                          f"else, e.g. {item} of {task} has another {why}",
                          "compare evaluations of the same suite, data and template")
    if not num_shared:
        raise RecipeError(f"{a.label} and {b.label}", "share no item",
                          f"the first has {_tasks(a)}, the second {_tasks(b)}")


def _why_another(a: Line, b: Line) -> str:
    """What makes two items of one id different questions; empty when nothing does."""
    # An item that could not be asked has no prompt.
    if a["prompt"] != b["prompt"] and a["prompt"] and b["prompt"]:
        return "prompt"
    if a["target"] != b["target"]:
        return "target"
    return "number of trained tokens" if a.get("weight", 1) != b.get("weight", 1) else ""


def _tasks(scored: Scored) -> str:
    return ", ".join(dict.fromkeys(task for task, _ in scored.lines)) or "none"


def _about(scored: Scored) -> dict[str, str]:
    return {"label": scored.label, "subject": scored.subject, "path": str(scored.path)}


# ---- words ------------------------------------------------------------------------------


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{'+' if value > 0 else ''}{number_text(value, 3)}"


def _interval(each: dict[str, Any]) -> str:
    return "–" if each["ci_low"] is None else f"{_signed(each['ci_low'])} to {_signed(each['ci_high'])}"


def _changes(each: dict[str, Any]) -> tuple[str, str]:
    if each["binary"]:
        return f"{each['wrong_to_right']} wrong to right", f"{each['right_to_wrong']} right to wrong"
    return count_text(each["num_better"]), count_text(each["num_worse"])


def _errors(each: dict[str, Any]) -> str:
    if not each["errors_a"] and not each["errors_b"]:
        return "none"
    return f"A {each['errors_a']}, B {each['errors_b']}"


def _one_line(text: str, longest: int = 160) -> str:
    return shortened(" ".join(text.split()), longest)
