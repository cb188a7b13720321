"""The command line: every verb's road, its output on a pipe, its exit codes.

Verbs run in processes of their own, as users run them. What a stage does is proven elsewhere; here
that the right ones run, on the right run, and that the output says so.
"""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import lora_kit
from lora_kit import cli, engines, rundir
from lora_kit.chat import prompt_ids
from lora_kit.recipe_file import read_recipe
from tests import fake_run, tiny_run
from tests.tiny_run import World

VERBS = ["init", "plan", "data", "train", "merge", "extract", "quantize", "bench", "eval", "report", "run", "chat",
         "doctor"]
SMALL = {"bench": {**tiny_run.SECTIONS["bench"], "artifacts": ["merged"]},
         "eval": {**tiny_run.SECTIONS["eval"], "artifacts": ["base", "merged"]}}
"""Sections with which a run starts few processes."""


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> World:
    """A finished run over all stages; nothing may change in it."""
    return tiny_run.finished(tiny_model, tmp_path_factory)


@pytest.fixture
def world(finished, tmp_path) -> World:
    return tiny_run.copy(finished, tmp_path)


@pytest.fixture(scope="session")
def no_torch(tmp_path_factory) -> str:
    """A path for PYTHONPATH on which importing torch ends the process with 99."""
    shim = tmp_path_factory.mktemp("shim")
    (shim / "torch.py").write_text("import os\nos._exit(99)\n")
    return f"{shim}{os.pathsep}{tiny_run.ROOT}"


def ok(world: World, *arguments: str | Path, **options) -> list[str]:
    """The lines that a verb prints when all goes well: plain, and nothing on standard error."""
    done = world.lora_kit(*arguments, **options)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert "\x1b" not in done.stdout and "\r" not in done.stdout
    return done.stdout.splitlines()


def refused(world: World, *arguments: str | Path, code: int, **options) -> str:
    """The one line on standard error with which a verb ends with ``code``."""
    done = world.lora_kit(*arguments, **options)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr.strip()


# ---- before any verb -------------------------------------------------------------------


def test_help_names_every_verb_in_under_three_tenths_of_a_cpu_second(world, no_torch):
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        lines = ok(world, "--help", PYTHONPATH=no_torch)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    shown = [re.split(r"  +", line.strip())[0] for line in lines if re.match(r"  [a-z]+ ", line)]
    assert sorted(shown) == sorted([*VERBS, "bench compare", "eval compare"])
    assert min(seconds) < 0.3, seconds


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_its_help(verb, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lora-kit", verb, "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr().out
    assert end.value.code == 0 and f"lora-kit {verb} [OPTIONS]" in shown
    for option in re.findall(r"^  (?:-h, )?--[a-z-]+.*$", shown, re.MULTILINE):
        assert len(option.split(maxsplit=1)) == 2, option


def test_version(world):
    assert ok(world, "--version") == [f"lora-kit {lora_kit.__version__}"]


@pytest.mark.parametrize(("arguments", "what"), [
    (["lern"], "No such command 'lern'"), (["run", "--fast", "x"], "No such option: --fast"),
    (["run"], "Missing argument 'RECIPE'"), (["quantize", "a", "b"], "unexpected extra argument"),
])
def test_a_command_line_that_is_none(world, no_torch, arguments, what):
    line = refused(world, *arguments, code=2, PYTHONPATH=no_torch)
    assert what in line and line.endswith("see lora-kit --help")


def test_no_arguments_show_the_help(world):
    done = world.lora_kit()
    assert done.returncode == 2 and "Usage: " in done.stderr and "doctor" in done.stderr


def test_several_processes_only_train(world):
    assert "only training uses them" in refused(world, "run", "tiny.yaml", code=2, WORLD_SIZE="2")


# ---- init and plan ---------------------------------------------------------------------


def test_init_lists_and_copies_recipes(world, no_torch):
    listed = ok(world, "init", PYTHONPATH=no_torch)
    assert any(re.match(r"  chat +SmolLM2-135M learns", line) for line in listed)
    assert ok(world, "init", "chat", "--yes", PYTHONPATH=no_torch) == ["wrote chat.yaml; next: lora-kit plan chat.yaml"]
    assert (world.folder / "chat.yaml").read_text() == (tiny_run.ROOT / "recipes" / "chat.yaml").read_text()
    assert "exists already" in refused(world, "init", "chat", "--yes", code=2)
    assert ok(world, "init", "chat", "--yes", "--to", "mine/other.yaml")[0].startswith("wrote mine/other.yaml;")
    assert "did you mean 'chat'?" in refused(world, "init", "chta", code=2)


def test_init_asks_at_a_terminal_what_the_recipe_must_know(world):
    keyboard, screen = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_kit.cli", "init", "chat"], cwd=world.folder, stdin=screen, stdout=screen,
        stderr=screen, env=tiny_run.environment())
    os.close(screen)
    shown = b""
    for question, answer in ((b"Base model", "./model"), (b"Training data", "rows.jsonl"),
                             (b"Name of the recipe", "mine")):
        while question not in shown.rpartition(b"\n")[2]:
            shown += os.read(keyboard, 4096)
        os.write(keyboard, f"{answer}\n".encode())
    assert process.wait(timeout=60) == 0
    shown += os.read(keyboard, 4096)
    os.close(keyboard)
    assert b"wrote mine.yaml" in shown
    recipe = read_recipe(world.folder / "mine.yaml").recipe
    assert (recipe.name, recipe.model.base, recipe.data.train[0].source) == ("mine", "./model", "./rows.jsonl")
    assert recipe.data.train[0].format is None and recipe.lora.rank == 16


