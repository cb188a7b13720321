"""How often the tuned model ends its answer: greedy answers to held-out prompts, right after training.

A model that never learnt its stop token talks until it is cut off, and its loss does not show
it. Reads nothing from disk but the tokenizer; writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_kit import chat
from lora_kit.engines.hf import HfEngine
from lora_kit.errors import DataError
from lora_kit.formats import UnusableRow
from lora_kit.items import question_and_answer
from lora_kit.stats import wilson
from lora_kit.types import Conversation


def prompts_of(tokenizer, held_out: Sequence[Conversation], number: int, most_tokens: int, tools_mode: str
               ) -> list[list[int]]:
    """Token ids of the first ``number`` prompts: what stands before a conversation's last assistant turn.

    Rows without a question, that the template cannot render, or over ``most_tokens`` are passed over.
    """
    found: list[list[int]] = []
    for conversation in held_out:
        if len(found) == number:
            break
        try:
            question, _ = question_and_answer(conversation)
            messages = [message.as_dict() for message in question]
            ids = chat.prompt_ids(tokenizer, messages, list(conversation.tools), tools_mode=tools_mode)
        except (UnusableRow, DataError):
            continue
        if len(ids) <= most_tokens:
            found.append(ids)
    return found


def measure_stop_rate(model, tokenizer, prompts: Sequence[Sequence[int]], new_tokens: int) -> dict[str, Any] | None:
    """Share of greedy answers that a stop token ends within ``new_tokens``; None without prompts.

    Returns:
        ``num_prompts``, ``num_stopped``, ``rate`` with Wilson's 95 % interval (``ci_low``, ``ci_high``) and
        ``new_tokens``.
    """
    if not prompts:
        return None
    was_training = model.training
    model.eval()
    try:
        engine = HfEngine(model, tokenizer, stop_ids=chat.stop_token_ids(tokenizer))
        answers = engine.generate(prompts, max_new_tokens=new_tokens)
    finally:
        model.train(was_training)
    stopped = sum(answer.stopped for answer in answers)
    low, high = wilson(stopped, len(answers))
    return {"num_prompts": len(answers), "num_stopped": stopped, "rate": stopped / len(answers), "ci_low": low,
            "ci_high": high, "new_tokens": new_tokens}
