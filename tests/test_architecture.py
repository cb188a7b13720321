"""What holds the house up: imports go down, torch stays out of the quick paths, only the command line prints.

A new module is entered in LEVELS, at the lowest level that its imports allow. Levels 0 and 1 never
import torch, nor anything that does.
"""

from __future__ import annotations

import ast
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_kit"

LEVELS = {
    0: "errors units",
    1: "gain frontier "
       "task_source lm_eval_task lm_eval_library multiple_choice "
       "activations footprint devices outlook calibration latency speed_ratio report_latency "
       "repeats bench_prompts bench_sweep bench_files energy report_load report_serving "
       "ci_files "
       "budget "
       "assertions labels "
       "recipe_fields recipe_serving "
       "types events recipe recipe_file yaml_file rundir hardware stats memory sources isolate nursery shipped formats "
       "metrics records rows spool prepared selection ledger overlap schedule tool_calls model_files suite items gates "
       "charts report_document report_html report_findings report_data report_costs report_snippets report_sections "
       "report_proofs scored paired report_items junit eval_checks intervals claims comparison power sequential "
       "stopwatch launch ranks choices",
    2: "lean_decoder likelihood tree_attention speculative "
       "merging tensor_files "
       "chat turns tokens shorten packing loss flops proof model checkpoint bnb_mend fast preparation "
       "adapter adapter_start adapter_check libraries optimizer trackers template_check "
       "shares processes training_model training_log resume divergence rehearsal stop_signals launcher",
    3: "score_cache greedy delta quantized_base combining extraction "
       "engines quantizers certificate scoring stop_rate baseline",
    4: "data train merge quantize bench evaluation report plan doctor scaffold reference data_view foresight "
       "advice plan_outlook plan_record memory_short bench_compare bench_url bench_serving "
       "bench_speculative bench_retrieval bench_adapters",
    5: "pipeline adapter_verbs terminal calibrate cli_options",
    6: "cli cli_plan cli_bench cli_adapters lora_kit",
}
"""Level -> its modules and folders; ``lora_kit`` is ``__init__.py``, the Python API."""

LEVEL_OF = {name: level for level, names in LEVELS.items() for name in names.split()}
STAGES = {"data", "train", "merge", "quantize", "bench", "evaluation", "report"}
VARIANTS = {"engines", "quantizers", "formats", "metrics"}
HEAVY = {"torch", "transformers", "accelerate", "evaluate", "peft", "datasets", "bitsandbytes"}

FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """``formats.text`` for lora_kit/formats/text.py; ``lora_kit`` for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "lora_kit"


MODULES = {name_of(path): path for path in FILES}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported(tree: ast.AST, *, at_once: bool = False) -> Iterator[tuple[str, int]]:
    """(module of lora_kit, line) of every import in ``tree``; with ``at_once`` not those inside functions."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if at_once and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from lora_kit import data` imports a module, `from lora_kit.errors import DataError` a name in one.
            longer = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name.removeprefix("lora_kit.") in MODULES else node.module for name in longer]
        else:
            continue
        for name in names:
            if name == "lora_kit" or name.startswith("lora_kit."):
                yield name.removeprefix("lora_kit."), node.lineno


def test_every_module_has_its_level():
    tops = {name.partition(".")[0] for name in MODULES}
    assert tops == set(LEVEL_OF), "LEVELS lacks or still has: " + ", ".join(sorted(tops ^ set(LEVEL_OF)))


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down_only(name):
    top, level = name.partition(".")[0], LEVEL_OF[name.partition(".")[0]]
    for other, line in imported(TREES[name]):
        other_top = other.partition(".")[0]
        where = f"{MODULES[name].relative_to(ROOT)}:{line} imports {other}"
        if other == "lora_kit":
            assert name == "cli", f"{where}: the Python API is for users"
            continue
        assert LEVEL_OF[other_top] <= level, f"{where}, which is above it"
        if top in STAGES:
            assert other_top not in STAGES - {top}, f"{where}: stages meet in the run folder"
        if top in VARIANTS and "." in name:
            assert other_top != top or other == top, f"{where}: files of {top}/ know nothing of each other"


