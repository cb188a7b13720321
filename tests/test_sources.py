"""Sources: which kind a reference is, archives checked and opened with care, the hub's answers explained.

No index and no hub is reached: `subprocess.run` (pip) and `huggingface_hub.snapshot_download` are
stand-ins that answer as the real ones were seen to.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from lora_kit import sources
from lora_kit.errors import DataError, LoraKitError, MachineError, ModelError, RecipeError, RefusedError
from lora_kit.sources import file_sha256, kind_of, new_cache_folder, remembered_sha256, resolve
from tests import nobody

MEMBERS = {
    "pack/rows.jsonl": b'{"a": 1}\n', "pack/answers/rows.jsonl": b'{"b": 2}\n',
    "pack/readme.txt": b" ".join(hashlib.sha256(b"%d" % number).digest() for number in range(50)),
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def wheel(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in MEMBERS.items():
            file.writestr(name, content)
    return path


@pytest.fixture
def pack(cache) -> Path:
    """The archive of pack 1.0, in the cache as if pip had brought it."""
    return wheel(cache / "pypi" / "pack-1.0" / "pack-1.0-py3-none-any.whl")


# ---- where and what --------------------------------------------------------------------


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "own"))
    assert sources.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LORA_KIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sources.cache_dir() == tmp_path / "xdg" / "lora-kit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert sources.cache_dir() == tmp_path / "home" / ".cache" / "lora-kit"


@pytest.mark.parametrize(("reference", "kind"), [
    ("pypi:a==1/b.json", "pypi"), ("hub:org/data", "hub-data"), ("python:stdlib", "python"),
    ("org/name", "hub"), ("org/name@main", "hub"), ("org/name@refs/pr/1", "hub"), ("Qwen/Qwen3-0.6B", "hub"),
    ("./org/name", "path"), ("../name", "path"), ("/abs/name", "path"), ("~/name", "path"), ("~nobody_here/x", "path"),
    ("data/rows.jsonl", "path"), ("data/rows.csv", "path"), ("models/m.gguf", "path"), ("rows", "path"),
    ("a/b/c", "path"), ("here/folder", "path"),
])
def test_a_reference_shows_its_kind(reference, kind, tmp_path):
    (tmp_path / "here" / "folder").mkdir(parents=True)
    assert kind_of(reference, tmp_path) == kind


def test_a_path_is_relative_to_the_recipe(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b"x")
    found = resolve("rows.jsonl", relative_to=tmp_path)
    assert found.path == tmp_path / "rows.jsonl"
    assert found.sha256 == hashlib.sha256(b"x").hexdigest() and found.revision is None
    assert resolve(str(tmp_path), relative_to=Path("/")).sha256 is None


def test_a_missing_path_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(DataError) as caught:
        resolve("data/rows.jsonl", relative_to=tmp_path)
    assert str(caught.value) == (f"data/rows.jsonl: no such file or folder (looked in {tmp_path}/data); "
                                 "check the path; it is relative to the recipe")


def test_what_a_format_reads_beside_a_file_counts_in_its_hash(tmp_path):
    (tmp_path / "answers").mkdir()
    (tmp_path / "rows.jsonl").write_bytes(b"x")
    (tmp_path / "answers" / "rows.jsonl").write_bytes(b"1")
    before = resolve("rows.jsonl", relative_to=tmp_path, companions=("answers/rows.jsonl",)).sha256
    (tmp_path / "answers" / "rows.jsonl").write_bytes(b"2")
    after = resolve("rows.jsonl", relative_to=tmp_path, companions=("answers/rows.jsonl",)).sha256
    assert len({before, after, file_sha256(tmp_path / "rows.jsonl")}) == 3


# ---- archives --------------------------------------------------------------------------


def test_a_member_is_read_from_a_checked_archive(pack):
    found = resolve("pypi:pack==1.0/pack/rows.jsonl", sha256=file_sha256(pack), relative_to=Path("/"))
    assert found.path.read_bytes() == MEMBERS["pack/rows.jsonl"]
    assert found.sha256 == hashlib.sha256(MEMBERS["pack/rows.jsonl"]).hexdigest()
    assert (found.revision, found.shown) == ("1.0", "rows.jsonl")
    assert not [path for path in found.path.parent.iterdir() if path.name.startswith(".")], "a scratch file is left"


def test_companions_come_along(pack):
    found = resolve("pypi:pack==1.0/pack/rows.jsonl", relative_to=Path("/"), companions=("answers/rows.jsonl",))
    assert (found.path.parent / "answers" / "rows.jsonl").read_bytes() == MEMBERS["pack/answers/rows.jsonl"]
    with pytest.raises(DataError, match="has no file pack/answers/none"):
        resolve("pypi:pack==1.0/pack/rows.jsonl", relative_to=Path("/"), companions=("answers/none",))


def test_another_archive_than_the_recipe_s_is_refused(pack):
    with pytest.raises(RefusedError) as caught:
        resolve("pypi:pack==1.0/pack/rows.jsonl", sha256="a" * 64, relative_to=Path("/"))
    assert caught.value.exit_code == 7
    assert f"the archive's sha256 is {file_sha256(pack)}, the recipe expects {'a' * 64}" in str(caught.value)
    assert f"delete {pack} to download again" in str(caught.value)
    assert not (pack.parent / "members").exists(), "nothing is unpacked from it"


@pytest.mark.parametrize("member", ["../up.json", "pack/../../up.json", "/etc/passwd"])
def test_a_member_outside_the_archive_is_refused(member, pack):
    with pytest.raises(RefusedError, match="leaves the archive"):
        resolve(f"pypi:pack==1.0/{member}", relative_to=Path("/"))


@pytest.mark.parametrize("reference", [
    "pypi:pack/rows.jsonl", "pypi:pack==1.0", "pypi:pack==1.0/", "pypi:==1/x", "pypi:pack>=1.0/x",
    "pypi:pack==1.0/dir/", "pypi:-rfile==1/x",
])
def test_a_reference_of_no_form_is_a_recipe_error(reference, cache):
    with pytest.raises(RecipeError, match=r"is not pypi:NAME==VERSION/MEMBER"):
        resolve(reference, relative_to=Path("/"))


@pytest.mark.parametrize(("member", "todo"), [
    ("rows.jsonl", "it has pack/rows.jsonl"), ("pack/rows.json", "it has pack/rows.jsonl"),
    ("zzz", "check the name after the version"),
])
def test_a_missing_member_comes_with_a_hint(member, todo, pack):
    with pytest.raises(DataError) as caught:
        resolve(f"pypi:pack==1.0/{member}", relative_to=Path("/"))
    assert f"has no file {member}; {todo}" in str(caught.value)


def test_a_cut_off_archive_is_refused(pack):
    pack.write_bytes(pack.read_bytes()[:-40])
    with pytest.raises(RefusedError, match="is not a whole archive .*; delete it and run again"):
        resolve("pypi:pack==1.0/pack/rows.jsonl", relative_to=Path("/"))


def test_a_flipped_byte_in_an_archive_is_refused_and_leaves_nothing(pack):
    content = bytearray(pack.read_bytes())
    with zipfile.ZipFile(pack) as file:
        info = file.getinfo("pack/readme.txt")
    start = info.header_offset + 30 + len(info.filename)
    content[start + info.compress_size // 2] ^= 0xFF
    pack.write_bytes(content)
    with pytest.raises(RefusedError, match="is not a whole archive"):
        resolve("pypi:pack==1.0/pack/readme.txt", relative_to=Path("/"))
    assert [path for path in (pack.parent / "members").rglob("*") if path.is_file()] == []


def test_a_hash_is_remembered_until_the_file_changes(pack, monkeypatch):
    resolve("pypi:pack==1.0/pack/rows.jsonl", relative_to=Path("/"))
    with monkeypatch.context() as patch:
        patch.setattr(sources, "file_sha256",
                      lambda path: pytest.fail("computed again") if path == pack else file_sha256(path))
        resolve("pypi:pack==1.0/pack/rows.jsonl", relative_to=Path("/"))
    content = pack.read_bytes()
    pack.write_bytes(content[:-1] + b"\x01")
    os.utime(pack, ns=(1, 1))
    with pytest.raises(RefusedError):
        resolve("pypi:pack==1.0/pack/rows.jsonl", sha256=hashlib.sha256(content).hexdigest(), relative_to=Path("/"))


def test_a_changed_member_is_noticed_though_size_and_time_are_the_same(cache, pack):
    before = resolve("pypi:pack==1.0/pack/rows.jsonl", relative_to=Path("/"))
    content, stat = before.path.read_bytes(), before.path.stat()
    before.path.write_bytes(content[:-1] + b"!")
    os.utime(before.path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert resolve("pypi:pack==1.0/pack/rows.jsonl", relative_to=Path("/")).sha256 != before.sha256


def test_a_large_file_of_the_user_is_hashed_once(cache, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    assert remembered_sha256(path) == hashlib.sha256(b"weights").hexdigest()
    assert [entry.name for entry in tmp_path.iterdir() if entry != cache] == ["model.safetensors"], "written beside it"
    with monkeypatch.context() as patch:
        patch.setattr(sources, "file_sha256", lambda path: pytest.fail("computed again"))
        remembered_sha256(path)
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(5, 5))
    assert remembered_sha256(path) == hashlib.sha256(b"WEIGHTS").hexdigest()


# ---- pip, by a stand-in for subprocess.run ---------------------------------------------


def pip_stand_in(monkeypatch, *, stderr: str = "", returncode: int = 0, writes: bool = False) -> list[list[str]]:
    commands = []

    def run(command, **options):
        commands.append(command)
        if writes:
            wheel(Path(command[command.index("--dest") + 1]) / "pack-1.0-py3-none-any.whl")
        return SimpleNamespace(returncode=returncode, stderr=stderr, stdout="")

    monkeypatch.setattr(sources.subprocess, "run", run)
    return commands


def test_pip_downloads_one_wheel_without_dependencies_once(cache, monkeypatch):
    commands = pip_stand_in(monkeypatch, writes=True)
    for _ in range(2):
        assert resolve("pypi:pack==1.0/pack/rows.jsonl", relative_to=Path("/")).path.is_file()
    assert len(commands) == 1
    assert {"download", "--no-deps", "--only-binary=:all:", "pack==1.0"} <= set(commands[0])
    assert [path.name for path in (cache / "pypi" / "pack-1.0").iterdir() if path.is_dir()] == ["members"]


@pytest.mark.parametrize(("stderr", "kind", "told"), [
    ("/usr/bin/python3: No module named pip", MachineError, "pip is not in this environment"),
    ("ERROR: Could not find a version that satisfies the requirement pack==1.0 (from versions: 0.9)\n"
     "ERROR: No matching distribution found for pack==1.0", DataError, "pip finds no wheel of pack==1.0"),
    ("WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\n"
     "ERROR: Could not find a version that satisfies the requirement pack==1.0 (from versions: none)\n"
     "ERROR: No matching distribution found for pack==1.0",
     MachineError, "pip could not download pack==1.0 (ERROR: No matching distribution"),
    ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n\n[notice] new release",
     MachineError, "(ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device)"),
    ("", MachineError, "(no message)"),
])
def test_what_pip_says_becomes_one_line(cache, monkeypatch, stderr, kind, told):
    pip_stand_in(monkeypatch, stderr=stderr, returncode=1)
    with pytest.raises(kind) as caught:
        resolve("pypi:pack==1.0/pack/rows.jsonl", relative_to=Path("/"))
    assert told in str(caught.value) and str(caught.value).startswith("pypi:pack==1.0/pack/rows.jsonl: ")
    assert list((cache / "pypi" / "pack-1.0").iterdir()) == [], "a scratch folder is left"


# ---- the hub, by a stand-in for snapshot_download --------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes the hub answer with an error or with a folder that holds ``names``; returns what it was asked."""
    import huggingface_hub

    def answer(problem: Exception | None = None, names: tuple[str, ...] = ("model.safetensors", "config.json")):
        asked = {}

        def snapshot_download(repo, **options):
            asked.update(repo=repo, **options)
            if problem:
                raise problem
            folder = tmp_path / "snapshots" / COMMIT
            folder.mkdir(parents=True)
            for name in names:
                (folder / name).write_bytes(b"")
            return str(folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
        return asked

    return answer


def hub_error(kind: str) -> Exception:
    from huggingface_hub import errors

    request = errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0]
    library = __import__(request)
    response = library.Response(403, request=library.Request("GET", "https://example.invalid"))
    return getattr(errors, kind)("as the hub says it", response=response)


