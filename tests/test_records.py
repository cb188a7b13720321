"""Readers: every kind of file, and every way in which one is broken, down to the line.

Hub datasets are tested with a stand-in for ``datasets.load_dataset``: no network is used, so
what the hub itself answers is not tested here, only what becomes of it.
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lora_kit.errors import DataError, MachineError
from lora_kit.records import read_hub_records, read_records
from tests.conftest import SHARED_DATA

ROWS = [{"prompt": "q1", "completion": "a1"}, {"prompt": "q2", "completion": "ä\u2028\nb"}]


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(tmp_path: Path, name: str, content: str | bytes, **options) -> list:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_records(path, f"data/{name}", **options))


def fail(tmp_path: Path, name: str, content: str | bytes, **options) -> DataError:
    with pytest.raises(DataError) as caught:
        read(tmp_path, name, content, **options)
    assert caught.value.exit_code == 4 and caught.value.todo
    assert "\n" not in str(caught.value)
    return caught.value


# ---- JSON lines ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "A.JSONL", "a.json"])
def test_json_lines_with_their_line_numbers(tmp_path, name):
    text = "\n" + jsonl(ROWS[:1]) + "  \r\n" + jsonl(ROWS[1:]).rstrip()
    assert read(tmp_path, name, text) == [(f"data/{name}:2", ROWS[0]), (f"data/{name}:4", ROWS[1])]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.ndjson.gz", "a.json.gz"])
def test_compressed_json_lines(tmp_path, name):
    assert [row for _, row in read(tmp_path, name, gzip.compress(jsonl(ROWS).encode()))] == ROWS


def test_a_byte_order_mark_is_taken_off(tmp_path):
    assert [row for _, row in read(tmp_path, "a.jsonl", "\ufeff" + jsonl(ROWS))] == ROWS
    assert [row for _, row in read(tmp_path, "a.json", "\ufeff" + json.dumps(ROWS))] == ROWS


def test_json_lines_are_streamed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(ROWS) + "{broken\n")
    rows = read_records(path, "a.jsonl")
    assert next(rows)[1] == ROWS[0] and next(rows)[1] == ROWS[1]
    with pytest.raises(DataError):
        next(rows)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("cut", ['{"prompt": "q3', '{"prompt": "q3", "comp', '{"prompt": "q3"', '{"prompt":', "{"])
def test_a_truncated_last_line_is_named(tmp_path, name, cut):
    error = fail(tmp_path, name, jsonl(ROWS) + cut)
    assert error.where == f"data/{name}:3"
    assert "ends in the middle of this row" in error.what


def test_a_broken_line_is_named(tmp_path):
    error = fail(tmp_path, "a.jsonl", jsonl(ROWS[:1]) + "{'prompt': 1}\n" + jsonl(ROWS[1:]))
    assert error.where == "data/a.jsonl:2" and "not valid JSON" in error.what
    error = fail(tmp_path, "a.jsonl", '{"prompt": "q\n' + jsonl(ROWS))
    assert error.where == "data/a.jsonl:1" and "not valid JSON" in error.what
    error = fail(tmp_path, "a.jsonl", jsonl(ROWS) + "{} {}\n")
    assert error.where == "data/a.jsonl:3"


@pytest.mark.parametrize(
    ("line", "kind"), [("[1]", "a list"), ("3", "a number"), ('"x"', "a string"), ("null", "null"), ("true", "true")]
)
def test_a_line_that_is_no_object_is_named(tmp_path, line, kind):
    error = fail(tmp_path, "a.jsonl", jsonl(ROWS) + line)
    assert error.where == "data/a.jsonl:3" and error.what.startswith(f"is {kind}") and "not an object" in error.what


def test_what_the_json_parser_gives_up_on(tmp_path):
    assert "nested too deeply" in fail(tmp_path, "a.jsonl", '{"a":' * 200_000 + "\n").what
    assert "number too long" in fail(tmp_path, "a.jsonl", '{"a": ' + "1" * 5000 + "}\n").what
    assert "nested too deeply" in fail(tmp_path, "a.json", '[{"a":' * 200_000).what


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    error = fail(tmp_path, "a.jsonl", jsonl(ROWS).encode() + '{"prompt": "é"}'.encode("latin-1"))
    assert error.where == "data/a.jsonl:3" and "0xe9" in error.what and "UTF-8" in error.todo


def test_a_compressed_file_that_is_cut_off_or_none(tmp_path):
    whole = gzip.compress(jsonl(ROWS * 500).encode())
    assert "cut off or broken" in fail(tmp_path, "a.jsonl.gz", whole[: len(whole) // 2]).what
    assert "cut off or broken" in fail(tmp_path, "a.jsonl.gz", jsonl(ROWS)).what


# ---- JSON ------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
def test_json_lists_and_objects(tmp_path, indent):
    numbered = [("data/a.json#0", ROWS[0]), ("data/a.json#1", ROWS[1])]
    assert read(tmp_path, "a.json", json.dumps(ROWS, indent=indent)) == numbered
    assert read(tmp_path, "a.json", json.dumps({"version": 1, "data": ROWS}, indent=indent)) == numbered
    keyed = {"x-1": ROWS[0], "x-2": ROWS[1]}
    assert read(tmp_path, "a.json", json.dumps(keyed, indent=indent)) == [
        ("data/a.json#x-1", ROWS[0]), ("data/a.json#x-2", ROWS[1]),
    ]
    assert read(tmp_path, "a.json", json.dumps(ROWS[0], indent=indent)) == [("data/a.json#0", ROWS[0])]


def test_one_object_to_a_line_in_a_json_file_is_json_lines(tmp_path):
    rows = [{"id": {"a": 1}}, {"id": {"a": 2}}]
    assert read(tmp_path, "a.json", jsonl(rows)) == [("data/a.json:1", rows[0]), ("data/a.json:2", rows[1])]


def test_broken_json_is_named_with_its_line(tmp_path):
    text = json.dumps(ROWS, indent=1)
    error = fail(tmp_path, "a.json", text[: len(text) // 2])
    assert "cut off" in error.what and error.where.startswith("data/a.json:")
    error = fail(tmp_path, "a.json", text.replace(",", ",,", 1))
    assert error.where == "data/a.json:3" and "not valid JSON" in error.what
    assert fail(tmp_path, "a.json", '[{"a": 1}, 3]').where == "data/a.json#1"
    assert "holds a number, not rows" in fail(tmp_path, "a.json", "3").what


# ---- nothing to read -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_an_empty_file(tmp_path, name):
    error = fail(tmp_path, name, "")
    assert error.where == f"data/{name}" and "empty" in error.what


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", "\n\n"), ("a.json", " \n"), ("a.json", "[]"), ("a.json", "{}"), ("a.json", '{"data": []}'),
     ("a.csv", "prompt,completion\n"), ("a.csv", "\n\n"), ("a.jsonl.gz", gzip.compress(b"", mtime=0))],
)
def test_a_file_without_rows(tmp_path, name, content):
    error = fail(tmp_path, name, content, cache_dir=tmp_path / "cache")
    assert error.where == f"data/{name}" and "no rows" in error.what


def test_a_missing_file_a_folder_and_an_unknown_ending(tmp_path):
    for name, what in [("none.jsonl", "no such file"), ("folder", "is a folder")]:
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=what) as caught:
            read_records(tmp_path / name, name)
        assert caught.value.where == name and caught.value.todo
    error = fail(tmp_path, "a.xlsx", "x")
    assert ".xlsx" in error.what and ".jsonl" in error.todo and ".parquet" in error.todo
    assert "no ending" in fail(tmp_path, "rows", "x").what


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.jsonl").write_text(jsonl(ROWS))
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match="cannot be read: Permission denied"):
        read_records(tmp_path / "a.jsonl", "a.jsonl")


# ---- CSV and Parquet -------------------------------------------------------------------


def test_csv_keeps_every_value_as_it_stands(tmp_path):
    text = '\ufeffprompt,completion\r\n007,None\r\n\r\n"two\r\nlines","a, ""b"""\r\n,NA\r\n1.0,True\r\n'
    assert read(tmp_path, "a[1]*.csv", text, cache_dir=tmp_path / "cache") == [
        ("data/a[1]*.csv:2", {"prompt": "007", "completion": "None"}),
        ("data/a[1]*.csv:4", {"prompt": "two\r\nlines", "completion": 'a, "b"'}),
        ("data/a[1]*.csv:6", {"prompt": "", "completion": "NA"}),
        ("data/a[1]*.csv:7", {"prompt": "1.0", "completion": "True"}),
    ]


