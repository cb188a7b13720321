"""report_items.py: the page needs nothing, its rules show what was chosen, texts stay texts."""

import json
import re

import pytest

from lora_kit import paired, report, report_items, scored
from lora_kit.report_items import Pair
from tests import run_on_paper as paper
from tests import tiny_run
from tests.scored_on_paper import line, write, write_run
from tests.test_report import HOSTILE, Page


def make(tmp_path, subjects, **more):
    found = [scored.read(write(tmp_path / name, lines), name) for name, lines in subjects.items()]
    options = {"pairs": report_items.pairs_of(list(subjects))} | more
    return report_items.page(title="t", subtitle="", facts=[], subjects=found, labels=list(subjects), **options)


class Browser:
    """What a browser makes of the page's buttons and rules: which items are seen, with which badge."""

    def __init__(self, text):
        self.page = Page(text)
        self.buttons = re.findall(r'<input class="pick" type="radio" name="(\w+)" id="(\w+)"( checked)?>', text)
        self.checked = {name: id_ for name, id_, checked in self.buttons if checked}
        self.labels = {words: id_ for id_, words in re.findall(r'<label for="(\w+)">([^<]*)</label>', text)}
        items = re.findall(r'<details class="(item [^"]*)">(.*?)</details>', text, re.DOTALL)
        self.items = [(classes.split(), re.search(r'class="name">([^<]*)<', body)[1], body) for classes, body in items]
        self.hiding = [(set(re.findall(r"#(\w+):checked", rule)), re.search(r"\.item:not\(\.([\w-]+)\)", rule)[1])
                       for rule in re.findall(r"^(#[^{]*\.item:not[^{]*)\{display:none\}$", text, re.MULTILINE)]

    def choose(self, words):
        id_ = self.labels[words]
        self.checked[next(name for name, known, _ in self.buttons if known == id_)] = id_
        return self

    def seen(self):
        on = set(self.checked.values())
        return [name for classes, name, _ in self.items
                if not any(buttons <= on and needed not in classes for buttons, needed in self.hiding)]

    def badge(self, name):
        pair = self.checked["pair"].removeprefix("pair")
        body = next(body for _, known, body in self.items if known == name)
        return re.search(rf'class="badge on on{pair} \w+">(\w+)<', body)[1]


@pytest.fixture
def browser(tmp_path):
    def loss(n, score):
        return line(n, score, task="held", metric="loss", weight=5, target="")

    return Browser(make(tmp_path, {
        "base": [line(1, 0), line(2, 1), line(3, 1), loss(1, 2.0)],
        "merged": [line(1, 1), line(2, 0), line(3, None), loss(1, 1.0)],
        "gguf": [line(1, 1), line(2, 1), loss(1, 1.5)]}))


def test_every_item_is_there_once_and_seen_at_first(browser):
    assert browser.seen() == ["answers rows.jsonl:1", "answers rows.jsonl:2", "answers rows.jsonl:3",
                              "held rows.jsonl:1"]
    assert browser.checked == {"task": "task0", "pair": "pair0", "change": "change0", "verdict": "verdict0"}


def test_items_are_filtered_by_task_change_and_verdict_of_the_comparison_that_is_chosen(browser):
    assert browser.choose("better").seen() == ["answers rows.jsonl:1", "held rows.jsonl:1"]
    assert browser.choose("held").seen() == ["held rows.jsonl:1"]  # less loss is better
    assert browser.choose("merged → gguf").choose("worse").seen() == ["held rows.jsonl:1"]
    assert browser.choose("all tasks").choose("any change").choose("right").seen() == [
        "answers rows.jsonl:1", "answers rows.jsonl:2"]
    assert browser.choose("not asked").seen() == ["answers rows.jsonl:3"]
    assert browser.choose("base → merged").choose("error").seen() == ["answers rows.jsonl:3"]
    assert browser.choose("unpaired").choose("right").seen() == []


def test_the_badge_is_that_of_the_comparison(browser):
    assert browser.badge("answers rows.jsonl:2") == "worse"
    browser.choose("merged → gguf")
    assert browser.badge("answers rows.jsonl:2") == "better" and browser.badge("answers rows.jsonl:1") == "same"


def test_choices_are_only_those_that_occur(tmp_path):
    page = Browser(make(tmp_path, {"base": [line(1, 0)], "merged": [line(1, 1)]}))
    assert set(page.labels) == {"all tasks", "answers", "base → merged", "any change", "better", "any verdict", "right"}


def test_an_item_shows_prompt_target_answers_scores_and_reasons(tmp_path):
    text = make(tmp_path, {
        "base": [line(1, 0.5, metric="token_f1", stopped=False), line(1, 0)],
        "merged": [line(1, None, metric="token_f1", error="it is too long"), line(1, None)]})
    page = Page(text)
    for shown in ("say 1", "target 1", "answer to 1", "base · token_f1 0.5; exact_match 0", "not the target", "cut off",
                  "no score: it is too long", "base 0.5 · merged error"):
        assert shown in page.text, shown