def test_plan_counts_and_needs_no_torch_once_the_data_is_prepared(world, no_torch):
    lines = ok(world, "plan", "tiny.yaml", PYTHONPATH=no_torch)
    text = "\n".join(lines)
    assert re.search(r"rows used +16 +8", text) and re.search(r"training +30 steps, 7.5 epochs, 120 examples", text)
    assert lines[-1] == "next: lora-kit run tiny.yaml"
    text = "\n".join(ok(world, "plan", "tiny.yaml", "--set", "train.steps=10", PYTHONPATH=no_torch))
    assert "10 steps, 2.5 epochs" in text
    assert "no suite is called 'chta'" in refused(
        world, "plan", "tiny.yaml", "--set", "eval.suite=chta", code=2, PYTHONPATH=no_torch)


def test_plan_prepares_the_data_when_it_has_to(world):
    lines = ok(world, "plan", "tiny.yaml", "--set", "data.held_out_rows=4")
    assert lines[0] == "  preparing the data, once" and re.search(r"rows used +20 +4", "\n".join(lines))


def test_data_shows_the_ledger_lengths_and_any_example(world, no_torch):
    text = "\n".join(ok(world, "data", "tiny.yaml", PYTHONPATH=no_torch))
    assert re.search(r"^ledger *\n +train +held out\nrows in +16 +8$", text, re.MULTILINE)
    assert re.search(r"^lengths *\ntokens +train +held out *$", text, re.MULTILINE) and "█" in text
    assert "training row says the same" in text or "training rows say the same" in text
    lines = ok(world, "data", "tiny.yaml", "--show", "2", "--show", "1", "--split", "held_out")
    titles = [line.split(":")[0] for line in lines if re.match(r"held out \d+ of ", line)]
    assert titles == ["held out 2 of 8", "held out 1 of 8"]
    assert any(line.startswith("⟦") and line.endswith("<|im_end|>⟧") for line in lines)
    assert "there is no such train example" in refused(world, "data", "tiny.yaml", "--show", "99", code=2)
    assert "there is no split" in refused(world, "data", "tiny.yaml", "--split", "test", code=2, PYTHONPATH=no_torch)


# ---- the road --------------------------------------------------------------------------


