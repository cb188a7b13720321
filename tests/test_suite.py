"""Suites and tasks: what ships is right, and every mistake is told with its line."""

from pathlib import Path

import pytest

from lora_kit import shipped
from lora_kit.errors import RecipeError
from lora_kit.recipe import Recipe
from lora_kit.suite import GenerateTask, HeldOutLossTask, TextTask, read_suite, suite_names, suite_of


def write(folder: Path, suite: str, **tasks: str) -> Path:
    (folder / "suites").mkdir()
    (folder / "suites" / "mine.yaml").write_text(suite)
    for name, text in tasks.items():
        (folder / "tasks" / name).mkdir(parents=True)
        (folder / "tasks" / name / "task.yaml").write_text(text)
    return folder / "suites" / "mine.yaml"


def problems(path: Path, scored=None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read_suite(str(path), Path("."), scored)
    return [line.removeprefix(f"{path.parent.parent}/") for line in caught.value.lines()]


ANSWERS = "kind: generate\ndata: {source: rows.jsonl}\nmetrics: [exact_match, token_f1]\n"


@pytest.mark.parametrize("name", suite_names())
def test_shipped_suites_are_right(name):
    suite = read_suite(name, Path("."), ["base", "merged"])
    assert suite.tasks and suite.gates
    assert all(gate.metric for gate in suite.gates)


def test_shipped_tasks_are_all_in_some_suite():
    used = {task.name for name in suite_names() for task in read_suite(name, Path(".")).tasks}
    assert used == {path.parent.name for path in (shipped.folder("eval") / "tasks").glob("*/task.yaml")}


def test_the_tools_suite_asks_for_both_baselines():
    suite = read_suite("tools", Path("."))
    task = next(task for task in suite.tasks if task.name == "bfcl_live_simple")
    assert isinstance(task.spec, GenerateTask)
    assert task.spec.cluster_by == "function" and task.spec.leave_out == ["functions_in_training"]
    assert {gate.better_than for gate in suite.gates} == {"base", "base-fewshot"}


def test_a_recipe_without_a_suite_gets_held_out_loss(tmp_path):
    recipe = Recipe(name="r", model={"base": "b"}, data={"train": {"source": "x.jsonl"}})
    suite = suite_of(recipe, tmp_path)
    assert [type(task.spec) for task in suite.tasks] == [HeldOutLossTask] and not suite.gates


def test_gates_take_the_tasks_first_metric_and_one_entry_stands_for_a_list(tmp_path):
    gate = "gates: {task: answers, no_worse_than: base, margin: 0.05}\n"
    path = write(tmp_path, "tasks: answers\n" + gate, answers=ANSWERS)
    suite = read_suite("suites/mine.yaml", tmp_path)
    assert suite.name == path.stem == "mine"
    [found] = suite.gates
    assert (found.metric, found.artifact, found.baseline) == ("exact_match", "merged", "base")
    assert suite.tasks[0].folder == path.resolve().parent.parent / "tasks" / "answers"


def test_every_problem_is_told_at_once_with_its_line(tmp_path):
    path = write(
        tmp_path,
        "tasks:\n  - answers\n  - answer\n  - broken\n"
        "gates:\n  - {task: answers, metric: rouge_l, better_than: base}\n"
        "  - task: answers\n    better_than: base\n    no_worse_than: base\n"
        "  - {task: anwsers, better_than: base}\n"
        "  - {task: answers, no_worse_than: base}\n"
        "  - {task: answers, better_than: base-fewshot, margin: 0.1}\n"
        "  - {task: answers, artifact: base, better_than: base}\n",
        answers=ANSWERS,
        broken="kind: generate\ndata: held_out\nmetrics:\n  - rouge_l\n  - exact_mach\n"
               "max_new_token: 3\ncluster_by: fun\n",
    )
    assert problems(path) == [
        "suites/mine.yaml:3: there is no task 'answer'; did you mean 'answers'?",
        "tasks/broken/task.yaml:6: unknown key 'max_new_token'; did you mean 'max_new_tokens'?",
        "tasks/broken/task.yaml:7: 'cluster_by' is 'fun'; input should be 'item' or 'function'",
        "suites/mine.yaml:6: task 'answers' has no metric 'rouge_l'; it has: exact_match, token_f1",
        "suites/mine.yaml:8: a gate has one of better_than, no_worse_than, at_least, at_most; give one",
        "suites/mine.yaml:10: the gate's task 'anwsers' is not among the suite's; did you mean 'answers'?",
        "suites/mine.yaml:11: 'margin' is missing; say how much worse is still no worse, in the metric's unit",
        "suites/mine.yaml:12: 'margin' has no effect: better_than has none; remove it",
        "suites/mine.yaml:12: task 'answers' has no few-shot form; set num_fewshot in its task.yaml",
        "suites/mine.yaml:13: the gate compares base with itself; name another",
    ]


@pytest.mark.parametrize("task, problem", [
    ("metrics: [rouge_l]\n", "1: 'kind' is missing; known kinds: held_out_loss, generate, text, "
     "multiple_choice, loglikelihood, loglikelihood_rolling, lm_eval"),
    ("description: x\nkind: multiple\n", "2: there is no kind 'multiple'; known kinds: held_out_loss, generate, text, "
     "multiple_choice, loglikelihood, loglikelihood_rolling, lm_eval"),
    ("kind: generate\nkind: generate\n", "2: key 'kind' stands twice, first on line 1; remove one of them"),
    ("kind: generate\ndata: held_out\nmetrics: rouge\n", "3: there is no metric 'rouge'; did you mean 'rouge_l'?"),
    ("kind: generate\ndata: held_out\nmetrics: [chrf, chrf]\n", "3: metric 'chrf' stands twice; remove one of them"),
    ("kind: generate\ndata: held_out\nmetrics: chrf\ntarget: x\n",
     "4: 'target' has no effect: held-out rows are kept as conversations, without their keys; remove it"),
    ("kind: generate\ndata: {source: a.jsonl}\nmetrics: chrf\ninputs:\n  functions: f\n",
     "5: 'inputs.functions' has no effect: no metric here reads it; remove it"),
    ("kind: generate\ndata: {source: a.jsonl}\nmetrics: all_assertions\n",
     "3: metric 'all_assertions' needs inputs.assertions; say which key of the row holds it, or write assertions"),
    ("kind: generate\ndata: {source: a.jsonl}\nmetrics: chrf\nassertions: [{contains: a}]\n",
     "4: 'assertions' has no effect: no metric here reads them; add all_assertions to metrics"),
    ("kind: generate\ndata: {source: a.jsonl, sha: 3}\nmetrics: chrf\n",
     "2: unknown key 'data.sha'; did you mean 'sha256'?"),
])
def test_mistakes_in_a_task(tmp_path, task, problem):
    path = write(tmp_path, "tasks: mine\n", mine=task)
    assert problems(path) == [f"tasks/mine/task.yaml:{problem}"]


def test_a_gate_about_what_is_not_scored_is_an_error(tmp_path):
    path = write(tmp_path, "tasks: answers\ngates:\n  - {task: answers, artifact: gguf-q8_0, better_than: base}\n",
                 answers=ANSWERS)
    assert problems(path, ["base", "merged"]) == [
        "suites/mine.yaml:3: 'gguf-q8_0' is not scored by this recipe; scored are: base, merged"]
    assert read_suite(str(path), Path("."), ["base", "gguf-q8_0"]).gates


def test_unknown_suites_and_paths(tmp_path):
    with pytest.raises(RecipeError, match="eval.suite: no suite is called 'tool'; did you mean 'tools'?"):
        read_suite("tool", tmp_path)
    with pytest.raises(RecipeError, match="no such suite"):
        read_suite("none.yaml", tmp_path)
    path = write(tmp_path, "tasks: ../tasks/answers\n", answers=ANSWERS)
    assert problems(path) == ["suites/mine.yaml:1: there is no task '../tasks/answers'; did you mean 'answers'?"]


def test_the_fingerprint_follows_tasks_gates_and_data_but_not_comments(tmp_path):
    path = write(tmp_path, "tasks: answers\n", answers=ANSWERS)
    rows = tmp_path / "tasks" / "answers" / "rows.jsonl"
    rows.write_text("{}\n")
    seen = [read_suite(str(path), tmp_path).fingerprint()]
    for change in (lambda: rows.write_text('{"a": 1}\n'),
                   lambda: path.write_text("tasks: answers\ngates: {task: answers, better_than: base}\n"),
                   lambda: (rows.parent / "task.yaml").write_text(ANSWERS + "max_new_tokens: 5\n")):
        change()
        seen.append(read_suite(str(path), tmp_path).fingerprint())
    assert len(set(seen)) == 4
    path.write_text("# a comment\n" + path.read_text())
    assert read_suite(str(path), tmp_path).fingerprint() == seen[-1]


def test_a_text_task_has_one_metric_of_which_less_is_better(tmp_path):
    [prose, code] = read_suite("general", tmp_path, ["base", "merged"]).tasks
    assert isinstance(prose.spec, TextTask) and prose.metrics == ["bits_per_byte"] and code.spec.text == "code"
    assert not prose.higher_is_better("bits_per_byte") and prose.unit("bits_per_byte") == "bits per byte"


def test_the_general_and_ci_suites_claim_that_nothing_is_lost(tmp_path):
    for name in ("general", "ci"):
        suite = read_suite(name, tmp_path, ["base", "merged"])
        retained = {gate.task for gate in suite.gates if gate.no_worse_than == "base" and gate.margin}
        assert retained == {task.name for task in suite.tasks if isinstance(task.spec, TextTask)} != set()


@pytest.mark.parametrize(("text", "told"), [
    ("data: held_out\n", "held-out rows are measured by their trained tokens; write kind: held_out_loss"),
    ("data: python:stdlib\nmin_chars: 300\nmax_chars: 20\n", "'max_chars' (20) is below 'min_chars' (300)")])
def test_mistakes_of_a_text_task_are_told(tmp_path, text, told):
    [problem] = problems(write(tmp_path, "tasks: [t]\n", t=f"kind: text\n{text}"))
    assert told in problem


def test_roles_become_gates(tmp_path):
    path = write(
        tmp_path,
        "tasks: [answers, loss]\n"
        "roles:\n  - {task: answers, role: target, at_least: 0.5}\n"
        "  - {task: loss, role: retain, margin: 0.02, artifacts: [merged, gguf-q8_0]}\n"
        "gates:\n  - {task: answers, metric: token_f1, artifact: gguf-q8_0, no_worse_than: merged, margin: 0.01}\n",
        answers=ANSWERS, loss="kind: held_out_loss\n")
    found = [(gate.role, gate.task, gate.metric, gate.artifact, gate.baseline, gate.bound)
             for gate in read_suite(str(path), tmp_path, ["base", "merged", "gguf-q8_0"]).gates]
    assert found == [
        ("target", "answers", "exact_match", "merged", "base", 0.0),
        ("floor", "answers", "exact_match", "merged", None, 0.5),
        ("retain", "loss", "loss", "merged", "base", -0.02),
        ("retain", "loss", "loss", "gguf-q8_0", "base", -0.02),
        ("retain", "answers", "token_f1", "gguf-q8_0", "merged", -0.01)]
    # Of a baseline.lock, base need not be scored.
    gates = read_suite(str(path), tmp_path, ["merged", "gguf-q8_0"], against="baseline").gates
    assert [gate.baseline for gate in gates] == ["baseline", None, "baseline", "baseline", "merged"]


def test_a_baseline_in_the_recipe_is_what_roles_compare_with(tmp_path):
    write(tmp_path, "tasks: loss\nroles: {task: loss, role: target}\n", loss="kind: held_out_loss\n")
    fields = {"name": "r", "model": {"base": "b"}, "data": {"train": {"source": "x.jsonl"}}}
    for section, baseline in (({}, "base"), ({"baseline": "baseline.lock"}, "baseline")):
        recipe = Recipe(**fields, eval={"suite": "suites/mine.yaml", **section})
        assert [gate.baseline for gate in suite_of(recipe, tmp_path).gates] == [baseline]


def test_mistakes_in_roles(tmp_path):
    path = write(
        tmp_path,
        "tasks: [answers, loss]\nroles:\n  - {task: answers, role: retain}\n"
        "  - {task: answers, role: target, margin: 0.1}\n"
        "  - {task: loss, role: target, at_least: 2.0, artifacts: [merged, gguf-q8_0]}\n"
        "  - {task: answers, role: target, at_most: 0.5, against: merged}\n"
        "  - {task: anwsers, role: target, artifacts: [merged, base]}\n"
        "  - {task: answers, role: traget}\n",
        answers=ANSWERS, loss="kind: held_out_loss\n")
    assert problems(path) == ["suites/mine.yaml:8: 'roles.5.role' is 'traget'; input should be 'target' or 'retain'"]
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "traget" not in line))
    assert problems(path, ["base", "merged"]) == [
        "suites/mine.yaml:3: 'margin' is missing; say how much worse is still no worse, in the metric's unit",
        "suites/mine.yaml:4: 'margin' has no effect: a target must get better; remove it",
        "suites/mine.yaml:5: 'at_least' is no floor: of loss, less is better; write at_most",
        "suites/mine.yaml:5: 'gguf-q8_0' is not scored by this recipe; scored are: base, merged",
        "suites/mine.yaml:6: the gate compares merged with itself; name another",
        "suites/mine.yaml:6: 'at_most' is no floor: of exact_match, more is better; write at_least",
        "suites/mine.yaml:7: the role's task 'anwsers' is not among the suite's; did you mean 'answers'?",
        "suites/mine.yaml:7: the gate compares base with itself; name another",
    ]


def test_the_fingerprint_follows_a_users_own_metric(tmp_path, monkeypatch):
    (tmp_path / "metrics").mkdir()
    module = tmp_path / "metrics" / "mine.py"
    module.write_text("HIGHER_IS_BETTER = False\n")
    monkeypatch.setenv("LORA_KIT_METRICS", str(tmp_path / "metrics"))
    path = write(tmp_path, "tasks: answers\n", answers="kind: generate\ndata: {source: rows.jsonl}\nmetrics: mine\n")
    suite = read_suite(str(path), Path("."))
    assert suite.tasks[0].higher_is_better("mine") is False
    before = suite.fingerprint()
    module.write_text("HIGHER_IS_BETTER = False\n# another\n")
    assert read_suite(str(path), Path(".")).fingerprint() != before
    module.write_text("\n")
    assert f"{module}: does not say whether more of it is better" in problems(path)[0]
