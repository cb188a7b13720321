"""Choices by measurement that are made once on a machine, so that a training is the same the next time.

Which of two ways is faster can come out either way on a busy machine, and the ways round differently. What was chosen
is kept in the cache, by everything that the choice depends on. Torch-free. Reads and writes the cache's ``choices/``.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_kit import sources


def recall(asked: dict[str, Any]) -> bool | None:
    """What was chosen before for ``asked`` (JSON values), None where nothing was."""
    try:
        kept = json.loads(_place(asked).read_text(encoding="utf-8"))
        return kept["chosen"] if kept["asked"] == asked and isinstance(kept["chosen"], bool) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(asked: dict[str, Any], chosen: bool) -> bool:
    """Keep ``chosen`` for ``asked``, unless another process was first; what is kept, or ``chosen`` where nothing is."""
    place = _place(asked)
    scratch = place.with_name(f".{place.name}.{os.getpid()}")
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps({"asked": asked, "chosen": chosen}, indent=1) + "\n", encoding="utf-8")
        with suppress(FileExistsError):
            os.link(scratch, place)
    with suppress(OSError):
        scratch.unlink()
    found = recall(asked)
    return chosen if found is None else found


def _place(asked: dict[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:32]
    return sources.cache_dir() / "choices" / f"{key}.json"