def test_the_road_from_a_recipe_to_its_report(tiny_model, tmp_path, no_torch):
    world = World(folder=tmp_path)
    tiny_run.write_recipe(tmp_path, tiny_model, **SMALL)

    # An output that knows no arrow shows a question mark.
    lines = ok(world, "train", "tiny.yaml", "--set", "train.steps=8", PYTHONIOENCODING="ascii")
    run = rundir.open_run(world.run)
    assert lines[0].split() == ["run", f"runs/tiny/{run.path.name}"]
    assert lines[1] == "data (not done yet)" and "train (not done yet)" in lines
    assert any(re.match(r"  train step 1/8  loss \d\.\d+  tokens/s \d+  left ", line) for line in lines)
    assert any(re.match(r"  done in .*: 8 steps, [\d,]+ tokens trained, held-out loss \d\.\d+ \? \d\.\d+$", line)
               for line in lines)
    assert lines[-1] == f"adapter: runs/tiny/{run.path.name}/train/adapter"
    assert run.recipe.train.steps == 8 and run.resolved["overrides"] == ["train.steps=8"]

    # A verb takes the newest run, says so first, and does first what is owed.
    lines = ok(world, "bench")
    assert lines[0] == f"run runs/tiny/{run.path.name}"
    heads = [line for line in lines if re.match(r"(data|train|merge|quantize|bench|eval|report) ", line)]
    assert heads == ["data skipped: done", "train skipped: done", "merge (not done yet)", "quantize (not done yet)",
                     "bench (not done yet)"]
    assert any(re.match(r"merged +transformers bf16 .*\d", line) for line in lines)
    assert lines[-2].startswith("bench: decode tokens/s: merged ")
    assert lines[-1] == f"written to runs/tiny/{run.path.name}/bench"

    # `run` does what is left.
    lines = ok(world, "run", "tiny.yaml", "--set", "train.steps=8")
    assert lines[0] == f"run runs/tiny/{run.path.name}" and "bench skipped: done" in lines
    assert "eval (not done yet)" in lines and "report (not done yet)" in lines
    assert lines[-1] == f"report: runs/tiny/{run.path.name}/report/index.html"
    assert (world.folder / lines[-1].partition(" ")[2]).stat().st_size > 5000

    # A second one has nothing to do, says so, and imports no torch for it.
    lines = ok(world, "run", "tiny.yaml", "--set", "train.steps=8", PYTHONPATH=no_torch)
    assert lines[1] == "nothing to do: every stage is done" and not [line for line in lines if "(not done" in line]
    assert [line for line in lines if "skipped: done" in line] == [
        f"{stage} skipped: done" for stage in ("data", "train", "merge", "quantize", "bench", "eval", "report")]


@pytest.mark.parametrize("verb", ["merge", "quantize", "bench", "eval", "report"])
def test_a_verb_on_a_run_where_all_is_done(world, no_torch, verb):
    lines = ok(world, verb, world.run, "--no-deps", PYTHONPATH=no_torch)
    seal = rundir.open_run(world.run).seal(verb)
    assert lines[0] == f"run {world.run}" and f"{verb} skipped: done" in lines
    assert lines[-2:] == [f"{verb}: {seal['summary']}", f"written to {world.run / verb}"]


def test_again_and_no_deps(world, no_torch):
    lines = ok(world, "report", world.run, "--again", PYTHONPATH=no_torch)
    assert "report (asked for)" in lines and "eval skipped: done" in lines
    shutil.rmtree(world.run / "quantize")
    line = refused(world, "bench", world.run, "--no-deps", code=2, PYTHONPATH=no_torch)
    assert line == (f"{world.run}: stage quantize is owed (not done yet) before bench; lora-kit quantize {world.run}, "
                    "or leave out --no-deps")


def test_the_newest_run_under_runs_is_taken(world, no_torch):
    older, newer = world.run, world.runs / "other" / "29991231-235959-ffff"
    shutil.copytree(older, newer)
    assert ok(world, "report", PYTHONPATH=no_torch)[0] == "run runs/other/29991231-235959-ffff"
    (world.folder / "elsewhere").mkdir()
    shutil.move(world.runs / "tiny", world.folder / "elsewhere" / "tiny")
    assert ok(world, "report", "--runs", "elsewhere", PYTHONPATH=no_torch)[0] == f"run elsewhere/tiny/{older.name}"
    assert "holds no run; lora-kit run RECIPE makes one" in refused(world, "report", "--runs", "nowhere", code=4)


def test_train_goes_on_with_a_run(world, no_torch):
    lines = ok(world, "train", world.run, PYTHONPATH=no_torch)
    assert lines[-2:] == ["train skipped: done", f"adapter: {world.run / 'train' / 'adapter'}"]
    for option in (["--set", "train.steps=9"], ["--fresh"]):
        assert "goes on with a run, whose recipe does not change; leave out" in refused(
            world, "train", world.run, *option, code=2)


