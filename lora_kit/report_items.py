"""A page to browse scored items by task, verdict and change, for one run or for a comparison.

The page has no script: radio buttons stand before the list, and rules of CSS hide the items that
do not fit what is chosen, so it works from a file, under the report's content security policy, on
hundreds of items. Every text is escaped. Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_kit import paired
from lora_kit.paired import shortened, text_of
from lora_kit.report_document import Paragraph, Table
from lora_kit.report_html import block_html, escaped, frame
from lora_kit.scored import Key, Line, Scored, change_of, is_binary
from lora_kit.suite import LOSS
from lora_kit.units import count_text, number_text

FILE = "items.html"
"""Name of the page beside index.html."""
MAX_ITEMS = 2000
"""Items on a page; of more, those that changed come first, and the page says how many are left out."""
MAX_CHARACTERS = 4000
"""Of one text on the page."""
CHANGES = ("worse", "better", "same", "unpaired")
VERDICTS = ("wrong", "partly", "right", "measured", "error", "not asked")
_TONES = {"worse": "fail", "better": "pass", "same": "plain", "unpaired": "unsure"}

_STYLE = """
.items{display:flex;flex-direction:column}
.pick{position:fixed;top:0;left:0;opacity:0;pointer-events:none}
.filters{order:2;display:grid;grid-template-columns:auto 1fr;gap:6px 14px;align-items:start;font-size:13.5px;
margin:4px 0 12px}
.filters b{color:var(--soft);font-weight:600;padding-top:3px}
.choice{display:flex;flex-wrap:wrap;gap:6px}
.choice label{border:1px solid var(--line);border-radius:99px;padding:2px 11px;cursor:pointer;background:var(--panel);
overflow-wrap:anywhere}
.choice label:hover{border-color:var(--accent)}
.above{order:1}
section.above{padding-top:14px;padding-bottom:12px}
.list{order:4}
.shown{order:3;color:var(--soft);font-size:13px;margin:0 0 8px}
.shown::before{content:counter(shown)}
.items{counter-reset:shown}
.item{counter-increment:shown;background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:0 14px;
margin:0 0 8px}
.item>summary{display:flex;flex-wrap:wrap;gap:3px 10px;align-items:baseline;margin:9px 0;font-weight:400}
.item .name{font-weight:600;overflow-wrap:anywhere}
.item .scores{color:var(--soft);font-variant-numeric:tabular-nums}
.item .look{flex-basis:100%;color:var(--soft);font-size:13px;overflow:hidden;text-overflow:ellipsis;white-space:nowrap;
unicode-bidi:plaintext}
.item[open] .look{display:none}
.item .text{max-height:26em;overflow:auto}
.item>.box{margin-bottom:8px}
.item .note{margin:6px 0 0}
.badge.plain{color:var(--soft);background:var(--head)}
.on{display:none}
@media (max-width:640px){.filters{grid-template-columns:1fr;gap:2px}.filters b{padding-top:6px}.item{padding:0 10px}}
"""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two subjects by their places: what was there before (None: nothing to compare with), and what is judged."""

    before: int | None
    after: int


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One item of a task with the lines that each subject has for it, by metric; an empty dict where it was not asked.
    """

    task: str
    item_id: str
    lines: Sequence[dict[str, Line]]

    def line(self, subject: int, metric: str) -> Line | None:
        return self.lines[subject].get(metric)


def pairs_of(subjects: Sequence[str]) -> list[Pair]:
    """Which subjects of a run to compare: each with the base, each quantized form with the merged model."""
    places = {name: place for place, name in enumerate(subjects)}
    if len(subjects) == 1:
        return [Pair(before=None, after=0)]
    if "base" not in places:
        return [Pair(before=0, after=place) for place in range(1, len(subjects))]
    found, forms = [], [name for name in subjects if name not in ("base", "base-fewshot", "adapter", "merged")]
    if "merged" in places:
        found = [Pair(before=places["base"], after=places["merged"])]
        found += [Pair(before=places["merged"], after=places[name]) for name in forms]
        if "base-fewshot" in places:
            found.append(Pair(before=places["base-fewshot"], after=places["merged"]))
    return found + [Pair(before=places["base"], after=place) for name, place in places.items()
                    if name not in ("base", "merged")]


def page(*, title: str, subtitle: str, facts: Sequence[tuple[str, str]], subjects: Sequence[Scored],
         labels: Sequence[str], pairs: Sequence[Pair], above: Sequence[Table | Paragraph] = (),
         links: Sequence[tuple[str, str]] = ()) -> str:
    """The whole page as HTML.

    Args:
        labels: how the page calls each subject.
        pairs: what may be compared; the first is what the page opens with.
        above: blocks that stand before the items. Default: how many changed, folded.
        links: (where to, text) of files beside the page.
    """
    entries, metric_of = entries_of(subjects)
    kinds = {task: _kind(task, metric, subjects) for task, metric in metric_of.items()}
    higher = {task: next(each for each in subjects if (task, metric) in each.lines).higher_is_better((task, metric))
              for task, metric in metric_of.items()}
    states = [[(_change(entry, pair, metric_of[entry.task], higher[entry.task]),
                _verdict(entry.line(pair.after, metric_of[entry.task]), kinds[entry.task], higher[entry.task]))
               for pair in pairs] for entry in entries]
    chosen = _within_limit(states)
    tasks = list(metric_of)
    shown = [_item(entries[place], states[place], tasks, metric_of, labels) for place in chosen]
    groups = [
        ("task", "task", ["all tasks", *tasks]),
        ("pair", "compare", [_pair_text(pair, labels) for pair in pairs]),
        ("change", "change", ["any change", *_occurring(CHANGES, states, 0)]),
        ("verdict", "verdict", ["any verdict", *_occurring(VERDICTS, states, 1)]),
    ]
    buttons, bars = [], []
    for group, heading, choices in groups:
        buttons += [f'<input class="pick" type="radio" name="{group}" id="{group}{place}"'
                    f'{" checked" if place == 0 else ""}>' for place in range(len(choices))]
        inside = "".join(f'<label for="{group}{place}">{escaped(text)}</label>' for place, text in enumerate(choices))
        bars.append(f'<b>{heading}</b><div class="choice">{inside}</div>')
    left_out = len(entries) - len(chosen)
    notes = [Paragraph(text=f"{count_text(left_out)} more items, which changed in no comparison or less than these, "
                            "stand in items.jsonl only.", tone="unsure")] if left_out else []
    counts = "" if above else ("<details><summary>How many items changed</summary>"
                               f"{block_html(_counts(entries, states, tasks, pairs, labels))}</details>")
    body = "\n".join([
        '<main class="items">', *buttons, '<section class="above">', *(block_html(block) for block in above), counts,
        *map(block_html, notes), "</section>", f'<div class="filters">{"".join(bars)}</div>',
        '<div class="list">', *shown, "</div>",
        f'<p class="shown"> of {count_text(len(chosen))} items shown</p>', "</main>"])
    return frame(title=title, subtitle=subtitle, facts=facts, links=links, body=body,
                 style=_STYLE + _rules([(group, choices) for group, _, choices in groups], len(pairs)),
                 footer="Written by lora-kit. A change is of the item's score by the task's first metric.")


def comparison_page(compared: dict[str, Any], a: Scored, b: Scored) -> str:
    """The page of a comparison: its table, then the items of both sides.

    Args:
        compared: what ``paired.compare(a, b)`` returned.
    """
    return page(
        title="Comparison", subtitle="", facts=[("A, before", a.label), ("B, after", b.label)], subjects=[a, b],
        labels=["A", "B"], pairs=[Pair(before=0, after=1)], above=[paired.table(compared)])


def entries_of(subjects: Sequence[Scored]) -> tuple[list[Entry], dict[str, str]]:
    """Every item that a subject was asked, by task, and the first metric of each task."""
    lines: dict[tuple[str, str], list[dict[str, Line]]] = {}
    metric_of: dict[str, str] = {}
    for place, subject in enumerate(subjects):
        for (task, metric), by_item in subject.lines.items():
            metric_of.setdefault(task, metric)
            for item_id, line in by_item.items():
                entry = lines.setdefault((task, item_id), [{} for _ in subjects])
                entry[place][metric] = line
    order = {task: place for place, task in enumerate(metric_of)}
    found = [Entry(task=task, item_id=item_id, lines=of) for (task, item_id), of in lines.items()]
    return sorted(found, key=lambda entry: order[entry.task]), metric_of


# ---- what is said of an item ------------------------------------------------------------


def _kind(task: str, metric: str, subjects: Sequence[Scored]) -> str:
    """``binary`` (right or wrong), ``share`` (from 0 to 1) or ``number`` of a task's scores."""
    key: Key = task, metric
    scores = [line["score"] for each in subjects for line in each.lines.get(key, {}).values()]
    if is_binary(scores) and metric != LOSS:
        return "binary"
    return "share" if metric != LOSS and all(score is None or 0 <= score <= 1 for score in scores) else "number"


