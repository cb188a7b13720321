"""What a model has answered before, so that it need not answer again: on every commit the base is the same.

Kept are the engine's own results (answers, log-probabilities), never scores: these are worked out anew. A result
is found again only when all that decides it is the same: the content of every file of weights, configuration,
adapter and tokenizer (a quantized form is its files); the engine, the type that it computes in and its device; the
token ids asked and the settings; the versions of the libraries; and lora-kit's own code. Paths, sizes
and times of files decide nothing. Where all that is asked is known, the model is not even loaded.

One SQLite file for each artifact and way of running it, in ``scores/`` of the cache folder. A file that is
broken, or a cache that cannot be written to, costs the work and nothing else. Torch-free itself.
Reads artifacts (to hash them); reads and writes the cache.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy

from lora_kit import sources
from lora_kit.chat import load_tokenizer
from lora_kit.types import Artifact, Generation, Likelihood, Question

FORMAT = 1
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes", "gguf", "llama-cpp-python", "numpy")
"""Libraries that take part in an answer."""
_PACKAGE = Path(__file__).parent
_ABOUT_LIKELIHOODS = b"about likelihoods"


def artifact_key(artifact: Artifact, computes: dict[str, Any]) -> str:
    """SHA-256 of all that decides what ``artifact`` answers, beside what it is asked.

    Args:
        computes: the engine, the type that it computes in, its device.

    Raises:
        OSError: a file cannot be read.
    """
    places = {"weights": artifact.path, "base": artifact.base, "tokenizer": artifact.tokenizer or artifact.path}
    parts = {
        "format": FORMAT, "kind": artifact.kind, "computes": computes, "code": code_sha256(),
        "versions": {name: _version(name) for name in PACKAGES},
        **{name: files_sha256(Path(path)) if path else None for name, path in places.items()},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def request_key(*parts: Any) -> bytes:
    """SHA-256 of one thing asked: what is wanted, token ids, settings."""
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).digest()


def files_sha256(path: Path) -> dict[str, str]:
    """SHA-256 of a file, or of each file in a folder by its name."""
    if path.is_file():
        return {"": sources.file_sha256(path)}
    if not path.is_dir():
        raise FileNotFoundError(2, "no such file or folder", str(path))
    return {str(file.relative_to(path)): sources.file_sha256(file)
            for file in sorted(path.rglob("*")) if file.is_file()}


@cache
def code_sha256() -> str:
    """SHA-256 of lora-kit's own code."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        digest.update(str(file.relative_to(_PACKAGE)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class KnownEngine:
    """An engine that looks up what was answered before, and opens the real one for the rest.

    Args:
        artifact: what answers.
        key: as :func:`artifact_key` gives it.
        opened: opens the real engine.
    """

    def __init__(self, artifact: Artifact, key: str, opened: Callable[[], Any]) -> None:
        self._opened, self._engine = opened, None
        self.num_known = self.num_asked = 0
        self._store = _Store(key)
        name = self._store.get(b"name")
        if name is None:
            self.name, self.tokenizer = self._real().name, self._real().tokenizer
            self._store.put({b"name": self.name.encode()})
        else:
            self.name = name.decode()
            self.tokenizer = load_tokenizer(artifact.tokenizer or artifact.base or artifact.path)

    def __getattr__(self, name: str) -> Any:
        # What is not looked up is the real engine's.
        return getattr(self._real(), name)

    @property
    def in_memory(self) -> Any:
        """The real engine where it has been opened; None while all that was asked was known."""
        return self._engine

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, ignore_stop: bool = False,
                 until: Sequence[Sequence[str]] = ()) -> list[Generation]:
        """As the engine's."""
        until = [list(strings) for strings in until] or [[] for _ in prompts]
        keys = [request_key("generate", list(map(int, prompt)), max_new_tokens, ignore_stop, strings)
                for prompt, strings in zip(prompts, until, strict=True)]

        def ask(places: list[int]) -> list[Generation]:
            return self._real().generate([prompts[place] for place in places], max_new_tokens=max_new_tokens,
                                         ignore_stop=ignore_stop, until=[until[place] for place in places])

        return self._answered(keys, ask, _generation_bytes, _generation)

    def token_log_probs(self, tokens_T: Sequence[int], positions_K: Sequence[int]) -> numpy.ndarray:
        """As the engine's."""
        tokens, positions = list(map(int, tokens_T)), list(map(int, positions_K))

        def read(value: bytes) -> numpy.ndarray:
            found = numpy.frombuffer(value, "<f4").astype(numpy.float32)
            if len(found) != len(positions):
                raise ValueError("a log-probability for each position")
            return found

        (found,) = self._answered([request_key("log_probs", tokens, positions)],
                                  lambda _: [self._real().token_log_probs(tokens_T, positions_K)],
                                  lambda values_K: numpy.asarray(values_K, "<f4").tobytes(), read)
        return found

    def summed_log_probs(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
        """As the engine's."""
        keys = [request_key("summed_log_probs", list(map(int, tokens_T)), list(map(int, positions_K)))
                for tokens_T, positions_K in texts]
        return self._answered(keys, lambda places: self._real().summed_log_probs([texts[place] for place in places]),
                              lambda value: json.dumps(value).encode(), lambda value: float(json.loads(value)))

    def likelihoods(self, questions: Sequence[Question], *, greedy: bool = False,
                    apart: bool = False) -> list[list[Likelihood]]:
        """As the engine's."""
        keys = [request_key("likelihoods", question.context, question.continuations, greedy, apart)
                for question in questions]

        def ask(places: list[int]) -> list[list[Likelihood]]:
            real = self._real()
            found = real.likelihoods([questions[place] for place in places], greedy=greedy, apart=apart)
            self._store.put({_ABOUT_LIKELIHOODS: json.dumps(_about_likelihoods(real)).encode()})
            return found

        return self._answered(keys, ask, _likelihood_bytes, _likelihoods)

    @property
    def likelihood_noise(self) -> float:
        """As the engine's, measured when it last read something."""
        return self._kept_about_likelihoods()["noise"]

    @property
    def likelihood_note(self) -> str:
        """As the engine's."""
        return self._kept_about_likelihoods()["note"]

    @property
    def batches_likelihoods(self) -> bool:
        """As the engine's."""
        return self._kept_about_likelihoods()["batches"]

    def _kept_about_likelihoods(self) -> dict[str, Any]:
        with suppress(ValueError, TypeError):
            return {"noise": 0.0, "note": "", "batches": False} | json.loads(self._store.get(_ABOUT_LIKELIHOODS))
        return _about_likelihoods(self._real())

    def close(self) -> None:
        """As the engine's."""
        self._store.close()
        if self._engine is not None:
            self._engine.close()

    def _answered(self, keys: list[bytes], ask: Callable[[list[int]], list], write: Callable[[Any], bytes],
                  read: Callable[[bytes], Any]) -> list:
        """What each key has, in their order; ``ask`` for the places of those that have nothing."""
        found: list[Any] = [None] * len(keys)
        for place, key in enumerate(keys):
            value = self._store.get(key)
            if value is not None:
                with suppress(ValueError, KeyError, TypeError):
                    found[place] = read(value)
        missing = [place for place, value in enumerate(found) if value is None]
        self.num_asked += len(keys)
        self.num_known += len(keys) - len(missing)
        if missing:
            for place, value in zip(missing, ask(missing), strict=True):
                found[place] = value
            self._store.put({keys[place]: write(found[place]) for place in missing})
        return found

    def _real(self) -> Any:
        if self._engine is None:
            self._engine = self._opened()
        return self._engine


def known(artifact: Artifact, computes: dict[str, Any], opened: Callable[[], Any]) -> Any:
    """A :class:`KnownEngine`, or the real engine where a file of the artifact cannot be read (which it will say)."""
    try:
        key = artifact_key(artifact, computes)
    except OSError:
        return opened()
    return KnownEngine(artifact, key, opened)


def _about_likelihoods(engine: Any) -> dict[str, Any]:
    return {"noise": engine.likelihood_noise, "note": engine.likelihood_note, "batches": engine.batches_likelihoods}


def _likelihood_bytes(found: list[Likelihood]) -> bytes:
    return json.dumps([[each.log_prob, each.greedy] for each in found]).encode()


def _likelihoods(value: bytes) -> list[Likelihood]:
    return [Likelihood(log_prob=float(log_prob), greedy=greedy) for log_prob, greedy in json.loads(value)]


def _generation_bytes(answer: Generation) -> bytes:
    return json.dumps([list(answer.tokens), answer.stopped, answer.text]).encode()


def _generation(value: bytes) -> Generation:
    tokens, stopped, text = json.loads(value)
    return Generation(tokens=tuple(tokens), stopped=bool(stopped), text=str(text))


class _Store:
    """Bytes by key in one SQLite file; nothing at all where that cannot be."""

    def __init__(self, key: str) -> None:
        self._file: sqlite3.Connection | None = None
        path = sources.cache_dir() / "scores" / f"{key}.sqlite"
        for is_second in (False, True):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = sqlite3.connect(path, timeout=30)
                with file:
                    file.execute("CREATE TABLE IF NOT EXISTS found (key BLOB PRIMARY KEY, value BLOB NOT NULL)")
                    file.execute("SELECT count(*) FROM found").fetchone()
                self._file = file
                return
            except sqlite3.DatabaseError as error:
                # Broken: begin anew. Locked or not writable (OperationalError): do without.
                if is_second or isinstance(error, sqlite3.OperationalError):
                    return
                file.close()
                with suppress(OSError):
                    path.unlink()
            except OSError:
                return

    def get(self, key: bytes) -> bytes | None:
        if self._file is None:
            return None
        try:
            row = self._file.execute("SELECT value FROM found WHERE key = ?", (key,)).fetchone()
        except sqlite3.DatabaseError:
            return None
        return row[0] if row else None

    def put(self, values: dict[bytes, bytes]) -> None:
        if self._file is not None:
            with suppress(sqlite3.DatabaseError), self._file:
                self._file.executemany("INSERT OR REPLACE INTO found VALUES (?, ?)", list(values.items()))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