def test_a_failed_gate_still_ends_with_the_report(world, no_torch):
    seal = world.run / "eval" / "stage.json"
    seal.write_text(seal.read_text().replace(
        '"verdicts": []', '"verdicts": [{"outcome": "FAIL", "claim": "a claim", "evidence": "shown otherwise"}]'))
    done = world.lora_kit("run", "tiny.yaml", PYTHONPATH=no_torch)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == f"report: runs/tiny/{world.run.name}/report/index.html"
    assert done.stderr == "a claim: FAIL: shown otherwise; see the report\n"


@pytest.mark.parametrize(("option", "code", "said"), [
    ([], 3, "a claim: INCONCLUSIVE: too few; see the report\n"), (["--inconclusive", "pass"], 0, ""),
    (["--inconclusive", "fail"], 1, "a claim: INCONCLUSIVE: too few; see the report\n"),
])
@pytest.mark.parametrize("verb", ["run", "eval"])
def test_what_an_inconclusive_gate_counts_as(world, no_torch, verb, option, code, said):
    seal = world.run / "eval" / "stage.json"
    seal.write_text(seal.read_text().replace(
        '"verdicts": []', '"verdicts": [{"outcome": "INCONCLUSIVE", "claim": "a claim", "evidence": "too few"}]'))
    done = world.lora_kit(verb, "tiny.yaml" if verb == "run" else world.run, *option, PYTHONPATH=no_torch)
    assert (done.returncode, done.stderr) == (code, said), done.stdout


def test_eval_says_what_gates_can_show_without_torch(world, no_torch):
    (world.folder / "suite.yaml").write_text("tasks: [held_out_loss]\nroles: {task: held_out_loss, role: target}\n")
    lines = ok(world, "eval", "--dry-run", "tiny.yaml", PYTHONPATH=no_torch)
    assert lines[-1] == "the suite claims nothing: it has neither roles nor gates"
    recipe = world.folder / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace('"samples": 1', '"suite": "./suite.yaml", "samples": 1'))
    text = "\n".join(ok(world, "eval", "--dry-run", "tiny.yaml", PYTHONPATH=no_torch))
    assert "held_out_loss loss: merged better than base: with 8 items nothing can be said yet" in text
    assert "merged better than base" in "\n".join(ok(world, "eval", "tiny.yaml", "--dry-run", PYTHONPATH=no_torch))


def test_a_baseline_is_written_from_a_finished_run_and_compared_with(world, no_torch):
    lines = ok(world, "eval", world.run, "--write-baseline", "baseline.lock", PYTHONPATH=no_torch)
    size = (world.folder / "baseline.lock").stat().st_size
    scored = dict.fromkeys(entry["artifact"] for entry in json.loads(
        (world.run / "eval" / "scores.json").read_text())["scores"])
    assert lines[-1] == f"baseline baseline.lock: {', '.join(scored)} on held_out_loss, {size:,} bytes" and size < 3000
    (world.folder / "suite.yaml").write_text(
        "tasks: [held_out_loss]\nroles: {task: held_out_loss, role: retain, margin: 0.01}\n")
    done = world.lora_kit("run", "tiny.yaml", "--set", "eval.suite=./suite.yaml",
                          "--set", "eval.baseline=baseline.lock", "--set", 'eval.artifacts=["merged"]')
    assert done.returncode == 0, done.stdout + done.stderr
    page = (world.run / "report" / "report.md").read_text()
    assert "merged no worse than baseline" in page and "baseline/merged → merged" in page
    text = "\n".join(ok(world, "eval", world.run, "--dry-run", "--baseline", "baseline.lock", PYTHONPATH=no_torch))
    assert "with 8 items a drop under" in text

    assert "nowhere.lock: no such baseline" in refused(
        world, "eval", world.run, "--baseline", "nowhere.lock", code=2, PYTHONPATH=no_torch)
    lock = world.folder / "baseline.lock"
    lock.write_text(lock.read_text().replace('"settings": "', '"settings": "0'))
    assert refused(world, "eval", world.run, "--baseline", "baseline.lock", code=7).endswith(
        "was made with other settings of task held_out_loss; make it again with lora-kit eval RUN --write-baseline")
    lock.write_text("{}")
    assert "baseline.lock: is not a whole baseline" in refused(
        world, "eval", world.run, "--baseline", "baseline.lock", code=7, PYTHONPATH=no_torch)


