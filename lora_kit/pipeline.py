"""The stages in order: which one is owed, which can be skipped, what a change of the recipe reopens.

A stage is skipped only when its fingerprint matches: the recipe sections it reads, the
seals of the stages it takes from, and the versions that matter. A change of model, data,
lora or train opens a new run; a change further down republishes those stages in the run.

Reads recipes and run folders; writes run folders.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_kit import (
    baseline,
    bench_serving,
    hardware,
    memory_short,
    prepared,
    quantizers,
    ranks,
    rundir,
    score_cache,
    sources,
    stopwatch,
    suite,
)
from lora_kit.errors import (
    BY_EXIT_CODE,
    GateFailed,
    GateInconclusive,
    LoraKitError,
    MachineError,
    ModelError,
    RecipeError,
)
from lora_kit.events import Note, StageFinished, StageSkipped, StageStarted, tell
from lora_kit.recipe import IDENTITY, ModelSection
from lora_kit.recipe_file import RecipeFile, parse_recipe
from lora_kit.rundir import Run
from lora_kit.types import Artifact, Result, Verdict

VERSIONS = ("lora-kit", "torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes", "evaluate",
            "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: its module, the recipe sections it reads, the stages it takes from, the packages that matter."""

    name: str
    module: str
    sections: tuple[str, ...]
    takes_from: tuple[str, ...]
    packages: tuple[str, ...]


STAGES = (
    Stage(name="data", module="lora_kit.data", sections=("model", "data", "seed"), takes_from=(),
          packages=("transformers", "tokenizers")),
    Stage(name="train", module="lora_kit.train", sections=("model", "lora", "train", "seed"), takes_from=("data",),
          packages=("torch", "transformers", "peft", "accelerate", "bitsandbytes")),
    Stage(name="merge", module="lora_kit.merge", sections=("merge",), takes_from=("train",),
          packages=("torch", "transformers", "peft")),
    Stage(name="quantize", module="lora_kit.quantize", sections=("quantize", "choose"), takes_from=("merge",),
          packages=("torch", "transformers", "bitsandbytes", "gguf", "llama-cpp-python", "torchao", "auto-round")),
    Stage(name="bench", module="lora_kit.bench", sections=("bench",), takes_from=("merge", "quantize"),
          packages=("torch", "transformers", "bitsandbytes", "llama-cpp-python", "openvino-genai")),
    Stage(name="eval", module="lora_kit.evaluation", sections=("eval",), takes_from=("merge", "quantize"),
          packages=("torch", "transformers", "bitsandbytes", "llama-cpp-python")),
    Stage(name="report", module="lora_kit.report", sections=("name", "description", "cost"),
          takes_from=("data", "train", "merge", "quantize", "bench", "eval"), packages=()),
)

NAMES = tuple(stage.name for stage in STAGES)


@stopwatch.part("opening the run")
def open_for(recipe_file: RecipeFile, runs_dir: Path | str, *, fresh: bool = False) -> Run:
    """The run of this recipe: the newest whose model, data, lora and train are the same, or a new one.

    Args:
        fresh: always a new one.
    """
    runs_dir, base = Path(runs_dir), check(recipe_file)
    resolved = _resolved(recipe_file, base)
    identity = resolved["identity"]
    for path in [] if fresh else reversed(rundir.runs_in(runs_dir, recipe_file.recipe.name)):
        if not _may_be_of(path, identity):
            continue
        run = rundir.open_run(path)
        if run.recipe == recipe_file.recipe and run.resolved["base"] == base:
            return run
        with run.locked():
            return rundir.update(run, recipe_file, resolved)
    return rundir.create(runs_dir, recipe_file, resolved)


def check(recipe_file: RecipeFile) -> dict[str, Any]:
    """Find the mistakes of later sections now, not after training; returns the base as ``find_base`` does.

    Raises:
        RecipeError: the suite or a quantized form is not one that lora-kit knows, or there is no such baseline.
        RefusedError: the baseline is not whole.
        ModelError: the base is missing, or cannot take one of the forms.
    """
    from lora_kit.model import find_base, read_config

    suite.suite_of(recipe_file.recipe, recipe_file.folder)
    if recipe_file.recipe.eval.baseline:
        baseline.read(_baseline_path(recipe_file), recipe_file.recipe.eval.baseline)
    base = find_base(recipe_file.recipe.model, recipe_file.folder)
    config = read_config(Path(base["artifact"]["path"]))
    for form in recipe_file.recipe.forms:
        quantizers.load(form.method).check(config, form.type)
    bench_serving.check(recipe_file.recipe, recipe_file.folder)
    return base


