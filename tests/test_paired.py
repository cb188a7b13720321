"""paired.py: paired over what both have, never over different questions."""

import json

import pytest

from lora_kit import paired, scored
from lora_kit.errors import RecipeError
from lora_kit.report_document import to_markdown
from lora_kit.stats import paired_difference
from tests import tiny_run
from tests.scored_on_paper import line, write, write_run


def sides(tmp_path, a, b):
    return scored.read(write(tmp_path / "a", a)), scored.read(write(tmp_path / "b", b))


def test_flips_are_counted_in_both_directions_and_the_interval_is_the_paired_one(tmp_path):
    before, after = [1, 1, 0, 0, 0, 1], [0, 1, 1, 1, 0, 1]
    a, b = sides(tmp_path, [line(n, score) for n, score in enumerate(before)],
                 [line(n, score) for n, score in enumerate(after)])
    [task] = paired.compare(a, b)["tasks"]
    assert (task["right_to_wrong"], task["wrong_to_right"], task["num_same"]) == (1, 2, 3)
    expected = paired_difference(after, before)
    assert (task["difference"], task["ci_low"], task["ci_high"]) == pytest.approx(
        (expected.mean, expected.ci_low, expected.ci_high))
    assert task["difference"] == pytest.approx(1 / 6) and (task["a"], task["b"]) == pytest.approx((3 / 6, 4 / 6))


def test_items_that_one_lacks_are_counted_and_in_no_mean(tmp_path):
    a, b = sides(tmp_path, [line(1, 1), line(2, 1), line(3, None), line(4, 1)],
                 [line(2, 0), line(3, 1), line(4, 1), line(5, 0), line(6, 0)])
    [task] = paired.compare(a, b)["tasks"]
    assert (task["num_items"], task["only_a"], task["only_b"], task["errors_a"], task["errors_b"]) == (2, 1, 2, 1, 0)
    assert (task["a"], task["b"]) == (1.0, 0.5)


def test_loss_is_weighted_by_its_tokens_and_less_is_better(tmp_path):
    def loss(n, score, weight):
        return line(n, score, task="held_out", metric="loss", weight=weight, target="")

    a, b = sides(tmp_path, [loss(n, 2.0, 1 + 9 * (n == 0)) for n in range(3)],
                 [loss(0, 1.0, 10), loss(1, 2.5, 1), loss(2, 2.0, 1)])
    compared = paired.compare(a, b)
    [task] = compared["tasks"]
    assert task["difference"] == pytest.approx((-10 + 0.5) / 12) and task["right_to_wrong"] is None
    assert (task["num_better"], task["num_worse"], task["num_same"]) == (1, 1, 1)
    assert [(each["change"], each["item_id"]) for each in compared["examples"]] == [
        ("worse", "rows.jsonl:1"), ("better", "rows.jsonl:0")]


@pytest.mark.parametrize(("field", "value", "named"), [
    ("prompt", "say something else", "prompt"), ("target", "another", "target"),
    ("weight", 7, "number of trained tokens")])
def test_other_questions_are_refused_in_one_line(tmp_path, field, value, named):
    a, b = sides(tmp_path, [line(n, 1) for n in range(3)], [line(0, 1), line(1, 1, **{field: value}), line(2, 1)])
    with pytest.raises(RecipeError, match=f"1 of 3 shared items ask something else, e.g. rows.jsonl:1 of answers has "
                                          f"another {named}; compare evaluations of the same suite") as told:
        paired.compare(a, b)
    assert len(told.value.lines()) == 1


def test_an_item_that_could_not_be_asked_is_no_other_question(tmp_path):
    a, b = sides(tmp_path, [line(1, None, prompt=""), line(2, 1)], [line(1, 1), line(2, 1)])
    assert paired.compare(a, b)["tasks"][0]["num_items"] == 1


def test_nothing_in_common_is_refused(tmp_path):
    a, b = sides(tmp_path, [line(1, 1)], [line(1, 1, task="other")])
    with pytest.raises(RecipeError, match="share no item; the first has answers, the second other"):
        paired.compare(a, b)


