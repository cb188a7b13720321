"""Multiple choice against lm-evaluation-harness: the same requests, tokens, log-probabilities and scores, and the time.

    python benchmarks/eval_parity.py --data DIR [--items 300] [--tasks arc_easy,piqa] [--shots 0,5] [--threads N]
                                     [--check] [--json PATH]
    python benchmarks/eval_parity.py --quick     a tiny random model and a few rows made up here

DIR has multiple_choice/arc_easy.jsonl, piqa.jsonl and openbook_qa.jsonl (rows with query, choices, gold); the fourth
task, stdlib_prose, asks how likely sentences of the standard library's own prose go on as they do. For each task and
number of fixed examples (the file's last rows) one YAML file is written, which both read: lm-evaluation-harness through
its TaskManager and HFLM, ours through a suite. Both have SmolLM2-135M (the base of recipes/chat.yaml) in fp32.

Item by item the request strings, the token ids, acc and acc_norm (for prose: whether it is the greedy continuation)
must be equal, and log-probabilities differ by at most 1e-4. These are compared with a second pass of the harness,
``softmax_dtype="float64"``: by default it takes torch's log_softmax in fp32, which on a CPU adds up the 49,152
exponentials of a row with an error of some 1e-5 for each token, always to the same side (torch 2.13; the column
"default" shows what that comes to). The scores are compared with the default pass.

Timed are ``HFLM.loglikelihood`` as it is by default and our ``multiple_choice.score``, each from strings to
log-probabilities (ours to scores), in blocks of items that take turns. Before that, the harness tries batch sizes on
some items and keeps its fastest. Ours has no such setting; its time includes reading some items twice, by which it
checks itself. Compared are CPU seconds, which a busy machine disturbs less than the clock. ``--check`` exits with 1
where anything differs or a target of TARGETS is missed. Needs the extra ``lm-eval``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

CHOICES = ("arc_easy", "openbook_qa", "piqa")
PROSE = "stdlib_prose"
TARGETS = {("arc_easy", 0): 2.5, ("openbook_qa", 0): 2.5, ("piqa", 0): 1.5, ("arc_easy", 5): 8.0,
           ("openbook_qa", 5): 8.0}
"""How many times the harness's speed ours has to be, by (task, examples)."""
LARGEST_DIFFERENCE = 1e-4
BATCH_SIZES = {0: (4, 8, 16, 32), 5: (1, 2, 4, 8)}
"""What the harness tries, by examples."""
BLOCKS = 5
_TRIED_ITEMS = {0: 12, 5: 4}
_WORDS = "red green blue one two three sun moon tree house river stone bird fish bread salt".split()


def rows_of(task: str, data: Path | None, quick: bool) -> list[dict[str, Any]]:
    """All rows of ``task``; made up for ``--quick``."""
    if task == PROSE:
        return prose(40 if quick else 400)
    if quick:
        return [{"query": f"Which is number {row}?\n" if row % 3 else f"{_WORDS[row % 16]} and ", "gold": row % 3,
                 "choices": [" ".join(_WORDS[(row * k + j) % 16] for j in range(1 + (row + k) % 4)) for k in (1, 2, 5)]}
                for row in range(30)]
    with open(data / "multiple_choice" / f"{task}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prose(number: int) -> list[dict[str, Any]]:
    """Sentences of the standard library's docstrings: their beginning, and how they go on."""
    from lora_kit import rows
    from lora_kit.prepared import resolve_source
    from lora_kit.task_source import TaskSource

    source, found, seen = TaskSource(source="python:stdlib"), [], set()
    for _, record, read in rows.rows_of(source, resolve_source(source, _ROOT)):
        text = read(record, "").messages[-1].content or ""
        words = text.split("\n\n")[0].split()
        # Of two requests with one text, cut in two places, lm-evaluation-harness 0.4.13 scores one by the other's rows.
        if 20 <= len(words) <= 60 and text.isascii() and (said := " ".join(words)) not in seen:
            seen.add(said)
            cut = len(words) - 6 - len(found) % 5
            found.append({"query": " ".join(words[:cut]), "rest": " " + " ".join(words[cut:])})
        if len(found) == number:
            break
    return found


def write_task(folder: Path, task: str, rows: list[dict], shots: list[dict]) -> Path:
    """The YAML file that both read, with its rows beside it."""
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    fields = {"task": task, "dataset_path": "json", "test_split": "test",
              "dataset_kwargs": {"data_files": {"test": str(folder / f"{task}.jsonl")}},
              "doc_to_text": "query", "num_fewshot": len(shots)}
    if task == PROSE:
        fields |= {"output_type": "loglikelihood", "doc_to_target": "rest", "target_delimiter": "",
                   "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    else:
        fields |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold",
                   "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}
                                   for metric in ("acc", "acc_norm")]}
    if shots:
        fields["fewshot_config"] = {"sampler": "first_n", "samples": shots}
    path = folder / f"{task}.yaml"
    # JSON is YAML.
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items()), encoding="utf-8")
    return path