def _baseline_path(recipe_file: RecipeFile) -> Path:
    return recipe_file.folder / Path(recipe_file.recipe.eval.baseline).expanduser()


def _may_be_of(path: Path, identity: str) -> bool:
    """Whether the run in ``path`` has this identity, or does not say. The recipe of another is not even read."""
    try:
        return json.loads((path / "lock.json").read_text(encoding="utf-8"))["identity"] == identity
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _resolved(recipe_file: RecipeFile, base: dict[str, Any]) -> dict[str, Any]:
    """What goes into lock.json."""
    found = prepared.find(recipe_file.recipe, recipe_file.folder, base)
    parts = [recipe_file.recipe.fingerprint(*IDENTITY), base["content"], base["sha256"], base["revision"], found.key]
    if recipe_file.recipe.train.from_adapter:
        parts.append(_from_adapter_sha256(recipe_file))
    identity = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return {
        "identity": identity, "base": base, "data_key": found.key, "seed": recipe_file.recipe.seed,
        "sources": {split: [{"reference": item.reference, "sha256": item.sha256, "revision": item.revision}
                            for item in items] for split, items in found.sources.items()},
        "versions": versions(VERSIONS), "machine": hardware.describe(),
        "recipe_path": str(recipe_file.path), "overrides": list(recipe_file.overrides),
        "resolved_recipe": recipe_file.recipe.model_dump(mode="json"),
        "opened": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _from_adapter_sha256(recipe_file: RecipeFile) -> str:
    folder = recipe_file.folder / Path(recipe_file.recipe.train.from_adapter).expanduser()
    weights = folder / "adapter_model.safetensors"
    if not (folder / "adapter_config.json").exists():
        what = "is not a PEFT adapter (no adapter_config.json)" if folder.is_dir() else f"no such folder ({folder})"
        raise ModelError(f"train.from_adapter: {recipe_file.recipe.train.from_adapter}", what,
                         "name an adapter folder; a path is relative to the recipe")
    return sources.file_sha256(weights) if weights.exists() else ""  # train says what it misses


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Installed versions by distribution name, None where a package is not installed. Imports none of them."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def run_recipe(recipe_file: RecipeFile, *, runs_dir: Path | str = "runs", until: str = "report", fresh: bool = False,
               redo: bool = False) -> Run:
    """Bring the recipe's run up to stage ``until``, skipping what is done.

    A failed gate does not keep later stages from running; it is raised at the end.

    Args:
        until: the last stage wanted.
        fresh: start a new run even when an unfinished or finished one exists.
        redo: do the last stage again even when it is done.

    Raises:
        GateFailed, GateInconclusive: after all stages, when a verdict says so.
        MachineError: a form that is to be made lacks its package; told before the first stage.
    """
    run = open_for(recipe_file, runs_dir, fresh=fresh)
    tell(Note(text=f"run {run.path}"))
    return continue_run(run, until=until, redo=redo)


def continue_run(run: Run, *, until: str = "report", no_deps: bool = False, redo: bool = False,
                 inconclusive: str | None = None) -> Run:
    """Bring ``run`` up to stage ``until``; see :func:`run_recipe`.

    Args:
        no_deps: an owed stage before ``until`` is an error instead of being run.
        inconclusive: what an inconclusive gate counts as: ``pass`` or ``fail``; None for what it is.
    """
    wanted = STAGES[:NAMES.index(until) + 1]
    needed = _needed_for(until) if until != "report" else set(NAMES)
    verdicts: list[Verdict] = []
    with run.locked():
        if any(stage.name == "quantize" and stage.name in needed and _why_owed(stage, run) for stage in wanted):
            _check_packages(run)
        for stage in wanted:
            if stage.name not in needed:
                continue
            reason = _why_owed(stage, run)
            if reason is None and not (redo and stage.name == until):
                tell(StageSkipped(stage=stage.name, why="done"))
            elif no_deps and stage.name != until:
                raise RecipeError(str(run.path), f"stage {stage.name} is owed ({reason}) before {until}",
                                  f"lora-kit {stage.name} {run.path}, or leave out --no-deps")
            else:
                _execute(stage, run, reason)
            verdicts += [Verdict(**fields) for fields in (run.seal(stage.name) or {}).get("verdicts", ())]
    raise_for(verdicts, inconclusive)
    return run


def _check_packages(run: Run) -> None:
    """Miss a form's package before hours of training, not after them."""
    for form in run.recipe_file.recipe.forms:
        install = quantizers.load(form.method).missing(form.type)
        if install:
            raise MachineError(f"quantize.method: {form.method}", f"what {form.type} needs is not installed", install)