def test_shares_are_partly_right(tmp_path):
    page = Browser(make(tmp_path, {"merged": [line(1, 0.4, metric="token_f1"), line(2, 1.0, metric="token_f1"),
                                              line(3, 0.0, metric="token_f1")]}))
    assert page.choose("partly").seen() == ["answers rows.jsonl:1"]
    assert page.choose("wrong").seen() == ["answers rows.jsonl:3"]


@pytest.mark.parametrize(("subjects", "expected"), [
    (["base"], [(None, 0)]),
    (["base", "merged", "gguf"], [(0, 1), (1, 2), (0, 2)]),
    (["base", "base-fewshot", "merged"], [(0, 2), (1, 2), (0, 1)]),
    (["one", "two"], [(0, 1)])])
def test_which_subjects_are_compared(subjects, expected):
    assert report_items.pairs_of(subjects) == [Pair(before=before, after=after) for before, after in expected]


def test_hostile_text_stays_text_and_the_page_needs_nothing(tmp_path):
    def lines(text):
        return {"base": [line(1, 0, prompt=text, prediction=text, target=text, reason=text, error=None)],
                "merged": [line(1, None, prompt=text, prediction=text, target=text, error=text)]}

    text = make(tmp_path / "hostile", lines(HOSTILE), links=[("index.html", "The report")])
    page, plain = Page(text), Page(make(tmp_path / "plain", lines("hello"), links=[("index.html", "The report")]))
    assert sorted(page.tags) == sorted(plain.tags)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert {value for _, name, value in page.attributes if name in ("src", "href")} == {"index.html"}
    outside = text.replace("http://evil.example", "").replace("http://b", "")
    assert not re.search(r"https?://|url\(|@import", outside)


def test_a_hostile_task_is_no_rule(tmp_path):
    page = Browser(make(tmp_path, {"base": [line(1, 0, task="a{} </style><b>")], "merged": [line(1, 1, task="b")]}))
    assert "b" not in page.page.tags[page.page.tags.index("main"):] or page.page.tags.count("style") == 1
    assert page.page.tags.count("style") == 1 and len(page.items) == 2


def test_hundreds_of_items_are_one_page_and_thousands_say_what_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(report_items, "MAX_ITEMS", 300)
    changed = [n for n in range(400) if n % 40 == 39]
    page = Browser(make(tmp_path, {"base": [line(n, 0) for n in range(400)],
                                   "merged": [line(n, int(n in changed)) for n in range(400)]}))
    assert len(page.items) == 300 and "100 more items" in page.page.text and "of 300 items shown" in page.page.text
    assert page.choose("better").seen() == [f"answers rows.jsonl:{n}" for n in changed]


def test_long_texts_are_shortened(tmp_path):
    text = make(tmp_path, {"merged": [line(1, 1, prompt="x" * 50_000, prediction="y" * 50_000)]})
    assert len(text) < 40_000 and "46,000 characters" in text


# ---- where it is written ----------------------------------------------------------------


def test_the_report_links_to_the_page_and_the_page_to_the_report(tmp_path):
    run = paper.write(tmp_path)
    for name in ("base", "merged"):
        write(run.path / "eval" / name, [line(1, int(name == "merged"))])
    report.stage(paper.recipe(), run)
    folder = run.path / "report"
    index, items = ((folder / name).read_text("utf-8") for name in ("index.html", "items.html"))
    assert '<a class="more" href="items.html">' in index and '<a href="index.html">The report</a>' in items
    assert "(items.html)" in (folder / "report.md").read_text("utf-8")
    assert Browser(items).choose("better").seen() == ["answers rows.jsonl:1"]


def test_without_items_there_is_no_page_and_no_link(tmp_path):
    run = paper.write(tmp_path)
    report.stage(paper.recipe(), run)
    assert not (run.path / "report" / "items.html").exists()
    assert "items.html" not in (run.path / "report" / "index.html").read_text("utf-8")


def test_a_comparison_is_written_as_a_page(tmp_path):
    runs = [write_run(tmp_path / name, merged=[line(n, n % 2) for n in range(first, first + 9)])
            for name, first in (("first", 0), ("second", 1))]
    done = tiny_run.lora_kit("eval", "compare", *runs, "--html", "made.html", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    page = Browser((tmp_path / "made.html").read_text("utf-8"))
    assert len(page.items) == 10 and "95 % interval" in page.page.text and str(runs[0]) in page.page.text
    assert page.choose("unpaired").seen() == ["answers rows.jsonl:0", "answers rows.jsonl:9"]
    assert paired.NOTE in page.page.text


def test_items_of_a_run_are_read_as_the_stage_left_them(tiny_model, tmp_path_factory):
    run = tiny_run.finished(tiny_model, tmp_path_factory).run
    page = Browser((run / "report" / "items.html").read_text("utf-8"))
    lines = [json.loads(text) for text in (run / "eval" / "merged" / "items.jsonl").read_text().splitlines()]
    assert len(page.items) == len(lines) and lines[0]["prompt"].startswith("<|im_start|>user\nsay ")
    assert len(page.choose("better").seen()) >= len(lines) // 2  # trained, so better at most rows
