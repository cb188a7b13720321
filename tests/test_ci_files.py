"""ci_files.py: the summary of a step under its size limit, and the JSON with its version, in every outcome."""

import json
from contextlib import nullcontext

import pytest

from lora_kit import ci_files
from lora_kit.errors import GateFailed, GateInconclusive, MachineError
from lora_kit.report_document import Document, Paragraph, Sample, Section, Table, Turn
from lora_kit.types import Verdict
from tests import run_on_paper, scored_on_paper
from tests.test_report import HOSTILE


@pytest.fixture
def run(tmp_path):
    """A finished run with gates of all outcomes, and items of base and merged that changed."""
    found = run_on_paper.write(tmp_path)
    found.recipe = run_on_paper.recipe()
    base = [scored_on_paper.line(n, float(n % 2)) for n in range(8)]
    merged = [scored_on_paper.line(n, float(n % 3 == 0)) for n in range(8)]
    for name, lines in (("base", base), ("merged", merged)):
        scored_on_paper.write(found.path / "eval" / name, lines)
    return found


def test_gates_come_first_the_failed_ones_before_the_others(run):
    text = ci_files.markdown_of(run)
    assert text.startswith("# FAIL: evaluation of chat\n")
    gates = text[text.index("## Gates"):text.index("## Quality")]
    rows = [line for line in gates.splitlines() if line.startswith("| ")][1:]
    outcomes = [row.split("|")[1].strip() for row in rows]
    assert outcomes == sorted(outcomes, key=["FAIL", "INCONCLUSIVE", "PASS"].index) and outcomes[0] == "FAIL"
    assert len(rows) == len(ci_files._verdicts(run)) >= 3
    assert "**Looks within the time**" in text and "Stopped because every gate is decided" in text
    assert "**Scores**" in text and "What got worse: base (A) and merged (B)" in text
    assert "answer to 1" in text and "items.html" not in text


def big(num_samples: int, length: int) -> Document:
    sample = Sample(origin="o", turns=[Turn(role="user", text="é" * length)], reference="", answers=[])
    return Document(title="T", subtitle="", facts=[], sections=[
        Section(anchor="a", title="Gates", blocks=[Table(columns=("x",), rows=[["the gates"]])]),
        Section(anchor="b", title="Samples", blocks=[sample] * num_samples)])


@pytest.mark.parametrize("num_samples, length, most", [(3, 10, 10**6), (500, 4000, 2**20), (1, 2**20, 2**20),
                                                       (40, 1000, 40_000)])
def test_what_does_not_fit_is_left_out_from_the_end_and_said(num_samples, length, most):
    text = ci_files.fitted(big(num_samples, length), most)
    assert len(text.encode()) <= most - ci_files._SPARE and "the gates" in text
    kept = text.count("é" * length)
    if kept == num_samples:
        assert "Left out" not in text
    else:
        assert f"{num_samples - kept} blocks did not fit" in text
        # No more is left out than has to be: one more would not have fitted.
        assert len(text.encode()) + 2 * length + 200 > most - ci_files._SPARE


def test_even_one_block_that_is_too_long_stays_under_the_limit():
    long = Document(title="é" * 2**20, subtitle="", facts=[], sections=[
        Section(anchor="a", title="A", blocks=[Paragraph(text="b" * 2**21)])])
    assert len(ci_files.fitted(long).encode()) < ci_files.MOST_BYTES


def test_the_json_has_everything_and_a_version(run):
    found = json.loads(ci_files.json_of(run))
    scores = json.loads((run.path / "eval" / "scores.json").read_text())
    assert (found["format"], found["outcome"], found["exit_code"]) == (ci_files.FORMAT, "FAIL", 1)
    assert found["scores"] == scores["scores"] and found["differences"] == scores["differences"]
    assert set(found["items"]) >= {"base", "merged"}
    assert [each["stage"] for each in found["verdicts"]] == [stage for stage, _ in ci_files._verdicts(run)]


@pytest.mark.parametrize("outcomes, policy, expected", [
    (["PASS", "PASS"], None, ("PASS", 0)), ([], None, ("PASS", 0)),
    (["PASS", "FAIL", "INCONCLUSIVE"], "pass", ("FAIL", 1)),
    (["PASS", "INCONCLUSIVE"], None, ("INCONCLUSIVE", 3)), (["PASS", "INCONCLUSIVE"], "pass", ("PASS", 0)),
    (["PASS", "INCONCLUSIVE"], "fail", ("FAIL", 1))])
def test_the_outcome_is_the_exit_codes(outcomes, policy, expected):
    verdicts = [Verdict(outcome=each, claim="c", evidence="e") for each in outcomes]
    assert ci_files._outcome(verdicts, policy) == expected


@pytest.mark.parametrize("error, outcome", [
    (None, "FAIL"), (GateFailed("a", "failed"), "FAIL"), (GateInconclusive("a", "cannot tell"), "FAIL"),
    (MachineError("engine <b>", "is not installed", "install it"), "ERROR")])
def test_the_files_are_written_however_it_ends(run, tmp_path, error, outcome):
    paths = {"junit_path": tmp_path / "a.xml", "markdown": tmp_path / "a.md", "json_path": tmp_path / "a.json"}
    paths["markdown"].write_text("of last week")
    with pytest.raises(type(error)) if error else nullcontext(), ci_files.reporting(run, **paths):
        assert not paths["markdown"].exists()
        if error:
            raise error
    found = json.loads(paths["json_path"].read_text())
    assert found["outcome"] == outcome and paths["junit_path"].exists()
    text = paths["markdown"].read_text()
    assert text.startswith(f"# {outcome}: evaluation of chat\n")
    if outcome == "ERROR":
        assert found["exit_code"] == 6 and found["error"]["todo"] == "install it"
        assert "engine \\<b\\>: is not installed; install it" in text and "exit code 6" in text


def test_a_place_that_cannot_be_written_to_is_told_before_the_work(run, tmp_path):
    with pytest.raises(MachineError), ci_files.reporting(run, markdown=tmp_path / "no" / "folder" / "a.md"):
        pytest.fail("the work began")


def test_no_text_of_a_model_becomes_markup(tmp_path):
    run = run_on_paper.write(tmp_path, text=HOSTILE)
    run.recipe = run_on_paper.recipe()
    lines = [scored_on_paper.line(1, 0.0, prediction=HOSTILE, prompt=HOSTILE)]
    better = [scored_on_paper.line(1, 1.0, prediction=HOSTILE, prompt=HOSTILE)]
    scored_on_paper.write(run.path / "eval" / "base", lines)
    scored_on_paper.write(run.path / "eval" / "merged", better)
    text = ci_files.markdown_of(run)
    outside = [part for place, part in enumerate(text.split("```")) if place % 2 == 0]
    assert not any("<script" in part.replace("\\<", "") for part in outside)
