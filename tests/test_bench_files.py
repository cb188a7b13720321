"""bench_files.py: the files are what their readers read."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest

from lora_kit import bench_files
from lora_kit.bench_files import Files
from lora_kit.errors import MachineError

LINES = [{"artifact": "a, b", "tokens": 1.0 / 3, "list": [1], "none": None}, {"artifact": "c", "more": 2}]
SHOWN = [("Speed", ("artifact", "tok/s"), [["a|b", "3"]])]


def write(files, echo=None):
    bench_files.write(files, everything={"x": [1]}, lines=LINES, shown=SHOWN, notes=["a note"],
                      echo=echo or pytest.fail)


def test_files(tmp_path):
    files = Files(json=tmp_path / "b.json", csv=tmp_path / "b.csv", markdown=tmp_path / "b.md")
    write(files)
    assert not files.take_the_output and json.loads((tmp_path / "b.json").read_text()) == {"x": [1]}
    rows = list(csv.DictReader(io.StringIO((tmp_path / "b.csv").read_text())))
    assert rows == [{"artifact": "a, b", "tokens": repr(1.0 / 3), "none": "", "more": ""},
                    {"artifact": "c", "tokens": "", "none": "", "more": "2"}]
    text = (tmp_path / "b.md").read_text()
    assert "| artifact | tok/s |" in text and r"a\|b" in text and text.endswith("a note\n")


def test_the_output():
    told = []
    files = Files(json=Path("-"))
    write(files, told.append)
    assert files.take_the_output and [json.loads(text) for text in told] == [{"x": [1]}]


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(MachineError, match="cannot be written"):
        write(Files(csv=tmp_path / "no" / "b.csv"))
