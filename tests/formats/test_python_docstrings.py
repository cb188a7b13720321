from __future__ import annotations

import sys

import pytest

from lora_kit.errors import DataError
from lora_kit.formats import UnusableRow, python_docstrings

SOURCE = '''\
"""A module."""
raise RuntimeError("imported")


def add(a, b):
    """Return the sum of a and b.

        Indented by four more.
    """

    return a + b


class Thing:
    @property
    def size(self) -> int:
        """How many parts the thing has."""
        text = """
left alone"""
        return len(text)

    async def wait(self, a,
                   b):
        # before
        r"""Wait for the \\d seconds that it takes."""
        return 1

    def short(self):
        """Too short."""
        return 2

    def abstract(self):
        """A docstring and nothing else below it."""

    def one_line(self): """A docstring and code on one line."""; return 3
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that raises when it is imported."""
    folder = tmp_path / "kit_sample"
    (folder / "part").mkdir(parents=True)
    (folder / "tests").mkdir()
    for name in ("__init__.py", "part/__init__.py", "tests/test_it.py"):
        (folder / name).write_text(SOURCE)
    (folder / "part" / "zlast.py").write_text(SOURCE.replace("sum", "total"))
    (folder / "broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "kit_sample"


def test_functions_stand_without_their_docstring(package):
    rows = list(python_docstrings.records_of(package))[:3]
    assert [(origin.removeprefix("kit_sample/"), row["name"]) for origin, row in rows] == [
        ("__init__.py:5", "add"), ("__init__.py:16", "size"), ("__init__.py:22", "wait"),
    ]
    add, size, wait = (row for _, row in rows)
    assert add["docstring"] == "Return the sum of a and b.\n\nIndented by four more."
    assert add["code"] == "def add(a, b):\n    return a + b"
    assert size["code"] == 'def size(self) -> int:\n    text = """\nleft alone"""\n    return len(text)'
    assert wait["code"].splitlines()[:3] == ["async def wait(self, a,", "               b):", "    # before"]
    assert wait["docstring"] == "Wait for the \\d seconds that it takes."


def test_order_repeats_tests_and_broken_files(package):
    rows = list(python_docstrings.records_of(package))
    assert rows == list(python_docstrings.records_of(package))
    # part/__init__.py repeats __init__.py; tests/ and broken.py are passed over; of zlast.py only add differs.
    assert [origin for origin, _ in rows[3:]] == ["kit_sample/part/zlast.py:5"]


def test_nothing_is_imported(package):
    list(python_docstrings.records_of(package))
    list(python_docstrings.records_of(f"{package}.part"))
    assert package not in sys.modules


def test_a_part_of_a_package_and_a_single_module(package, tmp_path):
    first, _ = next(python_docstrings.records_of(f"{package}.part.zlast"))
    assert first == "kit_sample/part/zlast.py:5"
    (tmp_path / "kit_single.py").write_text(SOURCE)
    first, _ = next(python_docstrings.records_of("kit_single"))
    assert first == "kit_single.py:5"


def test_long_functions_are_left_out(tmp_path, monkeypatch):
    body = "    x = 1\n" * python_docstrings.MAX_LINES
    (tmp_path / "kit_long.py").write_text(
        f'def long():\n    """Twenty characters or more."""\n{body}\n'
        'def fine():\n    """Twenty characters or more."""\n    return 1\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [row["name"] for _, row in python_docstrings.records_of("kit_long")] == ["fine"]


@pytest.mark.parametrize("reference", ["no_such_package_here", "../etc", "", "no-name", "_thread"])
def test_a_package_that_cannot_be_read_is_an_error(reference):
    with pytest.raises(DataError) as caught:
        list(python_docstrings.records_of(reference))
    assert caught.value.where == f"python:{reference}" and caught.value.todo


def test_a_package_without_pairs_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "kit_bare.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="no function with a docstring"):
        list(python_docstrings.records_of("kit_bare"))


def test_the_standard_library_has_thousands_and_all_are_usable():
    rows = list(python_docstrings.records_of("stdlib"))
    assert len(rows) > 3000
    origins = [origin for origin, _ in rows]
    assert len(set(origins)) == len(origins)
    assert not [origin for origin in origins if origin.startswith("test/") or "/tests/" in origin]
    for origin, row in rows:
        read = python_docstrings.to_conversation(row, origin)
        assert row["docstring"] not in read.messages[0].content or len(row["docstring"]) < 60
        assert len(row["docstring"]) >= 20 and row["code"].count("\n") < 60


def test_the_question_shows_the_code_and_the_answer_is_the_docstring():
    read = python_docstrings.to_conversation(python_docstrings.EXAMPLE, "x")
    assert read.messages[0].content.startswith(python_docstrings.INSTRUCTION)
    assert f"```python\n{python_docstrings.EXAMPLE['code']}\n```" in read.messages[0].content
    assert read.messages[1].content == python_docstrings.EXAMPLE["docstring"]
    with pytest.raises(UnusableRow):
        python_docstrings.to_conversation({"code": "def f(): pass", "docstring": ""}, "x")
