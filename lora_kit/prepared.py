"""Prepared data in the cache: its key, where it lies, what its ledger says.

The key covers everything that decides the token files: the data section and the seed,
the content of every source, tokenizer and template, lora-kit's own code that reads rows
and renders them, and the versions of the libraries that it renders with. Content is hashed,
never taken from a name, a size or a time.
Torch-free, so that ``plan`` on a cached ledger starts at once.
Reads sources (to hash them) and the cache; writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lora_kit import formats, sources, suite
from lora_kit.errors import DataError, RefusedError
from lora_kit.recipe import DataSource, Recipe
from lora_kit.sources import Resolved

_PACKAGE = Path(__file__).parent
_CODE = ("chat.py", "data.py", "items.py", "ledger.py", "lm_eval_library.py", "lm_eval_task.py", "overlap.py",
         "records.py", "rows.py", "selection.py", "shorten.py", "spool.py", "tokens.py", "turns.py", "types.py",
         "formats")
"""Modules whose code decides tokens, masks or their counts; a test holds it to what data.py imports."""
_LIBRARIES = ("transformers", "tokenizers", "jinja2")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Where prepared data lies; ``exists`` says whether it has been made."""

    folder: Path
    key: str
    sources: dict[str, list[Resolved]]
    relative_to: Path = Path(".")

    def overlap_path(self, recipe: Recipe) -> Path:
        """Where the count of overlap with the items of the recipe's suite lies: another suite, another count."""
        return sources.cache_dir() / "overlap" / f"{self.key[:32]}-{items_sha256(recipe, self.relative_to)[:16]}.json"

    def overlap(self, recipe: Recipe) -> list[dict[str, Any]] | None:
        """Overlap of training rows with the items of the recipe's suite, None where it has not been counted."""
        try:
            return json.loads(self.overlap_path(recipe).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @property
    def exists(self) -> bool:
        return (self.folder / "manifest.json").exists()

    def ledger(self) -> dict[str, Any]:
        """The ledger that was written with the token files; RefusedError when it is not whole."""
        path = self.folder / "ledger.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise RefusedError(str(path), "is not whole", f"remove {self.folder} and run again") from None


def find(recipe: Recipe, relative_to: Path, base: dict[str, Any]) -> Prepared:
    """Where the recipe's data lies in the cache, prepared or not yet.

    Args:
        relative_to: the recipe's folder.
        base: what :func:`lora_kit.model.find_base` returned.

    Raises:
        DataError, MachineError, RefusedError: a source is missing or not what the recipe names.
    """
    found = {split: [resolve_source(source, relative_to) for source in getattr(recipe.data, split)]
             for split in ("train", "held_out")}
    parts = {
        "data": recipe.section_json("data", "seed"),
        "sources": {split: [[item.reference, item.sha256, item.revision] for item in items]
                    for split, items in found.items()},
        "tokenizer": base["content"],
        "code": code_sha256(), "libraries": library_versions(),
    }
    if recipe.data.overlap == "drop":  # what is trained on then depends on what the evaluation asks
        parts["items"] = items_sha256(recipe, relative_to)
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Prepared(folder=sources.cache_dir() / "data" / key[:32], key=key, sources=found,
                    relative_to=relative_to)


def resolve_source(source: DataSource, relative_to: Path) -> Resolved:
    """A data source with its pinned content; hub and installed code are known by revision or version."""
    kind = sources.kind_of(source.source, relative_to)
    if kind == "python":
        package = source.source.removeprefix("python:")
        return Resolved(reference=source.source, path=Path(package), revision=_version_of(package), shown=package)
    if kind == "hub-data":
        repo, _, revision = source.source.removeprefix("hub:").partition("@")
        return Resolved(reference=source.source, path=Path(repo), revision=revision or None, shown=repo)
    if kind == "hub":
        raise DataError(source.source, "no such file or folder beside the recipe",
                        f"check the path, or write hub:{source.source} for a dataset on the hub")
    companions: tuple[str, ...] = ()
    if source.format:
        names_of = getattr(formats.load(source.format), "companions", None)
        companions = names_of(Path(source.source).name) if names_of else ()
    resolved = sources.resolve(source.source, sha256=source.sha256, relative_to=relative_to, companions=companions)
    if resolved.path.is_dir():
        raise DataError(source.source, "is a folder", "name a .jsonl, .json, .csv or .parquet file in it")
    return resolved


def _version_of(package: str) -> str:
    """Version of ``stdlib`` or of what the package (by the name it is imported by) was installed with."""
    top = package.partition(".")[0]
    if package == "stdlib" or top in sys.stdlib_module_names:
        return platform.python_version()
    distributions = metadata.packages_distributions().get(top)
    if not distributions:
        raise DataError(f"python:{package}", "is not installed", f"pip install {top}, or write python:stdlib")
    return ", ".join(f"{name} {metadata.version(name)}" for name in sorted(set(distributions)))


def library_versions() -> dict[str, str | None]:
    """Versions of the libraries that render and tokenize."""
    return {name: _version(name) for name in _LIBRARIES}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def items_sha256(recipe: Recipe, relative_to: Path) -> str:
    """One hash over what decides which items the recipe's evaluation asks, beside held-out rows."""
    asked = suite.suite_of(recipe, relative_to)
    tasks = suite.Suite(name=asked.name, tasks=tuple(asked.own_items()))
    limit = recipe.eval.limit if tasks.tasks else None
    return hashlib.sha256(json.dumps([tasks.fingerprint(), limit]).encode()).hexdigest()


def code_sha256() -> str:
    """SHA-256 of lora-kit's own code that decides tokens."""
    digest = hashlib.sha256()
    for name in _CODE:
        path = _PACKAGE / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
