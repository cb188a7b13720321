"""Losses that go wrong: those that are no numbers, with the rows that make them, and those that jump.

Reads token files; writes nothing. (torch inside functions.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lora_kit.errors import DivergedError
from lora_kit.events import Caution, tell
from lora_kit.loss import loss_sum
from lora_kit.shares import Shares
from lora_kit.tokens import ExampleFile
from lora_kit.units import number_text

REMEMBERED = 20
"""Losses that the next one is compared with."""
_FEWEST = 10
_DEVIATIONS = 6.0
_TIMES = 1.5
_NAMED = 4


def watch_for_spike(state: dict[str, Any], loss: float, origins: Sequence[str]) -> bool:
    """Whether ``loss`` is far above the last REMEMBERED ones in ``state``, which it joins; a Caution says so.

    Far: over their mean by 6 standard deviations and by half. A loss that is far joins them too, so that a new level
    is told once.
    """
    recent = state["recent_losses"]
    mean = math.fsum(recent) / len(recent) if recent else 0.0
    deviation = math.sqrt(math.fsum((each - mean) ** 2 for each in recent) / len(recent)) if recent else 0.0
    is_spike = len(recent) >= _FEWEST and loss > mean + _DEVIATIONS * deviation and loss > _TIMES * mean
    if is_spike:
        tell(Caution(text=f"loss spike at step {state['step'] + 1}: {number_text(loss)}, where the last {len(recent)} "
                          f"steps had {number_text(mean)} (rows {_listed(origins)})"))
        state["spikes"].append({"step": state["step"] + 1, "loss": loss, "rows": _listed(origins)})
    state["recent_losses"] = [*recent[1 - REMEMBERED:], loss]
    return is_spike


def refuse_step(step: int, loss: float, grad_norm: float, net, batch_rows: Sequence[int], shares: Shares,
                examples: ExampleFile, accelerator) -> None:
    """Raise for a batch whose loss or gradient is not finite, naming the rows that alone are not finite either.

    All processes take part, each with all rows: the weights may be shared among them.

    Args:
        net: wrapped or not, with any gradients, which are lost.

    Raises:
        DivergedError: always; the optimizer has not stepped.
    """
    import torch

    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    alone = []
    for row in dict.fromkeys(batch_rows):
        for parameter in trained:
            parameter.grad = None
        with accelerator.autocast():
            summed = loss_sum(net, shares.batch_of([row], examples))
        accelerator.backward(summed / max(1, examples.num_trained(row)))
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        finite = [torch.isfinite(gradient.to_local() if hasattr(gradient, "to_local") else gradient).all()
                  for gradient in gradients]
        wrong = torch.tensor(float(not (math.isfinite(float(summed.detach())) and all(map(bool, finite)))),
                             device=accelerator.device)
        if float(accelerator.reduce(wrong, "sum")) > 0:
            alone.append(row)
    origins = [examples.origins[row] for row in alone or batch_rows]
    those = f"alone, {_listed(origins)} is so too" if len(alone) == 1 else (
        f"alone, {_listed(origins)} are so too" if alone else f"no row alone is so; rows {_listed(origins)}")
    raise DivergedError(
        f"train step {step}", f"loss {loss}, gradient norm {grad_norm}; {those}",
        "look at those rows with lora-kit data --show, or lower train.learning_rate; the last checkpoint is from "
        "before this step")


def refuse_evaluation(step: int, loss: float) -> None:
    """Raise for a held-out loss that is not finite.

    Raises:
        DivergedError: always.
    """
    raise DivergedError(f"train step {step}", f"held-out loss {loss}",
                        "lower train.learning_rate; the last checkpoint is from before this evaluation")


def _listed(origins: Sequence[str]) -> str:
    return ", ".join(origins[:_NAMED]) + (f" and {len(origins) - _NAMED} more" if len(origins) > _NAMED else "")