def test_a_budget_ends_the_evaluation_when_the_gates_are_decided(world):
    (world.folder / "suite.yaml").write_text(
        "tasks: [held_out_loss]\nroles: {task: held_out_loss, role: retain, margin: 0.01}\n")
    done = world.lora_kit("run", "tiny.yaml", "--set", "eval.suite=./suite.yaml", "--set", 'quantize=[]')
    assert done.returncode == 0, done.stdout + done.stderr
    lines = ok(world, "eval", world.run, "--budget", "5m")
    assert any("look 1 of at most" in line and "8 of 8 items" in line for line in lines)
    scores = json.loads((world.run / "eval" / "scores.json").read_text())
    assert scores["budget"]["stopped"] == "every gate is decided"
    assert "should be a time such as 300s or 5m" in refused(world, "eval", world.run, "--budget", "soon", code=2)


# ---- one artifact ----------------------------------------------------------------------


def test_merge_of_an_adapter_outside_of_a_run(world):
    adapter, base = world.run / "train" / "adapter", world.folder / "model"
    lines = ok(world, "merge", adapter, "--base", base, "--out", "merged")
    assert re.fullmatch(r"merged: 1?\d\d kB in (bf16|fp16), KL \S+ from base \+ adapter .*", lines[-1].strip())
    assert (world.folder / "merged" / "lora_kit_certificate.json").exists()
    assert refused(world, "merge", adapter, "--base", base, "--out", "merged", code=2).startswith(
        "merged: exists already")
    assert refused(world, "merge", adapter, code=2).endswith(f"lora-kit merge {adapter} --base BASE --out FOLDER")
    assert "are for an adapter folder" in refused(world, "merge", "--base", base, code=2)


def test_merge_of_several_adapters_and_a_lora_out_of_what_came_of_it(world):
    own, base = world.run / "train" / "adapter", world.folder / "model"
    other = fake_run.save_adapter(base, world.folder / "other", size=0.1)
    lines = ok(world, "merge", own, other, "--base", base, "--out", "both", "--weights", "0.7,0.3", "--dtype", "fp32")
    assert "both/adapter: cat of 2 adapters: exactly the weighted sum of their changes" in lines[-2]
    assert re.search(r"both: \d+ kB in fp32, KL \S+ from base \+ adapter", lines[-1])
    told = json.loads((world.folder / "both" / "adapter" / "lora_kit_combined.json").read_text())
    assert told["exact"] and told["weights"] == [0.7, 0.3]
    assert refused(world, "merge", own, other, code=2).endswith(f"merge {own} {other} --base BASE --out FOLDER")

    lines = ok(world, "extract", "both", "--base", base, "--out", "taken", "--energy", "0.9999")
    assert re.search(r"taken: rank \d+( to \d+)? on 14 matrices, 99\.99% of .*; nothing that changed is left out; "
                     r"KL \S+ from the tuned model on plain prose \(the base's \S+\), \d+\.\d% the same first",
                     lines[-1])
    found = json.loads((world.folder / "taken" / "lora_kit_extracted.json").read_text())
    assert found["extracted"]["mean_kl"] < 0.05 * found["base_alone"]["mean_kl"]
    assert (world.folder / "taken" / "tokenizer.json").exists()
    assert "taken: exists already" in refused(world, "extract", "both", "--base", base, "--out", "taken", code=2)
    assert "is the same as its base" in refused(world, "extract", base, "--base", base, "--out", "none", code=5)
    assert not (world.folder / "none").exists()


def test_bench_of_an_artifact(world):
    lines = ok(world, "bench", world.run / "merged", "--threads", "1")
    assert lines[0].strip() == "Speed at 1 x 128 + 32 tokens" and lines[1].split()[:3] == ["artifact", "engine", "size"]
    assert re.match(r"merged +transformers bf16 +191 kB .* \d", lines[2])
    assert all(line.startswith("energy of a generated token") for line in lines[3:])  # where the machine counts it


