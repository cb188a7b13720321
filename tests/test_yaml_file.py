"""YAML that people write: read safely, every mistake with its line."""

from __future__ import annotations

import pytest

from lora_kit import yaml_file
from lora_kit.errors import RecipeError
from lora_kit.yaml_file import Places, load_tree, plain, read_text


def tree_of(text: str, **options):
    return load_tree(text, "f.yaml", parts="sections", needed="write some", **options)


def line_of(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        tree_of(text)
    return str(caught.value)


def test_a_missing_file_a_folder_and_a_binary_file_are_told_apart(tmp_path):
    (tmp_path / "model.yaml").write_bytes(b"\xff\xfe\x00GGUF")
    cases = {
        tmp_path / "none.yaml": ": no such recipe; look there",
        tmp_path: ": is a folder; name the recipe file in it",
        tmp_path / "model.yaml": ": cannot be read (",
    }
    for path, told in cases.items():
        with pytest.raises(RecipeError) as caught:
            read_text(path, "recipe", "look there")
        assert str(caught.value).startswith(f"{path}{told}"), caught.value


def test_a_huge_file_is_not_read(tmp_path):
    path = tmp_path / "weights.yaml"
    path.write_bytes(b"a" * 1_000_001)
    with pytest.raises(RecipeError, match="is over 1 MB, which no recipe is"):
        read_text(path, "recipe", "")


@pytest.mark.parametrize(("text", "told"), [
    ("a: 1\nb: [1, 2\nc: 3", "f.yaml:3: is not valid YAML ("),
    ("a: b: c", "f.yaml:1: is not valid YAML ("),
    ("a: 1\n\tb: 2", "f.yaml:2: is not valid YAML ("),
    ("a: 1\n---\nb: 2", "f.yaml:2: is not valid YAML ("),
    ("a: *nothing", "f.yaml:1: is not valid YAML (found undefined alias"),
    ("a: 2024-13-45", "f.yaml: is not valid YAML (month must be in 1..12)"),
    ("- a\n- b", "f.yaml:1: is not a mapping of sections; write some"),
    ("just words", "f.yaml:1: is not a mapping of sections; write some"),
    ("", "f.yaml: is empty; write some"),
    ("# a comment\n", "f.yaml: is empty; write some"),
])
def test_what_is_no_mapping_is_told_with_its_line(text, told):
    assert line_of(text).startswith(told)


def test_every_key_that_stands_twice_is_told():
    text = "a: 1\nb:\n  c: 1\n  d: [{e: 1, e: 2}]\n  c: 2\na: 3\n"
    with pytest.raises(RecipeError) as caught:
        tree_of(text)
    assert sorted(caught.value.lines()) == [
        "f.yaml:4: key 'e' stands twice, first on line 4; remove one of them",
        "f.yaml:5: key 'c' stands twice, first on line 3; remove one of them",
        "f.yaml:6: key 'a' stands twice, first on line 1; remove one of them",
    ]
    problems = []
    assert tree_of(text, problems=problems)["b"]
    assert len(problems) == 3


def test_aliases_of_aliases_do_not_fill_the_memory():
    text = "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
    for before, letter in zip("abcdefghij", "bcdefghijk", strict=True):
        text += f"{letter}: &{letter} [{', '.join(['*' + before] * 10)}]\n"
    assert "holds over 100,000 values" in line_of(text)


def test_deep_nesting_is_one_line():
    assert "is nested too deeply" in line_of("a: " + "[" * 600 + "]" * 600)


def test_tags_make_no_objects():
    values = plain(tree_of("a: !!python/object/apply:os.system [echo]\nb: !mine {c: 1}"))
    assert values["b"] == {"c": 1}
    assert not isinstance(values["a"], int), "os.system was called"


def test_numbers_are_numbers():
    values = plain(tree_of("a: 1e-4\nb: 0x10\nc: 1_000\nd: 'no'\ne: no\nf: true\ng:\nh: .5"))
    assert values == {"a": 1e-4, "b": 16, "c": 1000, "d": "no", "e": "no", "f": True, "g": None, "h": 0.5}
    assert {type(value) for value in values.values()} == {float, int, str, bool, type(None)}


def test_places_know_lines_lists_and_overrides():
    tree = tree_of("a:\n  b: 1\n  c:\n    - x\n    - y: 2\n")
    places = Places(tree, "f.yaml", {("a", "d"): "--set a.d=1", ("e", "f"): "--set e.f=2"})
    assert places.of(("a", "b")) == "f.yaml:2"
    assert places.of(("a", "c", 1)) == "f.yaml:5"
    assert places.of(("a", "c", 1, "y")) == "f.yaml:5"
    assert places.of(("a", "missing")) == "f.yaml:1"
    assert places.of(("missing",)) == "f.yaml:1"
    assert places.of(("a", "d", "deeper")) == "--set a.d=1"
    assert places.of(("e",)) == "--set e.f=2"


def test_problems_come_in_the_order_of_the_file():
    problems = [RecipeError(where, "x") for where in ("f.yaml:10", "f.yaml:9", "--set a=1", "f.yaml")]
    ordered = [problem.where for problem in yaml_file.in_order(problems)]
    assert ordered == ["--set a=1", "f.yaml", "f.yaml:9", "f.yaml:10"]
