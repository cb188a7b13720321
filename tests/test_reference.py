"""The generated reference says what the code says, and nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit import engines, errors, formats, metrics, quantizers, reference
from lora_kit.recipe import Recipe, json_schema

ROOT = Path(__file__).parent.parent


def test_the_generated_files_are_up_to_date():
    assert reference.stale(ROOT) == [], "run make docs"


def test_every_setting_is_on_the_page_with_its_meaning():
    page = reference.files()["docs/recipe.md"]
    for name, field in Recipe.model_fields.items():
        if name in ("name", "description", "seed"):
            assert f"| `{name}` |" in page
        else:
            assert f"## `{name}" in page, field
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("| `")}
    assert lines["`train.warmup`"] == (
        "| `train.warmup` | number ≥ 0, < 1 | `0.05` | Share of the steps in which the learning rate rises "
        "linearly from zero. |")
    assert "| *required* |" in lines["`model.base`"]
    assert "`16bit` \\| `8bit` \\| `4bit`" in lines["`model.load_in`"]
    assert "text or list of text" in lines["`lora.targets`"]
    assert "`data.train[].source`" in lines and "`quantize[].method`" in lines
    without_meaning = [key for key, line in lines.items() if line.split("|")[-2].strip() == ""]
    assert without_meaning == []


def test_the_schema_is_the_one_of_the_code():
    schema = json.loads(reference.files()["recipes/recipe.schema.json"])
    assert schema == json_schema()
    assert "name" not in schema["required"]


def test_stale_files_are_named_and_written_again(tmp_path):
    assert sorted(path.name for path in reference.stale(tmp_path)) == [
        "extensions.md", "recipe.md", "recipe.schema.json"]
    reference.write(tmp_path)
    assert reference.stale(tmp_path) == []
    page = tmp_path / "docs" / "recipe.md"
    page.write_text(page.read_text() + "by hand\n")
    assert reference.stale(tmp_path) == [page]


def test_the_command_checks_without_torch():
    program = ("import sys; from lora_kit import reference; reference.main(['--check']); "
               "sys.exit('torch' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [[], ["--chek"]])
def test_the_command_says_how_it_is_used(arguments):
    with pytest.raises(SystemExit, match="--write | --check"):
        reference.main(arguments)


def test_every_extension_is_on_its_page():
    page = reference.files()["docs/extensions.md"]
    for package in (metrics, quantizers, engines):
        for name in package.names():
            assert f"### `{name}`\n\n" in page
    for name in formats.names():
        assert f"- [`{name}`](sources-and-formats.md#{name}): " in page
    assert "- `type: nf4`: 4-bit NormalFloat" in page
    # What is said to developers, and the markup of docstrings, stay in the code.
    assert not re.search(r"Torch-free|Standard library only|Reads and writes nothing|Shape suffix|``|:\w+:`", page)


def test_every_format_is_shown_with_its_row():
    shown = reference.format_rows()
    rows = [json.loads(row) for row in re.findall(r"```json\n(.*?)\n```", shown, re.DOTALL)]
    assert rows == [formats.load(name).EXAMPLE for name in formats.names()]


def test_exit_codes_are_those_of_the_errors():
    listed = {code: name for code, name, _ in reference.exit_codes()}
    assert listed == {0: "", 130: ""} | {code: kind.__name__ for code, kind in errors.BY_EXIT_CODE.items()}
    assert all(meaning for _, _, meaning in reference.exit_codes())
