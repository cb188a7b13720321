"""Metrics are found by their file's name, and load without torch; a user's own are found in the user's folder."""

import subprocess
import sys

import pytest

from lora_kit import metrics
from lora_kit.errors import DataError, RecipeError


def test_every_metric_has_what_the_package_promises():
    assert {"exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l", "rouge_lsum", "chrf", "sacrebleu", "f1", "mcc",
            "squad_em", "json_match", "tool_call", "tool_call_valid"} <= set(metrics.names())
    for name in metrics.names():
        metric = metrics.load(name)
        assert isinstance(metric.HIGHER_IS_BETTER, bool)
        assert callable(metric.score) and callable(metric.build)
        assert hasattr(metric, "corpus") == hasattr(metric, "outcome")


def test_unknown_name_says_the_nearest():
    with pytest.raises(RecipeError, match="no such metric; did you mean 'rouge_l'"):
        metrics.load("rougel")


def test_metrics_score_without_torch():
    code = ("import sys; from lora_kit import metrics\n"
            "for name in metrics.names():\n"
            "    extra = {'functions': [{'name': 'f', 'parameters': {'properties': {}, 'required': []}}]}\n"
            "    tool = name.startswith('tool_call')\n"
            "    target = [{'f': {}}] if tool else '1' if name == 'json_match' else 'a c'\n"
            "    extra = extra if tool else {'assertions': [{'contains': 'a'}]} if name == 'all_assertions' else {}\n"
            "    metrics.load(name).score('a b', target, **extra)\n"
            "assert 'torch' not in sys.modules and 'evaluate' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_of_several_references_the_best_counts():
    metric = metrics.load("token_f1")
    assert metrics.score_item(metric, "Denver Broncos", ["Paris", "Denver Broncos won"])[0] == pytest.approx(0.8)
    with pytest.raises(DataError, match="has no reference"):
        metrics.score_item(metric, "x", [])


MODULE = '''
import datasets
import evaluate
{line}

class Shouting(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=datasets.Features(
            {{"predictions": datasets.Value("string"), "references": datasets.Value("string")}}))

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references, strict=True))
        return {{"{name}": {value}}}
'''
MEAN = "sum(p == r.upper() for p, r in pairs) / len(pairs)"
RATIO = "sum(map(len, predictions)) / sum(map(len, references))"


@pytest.fixture
def own(tmp_path, monkeypatch):
    def write(name: str, value: str, line: str = "HIGHER_IS_BETTER = True"):
        (tmp_path / f"{name}.py").write_text(MODULE.format(name=name, value=value, line=line))

    monkeypatch.setenv("LORA_KIT_METRICS", str(tmp_path))
    return write


def test_a_users_evaluate_module_is_a_metric(own):
    own("shouting", MEAN)
    metric = metrics.load("shouting")
    assert metric.HIGHER_IS_BETTER is True and metric.score("A", "a") == (1.0, "")
    found = metric.build().compute(predictions=["A", "b"], references=["a", "b"])
    assert found == {"shouting": 0.5, "item_scores": [1.0, 0.0], "reasons": ["", ""]}


def test_a_users_module_whose_value_is_no_mean_is_a_corpus_metric(own):
    own("ratio", RATIO)
    metric = metrics.load("ratio")
    found = metric.build().compute(predictions=["aa", "b"], references=["a", "bbb"])
    assert found["ratio"] == 0.75 and found["item_scores"] == [2.0, pytest.approx(1 / 3)]
    assert found["outcomes"] == [["aa", "a"], ["b", "bbb"]] and metric.corpus(found["outcomes"]) == 0.75


def test_what_a_users_module_lacks_is_said(own, tmp_path, monkeypatch):
    own("silent", MEAN, line="")
    with pytest.raises(RecipeError, match="does not say whether more of it is better; add a line HIGHER_IS_BETTER"):
        metrics.load("silent")
    own("broken", "1 / 0")
    with pytest.raises(DataError, match="raised ZeroDivisionError"):
        metrics.load("broken").score("a", "b")
    with pytest.raises(RecipeError, match="did you mean 'silent'"):
        metrics.load("silnt")
    monkeypatch.setenv("LORA_KIT_METRICS", str(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match="LORA_KIT_METRICS: no such folder"):
        metrics.load("silent")