def test_csv_that_changed_is_read_again(tmp_path):
    options = {"cache_dir": tmp_path / "cache"}
    assert [row for _, row in read(tmp_path, "a.csv", "text\nold\n", **options)] == [{"text": "old"}]
    assert [row for _, row in read(tmp_path, "a.csv", "text\nnew\nmore\n", **options)] == [
        {"text": "new"}, {"text": "more"},
    ]


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("p,c\n1,2\n1,2,3\n", ":3", "has 3 values for 2 columns"),
        ("p,c\n1,2,3\n1,2,3\n", ":2", "has 3 values for 2 columns"),
        ("p,c\n1,2\n\n1\n", ":4", "has 1 values for 2 columns"),
        ('p,c\n1,2\n3,"4\n5,6\n', ":3", "ends within quotes"),
        ('p,c\n1,"2"x\n', ":2", "not valid CSV"),
        ("p,p\n1,2\n", ":1", "two columns share a name"),
        ("p,\n1,2\n", ":1", "two columns share a name, or one has none"),
        ("p,c\n1,\udce9\n", ":2", "not UTF-8"),
    ],
)
def test_broken_csv_is_named_with_its_line(tmp_path, text, where, what):
    error = fail(tmp_path, "a.csv", text.encode("utf-8", "surrogateescape"), cache_dir=tmp_path / "cache")
    assert error.where == f"data/a.csv{where}" and what in error.what


