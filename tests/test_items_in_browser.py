"""The page of items in a real browser, where there is one: its filters are used, and what is shown is counted."""

import html
import json
import re
import shutil
import subprocess

import pytest

from lora_kit import report_items, scored
from tests import scored_on_paper

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")

SCRIPT = """<script>addEventListener("load", () => {
  const shown = [];
  for (const [group, text] of %s) {
    const bar = [...document.querySelectorAll(".filters b")].find(each => each.textContent === group).nextSibling;
    [...bar.querySelectorAll("label")].find(each => each.textContent === text).click();
    const items = [...document.querySelectorAll(".item")].filter(each => each.offsetParent !== null);
    const badges = items.flatMap(each => [...each.querySelectorAll(".badge")])
      .filter(each => each.offsetParent !== null);
    shown.push([items.map(each => each.querySelector(".name").textContent), badges.map(each => each.textContent)]);
  }
  const result = document.createElement("pre");
  result.id = "result";
  result.textContent = JSON.stringify(shown);
  document.body.append(result);
});</script>"""


def used(page: str, clicks: list[tuple[str, str]], tmp_path) -> list[tuple[list[str], list[str]]]:
    """Names and badges of the items that are shown after each click on (filter, choice)."""
    # The page's own policy allows no script: the copy that is clicked on goes without.
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    (tmp_path / "page.html").write_text(page.replace("</body>", SCRIPT % json.dumps(clicks) + "</body>"))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
         "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path / 'page.html'}"],
        capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


def test_filters_show_what_they_say(tmp_path):
    line = scored_on_paper.line
    before = [line(1, 1.0), line(2, 0.0), line(3, 1.0), line(4, None), line(1, 0.5, task="words", metric="rouge_l")]
    after = [line(1, 0.0), line(2, 1.0), line(3, 1.0), line(4, 1.0), line(1, 0.7, task="words", metric="rouge_l")]
    form = [line(1, 0.0), line(2, 0.0), line(3, 1.0), line(4, 1.0), line(1, 0.7, task="words", metric="rouge_l")]
    folder = scored_on_paper.write_run(tmp_path / "run", base=before, merged=after, gguf_q8_0=form)
    paths = scored.subjects_in(folder / "eval")
    subjects = [scored.read(each) for each in paths.values()]
    page = report_items.page(title="Items", subtitle="", facts=[], subjects=subjects,
                             labels=list(paths), pairs=report_items.pairs_of(list(paths)))
    names = {number: f"answers rows.jsonl:{number}" for number in range(1, 5)} | {5: "words rows.jsonl:1"}
    clicks = [("task", "answers"), ("change", "worse"), ("change", "better"), ("compare", "merged → gguf-q8-0"),
              ("change", "worse"), ("task", "all tasks"), ("change", "any change"), ("verdict", "right"),
              ("verdict", "partly"), ("compare", "base → merged"), ("verdict", "any verdict"), ("change", "unpaired")]
    expected = [([1, 2, 3, 4], ["worse", "better", "same", "unpaired"]), ([1], ["worse"]), ([2], ["better"]), ([], []),
                ([2], ["worse"]), ([2], ["worse"]), ([1, 2, 3, 4, 5], ["same", "worse", "same", "same", "same"]),
                ([3, 4], ["same", "same"]), ([5], ["same"]), ([5], ["better"]),
                ([1, 2, 3, 4, 5], ["worse", "better", "same", "unpaired", "better"]), ([4], ["unpaired"])]
    found = used(page, clicks, tmp_path)
    assert found == [[[names[number] for number in shown], badges] for shown, badges in expected]
