"""What every section of a recipe is made of: the section itself, and the kinds of numbers and texts in its fields.

Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _no_bool(value: Any) -> Any:
    """``true`` where a number is meant is a mistake, not 1."""
    if isinstance(value, bool):
        raise ValueError("a number is meant here")
    return value


# Outermost, so that the bounds stay on the number itself and reach the JSON Schema.
NumberOnly = BeforeValidator(_no_bool)
Fraction = Annotated[float, Field(ge=0, lt=1), NumberOnly]
Positive = Annotated[float, Field(gt=0), NumberOnly]
Count = Annotated[int, Field(ge=1), NumberOnly]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=False, allow_inf_nan=False, use_attribute_docstrings=True,
        protected_namespaces=(),
    )
    not_here: ClassVar[dict[str, tuple[str, str]]] = {}
    """Keys that a user may know from elsewhere -> what is to be said of them, and what to do."""
