"""The main job on the real model: a short run of recipes/chat.yaml through the command line, and its siblings' start.

What only a real model shows: that held-out loss falls, that the merge is as close as its type allows, and that
every quantized form answers in a process that knows nothing of lora-kit.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit import hardware, rundir, sources
from tests import tiny_run

# The run takes four minutes on two quiet cores, and is made while the first test waits.
pytestmark = [pytest.mark.real_model, pytest.mark.archives, pytest.mark.timeout(1800)]

SHORT = ["train.steps=12", "train.eval_every=6", "train.learning_rate=2.0e-3", "data.train.0.limit=112",
         "data.held_out_rows=16", "data.max_tokens=256", "bench.prompt_tokens=16", "bench.new_tokens=8",
         "bench.repeats=1", "eval.samples=1", "eval.sample_tokens=16", "eval.cache=false"]
FORMS = ["bitsandbytes-int8", "bitsandbytes-nf4", "gguf-q8_0"]


def lora_kit(folder: Path, *arguments: str, overrides: list[str] = ()) -> str:
    """The output of a verb that goes well; packages come from the cache that set-up filled."""
    options = [word for override in overrides for word in ("--set", override)]
    done = tiny_run.lora_kit(*arguments, *options, cwd=folder, timeout=1500, PIP_NO_INDEX="1",
                             OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", str(hardware.usable_cores())),
                             LORA_KIT_CACHE=str(sources.cache_dir()))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def finished(smollm2_base, tmp_path_factory) -> tuple[rundir.Run, str]:
    """The run and what it printed."""
    folder = tmp_path_factory.mktemp("main_job")
    printed = lora_kit(folder, "run", str(tiny_run.ROOT / "recipes" / "chat.yaml"), overrides=SHORT)
    return rundir.open_run(rundir.newest(folder / "runs")), printed


def test_held_out_loss_falls_at_every_look(finished):
    run, _ = finished
    lines = [json.loads(line) for line in (run.stage_dir("train") / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert len(held_out) == 3 and held_out[0] > held_out[1] > held_out[2] > 1
    figures = run.seal("train")["figures"]
    assert figures["steps"] == 12 and figures["num_params"] > 134e6 and figures["num_trainable_params"] < 5e6


def test_the_gain_is_more_than_chance_and_the_merge_is_proven(finished):
    run, _ = finished
    outcomes = {stage: [verdict["outcome"] for verdict in run.seal(stage)["verdicts"]] for stage in ("merge", "eval")}
    assert outcomes == {"merge": ["PASS"] * 4, "eval": ["PASS"]}
    merge = run.seal("merge")["figures"]
    assert merge["merged"]["mean_kl"] < 0.1 * merge["adapter_change"]["mean_kl"]
    differences = json.loads((run.stage_dir("eval") / "scores.json").read_text())["differences"]
    # nf4 costs this base, which was 4-bit once already, more than twelve steps are sure to gain.
    assert {entry["artifact"] for entry in differences if entry["ci_high"] < 0} >= {"merged", "gguf-q8_0"}


def test_every_form_costs_little_and_is_measured(finished):
    run, _ = finished
    sizes = {name: run.artifact(name).size_bytes for name in ("merged", *FORMS)}
    assert sizes["bitsandbytes-nf4"] < sizes["gguf-q8_0"] < sizes["merged"]
    forms = run.seal("quantize")["figures"]["forms"]
    assert all(0 < form["mean_kl"] < 2 and form["top1_agreement"] > 0.5 for form in forms.values())
    assert forms["gguf-q8_0"]["mean_kl"] < forms["bitsandbytes-nf4"]["mean_kl"]
    points = json.loads((run.stage_dir("bench") / "bench.json").read_text())["points"]
    assert [point["artifact"] for point in points] == ["base", "merged", *FORMS]
    assert all(point["decode_tokens_per_second"] > 0 and point["peak_memory_bytes"] > 10**8 for point in points)


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
if sys.argv[1] == "adapter":
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[2]), sys.argv[3])
else:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[3])
prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hello! How are you today?"}],
                                       add_generation_prompt=True, return_tensors="pt", return_dict=True)
tokens = model.generate(**prompt, max_new_tokens=12, do_sample=False)
print("answer:", tokenizer.decode(tokens[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
"""


@pytest.mark.parametrize("name", ["adapter", "merged", "bitsandbytes-int8", "bitsandbytes-nf4"])
def test_an_artifact_answers_without_lora_kit(finished, name):
    run, _ = finished
    kind = "adapter" if name == "adapter" else "model"
    done = subprocess.run([sys.executable, "-c", LOAD, kind, run.artifact("base").path, run.artifact(name).path],
                          capture_output=True, text=True, cwd=run.path, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    answer = done.stdout.partition("answer: ")[2]
    # Words, and not many: people's small talk is what it learnt ("I'm fine!").
    assert len(re.findall(r"[A-Za-z']+", answer)) >= 2, answer


def test_the_gguf_file_answers_in_llama_cpp(finished):
    pytest.importorskip("llama_cpp")
    run, _ = finished
    done = tiny_run.lora_kit("chat", run.artifact("gguf-q8_0").path, "--max-new-tokens", "12", cwd=run.path,
                             stdin="Hello! How are you today?\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(re.findall(r"[A-Za-z']+", done.stdout.partition("> ")[2])) >= 2, done.stdout


def test_the_report_shows_it_all(finished):
    run, printed = finished
    assert printed.splitlines()[-1] == f"report: runs/chat/{run.path.name}/report/index.html"
    page = (run.stage_dir("report") / "index.html").read_text()
    assert all(name in page for name in ("base", "merged", *FORMS)) and "PASS" in page and "FAIL" not in page
    # One file that asks for nothing: the policy says so to the browser, and no element would.
    assert "content=\"default-src 'none'; style-src 'unsafe-inline'\"" in page
    assert "<script" not in page and "<link" not in page and not re.search(r'(src|href)="(http|//)', page)


@pytest.mark.parametrize(("recipe", "overrides"), [
    ("tools", ["data.train.0.limit=24", "data.train.1.limit=8", "data.held_out_rows=4"]),
    ("docstrings", ["data.train.0.limit=24", "data.held_out_rows=4"]),
])
def test_the_other_recipes_train(smollm2_base, tmp_path, recipe, overrides):
    lora_kit(tmp_path, "train", str(tiny_run.ROOT / "recipes" / f"{recipe}.yaml"), overrides=[
        *overrides, "train.steps=2", "train.batch_size=4", "train.eval_every=null"])
    run = rundir.open_run(rundir.newest(tmp_path / "runs"))
    figures = run.seal("train")["figures"]
    assert figures["steps"] == 2 and figures["held_out_after"] != figures["held_out_before"]
    preview = (run.stage_dir("data") / "preview.txt").read_text()
    assert {"tools": "⟦<tool_call>{", "docstrings": "⟦"}[recipe] in preview
