"""Tasks that lm-evaluation-harness runs itself, answered by an engine: the same as its own model gives."""

import json
import math
from pathlib import Path

import pytest

from lora_kit import items, lm_eval_library, scoring
from lora_kit.errors import MachineError, RecipeError
from lora_kit.recipe import Recipe
from lora_kit.suite import read_suite
from lora_kit.types import Artifact
from tests import tiny

ROWS = [{"q": f"say {word}", "options": ["red", "a stone moon", "x"][: 2 + row % 2], "gold": row % 2, "n": row}
        for row, word in enumerate("red green blue one two three sun moon".split())]
COMMON = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\ntest_split: test\n"
TASKS = {
    # Rows are made by a function, which lora-kit's own reader refuses.
    "picks": "output_type: multiple_choice\nprocess_docs: !function made.shouted\ndoc_to_text: q\n"
             "doc_to_choice: options\ndoc_to_target: gold\nmetric_list: [{{metric: acc}}, {{metric: acc_norm}}]\n",
    "writes": "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: \"{{{{options[gold]}}}}\"\n"
              "generation_kwargs: {{until: [\"a\", \"e\"], max_gen_toks: 6}}\nmetric_list: [{{metric: exact_match}}]\n"
              "filter_list: [{{name: upper, filter: [{{function: uppercase}}, {{function: take_first}}]}}]\n",
    "goes_on": "output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: \" {{{{options[gold]}}}}\"\n",
    "reads": "output_type: loglikelihood_rolling\ndoc_to_text: \"\"\ndoc_to_target: q\n",
}

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("lm_eval", reason="an extra")
    return tiny.save_model(tmp_path_factory.mktemp("wide") / "model", initializer_range=0.15)[0]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    pytest.importorskip("lm_eval", reason="an extra")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "suites").mkdir()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks" / "made.py").write_text(
        "def shouted(rows):\n    return rows.map(lambda row: {'q': row['q'].upper()})\n")
    for name, text in TASKS.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(f"task: {name}\n" + (COMMON + text).format(folder=tmp_path))
    return tmp_path


def evaluated(folder, model, entries: str, limit: int | None = None):
    """The items of the suite's tasks and their lines."""
    (folder / "suites" / "s.yaml").write_text(f"lm_eval: {entries}\n")
    suite = read_suite("suites/s.yaml", folder)
    recipe = Recipe.model_validate({"name": "r", "model": {"base": "b"}, "data": {"train": "x.jsonl"},
                                    "eval": {"limit": limit}})
    work = folder / "work"
    (work / "items").mkdir(parents=True)
    made = {task.name: items.make_items(task, recipe, folder, []) for task in suite.tasks}
    for name, of_task in made.items():
        (work / "items" / f"{name}.json").write_text(json.dumps(
            {"items": [item.as_dict() for item in of_task.items], "examples": []}))
    base = Artifact(name="base", path=str(model), kind="hf", tokenizer=str(model))
    (found,) = scoring.score_artifacts(
        artifacts=[base.as_dict()], data_dir=str(work),
        tasks=[{"name": task.name, "spec": task.spec.model_dump(mode="json"), "folder": str(task.folder)}
               for task in suite.tasks],
        work_dir=str(work), tools_mode="template", samples=[], sample_tokens=4, threads=None, limit=limit, seed=0,
        strict=True)
    assert not found["not_measured"]
    return made, [json.loads(line) for line in (work / "base" / "items.jsonl").read_text().splitlines()]


def of_the_library(folder, model, name: str) -> list[dict]:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    with lm_eval_library._hushed():
        task = TaskManager(include_path=str(folder / "tasks"), include_defaults=False).load([name])["tasks"][name]
        task.set_fewshot_seed(1234)
        results = evaluate(HFLM(pretrained=str(model), dtype="float32", device="cpu", batch_size=1),
                           {"tasks": {name: task}}, bootstrap_iters=0)
    return results["samples"][name]