def expected_answers(world: World, name: str, questions: list[list[str]]) -> list[str]:
    """Greedy answers of the artifact to each conversation's last question, the earlier ones answered by itself."""
    artifact = rundir.open_run(world.run).artifact(name)
    answers = []
    with engines.open_engine(artifact, threads=1) as engine:
        for conversation in questions:
            messages = []
            for question in conversation:
                messages.append({"role": "user", "content": question})
                answer = engine.generate([prompt_ids(engine.tokenizer, messages)], max_new_tokens=6)[0].text
                messages.append({"role": "assistant", "content": answer})
            answers.append(answer)
    return answers


@pytest.mark.parametrize(("target", "name"), [
    (None, "merged"), ("{run}/adapter", "adapter"), ("{run}/quantize/gguf-q8_0/model/model.gguf", "gguf-q8_0"),
])
def test_chat(finished, target, name):
    if name.startswith("gguf"):
        pytest.importorskip("llama_cpp")
    arguments = [target.format(run=finished.run)] if target else []
    lines = ok(finished, "chat", *arguments, "--max-new-tokens", "6",
               stdin="say red\n\nsay blue\n/reset\nsay red\n/quit\nnever read\n")
    assert lines[0].startswith(f"{name}: ") and lines[1] == "/reset starts anew, /quit or Ctrl-D ends"
    alone, after = expected_answers(finished, name, [["say red"], ["say red", "say blue"]])
    assert alone
    answers = "\n".join(lines[2:]).split("> ")
    assert [answer.strip("\n") for answer in answers if answer.strip("\n")] == [alone, after, alone]


def test_chat_ends_with_its_input(finished, no_torch):
    line = refused(finished, "chat", finished.run / "nothing", code=2, PYTHONPATH=no_torch)
    assert "has no artifact 'nothing'; it has: base, adapter, merged," in line
    assert "is neither a run nor a model" in refused(finished, "chat", "rows.jsonl", code=2, PYTHONPATH=no_torch)


def test_doctor(world):
    lines = ok(world, "doctor")
    assert any(re.match(r"libraries +torch +ok ", line) for line in lines)
    assert any(re.match(r"disk +cache +ok .*" + re.escape(str(world.folder / "cache")), line) for line in lines)


# ---- how it ends -----------------------------------------------------------------------


@pytest.mark.parametrize(("error", "code", "line"), [
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 6, "lora-kit: out of memory; lower train.pack_tokens"),
    (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 6, "/x/y: No space left on device; check space"),
    (ValueError("two\nlines"), 70, "lora-kit: ValueError: two lines; a bug of ours: run again with --debug"),
])
def test_whatever_is_raised_ends_in_one_line(monkeypatch, capsys, error, code, line):
    def fail(**_):
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["lora-kit", "run"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    shown = capsys.readouterr().err
    assert end.value.code == code and shown.startswith(line) and len(shown.splitlines()) == 1


def test_debug_shows_the_traceback_before_the_line(world, no_torch):
    done = world.lora_kit("plan", "nowhere.yaml", "--debug", PYTHONPATH=no_torch)
    assert done.returncode == 2 and done.stderr.startswith("Traceback")
    assert done.stderr.splitlines()[-1].startswith("nowhere.yaml: no such recipe")


def test_a_reader_that_leaves_is_no_error(world):
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m lora_kit.cli init | true; echo ${{PIPESTATUS[0]}}"], cwd=world.folder,
        env=tiny_run.environment(), capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("130\n", "")


def test_an_end_from_outside_leaves_no_process_behind(world):
    shutil.rmtree(world.run / "merge")
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_kit.cli", "merge", str(world.run)], cwd=world.folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=tiny_run.environment(LORA_KIT_CACHE=str(world.folder / "cache")))
    deadline = time.monotonic() + 60
    while not (children := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (130, "interrupted\n")
    # One that is still importing torch ends when it has; a busy machine takes its time for that.
    assert not psutil.wait_procs(children, timeout=60)[1]
    assert not (world.run / "merge").exists() and Path(world.run / "quantize" / "stage.json").exists()