def test_no_modules_import_each_other():
    graph = {name: {other for other, _ in imported(tree, at_once=True)} - {name} for name, tree in TREES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "a circle: " + " -> ".join([*path, name])
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


# ---- torch stays out -------------------------------------------------------------------


def run_python(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_levels_0_and_1_plan_cli_and_pipeline_load_without_torch():
    names = [name for name in MODULES if LEVEL_OF[name.partition(".")[0]] <= 1]
    names += ["plan", "cli", "pipeline", "scaffold", "terminal", "lora_kit"]
    code = "import importlib, sys\n"
    code += "".join(f"importlib.import_module({f'lora_kit.{name}'.removesuffix('.lora_kit')!r})\n" for name in names)
    code += f"print(sorted({HEAVY!r} & set(sys.modules)))"
    done = run_python(code)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stdout + done.stderr


MAIN = f"""
import sys
from lora_kit import cli
sys.argv = ["lora-kit", *sys.argv[1:]]
try:
    cli.main()
finally:
    print("heavy:", sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""


def test_help_loads_no_torch():
    done = run_python(MAIN, "--help")
    assert done.returncode == 0 and "lora-kit" in done.stdout
    assert done.stderr.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("verb", ["plan", "train", "run"])
def test_a_recipe_error_loads_no_torch(verb, tmp_path):
    (tmp_path / "mine.yaml").write_text("model: {base: b}\ndata: {train: rows.jsonl}\ntrian: {steps: 3}\n")
    done = run_python(MAIN, verb, "mine.yaml", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines() == ["mine.yaml:3: unknown key 'trian'; did you mean 'train'?", "heavy: []"]


def test_help_takes_under_three_tenths_of_a_second_of_cpu():
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "lora_kit.cli", "--help"], check=True, capture_output=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3, seconds


# ---- files -----------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["lora_kit", "tests", "examples", "benchmarks"])
def test_no_file_is_long(folder):
    for path in (ROOT / folder).rglob("*.py"):
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert num_lines <= 600, f"{path.relative_to(ROOT)} has {num_lines} lines"


def test_no_file_is_a_drawer_for_odds_and_ends():
    odd = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    assert [path for path in FILES if path.stem in odd or path.parent.name in odd] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(TREES[name]), f"{MODULES[name].relative_to(ROOT)} has no docstring"


# ---- what only some may do -------------------------------------------------------------


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name as written, node) of every call in ``tree``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield ast.unparse(node.func), node


SPEAKERS = {
    "cli": "the command line",
    "cli_plan": "a part of it: two of its verbs",
    "cli_bench": "a part of it: one of its verbs",
    "cli_options": "a part of it: what its verbs share",
    "terminal": "renders events for it",
    "nursery": "the processes that it forks end where they are forked",
    "ranks": "a process that waits for one that is gone, in an operation that nothing can interrupt, ends itself",
    "reference": "its main() is a command of its own, for make docs",
}
"""Modules that may print or end the process -> why."""

SPEAKING = {"print", "input", "exit", "quit", "breakpoint", "typer.echo", "typer.prompt", "sys.exit", "os._exit",
            "sys.stdout.write", "sys.stderr.write"}


@pytest.mark.parametrize("name", sorted(set(MODULES) - set(SPEAKERS)))
def test_only_the_command_line_prints_or_exits(name):
    found = [f"{MODULES[name].relative_to(ROOT)}:{node.lineno} {called}"
             for called, node in calls(TREES[name]) if called in SPEAKING]
    found += [f"{MODULES[name].relative_to(ROOT)}:{node.lineno} SystemExit" for node in ast.walk(TREES[name])
              if isinstance(node, ast.Raise) and node.exc is not None and "SystemExit" in ast.unparse(node.exc)]
    assert found == []


UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal", "yaml"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "os.system", "os.popen"}
UNSAFE_OPTIONS = {("trust_remote_code", True), ("allow_pickle", True), ("weights_only", False), ("shell", True)}


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_unpickled_or_run_from_data(name):
    where = MODULES[name].relative_to(ROOT)
    for node in ast.walk(TREES[name]):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in names:
            assert module.partition(".")[0] not in UNSAFE_MODULES, f"{where}:{node.lineno} imports {module}"
    for called, node in calls(TREES[name]):
        assert called not in UNSAFE_CALLS, f"{where}:{node.lineno} calls {called}"
        for option in node.keywords:
            value = option.value.value if isinstance(option.value, ast.Constant) else None
            assert (option.arg, value) not in UNSAFE_OPTIONS, f"{where}:{node.lineno} {option.arg}={value}"


def test_these_checks_see_what_they_are_for():
    tree = ast.parse("import pickle\nfrom lora_kit.errors import DataError\ndef f():\n    from lora_kit import data\n"
                     "    sys.exit(eval('1'))\n    load(trust_remote_code=True)")
    assert {name for name, _ in imported(tree)} == {"errors", "data"}
    assert {name for name, _ in imported(tree, at_once=True)} == {"errors"}
    assert {called for called, _ in calls(tree)} == {"sys.exit", "eval", "load"}
