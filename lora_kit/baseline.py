"""baseline.lock: what earlier artifacts scored, item by item, in a few kilobytes that a repository can keep.

Written from a finished evaluation (``lora-kit eval RUN --write-baseline PATH``), read in a later one
(``--baseline PATH`` or ``eval.baseline``) in place of scoring the earlier model again. Scores may only be
compared item by item when the same was asked in the same way; so the file also holds hashes of
every item, of the task's settings, of tokenizer and template, and the versions of the libraries that
scored, and is refused when one of them differs.

The file is JSON. Arrays are packed: little-endian, zlib, base85. Per task: ``items`` are the first five
bytes of the SHA-256 of each item. Per artifact and metric: ``scores`` are bits (of 0-1 scores) or float32,
``missing`` bits say which items had none, ``margins`` are float16, ``outcomes`` (of a corpus metric) JSON.
Reads run folders and locks; writes the lock.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections import defaultdict
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy

from lora_kit import tokens
from lora_kit.claims import BASELINE
from lora_kit.comparison import Scored
from lora_kit.errors import RecipeError, RefusedError
from lora_kit.rundir import Run, write_text, writing
from lora_kit.suite import LOSS, Suite
from lora_kit.types import Artifact

FORMAT = 1
SCORING = 1
"""Raised when lora-kit scores the same answers otherwise than before."""
_PACKAGES = ("torch", "transformers", "tokenizers")
_PACKAGES_OF = {"bitsandbytes": "bitsandbytes", "gguf": "llama-cpp-python"}
"""Further packages that score an artifact, by the start of its name."""
_HASH_BYTES = 5
_TODO = "make it again with lora-kit eval RUN --write-baseline"


def item_hashes(suite: Suite, eval_dir: Path, data_dir: Path) -> dict[str, dict[str, str]]:
    """By task and item_id the hash of what is asked and expected, before anything is scored.

    Args:
        eval_dir: with ``items/``, the questions of tasks that have some.
        data_dir: the data stage's folder, whose held-out rows are the items of a ``held_out_loss`` task.
    """
    found: dict[str, dict[str, str]] = {}
    for task in suite.tasks:
        path = eval_dir / "items" / f"{task.name}.json"
        if path.exists():
            items = json.loads(path.read_text(encoding="utf-8"))["items"]
            found[task.name] = {
                item["item_id"]: _hash(json.dumps({key: value for key, value in item.items()
                                                   if key not in ("cluster", "stratum")},
                                                  sort_keys=True, ensure_ascii=False).encode())
                for item in items}
        elif task.metrics == [LOSS]:
            rows = tokens.read_examples(data_dir, "held_out")
            found[task.name] = {}
            for row in range(len(rows)):
                example = rows[row]
                content = (numpy.asarray(example.tokens_T, "<i4").tobytes()
                           + numpy.asarray(example.loss_mask_T, "u1").tobytes())
                item_id = f"{example.origin} [{row}]"
                found[task.name][item_id] = _hash(item_id.encode() + content)
    return found


def describe(suite: Suite, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """What must not have changed beside the items: settings of tasks, tokenizers and templates, versions."""
    names = {"lora-kit scoring": str(SCORING)}
    packages = [*_PACKAGES, *(package for start, package in _PACKAGES_OF.items()
                              if any(name.startswith(start) for name in artifacts))]
    for package in packages:
        try:
            # What stands after the plus is the build: cpu and cuda of one release are one version.
            names[package] = metadata.version(package).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return {"versions": names, "tokenizers": {name: _tokenizer(each) for name, each in artifacts.items()},
            "tasks": {task.name: _settings(task.spec) for task in suite.tasks}}


def write(run: Run, suite: Suite, path: Path) -> dict[str, Any]:
    """Write what the run's artifacts scored on ``suite`` to ``path``; what was written.

    Raises:
        MachineError: it cannot be written.
    """
    eval_dir = run.stage_dir("eval")
    hashes = item_hashes(suite, eval_dir, run.stage_dir("data"))
    everything = run.artifacts()
    names = [name for name in everything if (eval_dir / name / "items.jsonl").exists()]
    told = describe(suite, {name: everything[name] for name in {"base": None} | dict.fromkeys(names)
                            if name in everything})
    made: dict[str, Any] = {"format": FORMAT, "suite": suite.name, "versions": told["versions"],
                            "tokenizers": told["tokenizers"], "tasks": {}}
    for task in suite.tasks:
        items = hashes.get(task.name)
        if items:
            made["tasks"][task.name] = {
                "settings": told["tasks"][task.name], "num_items": len(items),
                "items": _packed(bytes.fromhex("".join(items.values()))), "artifacts": {}}
    for name in names:
        lines: dict[tuple[str, str], dict[str, dict]] = defaultdict(dict)
        with open(eval_dir / name / "items.jsonl", encoding="utf-8") as file:
            for line in map(json.loads, file):
                lines[line["task"], line["metric"]][line["item_id"]] = line
        for (task, metric), by_id in lines.items():
            if task in made["tasks"]:
                column = _column([by_id.get(item_id, {}) for item_id in hashes[task]])
                made["tasks"][task]["artifacts"].setdefault(name, {})[metric] = column
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(made, indent=1) + "\n")
    return made


def read(path: Path, shown: str) -> dict[str, Any]:
    """The lock at ``path``, whole; ``shown`` is what errors call it.

    Raises:
        RecipeError: there is none.
        RefusedError: it is not one, not whole, or of another format.
    """
    if not path.is_file():
        raise RecipeError(shown, "no such baseline", "check the path, or write one with lora-kit eval RUN "
                          "--write-baseline")
    try:
        lock = json.loads(path.read_text(encoding="utf-8"))
        if lock["format"] != FORMAT:
            raise RefusedError(shown, f"is of format {lock['format']}; this lora-kit reads {FORMAT}", _TODO)
        for about in lock["tasks"].values():
            if len(hashes_of(about)) != about["num_items"]:
                raise ValueError("a hash for each item")
            for metrics in about["artifacts"].values():
                for column in metrics.values():
                    _scores(column, about["num_items"])
        if not isinstance(lock["versions"], dict) or not isinstance(lock["tokenizers"], dict):
            raise ValueError("versions and tokenizers by name")
    except (ValueError, KeyError, TypeError, AttributeError, zlib.error):
        raise RefusedError(shown, "is not a whole baseline", _TODO) from None
    return lock


def check(lock: Mapping[str, Any], now: Mapping[str, Any], hashes: Mapping[str, Mapping[str, str]], shown: str) -> None:
    """See that ``lock`` was made from the same questions, asked in the same way.

    Args:
        now: what :func:`describe` says of this run.
        hashes: what :func:`item_hashes` says of it.

    Raises:
        RefusedError: something differs; the first in the order tokenizer, template, versions, settings, prompts.
    """
    for name, then in lock["tokenizers"].items():
        for part in ("tokenizer", "template"):
            if name in now["tokenizers"] and then.get(part) != now["tokenizers"][name].get(part):
                raise RefusedError(shown, f"was made with another {part} of {name}", _TODO)
    for package, then in lock["versions"].items():
        if now["versions"].get(package, then) != then:
            raise RefusedError(shown, f"was made with {package} {then}, this is {now['versions'][package]}", _TODO)
    for task, about in lock["tasks"].items():
        if task not in hashes:
            continue
        if about["settings"] != now["tasks"][task]:
            raise RefusedError(shown, f"was made with other settings of task {task}", _TODO)
        then = set(hashes_of(about))
        changed = [item_id for item_id, value in hashes[task].items() if value not in then]
        if changed:
            raise RefusedError(shown, f"was made with other prompts: {len(changed)} of {len(hashes[task])} items of "
                               f"task {task} are not in it, e.g. {changed[0]}", _TODO)


def scored(lock: Mapping[str, Any], hashes: Mapping[str, Mapping[str, str]], now: Scored) -> Scored:
    """The lock's scores as subjects ``baseline/NAME``: lines with this run's item ids, clusters and weights."""
    found: Scored = {}
    alike: dict[tuple[str, str], dict[str, Any]] = {}
    # A score that is the same but for its packing is the same: rounding is no difference between models.
    exact: dict[tuple[str, str, str, float], float] = {}
    for by_metric in now.values():
        for (task, metric), lines in by_metric.items():
            for line in lines:
                alike.setdefault((task, line["item_id"]), line)
                if line.get("score") is not None:
                    exact[task, metric, line["item_id"], float(numpy.float32(line["score"]))] = line["score"]
    for task, about in lock["tasks"].items():
        places = {value: index for index, value in enumerate(hashes_of(about))}
        for name, metrics in about["artifacts"].items():
            for metric, column in metrics.items():
                values, margins = _scores(column, about["num_items"]), _margins(column)
                outcomes = json.loads(_unpacked(column["outcomes"])) if "outcomes" in column else []
                lines = []
                for item_id, value in hashes.get(task, {}).items():
                    line = alike.get((task, item_id))
                    if line is None or value not in places:
                        continue
                    place = places[value]
                    score = exact.get((task, metric, item_id, values[place]), values[place])
                    lines.append({"item_id": item_id, "score": score, "cluster": line["cluster"],
                                  "weight": line.get("weight", 1),
                                  **({"margin": margins[place]} if margins else {}),
                                  **({"outcome": outcomes[place]} if outcomes else {})})
                found.setdefault(f"{BASELINE}/{name}", {})[task, metric] = lines
    return found


def _settings(spec: Any) -> str:
    """Hash of a task's settings, without what is only for people."""
    values = spec.model_dump(mode="json", exclude_defaults=True, exclude={"description"})
    return _hash(json.dumps(values, sort_keys=True).encode())


