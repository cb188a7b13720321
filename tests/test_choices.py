"""What was chosen by measurement stays chosen on a machine."""

from __future__ import annotations

import pytest

from lora_kit import choices

ASKED = {"what": "attention", "lengths": [5, 9]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("chosen", [True, False])
def test_the_first_choice_stays(chosen, own_cache):
    assert choices.recall(ASKED) is None
    assert choices.keep(ASKED, chosen) is chosen
    assert choices.keep(ASKED, not chosen) is chosen and choices.recall(ASKED) is chosen
    assert choices.recall({**ASKED, "lengths": [9, 5]}) is None
    assert len(list((own_cache / "choices").iterdir())) == 1


def test_a_broken_file_is_as_good_as_none(own_cache):
    choices.keep(ASKED, True)
    [path] = (own_cache / "choices").iterdir()
    path.write_text(path.read_text()[:20])
    assert choices.recall(ASKED) is None and choices.keep(ASKED, False) is False


def test_a_cache_that_cannot_be_written_chooses_anew(own_cache):
    own_cache.write_text("a file")
    assert choices.keep(ASKED, True) is True and choices.recall(ASKED) is None
