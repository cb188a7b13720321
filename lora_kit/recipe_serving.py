"""Parts of the recipe's section ``bench``: what is measured beside plain answers.

Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

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


class RetrievalSection(Section):
    """What retrieval costs a request: the question is embedded, passages are looked up, and they are read before it.
    Questions are the prompts of the recipe's evaluation; the merged model answers them."""

    passages: Count = 3
    """Passages that are put before each question."""
    passage_tokens: Annotated[int, Field(ge=16), NumberOnly] = 200
    """Tokens of a passage; texts are cut into pieces of so many."""
    corpus: str = "python:stdlib"
    """What is looked up: a folder or file of .md, .rst or .txt, relative to the recipe, or the docstrings of
    `python:stdlib` or `python:PACKAGE`."""
    most: Count = 256
    """Most passages of the corpus, drawn with the recipe's seed; the look-up goes through all of them."""
    embed: Literal["model", "tfidf"] = "model"
    """What a text is looked up by: model, the mean of the model's own last hidden states, less the corpus's mean;
    tfidf, its words weighted by how rare they are, which takes next to no time."""
    questions: Annotated[int, Field(ge=8), NumberOnly] = 8
    """Questions that are asked with and without passages; with fewer than 8 there is no interval."""
