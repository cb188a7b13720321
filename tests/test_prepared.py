"""Prepared data's key: it covers everything that decides the token files, and nothing else."""

from __future__ import annotations

import json
import platform
from importlib import metadata
from pathlib import Path

import pytest

from lora_kit import prepared
from lora_kit.errors import DataError, RefusedError
from lora_kit.recipe import DataSource, Recipe
from tests import test_architecture

BASE = {"content": "c" * 64}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text("rows")
    return tmp_path


def find(folder: Path, base=BASE, *, source="rows.jsonl", **fields) -> prepared.Prepared:
    recipe = Recipe.model_validate({
        "name": "r", "model": {"base": "b"}, "data": {"train": source, **fields.pop("data", {})}, **fields})
    return prepared.find(recipe, folder, base)


def test_the_key_is_a_function_of_what_decides_the_tokens(folder):
    key = find(folder).key
    assert find(folder).key == key and find(folder).folder == folder / "cache" / "data" / key[:32]
    (folder / "same.jsonl").write_text("rows")
    others = {
        "seed": find(folder, seed=1).key, "settings": find(folder, data={"max_tokens": 9}).key,
        "tokenizer": find(folder, {"content": "d" * 64}).key, "source": find(folder, source="same.jsonl").key,
        "held out": find(folder, data={"held_out": "same.jsonl"}).key,
    }
    (folder / "rows.jsonl").write_text("ROWS")
    others["content"] = find(folder).key
    assert len({key, *others.values()}) == 1 + len(others)


def test_other_sections_have_the_same_data(folder):
    same = find(folder, train={"steps": 3}, lora={"rank": 2}, bench={"repeats": 1}, description="x")
    assert same.key == find(folder).key


def test_other_code_makes_other_data(folder, monkeypatch):
    key = find(folder).key
    package = folder / "lora_kit"
    package.mkdir()
    for name in prepared._CODE:
        source = prepared._PACKAGE / name
        if source.is_dir():
            (package / name).mkdir()
            for file in source.glob("*.py"):
                (package / name / file.name).write_bytes(file.read_bytes())
        else:
            (package / name).write_bytes(source.read_bytes())
    monkeypatch.setattr(prepared, "_PACKAGE", package)
    assert find(folder).key == key
    (package / "formats" / "text.py").write_text("# changed\n")
    assert find(folder).key != key


_NO_TOKENS = {"multiple_choice", "claims", "errors", "events", "prepared", "recipe", "recipe_fields", "recipe_serving",
              "recipe_file", "rundir", "shipped", "sources", "suite", "task_source", "units", "yaml_file",
              "metrics", "assertions"}
"""Modules that data.py imports and that decide no token: they name, resolve, report and store."""


def test_every_module_that_decides_tokens_is_in_the_key():
    counted = {name.removesuffix(".py") for name in prepared._CODE}
    assert all((prepared._PACKAGE / name).exists() for name in prepared._CODE)
    waiting, reached = ["data"], set()
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            tree = test_architecture.TREES[name]
            waiting += {other.partition(".")[0] for other, _ in test_architecture.imported(tree)}
    assert reached - counted - _NO_TOKENS == set(), "enter it in prepared._CODE, or here when it decides no token"
    assert counted <= reached


def test_other_libraries_make_other_data(folder, monkeypatch):
    key, version = find(folder).key, prepared._version
    monkeypatch.setattr(prepared, "_version", lambda name: "0" if name == "tokenizers" else version(name))
    assert find(folder).key != key
    assert version("tokenizers") and version("no-such-package") is None


def test_the_evaluation_is_in_the_key_only_where_it_decides_rows(folder):
    def key(overlap, limit):
        return find(folder, data={"overlap": overlap}, eval={"suite": "tools", "limit": limit}).key

    assert key("keep", 3) == key("keep", 4)
    assert key("drop", 3) != key("drop", 4)


def test_a_ledger_that_is_not_whole_is_refused(folder):
    found = find(folder)
    assert not found.exists
    found.folder.mkdir(parents=True)
    (found.folder / "manifest.json").write_text("{}")
    assert found.exists
    for content in (None, "{"):
        if content:
            (found.folder / "ledger.json").write_text(content)
        with pytest.raises(RefusedError, match="ledger.json: is not whole; remove .* and run again"):
            found.ledger()
    (found.folder / "ledger.json").write_text(json.dumps({"splits": {}}))
    assert found.ledger() == {"splits": {}}


# ---- sources ---------------------------------------------------------------------------


def resolve(reference: str, folder: Path, **fields):
    return prepared.resolve_source(DataSource(source=reference, **fields), folder)


def test_a_hub_dataset_is_known_by_its_revision(folder):
    found = resolve("hub:org/data@abc", folder)
    assert (str(found.path), found.revision, found.sha256) == ("org/data", "abc", None)
    assert resolve("hub:org/data", folder).revision is None


@pytest.mark.parametrize(("package", "version"), [
    ("stdlib", platform.python_version()), ("json", platform.python_version()), ("xml.dom", platform.python_version()),
    ("numpy", f"numpy {metadata.version('numpy')}"), ("ruamel.yaml", f"ruamel.yaml {metadata.version('ruamel.yaml')}"),
    ("rouge_score", f"rouge_score {metadata.version('rouge_score')}"),
])
def test_installed_code_is_known_by_its_version(package, version, folder):
    assert resolve(f"python:{package}", folder).revision.lower().replace("-", "_") == version.lower().replace("-", "_")


def test_a_package_that_is_not_installed_is_told(folder):
    with pytest.raises(DataError, match="python:nonesuch.part: is not installed; pip install nonesuch, or write "):
        resolve("python:nonesuch.part", folder)


def test_the_answers_of_a_benchmark_count_in_its_hash(folder):
    before = resolve("rows.jsonl", folder, format="bfcl").sha256
    (folder / "possible_answer").mkdir()
    (folder / "possible_answer" / "rows.jsonl").write_text("answers")
    assert resolve("rows.jsonl", folder, format="bfcl").sha256 != before
    assert resolve("rows.jsonl", folder, format="messages").sha256 == before


@pytest.mark.parametrize(("reference", "told"), [
    ("none.jsonl", "no such file or folder"), ("org/data", "write hub:org/data for a dataset on the hub"),
    (".", r"is a folder; name a \.jsonl"),
])
def test_a_source_that_is_not_there_is_told(reference, told, folder):
    with pytest.raises(DataError, match=told):
        resolve(reference, folder)