def test_a_task_that_only_one_has_stays_in_the_table(tmp_path):
    a, b = sides(tmp_path, [line(1, 1), line(1, 1, task="old")], [line(1, 1), line(1, 1, task="new")])
    tasks = {each["task"]: each for each in paired.compare(a, b)["tasks"]}
    assert (tasks["old"]["only_a"], tasks["new"]["only_b"]) == (1, 1)
    assert tasks["old"]["difference"] is None and tasks["old"]["a"] is None


def test_examples_are_those_that_changed_most_of_a_tasks_first_metric(tmp_path):
    def f1(n, score):
        return line(n, score, metric="token_f1")

    a, b = sides(tmp_path, [f1(n, 0.5) for n in range(8)] + [line(n, 0) for n in range(8)],
                 [f1(n, n / 8) for n in range(8)] + [line(n, 1) for n in range(8)])
    compared = paired.compare(a, b, num_examples=2)
    assert [(each["change"], each["item_id"], each["metric"]) for each in compared["examples"]] == [
        ("worse", "rows.jsonl:0", "token_f1"), ("worse", "rows.jsonl:1", "token_f1"),
        ("better", "rows.jsonl:7", "token_f1"), ("better", "rows.jsonl:6", "token_f1")]
    example = compared["examples"][0]
    assert example["prompt"] == "say 0" and example["target"] == "target 0"
    assert example["b"] == {"score": 0.0, "prediction": "answer to 0", "reason": "not the target"}
    assert paired.compare(a, b, num_examples=0)["examples"] == []


def test_the_page_says_what_changed_and_escapes_what_models_wrote(tmp_path):
    a, b = sides(tmp_path, [line(n, 1) for n in range(3)],
                 [line(0, 0, prediction="| <b>`no`"), *[line(n, 1) for n in (1, 2)]])
    text = to_markdown(paired.document(paired.compare(a, b)))
    assert "| answers exact\\_match" in text or "| answers exact_match" in text
    assert "## What got worse" in text and "No item got better." in text and "1 right to wrong" in text
    assert "```\n| <b>`no`\n```" in text


def test_a_long_text_keeps_its_ends():
    assert paired.shortened("a" * 10 + "b" * 10, 8) == "aaaa [... 12 characters ...] bbbb"


# ---- the verb ---------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    first = write_run(tmp_path / "first", base=[line(n, 0) for n in range(40)], merged=[line(n, 0) for n in range(40)])
    second = write_run(tmp_path / "second", merged=[line(n, n > 4) for n in range(40)])
    return first, second


def test_the_verb_prints_the_table_and_examples(runs, tmp_path):
    done = tiny_run.lora_kit("eval", "compare", *runs, "--examples", "1", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "35 wrong to right" in done.stdout and "0 right to wrong" in done.stdout and "+0.875" in done.stdout
    assert "better: answers rows.jsonl:5\n  prompt  say 5\n" in done.stdout and "rows.jsonl:6" not in done.stdout
    assert "  A  0  answer to 5 (not the target)\n  B  1  answer to 5\n" in done.stdout


def test_the_verb_writes_json_and_markdown(runs, tmp_path):
    done = tiny_run.lora_kit("eval", "compare", *runs, "--json", "-", "--markdown", "made.md", cwd=tmp_path)
    compared = json.loads(done.stdout)
    assert compared["format"] == 1 and compared["tasks"][0]["wrong_to_right"] == 35
    assert compared["a"] == {"label": str(runs[0]), "subject": "merged",
                             "path": str(runs[0] / "eval" / "merged" / "items.jsonl")}
    assert "35 wrong to right" in (tmp_path / "made.md").read_text()


def test_the_verb_refuses_in_one_line(runs, tmp_path):
    write(runs[1] / "eval" / "merged", [line(n, 1, prompt="else") for n in range(40)])
    done = tiny_run.lora_kit("eval", "compare", *runs, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "40 of 40 shared items ask something else" in done.stderr


def test_eval_itself_still_takes_a_run(tmp_path):
    done = tiny_run.lora_kit("eval", "./compare", cwd=tmp_path)
    assert done.returncode == 2 and "compare: is not a run folder" in done.stderr