def test_scores_are_the_librarys_with_its_own_model(folder, model):
    made, lines = evaluated(
        folder, model, "[{task: picks, metrics: [acc, acc_norm], num_fewshot: 0}, {task: writes, metrics: "
                       "'exact_match,upper'}, {task: goes_on, metrics: perplexity}, {task: reads, metrics: "
                       "[bits_per_byte]}]")
    assert made["picks"].items[0].messages[0]["content"] == "SAY RED"
    assert made["picks"].items[1].target == "a stone moon"
    by_task = {name: [line for line in lines if line["task"] == name] for name in TASKS}
    assert [len(of) for of in by_task.values()] == [16, 8, 8, 8] and not any(line["error"] for line in lines)
    for sample, acc, norm in zip(of_the_library(folder, model, "picks"), by_task["picks"][:8], by_task["picks"][8:],
                                 strict=True):
        assert (acc["score"], norm["score"]) == (sample["acc"], sample["acc_norm"])
        assert acc["item_id"] == f"picks:{sample['doc_id']}" and acc["prompt"] == sample["arguments"][0][0]
    for sample, line in zip(of_the_library(folder, model, "writes"), by_task["writes"], strict=True):
        assert line["score"] == sample["exact_match"] and line["prediction"] == sample["filtered_resps"][0]
    assert len({line["prediction"] for line in by_task["writes"]}) > 1
    for sample, line in zip(of_the_library(folder, model, "goes_on"), by_task["goes_on"], strict=True):
        assert line["outcome"] == pytest.approx(sample["perplexity"], abs=1e-4)
        assert line["score"] == pytest.approx(math.exp(-line["outcome"]))
    for sample, line in zip(of_the_library(folder, model, "reads"), by_task["reads"], strict=True):
        log_prob, num_bytes = sample["bits_per_byte"]
        assert line["weight"] == num_bytes
        assert line["score"] == pytest.approx(-log_prob / num_bytes / math.log(2), rel=1e-4)


def test_a_drawn_item_keeps_its_number_and_one_that_does_not_fit_has_no_score(folder, model, monkeypatch):
    rows = [{**row, "q": row["q"] + " word" * 500 * (row["n"] == 3)} for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made, lines = evaluated(folder, model, "picks", limit=6)
    assert made["picks"].num_rows == 8 and made["picks"].num_not_drawn == 2 and len(lines) == 6
    ids = [line["item_id"] for line in lines]
    assert ids == sorted(ids) and ids != [f"picks:{number}" for number in range(6)] and "picks:3" in ids
    for line in lines:
        if line["item_id"] == "picks:3":
            assert line["score"] is None and "does not fit into 2048" in line["error"]
        else:
            assert line["score"] in (0.0, 1.0)
            assert line["prompt"] == ROWS[int(line["item_id"].rpartition(":")[2])]["q"].upper()


def test_mistakes_are_told(folder, model, monkeypatch):
    with pytest.raises(RecipeError, match="lm_eval: reads: has no metric 'acc'; write {task: reads, metrics: "
                                          r"\[...\]} with some of: word_perplexity, byte_perplexity, bits_per_byte"):
        evaluated(folder, model, "reads")
    own = lm_eval_library._manager  # of the library's own tasks there are thousands
    monkeypatch.setattr(lm_eval_library, "_manager", lambda place, _all: own(place, False))
    (folder / "work" / "items").rmdir()
    with pytest.raises(RecipeError, match="lm_eval: pick: is no task of lm-evaluation-harness"):
        evaluated(folder, model, "pick")


def test_without_the_library_it_says_what_to_install(folder, monkeypatch):
    (folder / "suites" / "s.yaml").write_text("lm_eval: picks\n")
    [task] = read_suite("suites/s.yaml", folder).tasks
    monkeypatch.setattr(lm_eval_library, "missing", lambda: lm_eval_library.INSTALL)
    recipe = Recipe.model_validate({"name": "r", "model": {"base": "b"}, "data": {"train": "x.jsonl"}})
    with pytest.raises(MachineError, match=r'is not installed; pip install "lora-kit\[lm-eval\]"'):
        items.make_items(task, recipe, folder, [])


def test_a_suite_of_no_task_is_an_error(folder):
    (folder / "suites" / "s.yaml").write_text("description: nothing\n")
    with pytest.raises(RecipeError, match="names no task; write at least tasks:"):
        read_suite("suites/s.yaml", folder)
    (folder / "suites" / "s.yaml").write_text("lm_eval: [picks, ../picks]\ntasks: [held_out_loss]\n")
    with pytest.raises(RecipeError, match="'../picks' is no name of a task"):
        read_suite("suites/s.yaml", folder)