def _verdict(line: Line | None, kind: str, higher_is_better: bool) -> str:
    if line is None:
        return "not asked"
    if line["score"] is None:
        return "error"
    if kind == "number":
        return "measured"
    best, worst = (1, 0) if higher_is_better else (0, 1)
    return "right" if line["score"] == best else "wrong" if line["score"] == worst else "partly"


def _change(entry: Entry, pair: Pair, metric: str, higher_is_better: bool) -> str:
    if pair.before is None:
        return "unpaired"
    before, after = entry.line(pair.before, metric), entry.line(pair.after, metric)
    return change_of(before and before["score"], after and after["score"], higher_is_better)


def _within_limit(states: Sequence[Sequence[tuple[str, str]]]) -> list[int]:
    """Places of the items to show, in their order: what changed in some comparison goes before what did not."""
    places = list(range(len(states)))
    if len(places) <= MAX_ITEMS:
        return places
    places.sort(key=lambda place: min(CHANGES.index(change) for change, _ in states[place]))
    return sorted(places[:MAX_ITEMS])


def _occurring(names: Sequence[str], states: Sequence[Sequence[tuple[str, str]]], which: int) -> list[str]:
    found = {state[which] for of in states for state in of}
    return [name for name in names if name in found]


def _pair_text(pair: Pair, labels: Sequence[str]) -> str:
    return labels[pair.after] if pair.before is None else f"{labels[pair.before]} → {labels[pair.after]}"


