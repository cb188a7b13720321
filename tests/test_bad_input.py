"""Whatever is wrong outside of lora-kit: one line that says where, what and what to do, and nothing lost.

Through the command line, which is where a user meets it. In this process where nothing but the line and the
exit code matters; in one of its own where limits, signals and other users come in.
"""

from __future__ import annotations

import json
import os
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

from lora_kit import cli, isolate, rundir
from tests import nobody, tiny, tiny_run
from tests.test_sources import hub_error
from tests.test_train import metrics_of
from tests.tiny_run import World

INSTALL = 'pip install "lora-kit[llamacpp]"'


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory) -> World:
    """A finished run over all stages; nothing may change in it."""
    return tiny_run.finished(tiny_model, tmp_path_factory)


@pytest.fixture
def world(tiny_model, tmp_path, monkeypatch) -> World:
    """A recipe, its rows and its model; nothing has been run."""
    shutil.copytree(tiny_model, tmp_path / "model")
    tiny_run.write_recipe(tmp_path, "./model")
    monkeypatch.chdir(tmp_path)
    return World(folder=tmp_path).use(monkeypatch)


@pytest.fixture
def done(finished, tmp_path, monkeypatch) -> World:
    """A copy of the finished run."""
    monkeypatch.setattr(isolate, "call", tiny_run.call_here)
    monkeypatch.chdir(tmp_path)
    return tiny_run.copy(finished, tmp_path).use(monkeypatch)


@pytest.fixture
def told(capsys, monkeypatch):
    """Run a verb here; returns its exit code and the lines on standard error. ``told.out`` is its output."""

    def run(*arguments: str | Path) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["lora-kit", *map(str, arguments)])
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as end:
            cli.main()
        signal.signal(signal.SIGTERM, handler)
        run.out, stderr = capsys.readouterr()
        assert "Traceback" not in stderr
        return end.value.code, stderr.splitlines()

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "run.lock"}


# ---- recipes ---------------------------------------------------------------------------


def test_every_mistake_of_a_recipe_at_once_each_with_its_line(world, told):
    (world.folder / "bad.yaml").write_text(
        "model:\n  base: ./model\ndata:\n  train: rows.jsonl\n  max_tokns: 64\ntrain:\n  steps: many\n"
        "  steps: 4\n  learning_rate: -1\nquantise: []\nlora:\n  rank: true\n")
    code, lines = told("run", "bad.yaml", "--set", "train.batch=2")
    assert code == 2
    assert [re.match(r"(bad.yaml:\d+|--set [^:]*)", line)[1] for line in lines] == [
        "--set train.batch=2", *(f"bad.yaml:{line}" for line in (5, 7, 8, 9, 10, 12))]
    assert "did you mean 'max_tokens'?" in lines[1] and "'train.steps' is 'many'" in lines[2]
    assert "stands twice, first on line 7" in lines[3] and "did you mean 'quantize'?" in lines[5]
    assert all("; " in line for line in lines)
    assert not world.runs.exists()


@pytest.mark.parametrize(("target", "what"), [
    (".", r"\.: is a folder; name the recipe file in it"),
    ("recipes/chatt.yaml", r"recipes/chatt.yaml: no such recipe; did you mean recipes/chat.yaml\?"),
    ("rows.jsonl", r"rows.jsonl:"), ("model/model.safetensors", r"model/model.safetensors: "),
])
@pytest.mark.parametrize("verb", ["run", "plan", "train"])
def test_what_is_no_recipe(world, told, verb, target, what):
    code, lines = told(verb, target)
    assert code == 2 and len(lines) == 1 and re.match(what, lines[0])


@pytest.mark.parametrize("verb", ["merge", "bench", "chat"])
def test_a_folder_that_is_no_run(world, told, verb):
    code, lines = told(verb, "model/..")
    assert code == 2 and len(lines) == 1 and re.search(r"is (not a run folder|neither a run nor a model)", lines[0])


def test_precision_that_this_machine_does_not_train_in(world, told):
    import torch

    if torch.accelerator.is_available():
        pytest.skip("this machine trains in fp16")
    code, lines = told("train", "tiny.yaml", "--set", "train.precision=fp16")
    assert code == 2 and lines == ["train.precision: fp16 trains only on a GPU; set bf16, fp32 or auto"]


# ---- data ------------------------------------------------------------------------------

