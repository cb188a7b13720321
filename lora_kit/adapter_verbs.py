"""What is done with adapters outside of a run: merged into any base, several made one, one taken out of a model.

Reads models and adapters that the user names; writes the folder that the user names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kit.events import Note, tell
from lora_kit.pipeline import raise_for
from lora_kit.recipe import ModelSection
from lora_kit.types import Artifact


def merge_adapter(adapter_dir: Path, base: str, out_dir: Path, dtype: str = "auto") -> str:
    """Merge any adapter in PEFT layout into ``base``, outside of a run; a line that says what came of it.

    Args:
        base: as ``model.base`` in a recipe; a path is relative to the working folder.

    Raises:
        GateFailed: the certificate failed; the model is there to look at.
    """
    from lora_kit import merge

    summary, verdicts = merge.merge_adapter(_found(base), base, adapter_dir, out_dir, dtype)
    tell(Note(text=f"{out_dir}: {summary}"))
    raise_for(verdicts)
    return summary


def merge_adapters(adapters: list[Path], base: str, out_dir: Path, dtype: str = "auto", **options: Any) -> str:
    """Merge several adapters of ``base`` as one; a line that says what came of it.

    Args:
        base: as ``model.base`` in a recipe; a path is relative to the working folder.
        options: see :func:`lora_kit.merge.merge_adapters`.

    Raises:
        GateFailed: the certificate failed; the model is there to look at.
    """
    from lora_kit import merge

    lines, verdicts = merge.merge_adapters(_found(base), base, adapters, out_dir, dtype, **options)
    tell(Note(text=f"{out_dir / 'adapter'}: {lines[0]}"))
    tell(Note(text=f"{out_dir}: {lines[1]}"))
    raise_for(verdicts)
    return "; ".join(lines)


def extract_adapter(tuned: str, base: str, out_dir: Path, **options: Any) -> str:
    """Take a LoRA out of a model that was tuned whole; a line that says how much of the change it holds.

    Args:
        tuned, base: as ``model.base`` in a recipe; paths are relative to the working folder.
        options: see :func:`lora_kit.extraction.extract_lora`.
    """
    from lora_kit import extraction

    line = extraction.extract_certified(_found(base), _found(tuned), base, out_dir, **options)
    tell(Note(text=f"{out_dir}: {line}"))
    return line


def _found(reference: str) -> Artifact:
    from lora_kit.model import find_base

    return Artifact(**find_base(ModelSection(base=reference), Path.cwd())["artifact"])