def parquet(tmp_path: Path, rows: list) -> bytes:
    import pyarrow
    import pyarrow.parquet

    schema = None if rows else pyarrow.schema({"text": pyarrow.string()})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), tmp_path / "written")
    return (tmp_path / "written").read_bytes()


def test_parquet(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "q"}], "n": 1}, {"messages": [], "n": None}]
    assert read(tmp_path, "a.parquet", parquet(tmp_path, rows), cache_dir=tmp_path / "cache") == [
        ("data/a.parquet#0", rows[0]), ("data/a.parquet#1", rows[1]),
    ]


def test_broken_and_empty_parquet(tmp_path, capfd):
    whole = parquet(tmp_path, ROWS)
    error = fail(tmp_path, "a.parquet", whole[: len(whole) // 2], cache_dir=tmp_path / "cache")
    assert error.where == "data/a.parquet" and "cannot be read as parquet" in error.what
    scribbled = whole[:4] + b"\xff" * (len(whole) // 3) + whole[4 + len(whole) // 3 :]
    error = fail(tmp_path, "c.parquet", scribbled, cache_dir=tmp_path / "cache")
    assert error.where == "data/c.parquet" and "cannot be read as parquet" in error.what
    assert "no rows" in fail(tmp_path, "b.parquet", parquet(tmp_path, []), cache_dir=tmp_path / "cache").what
    assert capfd.readouterr() == ("", ""), "the library's own lines and bars are not shown"


def test_a_cache_that_cannot_be_written_is_the_machines_fault(tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    (tmp_path / "a.parquet").write_bytes(parquet(tmp_path, ROWS))
    with pytest.raises(MachineError) as caught:
        list(read_records(tmp_path / "a.parquet", "a.parquet", cache_dir=tmp_path / "cache"))
    assert "cache" in caught.value.what and caught.value.exit_code == 6


def test_csv_and_parquet_are_read_without_torch(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet(tmp_path, ROWS))
    (tmp_path / "a.csv").write_text("text\nhello\n")
    code = (
        "import sys, pathlib; from lora_kit.records import read_records; root = pathlib.Path(sys.argv[1]);"
        "print([len(list(read_records(root / n, n, cache_dir=root / 'cache'))) for n in ('a.csv', 'a.parquet')],"
        "'torch' in sys.modules, 'datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "[1, 2] False True\n", done.stderr


# ---- the hub (through a stand-in) ------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Replaces datasets.load_dataset: answers with what is put into ``answer``, keeps the ``calls``."""
    import datasets

    class Hub:
        answer: object = ROWS
        calls: list = []

        def load_dataset(self, *args, **kwargs):
            self.calls.append((args, kwargs))
            if isinstance(self.answer, Exception):
                raise self.answer
            return datasets.Dataset.from_list(self.answer)

    stand_in = Hub()
    stand_in.calls = []
    monkeypatch.setattr(datasets, "load_dataset", stand_in.load_dataset)
    return stand_in


def test_rows_of_the_hub(hub, tmp_path):
    rows = list(read_hub_records("org/name", "abc123", "en", "test", tmp_path))
    assert rows == [("hub:org/name/test#0", ROWS[0]), ("hub:org/name/test#1", ROWS[1])]
    assert hub.calls == [
        (("org/name",), {"name": "en", "revision": "abc123", "split": "test", "cache_dir": str(tmp_path)})
    ]
    list(read_hub_records("org/name"))
    assert hub.calls[1][1] == {"name": None, "revision": None, "split": "train", "cache_dir": None}


def hub_errors():
    from datasets.exceptions import DatasetNotFoundError

    return {
        "missing": DatasetNotFoundError("Dataset 'org/name' doesn't exist on the Hub or cannot be accessed."),
        "gated": DatasetNotFoundError("Dataset 'org/name' is a gated dataset on the Hub. You must be authenticated."),
        "revision": DatasetNotFoundError("Revision 'abc' doesn't exist for dataset 'org/name' on the Hub."),
        "offline": ConnectionError("Couldn't reach 'org/name' on the Hub (OfflineModeIsEnabled)"),
        "split": ValueError('Unknown split "test". Should be one of [\'train\'].'),
        "subset": ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"),
        "wrong subset": ValueError("BuilderConfig 'x' not found. Available: ['a', 'b']"),
        "script": RuntimeError("Dataset scripts are no longer supported, but found name.py"),
        "disk": OSError(28, "No space left on device"),
    }


@pytest.mark.parametrize(
    ("case", "kind", "what", "todo"),
    [
        ("missing", DataError, "no such dataset", "HF_TOKEN"),
        ("gated", DataError, "gated", "HF_TOKEN"),
        ("revision", DataError, "no such revision", "@"),
        ("offline", MachineError, "cannot be reached", "HF_HUB_OFFLINE"),
        ("split", DataError, "Should be one of ['train']", "split:"),
        ("subset", DataError, "available configs: ['a', 'b']", "subset:"),
        ("wrong subset", DataError, "Available: ['a', 'b']", "subset:"),
        ("script", DataError, "no longer supported", "no script"),
        ("disk", MachineError, "disk", "free space"),
    ],
)
def test_errors_of_the_hub_are_explained_in_a_line(hub, case, kind, what, todo):
    hub.answer = hub_errors()[case]
    with pytest.raises(kind) as caught:
        read_hub_records("org/name", "abc")
    assert caught.value.where == "hub:org/name@abc"
    assert what in caught.value.what and todo in caught.value.todo
    assert "\n" not in str(caught.value)


def test_a_hub_split_without_rows_and_a_folder_in_the_way(hub, tmp_path, monkeypatch):
    hub.answer = []
    with pytest.raises(DataError, match="no rows"):
        list(read_hub_records("org/name"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    with pytest.raises(DataError, match="local folder"):
        read_hub_records("org/name")
    assert len(hub.calls) == 1


# ---- real rows by others, where they are at hand ---------------------------------------


@pytest.mark.parametrize(
    ("name", "keys", "num_rows"),
    [
        ("snips/train.jsonl", {"text", "intent", "slots"}, 13_773),
        ("clinc150/full_train.jsonl", {"text", "label"}, 14_998),
        ("nl2bash/test.jsonl", {"nl", "cmd"}, 1_226),
        ("self_instruct/seed_tasks.jsonl", {"instruction", "instances"}, 175),
        ("multiple_choice/arc_easy.jsonl", {"query", "choices", "gold"}, 2_376),
    ],
)
def test_real_rows_are_read(name, keys, num_rows):
    path = SHARED_DATA / name
    if not path.exists():
        pytest.skip("no shared data here")
    rows = list(read_records(path, name))
    assert len(rows) == num_rows and rows[-1][0] == f"{name}:{num_rows}"
    assert all(keys <= set(row) for _, row in rows)
