"""How long training is and how fast it learns at each step, as arithmetic.

Torch-free, so that ``plan`` and ``train`` share it. Reads and writes nothing.
"""

from __future__ import annotations

import math

from lora_kit.recipe import TrainSection


def count_steps(settings: TrainSection, num_rows: int) -> int:
    """Optimizer steps of the recipe: ``steps``, or ``epochs`` (1 by default) over ``num_rows`` rounded up."""
    return settings.steps or max(1, math.ceil((settings.epochs or 1.0) * num_rows / settings.batch_size))


def learning_rate_at(step: int, num_steps: int, settings: TrainSection) -> float:
    """Learning rate of ``step`` (from 0): linear warm-up, then cosine to zero or constant."""
    num_warmup = round(settings.warmup * num_steps)
    if step < num_warmup:
        return settings.learning_rate * (step + 1) / num_warmup
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def save_interval(settings: TrainSection, num_steps: int) -> int:
    """Steps between checkpoints: ``save_every``, or a tenth of the steps and at least 20."""
    return settings.save_every or max(20, num_steps // 10)