def test_a_hub_model_is_pinned_to_its_commit(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    asked = hub()
    found = resolve("org/name@v1", relative_to=tmp_path)
    assert (asked["repo"], asked["revision"], asked["token"]) == ("org/name", "v1", "hf_secret")
    assert found.revision == COMMIT and found.path.name == COMMIT
    assert "hf_secret" not in repr(found)


def test_only_one_copy_of_a_model_is_downloaded_and_nothing_pickled(hub, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    asked = hub()
    resolve("org/name", relative_to=tmp_path)
    files = ["model-00001-of-00002.safetensors", "consolidated.safetensors", "original/consolidated.00.pth",
             "pytorch_model.bin", "modeling_x.py", "config.json", "tokenizer.json", "tokenizer.model", "merges.txt",
             "chat_template.jinja", "model.safetensors.index.json"]
    taken = filter_repo_objects(files, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"])
    assert list(taken) == ["model-00001-of-00002.safetensors", "config.json", "tokenizer.json", "tokenizer.model",
                           "merges.txt", "chat_template.jinja", "model.safetensors.index.json"]


@pytest.mark.parametrize(("problem", "kind", "told"), [
    ("GatedRepoError", ModelError, "is gated: its owner asks for an agreement; accept it on the model's page and set "
                                   "HF_TOKEN in the environment"),
    ("RepositoryNotFoundError", ModelError, "is not on the hub, or is private; check the name"),
    ("RevisionNotFoundError", ModelError, "has no revision v1; name a branch, tag or commit of it"),
    ("HfHubHTTPError", MachineError, "the hub cannot be reached and it is not in the cache (as the hub says it)"),
])
def test_the_hub_s_refusals_are_explained(hub, tmp_path, problem, kind, told):
    hub(hub_error(problem))
    with pytest.raises(kind) as caught:
        resolve("org/name@v1", relative_to=tmp_path)
    assert str(caught.value).startswith(f"org/name@v1: {told}")


def test_no_network_is_explained(hub, tmp_path):
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    for problem in (LocalEntryNotFoundError("not cached"), OfflineModeIsEnabled("offline"), ConnectionError("refused")):
        hub(problem)
        with pytest.raises(MachineError, match="the hub cannot be reached .*; check the connection, or name a local"):
            resolve("org/name", relative_to=tmp_path)


def test_a_full_disk_is_not_called_a_missing_network(hub, tmp_path):
    hub(OSError(28, "No space left on device", "/hub/blob"))
    with pytest.raises(MachineError, match=r"^/hub/blob: cannot be written \(No space left on device\)"):
        resolve("org/name", relative_to=tmp_path)


def test_an_impossible_hub_name_is_a_recipe_error(hub, tmp_path):
    from huggingface_hub.errors import HFValidationError

    hub(HFValidationError("no -- in a name"))
    with pytest.raises(RecipeError, match="is no name of a hub model"):
        resolve("org/na--me", relative_to=tmp_path)


def test_a_model_without_safetensors_is_refused(hub, tmp_path):
    hub(names=("config.json",))
    with pytest.raises(RefusedError, match="has no safetensors weights, and pickled ones are not loaded"):
        resolve("org/name", relative_to=tmp_path)


# ---- writing into the cache ------------------------------------------------------------


def test_a_new_cache_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "cache" / "thing"
    with pytest.raises(KeyError), new_cache_folder(target) as scratch:
        (scratch / "half").write_text("")
        raise KeyError
    assert list(target.parent.iterdir()) == []
    with new_cache_folder(target) as scratch:
        (scratch / "whole").write_text("")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert target.stat().st_mode & 0o777 == 0o755


def test_of_two_that_fill_the_same_folder_one_wins(tmp_path):
    target, both = tmp_path / "thing", threading.Barrier(2)

    def fill(name):
        with new_cache_folder(target) as scratch:
            (scratch / name).write_text("")
            both.wait()

    threads = [threading.Thread(target=fill, args=(name,)) for name in "ab"]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [path.name for path in target.iterdir()] in (["a"], ["b"])
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written .*set LORA_KIT_CACHE to another folder"):
        with new_cache_folder(tmp_path / "file" / "thing"):
            pass


@nobody.needs_root
@pytest.mark.parametrize("has_archive", [False, True])
def test_an_unwritable_cache_is_one_line_with_exit_code_6(tmp_path, has_archive):
    folder = tmp_path / "cache"
    folder.mkdir()
    if has_archive:
        wheel(folder / "pypi" / "pack-1.0" / "pack-1.0-py3-none-any.whl")
    imports = """
from pathlib import Path
from lora_kit.errors import LoraKitError
from lora_kit.sources import cache_dir, new_cache_folder, resolve
"""
    code = """
try:
    resolve("pypi:pack==1.0/pack/rows.jsonl", relative_to=Path("/"))
except LoraKitError as error:
    print(error.exit_code, error)
try:
    with new_cache_folder(cache_dir() / "models" / "x"):
        pass
except LoraKitError as error:
    print(error.exit_code, error)
"""
    lines = nobody.run(imports, code, folder, LORA_KIT_CACHE=str(folder))
    assert len(lines) == 2
    for line in lines:
        assert line.startswith(f"6 {folder}/") and "cannot be written (Permission denied); make it writable" in line


@nobody.needs_root
def test_a_full_cache_that_is_only_read_serves(tmp_path):
    folder = tmp_path / "cache"
    archive = wheel(folder / "pypi" / "pack-1.0" / "pack-1.0-py3-none-any.whl")
    member = folder / "pypi" / "pack-1.0" / "members" / file_sha256(archive)[:16] / "pack" / "rows.jsonl"
    member.parent.mkdir(parents=True)
    member.write_bytes(MEMBERS["pack/rows.jsonl"])
    lines = nobody.run(
        "from pathlib import Path\nfrom lora_kit.sources import resolve",
        'print(resolve("pypi:pack==1.0/pack/rows.jsonl", relative_to=Path("/")).path)', folder,
        LORA_KIT_CACHE=str(folder))
    assert lines == [str(member)]


def test_no_reference_breaks_out_of_lora_kit_s_errors(pack):
    for reference in ("", "pypi:", "hub", "~nobody_here/x", "a" * 300, "pypi:pack==1.0/\x00"):
        with pytest.raises(LoraKitError):
            resolve(reference + "?", relative_to=Path("/nowhere"))
