"""scored.py: which items file a user means, and what is read out of it."""

import pytest

from lora_kit import scored
from lora_kit.errors import RecipeError, RefusedError
from tests.scored_on_paper import line, write, write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", base=[line(1, 0)], base_fewshot=[line(1, 0)], merged=[line(1, 1)])


@pytest.mark.parametrize(("named", "subject"), [
    ("", "merged"), ("eval", "merged"), ("eval/base", "base"), ("base", "base"), ("base-fewshot", "base-fewshot"),
    ("eval/base/items.jsonl", "base")])
def test_runs_folders_artifacts_and_files_are_found(run, named, subject):
    found = scored.find(str(run / named))
    assert found.subject == subject and found.label == str(run / named)
    assert found.lines["answers", "exact_match"]["rows.jsonl:1"]["score"] == (subject == "merged")


def test_the_only_subject_of_a_folder_is_meant(tmp_path):
    write(tmp_path / "eval" / "gguf", [line(1, 1)])
    assert scored.find(str(tmp_path / "eval")).subject == "gguf"


def test_what_is_not_there_is_told_with_what_is(run, tmp_path):
    with pytest.raises(RecipeError, match="nobody called 'mergd' was scored in this run; scored are: base, base-few"):
        scored.find(str(run / "mergd"))
    with pytest.raises(RecipeError, match="has no scored items; name a run"):
        scored.find(str(tmp_path / "nothing"))
    empty = write_run(tmp_path / "empty")
    with pytest.raises(RecipeError, match="has no scored items; lora-kit eval .*empty scores it"):
        scored.find(str(empty))
    write(tmp_path / "two" / "a", [line(1, 1)])
    write(tmp_path / "two" / "b", [line(1, 1)])
    with pytest.raises(RecipeError, match="several scored subjects and none is 'merged'; name one: .*two/a, "):
        scored.find(str(tmp_path / "two"))


@pytest.mark.parametrize("text", ["{", "[]", '{"task": "t", "metric": "m"}'])
def test_a_line_that_is_no_item_is_refused_with_its_number(tmp_path, text):
    path = write(tmp_path / "base", [line(1, 1)])
    path.write_text(path.read_text() + text + "\n")
    with pytest.raises(RefusedError, match=r"items.jsonl:2: is not a scored item"):
        scored.read(path)


def test_subjects_stand_in_the_order_of_the_stages(run):
    write(run / "eval" / "aaa", [line(1, 1)])
    assert list(scored.subjects_in(run / "eval")) == ["base", "base-fewshot", "merged", "aaa"]


def test_the_direction_of_a_metric_is_the_evaluations_else_the_metrics_own(tmp_path):
    lines = [line(1, 2.0, task="held_out", metric="loss"), line(1, 1), line(1, 1, metric="./mine.py")]
    path = write(tmp_path / "base", lines, higher=False)
    found = scored.read(path)
    assert not found.higher_is_better(("answers", "exact_match"))  # as scores.json says
    (path.parent / "scores.json").unlink()
    found = scored.read(path)
    assert found.higher_is_better(("answers", "exact_match")) and not found.higher_is_better(("held_out", "loss"))
    with pytest.raises(RecipeError, match="whether more of './mine.py' is better; keep scores.json beside"):
        found.higher_is_better(("answers", "./mine.py"))


@pytest.mark.parametrize(("before", "after", "higher", "change"), [
    (0.0, 1.0, True, "better"), (0.0, 1.0, False, "worse"), (0.3, 0.1 + 0.2, True, "same"), (None, 1.0, True,
                                                                                           "unpaired")])
def test_changes(before, after, higher, change):
    assert scored.change_of(before, after, higher) == change