def _counts(entries: Sequence[Entry], states, tasks: Sequence[str], pairs: Sequence[Pair],
            labels: Sequence[str]) -> Table:
    rows = []
    for task in tasks:
        for place, pair in enumerate(pairs):
            counted = Counter(of[place][0] for entry, of in zip(entries, states, strict=True) if entry.task == task)
            rows.append([task, _pair_text(pair, labels), *(count_text(counted[change]) for change in CHANGES)])
    return Table(columns=("task", "comparison", *CHANGES), rows=rows, numeric=(2, 3, 4, 5))


# ---- HTML -------------------------------------------------------------------------------


def _rules(groups: Sequence[tuple[str, Sequence[str]]], num_pairs: int) -> str:
    """CSS that hides what does not fit the buttons that are checked, and marks their labels."""
    rules = []
    for group, choices in groups:
        for place, choice in enumerate(choices):
            button = f"#{group}{place}"
            label = f'~.filters label[for="{group}{place}"]'
            rules.append(f"{button}:checked{label}{{background:var(--accent);border-color:var(--accent);"
                         "color:var(--page)}")
            rules.append(f"{button}:focus-visible{label}{{outline:2px solid var(--text);outline-offset:2px}}")
            if group == "pair":
                rules.append(f"{button}:checked~.list .on{place}{{display:inline-block}}")
            elif group == "task" and place:
                rules.append(f"{button}:checked~.list>.item:not(.t{place}){{display:none}}")
            elif place:
                rules += [f"#pair{pair}:checked~{button}:checked~.list>.item:not(.p{pair}-{choice.replace(' ', '-')})"
                          "{display:none}" for pair in range(num_pairs)]
    return "\n".join(rules)


def _item(entry: Entry, states: Sequence[tuple[str, str]], tasks: Sequence[str], metric_of: dict[str, str],
          labels: Sequence[str]) -> str:
    metric = metric_of[entry.task]
    kinds = " ".join(f"p{place}-{state.replace(' ', '-')}" for place, of in enumerate(states) for state in of)
    badges = "".join(f'<span class="badge on on{place} {_TONES[change]}">{change}</span>'
                     for place, (change, _) in enumerate(states))
    scores = " · ".join(f"{label} {_score_text(entry.line(place, metric))}" for place, label in enumerate(labels)
                        if entry.lines[place])
    first = next(line for of in entry.lines for line in of.values())
    prompts = list(dict.fromkeys(text_of(line["prompt"]) for of in entry.lines for line in of.values()
                                 if line["prompt"]))
    target = text_of(first["target"])
    parts = [_box("prompt" if len(prompts) == 1 else f"prompt {number}", text)
             for number, text in enumerate(prompts, 1)]
    parts += [_box("target", target)] if target else []
    answers = "".join(_answer(label, of, metric) for label, of in zip(labels, entry.lines, strict=True))
    look = " ".join((target or text_of(first["prompt"]))[:300].split())
    return (f'<details class="item t{tasks.index(entry.task) + 1} {kinds}"><summary>{badges}'
            f'<span class="name">{escaped(entry.task)} {escaped(entry.item_id)}</span>'
            f'<span class="scores">{escaped(scores)}</span><span class="look">{escaped(look)}</span></summary>'
            f'{"".join(parts)}<div class="answers">{answers}</div></details>')


def _score_text(line: Line | None) -> str:
    if line is None:
        return "not asked"
    return "error" if line["score"] is None else number_text(line["score"], 3)


def _answer(label: str, lines: dict[str, Line], metric: str) -> str:
    """What one subject answered, with its score by every metric and the reasons."""
    if not lines:
        return ""
    line = lines.get(metric) or next(iter(lines.values()))
    scores = "; ".join(f"{name} {_score_text(each)}" for name, each in lines.items())
    reasons = list(dict.fromkeys(filter(None, (text_of(each["reason"]) for each in lines.values()))))
    if line["error"]:
        reasons.insert(0, f"no score: {line['error']}")
    if line.get("stopped") is False:
        reasons.append("cut off")
    notes = "".join(f'<div class="note">{escaped(reason)}</div>' for reason in reasons)
    return _box(f"{label} · {scores}", text_of(line["prediction"]), notes)


def _box(heading: str, text: str, notes: str = "") -> str:
    inside = f'<div class="text" dir="auto">{escaped(shortened(text, MAX_CHARACTERS))}</div>' if text else ""
    return f'<div class="box"><b>{escaped(heading)}</b>{inside}{notes}</div>'