def compare_with(run: Run, path: Path) -> Run:
    """The run with the baseline.lock at ``path`` in its recipe, as by ``--set eval.baseline=PATH``.

    Raises:
        RecipeError: there is no such file.
        RefusedError: it is not a whole baseline.
    """
    baseline.read(path, str(path))
    return _with(run, {"eval.baseline": json.dumps(str(path.resolve()))})


def within(run: Run, budget: str) -> Run:
    """The run with a time for its evaluation in its recipe, as by ``--set eval.budget=300s``.

    Raises:
        RecipeError: ``budget`` is no time.
    """
    return _with(run, {"eval.budget": json.dumps(budget)})


def serving(run: Run, given: dict[str, Any], *, keep: bool = True) -> Run:
    """The run with keys of ``bench`` in its recipe, as by ``--set bench.speculative.assistant=base``.

    Args:
        given: key within ``bench`` -> JSON value; {} for a part that is measured as the recipe has it, if it does.
        keep: whether the run's folder keeps them; False: they are for this call.

    Raises:
        RecipeError: a value is none of that key's.
        ModelError: there is no such assistant.
    """
    new = {key: value for key, value in given.items()
           if value != {} or getattr(run.recipe.bench, key) is None}
    changed = _with(run, {f"bench.{key}": json.dumps(value) for key, value in new.items()}, keep=keep)
    check(changed.recipe_file)
    return changed


def _with(run: Run, given: dict[str, str], *, keep: bool = True) -> Run:
    """The run with keys of its recipe set to values, as YAML."""
    kept = [text for text in run.recipe_file.overrides if text.partition("=")[0] not in given]
    overrides = [*kept, *(f"{key}={value}" for key, value in given.items())]
    recipe_file = parse_recipe(run.recipe_file.text, run.recipe_file.path, overrides,
                               shown_as=str(run.path / "recipe.yaml"))
    resolved = {**run.resolved, "overrides": overrides,
                "resolved_recipe": recipe_file.recipe.model_dump(mode="json")}
    if not keep:
        return Run(run.path, recipe_file, resolved)
    with run.locked():
        return rundir.update(run, recipe_file, resolved)


def write_baseline(run: Run, path: Path) -> str:
    """Write what the run's artifacts scored to ``path``; what was written, in words.

    Raises:
        RecipeError: the run has no finished evaluation.
    """
    if run.seal("eval") is None:
        raise RecipeError(str(run.path), "has no finished evaluation to make a baseline of",
                          f"lora-kit eval {run.path}")
    made = baseline.write(run, suite.suite_of(run.recipe, run.recipe_file.folder), path)
    names = list(dict.fromkeys(name for about in made["tasks"].values() for name in about["artifacts"]))
    return f"{path}: {', '.join(names)} on {', '.join(made['tasks'])}, {path.stat().st_size:,} bytes"


def owed(run: Run) -> list[str]:
    """Names of the stages that a full run would still do."""
    return [stage.name for stage in STAGES if _why_owed(stage, run) is not None]


def _needed_for(until: str) -> set[str]:
    by_name = {stage.name: stage for stage in STAGES}
    needed, waiting = set(), [until]
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting += by_name[name].takes_from
    return needed


