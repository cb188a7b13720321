"""Parts of the recipe's section ``bench``: what is measured beside plain answers.

Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lora_kit.recipe_fields import Count, NumberOnly, Section


class SpeculativeSection(Section):
    """Speculative decoding beside plain decoding, on the prompts of the recipe's evaluation: those of its suite's
    tasks that generate, else of the held-out rows. The merged model decodes; prompt lookup always drafts once."""

    assistant: str | None = None
    """A smaller model with the same tokenizer that drafts too: an artifact of the run by its name, or a model as
    `model.base` names one. Default: none."""
    drafted: Count = 4
    """Tokens drafted for each pass of the model."""
    prompts: Annotated[int, Field(ge=8), NumberOnly] = 8
    """Prompts that are answered in each way; with fewer than 8 there is no interval."""
    new_tokens: Annotated[int, Field(ge=2), NumberOnly] = 48
    """Tokens of each answer; stop tokens are ignored."""
