"""Recipes, suites and tasks that come with lora-kit, in a checkout or in a wheel.

In a checkout they are the top-level folders ``recipes/`` and ``eval/``; a wheel
carries them inside the package. Torch-free. Reads folder listings; writes nothing.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def folder(name: str) -> Path:
    """The shipped folder ``recipes`` or ``eval``."""
    inside = _PACKAGE / "shipped_data" / name
    return inside if inside.is_dir() else _PACKAGE.parent / name


def recipe_names() -> list[str]:
    """Names of the shipped recipes, without their ending."""
    return sorted(path.stem for path in folder("recipes").glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """The shipped recipe called ``name``; it need not exist."""
    return folder("recipes") / f"{name}.yaml"