GOOD = [json.dumps(tiny_run.conversation(row)) for row in range(24)]
ASKED = json.dumps({"messages": [{"role": "user", "content": "and?"}]})
WITH_TOOLS = json.dumps({**tiny_run.conversation(1), "tools": [{"type": "function", "function": {
    "name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}}]})


@pytest.mark.parametrize(("text", "overrides", "code", "what"), [
    ("", [], 4, r"rows\.jsonl: is empty \(0 bytes\); "),
    ("\n".join(GOOD)[:-20], [], 4, r"rows\.jsonl:24: .*; "),
    ("\n".join([*GOOD[:4], ASKED, *GOOD[5:]]), ["data.max_dropped=0"], 4,
     r"rows\.jsonl: 1 of 24 rows are unusable, .*no assistant turn, first at rows\.jsonl:5; mend them or raise"),
    ("\n".join([ASKED] * 5), ["data.max_dropped=1"], 4,
     r"rows\.jsonl: none of its 5 rows is usable; .*no assistant turn"),
    ("\n".join(GOOD), ["data.max_tokens=16"], 4,
     r"rows\.jsonl:\d+: has \d+ tokens, over data\.max_tokens \(16\); raise it, or set data\.too_long: drop, cut_end"),
    ("\n".join([WITH_TOOLS] * 8), [], 2,
     r"data\.tools: .*template ignores tools \(seen at rows\.jsonl:\d\); set data\.tools: system"),
    (None, [], 4, r"rows\.jsonl: no such file .*; "),
    ("\n".join(GOOD), ["data.train.0.source=rows.xlsx"], 2, r"--set data\.train\.0\.source=rows\.xlsx: "),
], ids=["empty", "truncated", "no assistant turn", "none usable", "too long", "tools ignored", "missing", "override"])
@pytest.mark.parametrize("verb", ["plan", "train"])
def test_rows_that_cannot_be_used(world, told, verb, text, overrides, code, what):
    rows = world.folder / "rows.jsonl"
    rows.unlink()
    if text is not None:
        rows.write_text(text)
    found, lines = told(verb, "tiny.yaml", *(word for override in overrides for word in ("--set", override)))
    assert found == code and len(lines) == 1 and re.match(what, lines[0]), lines
    assert text is None or rows.read_text() == text
    assert not list(world.folder.glob("cache/data/*")) and not list(world.folder.glob("cache/data/.*"))


# ---- models and adapters ---------------------------------------------------------------


def _no_model(model: Path) -> None:
    shutil.rmtree(model)


def _pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _quantized(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))


def _cut_config(model: Path) -> None:
    (model / "config.json").write_text((model / "config.json").read_text()[:40])


def _cut_weights(model: Path) -> None:
    with open(model / "model.safetensors", "r+b") as file:
        file.truncate(50_000)


def _no_tokenizer(model: Path) -> None:
    for path in model.glob("*token*"):
        path.unlink()


def _other_size(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 192}))


@pytest.mark.parametrize(("spoil", "code", "what"), [
    (_no_model, 5, r"\./model: no such file or folder .*; check the path; it is relative to the recipe"),
    (_pickled, 7, r".*/model: has no safetensors weights, and pickled ones are not loaded; "),
    (_quantized, 5, r"\./model: is quantized already, .*; name the 16-bit model and set model.load_in"),
    (_cut_config, 7, r".*/config.json: is not a JSON object; "),
    (_cut_weights, 7, r".*/model: its weights are not whole .*; fetch the model again"),
    (_no_tokenizer, 5, r".*/model: has no tokenizer that loads .*; check the model folder"),
    (_other_size, 5, r".*/model: \d+ of its tensors are missing or not of the size .*; fetch the model again"),
])
def test_a_base_that_cannot_be_trained(world, told, spoil, code, what):
    spoil(world.folder / "model")
    found, lines = told("train", "tiny.yaml")
    assert found == code and len(lines) == 1 and re.match(what, lines[0]), lines


def test_an_adapter_in_place_of_a_base_and_none_in_place_of_an_adapter(world, told):
    (world.folder / "adapter").mkdir()
    (world.folder / "adapter" / "adapter_config.json").write_text("{}")
    code, lines = told("train", "tiny.yaml", "--set", "model.base=./adapter")
    assert code == 5 and "is an adapter, not a model; name the base" in lines[0]
    tiny_run.write_recipe(world.folder, "./model", lora=None)
    code, lines = told("train", "tiny.yaml", "--set", "train.from_adapter=./mine")
    assert code == 5 and len(lines) == 1 and lines[0].startswith("train.from_adapter: ./mine: no such folder")
    assert not world.runs.exists()


def test_a_gated_model_is_explained(world, told, monkeypatch):
    import huggingface_hub

    def snapshot_download(*_, **__):
        raise hub_error("GatedRepoError")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    code, lines = told("train", "tiny.yaml", "--set", "model.base=org/name")
    assert code == 5 and lines == ["org/name: is gated: its owner asks for an agreement; accept it on the model's "
                                   "page and set HF_TOKEN in the environment"]


def test_training_that_diverges_names_its_rows(world, told):
    code, lines = told("train", "tiny.yaml", "--set", "train.learning_rate=1e30", "--set", "train.warmup=0")
    assert code == 8 and len(lines) == 1
    assert re.match(r"train step \d+: loss nan.*rows\.jsonl:\d+.*, or lower train\.learning_rate", lines[0])


# ---- a run that is in use or broken ----------------------------------------------------


def test_a_second_process_on_a_run_is_refused_at_once(done):
    before = contents(done.runs)
    seconds = []
    with rundir.open_run(done.run).locked():
        for arguments in (["run", "tiny.yaml"], ["run", "tiny.yaml", "--set", "bench.repeats=2"], ["bench", done.run]):
            started = time.monotonic()
            ended = done.lora_kit(*arguments)
            seconds.append(time.monotonic() - started)
            assert ended.returncode == 6, ended.stderr
            assert re.fullmatch(rf".*{done.run.name}: is in use by pid {os.getpid()} on .*; wait for it or stop it\n",
                                ended.stderr)
    assert min(seconds) < 2, seconds
    assert contents(done.runs) == before


@pytest.mark.parametrize(("file", "text"), [
    ("lock.json", '{"identity": '), ("lock.json", "{}"), ("merge/stage.json", '{"stage": "merge", '),
    ("merge/stage.json", "[]"),
])
@pytest.mark.parametrize("arguments", [["run", "tiny.yaml"], ["bench"], ["chat"]])
def test_a_broken_file_of_a_run_is_refused(done, told, file, text, arguments):
    (done.run / file).write_text(text)
    before = contents(done.runs)
    code, lines = told(*arguments)
    assert code == 7 and len(lines) == 1, lines
    assert re.match(rf".*{file}: is not whole.*; (move .* away; lora-kit run RECIPE|remove .*/merge and run again)",
                    lines[0])
    assert contents(done.runs) == before


# ---- the machine -----------------------------------------------------------------------


@nobody.needs_root
def test_a_folder_that_may_not_be_written(done):
    for name in ("mine", "other"):
        (done.folder / name).mkdir()
    imports = f"import os, sys\nos.chdir({str(done.folder)!r})\n" + """
import contextlib, io
import lora_kit.cli, lora_kit.data, lora_kit.pipeline, lora_kit.report, lora_kit.terminal

def verb(*arguments):
    sys.argv = ["lora-kit", *arguments]
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            lora_kit.cli.main()
    except SystemExit as end:
        print("ended", end.code, told.getvalue())

# Here still as root, who may: this imports all that the verbs need, which another user may not be able to.
verb("report", "--again", "--runs", "mine")
verb("run", "tiny.yaml", "--runs", "mine")
"""
    code = """
verb("run", "tiny.yaml", "--runs", "other")
verb("run", "tiny.yaml", "--set", "bench.repeats=9")
verb("report", "--again")
os.environ["LORA_KIT_CACHE"] = "other/cache"
verb("plan", "tiny.yaml", "--set", "data.held_out_rows=4")
"""
    shutil.copytree(done.runs / "tiny", done.folder / "mine" / "tiny")
    (done.folder / "model" / "model.safetensors").chmod(0o644)
    before = contents(done.runs)
    lines = [line for line in nobody.run(imports, code, done.folder, LORA_KIT_CACHE=str(done.folder / "cache"))
             if line.startswith("ended")]
    assert len(lines) == 6 and [line.strip() for line in lines[:2]] == ["ended 0"] * 2, lines
    denied, todo = r"cannot be written \(Permission denied\)", "make the folder writable, free space, or choose another"
    assert re.match(rf"ended 6 other/tiny.*: {denied}; {todo} with --runs", lines[2]), lines
    for line in lines[3:5]:
        assert re.match(rf"ended 6 runs/tiny/.*: {denied}; {todo} with --runs", line), lines
    assert re.match(rf"ended 6 other/cache.*: {denied}; .*LORA_KIT_CACHE", lines[5]), lines
    assert contents(done.runs) == before and not list((done.folder / "other").iterdir())


def small_files_only() -> None:
    """Let the process write no file of more than 100 kB, which fails as a full disk does."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of files are Linux's")
def test_a_full_disk_leaves_the_earlier_model_in_place(done):
    before = contents(done.run)
    ended = done.lora_kit("merge", done.run, "--again", preexec_fn=small_files_only)
    assert ended.returncode == 6, ended.stdout + ended.stderr
    assert re.fullmatch(r".*\.merge\.working.*: cannot be written \(.*\); .*free space.*\n", ended.stderr)
    after = contents(done.run)
    assert {name: after[name] for name in before} == before
    ended = done.lora_kit("merge", done.run, "--again")
    assert ended.returncode == 0, ended.stderr
    again = contents(done.run)
    assert all(again[name] == before[name] for name in before if name.startswith("merge/model/"))
    assert not list(done.run.glob(".*"))


def wait_for(process: subprocess.Popen, happened) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.005)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of files are Linux's")
def test_training_survives_a_full_disk_and_an_end_from_outside(world, told):
    tiny_run.write_recipe(world.folder, "./model", train={**tiny_run.SECTIONS["train"], "steps": 300, "save_every": 20})
    command = [sys.executable, "-m", "lora_kit.cli", "train"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": world.folder,
               "env": tiny_run.environment()}

    process = subprocess.Popen([*command, "tiny.yaml"], **options)
    wait_for(process, lambda: list(world.runs.glob("tiny/*/train/checkpoints/step-000020")))
    psutil.Process(process.pid).rlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 6 and len(stderr.splitlines()) == 1, stderr
    assert re.match(r".*checkpoints/\.step-0.*: cannot be written \(.*\); .*free space", stderr)
    checkpoints = world.run / "train" / "checkpoints"
    assert list(checkpoints.glob("step-*")) and not list(checkpoints.glob(".*"))

    process = subprocess.Popen([*command, str(world.run)], **options)
    lines = (world.run / "train" / "metrics.jsonl").read_text().count("\n")
    wait_for(process, lambda: (world.run / "train" / "metrics.jsonl").read_text().count("\n") > lines + 2)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 75 and "going on from step-0" in stdout
    assert re.fullmatch(r".*: stopped after step \d+ of 300, checkpoint saved; go on with: lora-kit train .*\n", stderr)

    code, lines = told(*stderr.strip().rpartition("lora-kit ")[2].split())
    assert (code, lines) == (0, []), lines
    assert rundir.open_run(world.run).seal("train")["figures"]["steps"] == 300
    assert len(metrics_of(rundir.open_run(world.run))) == 300


# ---- a package that is not there -------------------------------------------------------


@pytest.fixture(params=["absent", "broken"])
def without_llama_cpp(request, monkeypatch, tmp_path):
    """llama-cpp-python is not installed, or cannot be imported; returns what the user is told to do."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "llama_cpp"]:
        monkeypatch.delitem(sys.modules, name)
    if request.param == "absent":
        monkeypatch.setitem(sys.modules, "llama_cpp", None)
        return INSTALL
    (tmp_path / "shim").mkdir()
    (tmp_path / "shim" / "llama_cpp.py").write_text("raise ImportError('libgomp.so.1: no such file')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "shim"))
    return "libgomp.so.1"


def test_without_llama_cpp_the_rest_is_measured(done, told, without_llama_cpp):
    code, lines = told("run", "tiny.yaml", "--set", "bench.artifacts=[merged, gguf-q8_0]", "--set", "eval.limit=4")
    assert code == 0, lines
    points = {path.stem: json.loads(path.read_text())["point"] for path in (done.run / "bench").glob("*q8_0.json")}
    assert without_llama_cpp in points["gguf-q8_0"]["why_not"]
    assert "gguf-q8_0 was not measured: engine llamacpp:" in told.out and without_llama_cpp in told.out
    scores = json.loads((done.run / "eval" / "scores.json").read_text())
    page = (done.run / "report" / "report.md").read_text()
    assert {entry["artifact"] for entry in scores["not_measured"]} <= {"gguf-q8_0"}
    assert {score["artifact"] for score in scores["scores"]} >= {"base", "merged", "bitsandbytes-int8"}
    assert "not measured" in page and without_llama_cpp.replace('"', "") in page.replace("\\", "").replace('"', "")


@pytest.mark.parametrize("verb", ["chat", "bench"])
def test_a_gguf_file_without_llama_cpp(done, told, without_llama_cpp, verb):
    code, lines = told(verb, done.run / "gguf-q8_0")
    assert code == 6 and without_llama_cpp in lines[0] and "llama" in lines[0] and len(lines) == 1, lines


def test_a_stray_gguf_file_says_what_it_lacks(done, told):
    shutil.copy(done.run / "quantize" / "gguf-q8_0" / "model" / "model.gguf", done.folder / "mine.gguf")
    code, lines = told("chat", "mine.gguf")
    assert code == 5 and lines == ["mine.gguf: lies in no run, and no tokenizer lies beside it; put tokenizer.json "
                                   "and tokenizer_config.json of its model into its folder"]


def test_a_model_without_a_chat_template_cannot_chat(world, told, monkeypatch):
    tiny.save_tokenizer(world.folder / "model", template=None)
    (world.folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    monkeypatch.setattr("builtins.input", lambda prompt: "hello")
    code, lines = told("chat", "model")
    assert code == 5 and len(lines) == 1 and "has no chat template; set model.template" in lines[0]
