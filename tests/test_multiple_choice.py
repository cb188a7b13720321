"""Multiple choice scored: what is right, near ties, errors that are no zeros, and a whole evaluation of such a task."""

import json
import math

import pytest

from lora_kit import evaluation, gates, isolate, multiple_choice, score_cache
from lora_kit.chat import load_tokenizer
from lora_kit.engines import open_engine
from lora_kit.lm_eval_task import LmEvalTask
from lora_kit.recipe import Recipe
from lora_kit.types import Artifact, Likelihood
from tests import tiny_run
from tests.test_evaluation import FakeRun

SPEC = {"kind": "multiple_choice", "data": "rows.jsonl", "doc_to_text": "q", "doc_to_choice": "c", "doc_to_target": "g"}


def spec(**fields) -> LmEvalTask:
    return LmEvalTask.model_validate({**SPEC, **fields})


def item(name: str, context: str, options: list[str], *gold: int) -> dict:
    return {"item_id": name, "cluster": name, "target": "\n".join(options[number] for number in gold), "likelihood": {
        "context": context, "continuations": [f" {option}" for option in options], "choices": options,
        "gold": list(gold)}}


class Answering:
    """An engine whose log-probabilities are given; in another batch shape those of ``again``."""

    batches_likelihoods, likelihood_noise, likelihood_note = True, 0.01, ""

    def __init__(self, tokenizer, log_probs, again=()):
        self.tokenizer, self.log_probs, self.again, self.asked = tokenizer, log_probs, again, []

    def likelihoods(self, questions, *, greedy=False, apart=False):
        self.asked.append((len(questions), apart))
        return [[Likelihood(log_prob=value, greedy=False) for value in row]
                for row in (self.again if apart else self.log_probs)]


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


def test_the_best_choice_is_summed_by_character_and_by_byte(tokenizer):
    asked = [item("a", "q", ["four", "a hundred", "ü"], 1)]
    lines = multiple_choice.score(Answering(tokenizer, [[-4.0, -7.0, -3.0]]), "t", spec(metric_list=[
        {"metric": "acc"}, {"metric": "acc_norm"}, {"metric": "acc_bytes"}]), asked, None)
    assert [(line["metric"], line["score"], line["prediction"]) for line in lines] == [
        ("acc", 0.0, "ü"), ("acc_norm", 1.0, "a hundred"), ("acc_bytes", 1.0, "a hundred")]
    acc, norm, by_bytes = lines
    assert acc["margin"] == -4.0 and norm["margin"] == pytest.approx(-7 / 9 + 1) and acc["log_probs"] == [-4, -7, -3]
    assert by_bytes["margin"] == pytest.approx(-7 / 9 + 1)
    assert acc["noise"] == 0.02 and norm["noise"] == 0.02  # the shortest choice has one character
    assert acc["target"] == "a hundred" and acc["prompt"] == "q" and acc["error"] is None and acc["weight"] == 1


def test_of_equal_choices_the_first_and_of_several_right_ones_any_counts(tokenizer):
    asked = [item("a", "q", ["x", "y"], 0), item("b", "q", ["x", "y"], 1), item("c", "q", ["x", "y", "z"], 1, 2),
             item("d", "q", ["x"], 0)]
    rows = [[-1.0, -1.0], [-1.0, -1.0], [-3.0, -2.0, -5.0], [-1.0]]
    only = spec(metric_list=[{"metric": "acc"}])
    lines = multiple_choice.score(Answering(tokenizer, rows, rows[:2]), "t", only, asked, None)
    assert [line["score"] for line in lines] == [1.0, 0.0, 1.0, 1.0]
    assert [line.get("margin") for line in lines] == [0.0, 0.0, 1.0, None]


def test_near_ties_are_scored_again_in_another_shape_and_say_so(tokenizer):
    asked = [item(name, "q", ["x", "y"], 0) for name in "abc"]
    engine = Answering(tokenizer, [[-1.0, -1.015], [-1.0, -1.01], [-1.0, -1.03]], [[-1.0, -1.016], [-1.01, -1.0]])
    lines = multiple_choice.score(engine, "t", spec(metric_list=[{"metric": "acc"}]), asked, None)
    assert engine.asked == [(3, False), (2, True)]
    assert [line.get("near_tie", False) for line in lines] == [True, True, False]
    assert [line["score"] for line in lines] == [1.0, 1.0, 1.0]
    assert lines[0]["reason"].endswith("a near tie: in another batch shape it is the same")
    assert lines[1]["reason"].endswith("in another batch shape it is decided otherwise")
    assert lines[1]["margin_again"] == pytest.approx(-0.01)


def test_flips_within_the_rounding_of_both_sides_are_numeric():
    def line(name, score, margin, **more):
        return {"item_id": name, "score": score, "margin": margin, "cluster": name, **more}

    before = [line("a", 1.0, 0.01, noise=0.02), line("b", 1.0, 0.01, noise=0.02), line("c", 1.0, 1e-5)]
    after = [line("a", 0.0, -0.02, noise=0.02), line("b", 0.0, -0.04, noise=0.02), line("c", 0.0, -1e-4)]
    found = gates.flips(after, before, task="t", metric="acc", artifact="m", baseline="base", higher_is_better=True)
    assert (found["num_worse"], found["num_numeric"]) == (3, 2)


