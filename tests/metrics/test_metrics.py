"""Metrics are found by their file's name, and load without torch."""

import subprocess
import sys

import pytest

from lora_kit import metrics
from lora_kit.errors import RecipeError


def test_every_metric_has_what_the_package_promises():
    assert {"exact_match", "token_f1", "rouge_l", "chrf", "tool_call", "tool_call_valid"} <= set(metrics.names())
    for name in metrics.names():
        metric = metrics.load(name)
        assert isinstance(metric.HIGHER_IS_BETTER, bool)
        assert callable(metric.score) and callable(metric.build)


def test_unknown_name_says_the_nearest():
    with pytest.raises(RecipeError, match="no such metric; did you mean 'rouge_l'"):
        metrics.load("rougel")


def test_metrics_score_without_torch():
    code = ("import sys; from lora_kit import metrics\n"
            "for name in metrics.names():\n"
            "    extra = {'functions': [{'name': 'f', 'parameters': {'properties': {}, 'required': []}}]}\n"
            "    tool = name.startswith('tool_call')\n"
            "    metrics.load(name).score('a b', [{'f': {}}] if tool else 'a c', **(extra if tool else {}))\n"
            "assert 'torch' not in sys.modules and 'evaluate' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True)
