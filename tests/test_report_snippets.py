"""report_snippets.py: the code that the report shows runs, without lora-kit."""

import dataclasses
import subprocess
import sys

import pytest

from lora_kit import report_findings, report_snippets
from tests import run_on_paper as paper


@pytest.fixture
def found(tmp_path):
    return report_findings.read(paper.recipe(), paper.write(tmp_path))


def test_paths_start_at_the_run(found):
    texts = {name: report_snippets.snippet(artifact, found) for name, artifact in found.artifacts.items()}
    assert "from_pretrained('merge/model', dtype=\"auto\")" in texts["merged"]
    assert "PeftModel.from_pretrained(base, 'train/adapter')" in texts["adapter"]
    assert "Llama('quantize/gguf-q8_0/model/model.gguf'" in texts["gguf-q8_0"]
    assert str(found.artifacts["base"].path) in texts["adapter"]
    for name, text in texts.items():
        compile(text, name, "exec")
    assert not any("lora_kit" in text or "{" * 2 in text for text in texts.values())


def test_the_shown_code_answers(found, tiny_model, tmp_path):
    artifact = dataclasses.replace(found.artifacts["merged"], path=str(tiny_model))
    code = report_snippets.snippet(artifact, found).replace("max_new_tokens=100", "max_new_tokens=3")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-500:]