def _fingerprint(stage: Stage, run: Run) -> str:
    inputs = {name: (run.seal(name) or {}).get("content") for name in stage.takes_from}
    parts = {"sections": run.recipe.section_json(*stage.sections), "inputs": inputs,
             "versions": versions(stage.packages)}
    if stage.name == "data":
        parts["key"] = run.resolved["data_key"]
        # What training rows share with the suite's items is counted there.
        parts["items"] = prepared.items_sha256(run.recipe, run.recipe_file.folder)
    if stage.name in ("bench", "report"):
        parts["machine"] = run.resolved["machine"].get("cpu")
    if stage.name == "bench" and run.recipe.bench.asks:
        parts["suite"] = suite.suite_of(run.recipe, run.recipe_file.folder).fingerprint()
    if stage.name == "report":  # servers were measured beside the stages
        parts["servers"] = [sources.file_sha256(path) for path in sorted((run.path / "servers").glob("*.json"))]
    if stage.name == "eval":
        # What only the dry run reads, and where the baseline lies, change no score; what the baseline says does.
        for key in ("discordance", "baseline", "cache"):
            parts["sections"]["eval"].pop(key)
        parts["suite"] = suite.suite_of(run.recipe, run.recipe_file.folder).fingerprint()
        if run.recipe.eval.baseline and _baseline_path(run.recipe_file).is_file():
            parts["baseline"] = sources.file_sha256(_baseline_path(run.recipe_file))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _made_from(stage: Stage, run: Run) -> str:
    """All that decides what the stage makes, but for its own sections of the recipe."""
    parts = {"inputs": {name: (run.seal(name) or {}).get("content") for name in ("data", *stage.takes_from)},
             "versions": versions(stage.packages), "code": score_cache.code_sha256()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _why_owed(stage: Stage, run: Run) -> str | None:
    """Why the stage has to run, or None when what lies there is what it would make."""
    seal = run.seal(stage.name)
    if seal is None:
        return "not done yet"
    if any(run.seal(name) is None for name in stage.takes_from):
        return "an earlier stage is owed"
    if seal["fingerprint"] != _fingerprint(stage, run):
        return "its settings, inputs or versions changed"
    for name, size in seal["files"].items():
        path = run.stage_dir(stage.name) / name
        if not path.exists():
            return f"{name} is gone"
        if path.stat().st_size != size:
            return f"{name} is not as long as it was"
    return None


def _execute(stage: Stage, run: Run, reason: str | None) -> None:
    """Run the stage; without a reason it was asked for, and starts anew."""
    tell(StageStarted(stage=stage.name, why=reason or "asked for"))
    started = time.perf_counter()
    with stopwatch.importing():
        module = importlib.import_module(stage.module)
    _set_aside_if_stale(stage, run)
    made_from = _made_from(stage, run) if stage.name == "quantize" else None
    with run.publishing(stage.name, made_from, anew=reason is None) as work, \
            stopwatch.part("data" if stage.name == "data" else "other"):
        try:
            result: Result = module.stage(run.recipe, run)
        except Exception as error:
            if stage.name != "train" or not memory_short.is_out_of_memory(error):
                raise
            raise memory_short.explained(run) from error
        seconds = time.perf_counter() - started
        _give_usual_modes(work)
        files = {str(path.relative_to(work)): path.stat().st_size for path in sorted(work.rglob("*"))
                 if path.is_file() and "checkpoints" not in path.relative_to(work).parts}
        run.publish(stage.name, {
            "stage": stage.name, "fingerprint": _fingerprint(stage, run), "seconds": seconds,
            "content": _content(stage, result, work), "files": files,
            "artifacts": [artifact.as_dict() for artifact in result.artifacts],
            "verdicts": [verdict.as_dict() for verdict in result.verdicts],
            "summary": result.summary, "figures": result.figures, "versions": versions(stage.packages),
            "made_from": made_from,
        })
    tell(StageFinished(stage=stage.name, seconds=seconds, summary=result.summary))


def _set_aside_if_stale(stage: Stage, run: Run) -> None:
    """A finished stage that works in place would take its own end for a start, under versions that it does not know."""
    seal = run.seal(stage.name)
    if stage.name in rundir.IN_PLACE and seal is not None and seal["fingerprint"] != _fingerprint(stage, run):
        run.set_aside(stage.name)


def _give_usual_modes(work: Path) -> None:
    """Let others read what they may read of any new file: safetensors 0.8 keeps its files to their owner.

    Goes when safetensors follows the umask (tests/test_pipeline.py, the modes of a finished run).
    """
    mask = os.umask(0)
    os.umask(mask)
    with rundir.writing(work):
        for path in work.rglob("*.safetensors"):
            path.chmod(0o666 & ~mask)


def _content(stage: Stage, result: Result, work: Path) -> str:
    """What later stages depend on: the files of the artifacts when there are any, else everything the stage found.

    Seconds and memory are no part of an artifact: making it again, the same, leaves what comes after it done.
    """
    parts: dict[str, Any] = {"outcomes": [[verdict.claim, verdict.outcome] for verdict in result.verdicts]}
    for artifact in result.artifacts:
        path = work / Path(artifact.path).relative_to(stage.name)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                parts[f"{artifact.name}/{file.relative_to(path)}"] = sources.file_sha256(file)
    if not result.artifacts:
        parts["figures"] = result.figures
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def raise_for(verdicts: list[Verdict], inconclusive: str | None = None) -> None:
    """Raise what the first verdict that did not pass stands for, FAIL before INCONCLUSIVE."""
    undecided = {"pass": [], "fail": [("INCONCLUSIVE", GateFailed)], None: [("INCONCLUSIVE", GateInconclusive)]}
    for outcome, kind in [("FAIL", GateFailed), *undecided[inconclusive]]:
        found = [verdict for verdict in verdicts if verdict.outcome == outcome]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise kind(found[0].claim, f"{outcome}: {found[0].evidence}{more}", "see the report")


def artifact_at(target: str, runs_dir: Path) -> tuple[Artifact, Run | None]:
    """The artifact that a user names: a run (its merged model), ``run/artifact``, a folder or a .gguf file.

    What lies inside a run is that run's artifact, wherever in it the user points.

    Raises:
        RecipeError: it is nothing that a model can be loaded from.
        ModelError: a .gguf file without a tokenizer, or an adapter without its base.
    """
    path = Path(target)
    if rundir.is_run(path):
        run = rundir.open_run(path)
        found = run.artifacts()
        return found.get("merged") or found.get("adapter") or found["base"], run
    for folder in path.absolute().parents:
        if rundir.is_run(folder):
            run = rundir.open_run(folder)
            inside = [artifact for artifact in run.artifacts().values()
                      if path.resolve() in (Path(artifact.path).resolve(), *Path(artifact.path).resolve().parents)]
            return (inside[0] if path.exists() and len(inside) == 1 else run.artifact(path.name)), run
    if path.suffix == ".gguf" and path.is_file():
        if not (path.parent / "tokenizer_config.json").exists():
            raise ModelError(target, "lies in no run, and no tokenizer lies beside it",
                             "put tokenizer.json and tokenizer_config.json of its model into its folder")
        return Artifact(name=path.stem, path=str(path.resolve()), kind="gguf", tokenizer=str(path.resolve().parent),
                        size_bytes=path.stat().st_size), None
    if (path / "adapter_config.json").exists():
        return _adapter_at(path), None
    if (path / "config.json").exists():
        from lora_kit.model import weight_bytes

        return Artifact(name=path.resolve().name, path=str(path.resolve()), kind="hf", tokenizer=str(path.resolve()),
                        size_bytes=weight_bytes(path)), None
    raise RecipeError(target, "is neither a run nor a model, adapter or .gguf file",
                      f"name one, or leave it out for the newest run under {runs_dir}")


def _adapter_at(path: Path) -> Artifact:
    """An adapter outside of a run, on the base that it names."""
    from lora_kit.model import find_base, weight_bytes

    try:
        reference = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError):
        reference = None
    if not reference:
        raise ModelError(str(path), "does not say which base it is for",
                         "write base_model_name_or_path into its adapter_config.json")
    base = find_base(ModelSection(base=reference), path)["artifact"]
    return Artifact(name="adapter", path=str(path.resolve()), kind="adapter", base=base["path"],
                    tokenizer=base["tokenizer"], size_bytes=weight_bytes(path))