def test_items_that_cannot_be_asked_have_an_error_and_no_score(tokenizer):
    asked = [item("long", "q" * 100, ["x", "y"], 0), item("empty", "q", ["x", "y"], 0),
             item("nan", "q", ["x", "y"], 0)]
    asked[1]["likelihood"]["continuations"] = ["", " y"]
    only = spec(metric_list=[{"metric": "acc"}])
    lines = multiple_choice.score(Answering(tokenizer, [[math.nan, -1.0]]), "t", only, asked, 90)
    assert [line["score"] for line in lines] == [None] * 3
    assert [line["error"] for line in lines] == [
        "a prompt of 101 tokens does not fit into 90", "a continuation has no token of its own",
        "its log-probabilities are nan, -1.0"]


def test_continuations_and_whole_texts(tiny_model, tokenizer):
    with open_engine(Artifact(name="base", path=str(tiny_model), kind="hf")) as engine:
        asked = [item("a", "one", ["two"], 0)]
        perplexity, acc = multiple_choice.score(engine, "t", spec(kind="loglikelihood"), asked, None)
        ids = tokenizer("one two")["input_ids"]
        expected = float(engine.token_log_probs(ids, range(3, 7)).sum())
        assert perplexity["outcome"] == pytest.approx(expected, abs=1e-4)
        assert perplexity["score"] == pytest.approx(math.exp(-expected), rel=1e-3)
        assert acc["score"] in (0.0, 1.0) and acc["score"] == float(all(
            engine.log_probs(ids)[place - 1].argmax() == ids[place] for place in range(3, 7)))
        text = {**item("b", "", ["Fünf"], 0)}
        text["likelihood"]["continuations"] = ["Fünf"]
        [bits] = multiple_choice.score(engine, "t", spec(kind="loglikelihood_rolling"), [text], None)
        ids = [tokenizer.bos_token_id, *tokenizer("Fünf", add_special_tokens=False)["input_ids"]]
        nats = -float(engine.token_log_probs(ids, range(1, len(ids))).sum())
        assert bits["weight"] == 5 and bits["score"] == pytest.approx(nats / math.log(2) / 5, rel=1e-4)


def test_likelihoods_are_found_again_with_what_is_known_of_them(tokenizer, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    artifact = Artifact(name="base", path=str(tiny_model), kind="hf", tokenizer=str(tiny_model))
    asked = [item(name, "q", ["x", "y"], 0) for name in "ab"]
    real = Answering(tokenizer, [[-1.0, -2.0], [-1.0, -2.0]])
    real.name, real.close, real.likelihood_note = "given", lambda: None, "why"
    runs = []
    for opened in (lambda: real, lambda: pytest.fail("is opened again")):
        engine = score_cache.known(artifact, {"engine": "given"}, opened)
        runs.append(multiple_choice.score(engine, "t", spec(metric_list=[{"metric": "acc"}]), asked, None))
        assert (engine.likelihood_noise, engine.likelihood_note, engine.batches_likelihoods) == (0.01, "why", True)
        engine.close()
        real.log_probs = None
    assert runs[0] == runs[1] and [line["score"] for line in runs[0]] == [1.0, 1.0] and len(real.asked) == 1


def test_a_whole_evaluation_of_a_task_of_the_harness(tiny_model, tmp_path, monkeypatch):
    rows = [{"q": f"say {word}", "c": ["red", "stone moon", "x"], "g": number % 3}
            for number, word in enumerate("red green blue one two three".split())]
    (tmp_path / "mc.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mc.yaml").write_text(
        "task: colours\ndataset_path: json\ndataset_kwargs: {data_files: {test: mc.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: c\ndoc_to_target: g\nnum_fewshot: 1\n"
        "fewshot_config: {sampler: first_n, samples: [{q: say sun, c: [sun, moon], g: 0}]}\n")
    (tmp_path / "suite.yaml").write_text("tasks: [./mc.yaml]\n"
                                         "gates: {task: colours, no_worse_than: base, margin: 0.9}\n")
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(isolate, "call", tiny_run.call_here)
    run = FakeRun(tmp_path, {name: Artifact(name=name, path=str(tiny_model), kind="hf", tokenizer=str(tiny_model))
                             for name in ("base", "merged")})
    run.stage_dir("data").mkdir()
    run.work("eval").mkdir()
    recipe = Recipe.model_validate({"name": "r", "model": {"base": "b"}, "data": {"train": "rows.jsonl"},
                                    "eval": {"suite": "./suite.yaml", "samples": 0}})
    evaluation.stage(recipe, run)
    scores = json.loads((run.work("eval") / "scores.json").read_text())
    found = {(score["task"], score["metric"], score["artifact"]): score for score in scores["scores"]}
    assert found.keys() == {("colours", metric, name) for metric in ("acc", "acc_norm") for name in ("base", "merged")}
    assert all(score["num_items"] == 6 and score["num_errors"] == 0 for score in found.values())
    [verdict] = scores["verdicts"]
    assert "colours acc: merged no worse than base" in verdict["claim"] and verdict["outcome"] == "PASS"
    line = json.loads((run.work("eval") / "base" / "items.jsonl").read_text().splitlines()[0])
    assert line["prompt"] == "say sun sun\n\nsay red" and len(line["log_probs"]) == 3