@contextmanager
def quiet_library() -> Iterator[None]:
    """lm-evaluation-harness warns of what it takes by default, and datasets of its cache: not of interest here."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


class Theirs:
    """lm-evaluation-harness with one model; ``lm`` computes, ``task`` asks and scores."""

    def __init__(self, folder: Path) -> None:
        from lm_eval.models.huggingface import HFLM

        self.lm = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=1)

    def load(self, path: Path) -> None:
        from lm_eval.tasks import TaskManager

        self.task = TaskManager(include_path=str(path.parent), include_defaults=False).load([path.stem])["tasks"][
            path.stem]
        self.task.set_fewshot_seed(1234)
        self.task.build_all_requests()
        self.requests: dict[int, list] = {}
        for instance in self.task.instances:
            self.requests.setdefault(instance.doc_id, []).append(instance)

    def answer(self, items: range, batch_size: int, *, exact: bool = False) -> list[tuple[float, bool]]:
        import torch

        self.lm.batch_size_per_gpu, self.lm.softmax_dtype = batch_size, torch.float64 if exact else None
        return self.lm.loglikelihood([one for item in items for one in self.requests[item]], disable_tqdm=True)

    def scores(self, item: int, answers: list[tuple[float, bool]]) -> dict[str, float]:
        return self.task.process_results(self.task.eval_docs[item], answers)

    def encode(self, item: int) -> list[tuple[list[int], list[int]]]:
        return [self.lm._encode_pair(*one.args) for one in self.requests[item]]


class Ours:
    """lora-kit's task and engine."""

    def __init__(self, folder: Path) -> None:
        from lora_kit.engines import open_engine
        from lora_kit.types import Artifact

        self.engine = open_engine(Artifact(name="base", path=str(folder), kind="hf", tokenizer=str(folder)),
                                  dtype="fp32")

    def load(self, path: Path) -> None:
        from lora_kit import items
        from lora_kit.engines.hf import HfEngine
        from lora_kit.recipe import Recipe
        from lora_kit.suite import read_suite

        (path.parent / "suite.yaml").write_text(f"tasks: [./{path.name}]\n", encoding="utf-8")
        [self.task] = read_suite("suite.yaml", path.parent).tasks
        (path.parent / "suite.yaml").unlink()  # the harness would take it for a task
        recipe = Recipe.model_validate({"name": "parity", "model": {"base": "b"}, "data": {"train": "rows.jsonl"}})
        self.items = [item.as_dict() for item in items.make_items(self.task, recipe, path.parent, []).items]
        # A new engine on the same weights checks itself anew.
        self.engine = HfEngine(self.engine.model, self.engine.tokenizer, stop_ids=self.engine.stop_ids)

    def answer(self, items: range) -> list[dict[str, Any]]:
        from lora_kit import multiple_choice

        asked = [self.items[item] for item in items]
        return multiple_choice.score(self.engine, self.task.name, self.task.spec, asked, None)


def spent(function: Callable[[], Any]) -> tuple[Any, float, float]:
    """What ``function`` gives, its CPU seconds and its seconds."""
    cpu, clock = time.process_time(), time.perf_counter()
    found = function()
    return found, time.process_time() - cpu, time.perf_counter() - clock