def train_on_ranks(target: RecipeFile | Path, *, runs_dir: Path, fresh: bool = False) -> Run:
    """Train as one of several launched processes: the first opens the run and prepares the data for all.

    Args:
        target: a recipe, or the folder of a run to go on with.

    Raises:
        LoraKitError: what stopped the first process, in every process; or this process.
        StoppedError: another process is gone.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=not torch.accelerator.is_available())
    told: list[Any] = [None, None, None]
    run = None
    if state.is_main_process:
        try:
            run = rundir.open_run(target) if isinstance(target, Path) else open_for(target, runs_dir, fresh=fresh)
            tell(Note(text=f"run {run.path}"))
            continue_run(run, until="data")
            _set_aside_if_stale(_stage("train"), run)
            with rundir.writing(run.path):
                told = [str(run.path), str(ranks.folder_of(run.path, secrets.token_hex(4))), None]
        except LoraKitError as error:
            told = [None, None, (error.exit_code, error.where, error.what, error.todo)]
    broadcast_object_list(told)
    if told[2] is not None:
        code, where, what, todo = told[2]
        raise BY_EXIT_CODE[code](where, what, todo)
    watched = ranks.Ranks(Path(told[1]), state.process_index, state.num_processes)
    try:
        if run is None:
            run = rundir.open_run(Path(told[0]))
            if _why_owed(_stage("train"), run) is not None:
                importlib.import_module("lora_kit.train").stage(run.recipe, run)
        else:
            continue_run(run, until="train")
        state.wait_for_everyone()
    except BaseException as error:
        explained = watched.explain(error)
        watched.end(getattr(explained, "exit_code", 70))
        if explained is error:
            raise
        raise explained from error
    watched.end(0)
    return run


def _stage(name: str) -> Stage:
    return STAGES[NAMES.index(name)]
