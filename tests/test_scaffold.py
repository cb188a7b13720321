"""What `lora-kit init` writes: the shipped recipe, line for line, but for the answers."""

from __future__ import annotations

import os

import pytest

from lora_kit import scaffold
from lora_kit.errors import MachineError, RecipeError
from lora_kit.recipe_file import parse_recipe, read_recipe
from lora_kit.shipped import recipe_path

SHIPPED = scaffold.names()


def changed_lines(name, written):
    before = recipe_path(name).read_text().splitlines()
    after = written.read_text().splitlines()
    return [line for line in after if line not in before], [line for line in before if line not in after]


def test_names_are_the_shipped_recipes():
    assert "qwen3-0.6b-lora" in SHIPPED
    assert scaffold.SCHEMA_FILE not in SHIPPED
    assert scaffold.description("mistral-7b-qlora") == "Chat fine-tuning of Mistral 7B with QLoRA on one GPU"


@pytest.mark.parametrize("name", SHIPPED)
def test_questions_default_to_what_the_recipe_says(name):
    recipe = read_recipe(recipe_path(name)).recipe
    defaults = {question.key: question.default for question in scaffold.questions(name)}
    assert defaults == {"base": recipe.model.base, "data": recipe.data.train[0].source, "name": name}


@pytest.mark.parametrize("name", SHIPPED)
def test_without_answers_the_copy_is_verbatim(name, tmp_path):
    defaults = {question.key: question.default for question in scaffold.questions(name)}
    for folder, answers in (("none", {}), ("defaults", defaults), ("empty", {"base": "", "data": " "})):
        written = scaffold.copy_recipe(name, tmp_path / folder, answers)
        assert written == tmp_path / folder / f"{name}.yaml"
        assert written.read_text() == recipe_path(name).read_text()


@pytest.mark.parametrize("name", SHIPPED)
def test_answers_change_their_lines_and_nothing_else(name, tmp_path):
    written = scaffold.copy_recipe(name, tmp_path, {"base": "my/model@abc", "data": "rows.jsonl", "name": "mine"})
    assert written == tmp_path / "mine.yaml"
    recipe = read_recipe(written).recipe
    assert (recipe.name, recipe.model.base, recipe.model.sha256) == ("mine", "my/model@abc", None)
    assert [source.source for source in recipe.data.train] == ["rows.jsonl"]
    assert recipe.data.train[0].format is None and recipe.data.held_out == []
    added, removed = changed_lines(name, written)
    assert len(added) == 2, added
    # Apart from what describes the old data, every other setting is the shipped one.
    shipped = read_recipe(recipe_path(name)).recipe
    for section in ("lora", "train", "merge", "quantize", "bench", "eval", "cost"):
        assert getattr(recipe, section) == getattr(shipped, section)
    keys = {line.strip(" -").partition(":")[0] for line in removed if not line.strip().startswith("#")}
    assert keys <= {"base", "held_out", *scaffold._BOUND_TO_DATA, "source"}, keys


PAGE = """\
# The head.
model:
  base: pypi:a==1/b.gguf   # the base
  sha256: {digest}
  template: chatml
data:
  train:
    # rows of two archives
    - source: pypi:c==1/d.json   # the first
      sha256: {digest}
      format: two_party
    - source: pypi:e==1/f.json
      limit: 3
  # what is asked afterwards
  held_out:
    - source: pypi:g==1/h.json
      format: bfcl
  # longest row
  max_tokens: 64

# The adapter.
lora:
  rank: 4
""".format(digest="a" * 64)

FILLED = """\
# The head.
model:
  base: org/name   # the base
  template: chatml
data:
  train:
    # rows of two archives
    - source: "a: b.jsonl"   # the first
  # longest row
  max_tokens: 64

# The adapter.
lora:
  rank: 4
"""


def test_comments_stay_and_what_describes_other_data_goes(tmp_path, monkeypatch):
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "page.yaml").write_text(PAGE)
    (tmp_path / "shipped" / scaffold.SCHEMA_FILE).write_text("{}")
    monkeypatch.setattr("lora_kit.shipped.folder", lambda name: tmp_path / "shipped")
    parse_recipe(PAGE, tmp_path / "page.yaml")
    written = scaffold.copy_recipe("page", tmp_path, {"base": "org/name", "data": "a: b.jsonl"})
    assert written.read_text() == FILLED


def test_a_single_source_without_a_dash(tmp_path, monkeypatch):
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "page.yaml").write_text(
        "name: page\nmodel: {base: a/b}\ndata:\n  train:\n    source: x.jsonl\n    format: alpaca\n")
    (tmp_path / "shipped" / scaffold.SCHEMA_FILE).write_text("{}")
    monkeypatch.setattr("lora_kit.shipped.folder", lambda name: tmp_path / "shipped")
    written = scaffold.copy_recipe("page", tmp_path / "other.yaml", {"data": "y.csv"})
    assert written.read_text() == "name: other\nmodel: {base: a/b}\ndata:\n  train:\n    source: y.csv\n"


def test_a_file_that_is_here_is_named_from_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "base").mkdir()
    written = scaffold.copy_recipe(
        "qwen3-0.6b-lora", tmp_path / "recipes", {"base": "base", "data": "rows.jsonl", "name": "mine"})
    recipe = read_recipe(written)
    assert (recipe.folder / recipe.recipe.data.train[0].source).resolve() == tmp_path / "rows.jsonl"
    assert (recipe.folder / recipe.recipe.model.base).resolve() == tmp_path / "base"


def test_the_schema_lies_beside_the_recipe_and_is_not_replaced(tmp_path):
    scaffold.copy_recipe("qwen3-0.6b-lora", tmp_path, {})
    schema = tmp_path / scaffold.SCHEMA_FILE
    assert schema.read_text() == (recipe_path("x").parent / scaffold.SCHEMA_FILE).read_text()
    schema.write_text("mine")
    scaffold.copy_recipe("qwen3-0.6b-lora", tmp_path, {"name": "second"})
    assert schema.read_text() == "mine"


def test_an_existing_file_is_never_touched(tmp_path):
    (tmp_path / "mine.yaml").write_text("precious")
    for target in (tmp_path, tmp_path / "mine.yaml"):
        with pytest.raises(RecipeError, match="mine.yaml: exists already") as caught:
            scaffold.copy_recipe("qwen3-0.6b-lora", target, {"name": "mine"})
        assert caught.value.exit_code == 2
    assert os.listdir(tmp_path) == ["mine.yaml"]
    assert (tmp_path / "mine.yaml").read_text() == "precious"


@pytest.mark.parametrize("answers, message", [
    ({"name": "a/b"}, "'a/b' names no recipe"),
    ({"name": "../up"}, "names no recipe"),
    ({"name": "two words"}, "'name' is 'two words'"),
    ({"colour": "red"}, "asks nothing called 'colour'; it asks: base, data, name"),
])
def test_answers_that_no_recipe_can_hold(tmp_path, answers, message):
    with pytest.raises(RecipeError) as caught:
        scaffold.copy_recipe("qwen3-0.6b-lora", tmp_path / "new", answers)
    assert message in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'qwen3-8b-qlora'"):
        scaffold.questions("qwen3-8b-qlor")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        scaffold.copy_recipe("qwen3-0.6b-lora", tmp_path / "file" / "sub", {})