def measure(theirs: Theirs, ours: Ours, path: Path, batch_sizes: tuple[int, ...], shots: int,
            num_exact: int) -> dict[str, Any]:
    """Parity and time of one task, in blocks that take turns; log-probabilities of the first ``num_exact`` items."""
    with quiet_library():
        theirs.load(path)
    ours.load(path)
    num_items = len(ours.items)
    assert num_items == len(theirs.requests)
    sample = range(min(_TRIED_ITEMS[5 if shots else 0], num_items))
    theirs.answer(sample[:1], 1)
    tried = {size: spent(lambda size=size: theirs.answer(sample, size))[1] for size in batch_sizes}
    best = min(tried, key=tried.get)
    blocks = [range(num_items * block // BLOCKS, num_items * (block + 1) // BLOCKS) for block in range(BLOCKS)]
    default: list[tuple[float, bool]] = []
    lines: dict[str, list[dict]] = {metric: [] for metric in ours.task.metrics}
    took: dict[str, list[tuple[float, float]]] = {"theirs": [], "ours": []}
    for number, block in enumerate(blocks):
        for side in (("theirs", "ours"), ("ours", "theirs"))[number % 2]:
            if side == "theirs":
                found, *seconds = spent(lambda block=block: theirs.answer(block, best))
                default += found
            else:
                found, *seconds = spent(lambda block=block: ours.answer(block))
                for line in found:
                    lines[line["metric"]].append(line)
            took[side].append(tuple(seconds))
    exact = theirs.answer(range(min(num_exact, num_items)), best, exact=True)
    cpu = {side: sum(seconds for seconds, _ in blocks) for side, blocks in took.items()}
    clock = {side: sum(seconds for _, seconds in blocks) for side, blocks in took.items()}
    return {"task": path.stem, "shots": shots, "items": num_items, "best_batch_size": best, "tried_cpu_seconds": tried,
            "cpu_seconds": cpu, "seconds": clock, "times_faster": cpu["theirs"] / cpu["ours"],
            "times_faster_by_the_clock": clock["theirs"] / clock["ours"],
            "times_faster_by_block": [one[0] / other[0] for one, other in zip(*took.values(), strict=True)],
            "noise_nats": ours.engine.likelihood_noise, "note": ours.engine.likelihood_note,
            "items_exact": min(num_exact, num_items), **compare(theirs, ours, default, exact, lines)}


def compare(theirs: Theirs, ours: Ours, default: list[tuple[float, bool]], exact: list[tuple[float, bool]],
            lines: dict[str, list[dict]]) -> dict[str, Any]:
    """What differs, item by item; ``exact`` are the first of the answers that ``default`` has all of."""
    from lora_kit import multiple_choice

    found: dict[str, Any] = {"other_requests": 0, "other_tokens": 0, "largest_difference": 0.0,
                             "largest_difference_to_default": 0.0, "near_ties": 0}
    found |= {f"other_{metric}": 0 for metric in lines} | {metric: 0.0 for metric in lines}
    flat, flat_exact = iter(default), iter(exact)
    for item, of_item in theirs.requests.items():
        about, answers = ours.items[item]["likelihood"], [next(flat) for _ in of_item]
        requests = [(about["context"], each) for each in about["continuations"]]
        found["other_requests"] += requests != [one.args for one in of_item]
        question = multiple_choice.encode(ours.engine.tokenizer, about["context"], about["continuations"])
        found["other_tokens"] += theirs.encode(item) != [
            (list(question.context), list(each)) for each in question.continuations]
        scores = theirs.scores(item, answers)
        for metric, of_metric in lines.items():
            line = of_metric[item]
            found[f"other_{metric}"] += line["score"] != float(scores[metric])
            found[metric] += line["score"] / len(theirs.requests)
            found["near_ties"] += bool(line.get("near_tie"))
        for key, source in (("largest_difference_to_default", iter(answers)), ("largest_difference", flat_exact)):
            for own, (value, _) in zip(next(iter(lines.values()))[item]["log_probs"], source, strict=False):
                found[key] = max(found[key], abs(value - own))
    return found


def problems_of(row: dict[str, Any], quick: bool) -> list[str]:
    """What of ``row`` breaks the promise."""
    name = f"{row['task']} with {row['shots']} examples"
    found = [f"{name}: {key.removeprefix('other_')} differ in {value} items" for key, value in row.items()
             if key.startswith("other_") and value]
    if row["largest_difference"] > LARGEST_DIFFERENCE:
        found.append(f"{name}: log-probabilities differ by up to {row['largest_difference']:.2g}")
    target = TARGETS.get((row["task"], row["shots"]))
    if target and not quick and row["times_faster"] < target:
        found.append(f"{name}: {row['times_faster']:.2f} times as fast, not {target}")
    return found


def model_folder(quick: bool, folder: Path) -> Path:
    if quick:
        from tests import tiny

        return tiny.save_model(folder / "model", initializer_range=0.15)[0]
    from tests import fetch

    return fetch.base()


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder that has multiple_choice/")
    parser.add_argument("--items", type=int, default=300, help="items of each task")
    parser.add_argument("--tasks", default=",".join((*CHOICES, PROSE)), help="names, by commas")
    parser.add_argument("--shots", default="0,5", help="numbers of fixed examples, by commas")
    parser.add_argument("--exact", type=int, metavar="N", help="items whose log-probabilities are compared; "
                        "default: all without examples, 60 with them, since the harness reads them once more for it")
    parser.add_argument("--threads", type=int, help="of both; default: as the environment says")
    parser.add_argument("--quick", action="store_true", help="a tiny model and made-up rows: does it work at all")
    parser.add_argument("--check", action="store_true", help="exit with 1 when anything differs or a target is missed")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    arguments = parser.parse_args()
    if not arguments.quick and (arguments.data is None or not (arguments.data / "multiple_choice").is_dir()):
        sys.exit("--data DIR: name the folder that has multiple_choice/, or use --quick")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from lora_kit import events

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place, events.listening(lambda _event: None):
        os.environ["HF_DATASETS_CACHE"] = f"{place}/cache"
        folder = model_folder(arguments.quick, Path(place))
        with quiet_library():
            theirs = Theirs(folder)
        ours = Ours(folder)
        print(f"fp32, {torch.get_num_threads()} threads; CPU seconds; the largest difference of a log-probability\n")
        print(f"{'task':13} {'shots':>5} {'items':>5} {'harness':>8} {'batch':>5} {'ours':>7} {'faster':>7} "
              f"{'wanted':>6} {'by clock':>8} {'difference':>10} {'default':>8}  unequal items", flush=True)
        for shots in map(int, arguments.shots.split(",")):
            for task in arguments.tasks.split(","):
                everything = rows_of(task, arguments.data, arguments.quick)
                asked = everything[:len(everything) - shots][:12 if arguments.quick else arguments.items]
                with tempfile.TemporaryDirectory(dir=place) as own:
                    path = write_task(Path(own), task, asked, everything[-shots:] if shots else [])
                    sizes = (2,) if arguments.quick else BATCH_SIZES[5 if shots else 0]
                    num_exact = arguments.exact or (60 if shots else len(asked))
                    row = measure(theirs, ours, path, sizes, shots, num_exact)
                rows.append(row)
                unequal = sum(value for key, value in row.items() if key.startswith("other_"))
                cpu = row["cpu_seconds"]
                print(f"{task:13} {shots:5} {row['items']:5} {cpu['theirs']:8.1f} {row['best_batch_size']:5} "
                      f"{cpu['ours']:7.1f} {row['times_faster']:6.2f}x {TARGETS.get((task, shots), ''):>6} "
                      f"{row['times_faster_by_the_clock']:7.2f}x {row['largest_difference']:10.1e} "
                      f"{row['largest_difference_to_default']:8.1e}  {unequal}", flush=True)
    missed = [problem for row in rows for problem in problems_of(row, arguments.quick)]
    if arguments.json:
        figures = {"threads": torch.get_num_threads(), "rows": rows, "missed": missed}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("\n" + "\n".join(missed or ["everything is equal, and as fast as promised" if not arguments.quick else
                                       "everything is equal"]))
    if arguments.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