def _tokenizer(artifact: Artifact) -> dict[str, str]:
    """Hashes of the content of an artifact's tokenizer and chat template; of those that it has."""
    folder, found = Path(artifact.tokenizer or artifact.path), {}
    if (folder / "tokenizer.json").is_file():
        found["tokenizer"] = _json_hash(folder / "tokenizer.json")
    template = folder / "chat_template.jinja"
    if template.is_file():
        found["template"] = _hash(template.read_bytes())
    elif (folder / "tokenizer_config.json").is_file():
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        if config.get("chat_template"):
            found["template"] = _hash(json.dumps(config["chat_template"]).encode())
    return found


def _json_hash(path: Path) -> str:
    return _hash(json.dumps(json.loads(path.read_text(encoding="utf-8")), sort_keys=True).encode())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:2 * _HASH_BYTES]


def hashes_of(about: Mapping[str, Any]) -> list[str]:
    """The hashes of a locked task's items, in their order."""
    text = _unpacked(about["items"]).hex()
    return [text[start:start + 2 * _HASH_BYTES] for start in range(0, len(text), 2 * _HASH_BYTES)]


def _column(lines: list[dict[str, Any]]) -> dict[str, str]:
    """Scores of one artifact by one metric, packed; an item without a score is missing, never a zero."""
    values = [line.get("score") for line in lines]
    known = numpy.array([value is not None for value in values])
    numbers = numpy.array([value if value is not None else 0 for value in values], dtype="<f4")
    if numpy.isin(numbers, (0, 1)).all():
        packed = {"bits": _packed(numpy.packbits(numbers.astype(bool)).tobytes())}
    else:
        packed = {"float32": _packed(numbers.tobytes())}
    if not known.all():
        packed["missing"] = _packed(numpy.packbits(~known).tobytes())
    margins = [line.get("margin") for line in lines]
    if any(margin is not None for margin in margins):
        clipped = numpy.clip([numpy.nan if margin is None else margin for margin in margins], -6e4, 6e4)
        packed["margins"] = _packed(clipped.astype("<f2").tobytes())
    outcomes = [line.get("outcome") for line in lines]
    if any(outcome is not None for outcome in outcomes):
        packed["outcomes"] = _packed(json.dumps(outcomes, separators=(",", ":")).encode())
    return packed


def _scores(column: Mapping[str, str], many: int) -> list[float | None]:
    if "bits" in column:
        numbers = numpy.unpackbits(numpy.frombuffer(_unpacked(column["bits"]), "u1"), count=many).astype(float)
    else:
        numbers = numpy.frombuffer(_unpacked(column["float32"]), "<f4").astype(float)
    if len(numbers) != many:
        raise ValueError("a score for each item")
    missing = numpy.zeros(many, "u1")
    if "missing" in column:
        missing = numpy.unpackbits(numpy.frombuffer(_unpacked(column["missing"]), "u1"), count=many)
    return [None if gone else float(number) for number, gone in zip(numbers, missing, strict=True)]


def _margins(column: Mapping[str, str]) -> list[float | None]:
    if "margins" not in column:
        return []
    numbers = numpy.frombuffer(_unpacked(column["margins"]), "<f2").astype(float)
    return [None if numpy.isnan(number) else float(number) for number in numbers]


def _packed(content: bytes) -> str:
    return base64.b85encode(zlib.compress(content, 9)).decode("ascii")


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))
