"""What each process takes of a batch, pass by pass, and the loss over rows that are held out.

Reads token files; writes nothing. (torch inside functions.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lora_kit import packing, stopwatch, tokens
from lora_kit.ledger import check_batch, padded_tokens
from lora_kit.loss import loss_sum
from lora_kit.recipe import TrainSection
from lora_kit.types import Batch, Example


class Shares:
    """What this process takes of a batch, pass by pass, packed within ``budget`` tokens or padded (None)."""

    def __init__(self, settings: TrainSection, budget: int | None, accelerator, share_prefix: bool = False) -> None:
        self.budget, self.micro_batch_size, self.accelerator = budget, settings.micro_batch_size, accelerator
        self.share_prefix = share_prefix

    def of(self, rows: Sequence[int], examples: tokens.ExampleFile) -> list[list[int]]:
        return packing.micro_batches(
            rows, examples.length, micro_batch_size=self.micro_batch_size, budget=self.budget,
            process=self.accelerator.process_index, num_processes=self.accelerator.num_processes)

    def padding_of(self, rows: Sequence[int], examples: tokens.ExampleFile) -> int:
        """Tokens of padding that all processes together make of ``rows``."""
        if self.budget is not None:
            return 0
        number = self.accelerator.num_processes
        plans = (packing.micro_batches(rows, examples.length, micro_batch_size=self.micro_batch_size, budget=None,
                                       process=process, num_processes=number) for process in range(number))
        lengths = {row: examples.length(row) for row in rows}
        return sum(padded_tokens(lengths, plan) for plan in plans)

    def batch_of(self, micro: Sequence[int], examples: tokens.ExampleFile) -> Batch:
        """One forward pass, recounted: InternalError when it trains on other than what the token files say."""
        chosen = [examples[row] for row in micro]
        batch = self.batch_of_examples(chosen)
        check_batch(batch, num_trained=sum(map(examples.num_trained, micro)),
                    num_tokens=sum(map(examples.length, micro)), origins=[example.origin for example in chosen])
        return batch

    def batch_of_examples(self, chosen: Sequence[Example]) -> Batch:
        """One forward pass of ``chosen``, packed or padded as this training does."""
        if self.budget is None:
            return tokens.batch_of(chosen, 0, self.accelerator.device)
        return packing.packed_batch_of(chosen, self.accelerator.device, self.share_prefix)

    def size_of(self, micro: Sequence[int], examples: tokens.ExampleFile) -> int:
        """Tokens of a pass, padding included."""
        return self._size([examples.length(row) for row in micro])

    def size_of_examples(self, chosen: Sequence[Example]) -> int:
        """As :meth:`size_of`, of examples."""
        return self._size([len(example.tokens_T) for example in chosen])

    def _size(self, lengths: Sequence[int]) -> int:
        return sum(lengths) if self.budget is not None else len(lengths) * max(lengths, default=0)


@stopwatch.part("held-out loss")
def evaluate_loss(net, examples: tokens.ExampleFile, shares: Shares, accelerator,
                  abandon: Callable[[], bool] = lambda: False) -> float | None:
    """Mean loss in nats over all trained tokens of ``examples``, over all processes; None without rows.

    Args:
        abandon: asked before each pass, in all processes: whether to leave it at that, and return None.
    """
    import torch

    if not len(examples):
        return None
    net.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for micro in shares.of(range(len(examples)), examples):
            if abandon():
                return None
            # A process that has no rows left takes part with one that does not count.
            batch = shares.batch_of(micro or [0], examples)
            with accelerator.autocast():
                summed = float(loss_sum(net, batch))
            totals += torch.tensor([summed, batch.num_trained_tokens]) * bool(micro)
    totals = accelerator.reduce(totals.to(accelerator.device).float() if accelerator.device.type == "mps"
                                else totals.to(accelerator.device), "sum")
    return float(totals[0] / totals[1])
