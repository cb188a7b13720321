"""Examples that are too long: cut, or split into several at the turns of their conversation.

What is done with them is the recipe's ``data.too_long``; the ledger counts what went where.
Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lora_kit.types import Conversation, Example, Message

Encode = Callable[[Conversation], list[Example]]


def cut(example: Example, policy: str, most: int) -> Example:
    """The first (``cut_end``) or the last (``cut_start``) ``most`` tokens of ``example``."""
    return _part(example, 0 if policy == "cut_end" else len(example.tokens_T) - most, most)


def split(conversation: Conversation, examples: list[Example], encode: Encode, most: int,
          decode: Callable[[list[int]], str]) -> list[tuple[Conversation, Example]]:
    """``conversation`` as several examples, in order, each of at most ``most`` tokens where that can be.

    A piece is as many exchanges (a user's turn and all that answers it) as fit, after the system message of the
    conversation. An exchange that does not fit by itself is a piece over ``most``. A ``text`` row has no turns: it
    is cut into stretches of ``most`` tokens.

    Args:
        examples: what ``encode`` made of the whole conversation.
        decode: the text of token ids, for the pieces of a ``text`` row.

    Raises:
        DataError: the template cannot render a piece.
    """
    if conversation.trains_all:
        return [(replace(conversation, messages=(Message(role="assistant", content=decode(part.tokens_T)),)), part)
                for example in examples for part in _stretches(example, most)]
    head, exchanges = _exchanges(conversation)
    pieces: list[tuple[Conversation, Example]] = []
    first = 0
    while first < len(exchanges):
        end, made = first + 1, _piece(conversation, head, exchanges[first:first + 1])
        encoded = encode(made)
        while end < len(exchanges) and _fits(encoded, most):
            longer = _piece(conversation, head, exchanges[first:end + 1])
            tried = encode(longer)
            if not _fits(tried, most):
                break
            end, made, encoded = end + 1, longer, tried
        pieces += [(made, example) for example in encoded]
        first = end
    return pieces


def _fits(examples: list[Example], most: int) -> bool:
    return all(len(example.tokens_T) <= most for example in examples)


def _exchanges(conversation: Conversation) -> tuple[list[Message], list[list[Message]]]:
    """The messages before the first user's, and the others in groups that a user begins."""
    head: list[Message] = []
    groups: list[list[Message]] = []
    for message in conversation.messages:
        if message.role == "user":
            groups.append([message])
        else:
            (groups[-1] if groups else head).append(message)
    return head, groups


def _piece(conversation: Conversation, head: list[Message], exchanges: list[list[Message]]) -> Conversation:
    return replace(conversation, messages=(*head, *(message for exchange in exchanges for message in exchange)))


def _stretches(example: Example, most: int) -> list[Example]:
    return [_part(example, start, most) for start in range(0, len(example.tokens_T), most)]


def _part(example: Example, start: int, most: int) -> Example:
    """The at most ``most`` tokens of ``example`` from ``start`` on."""
    end = start + most
    return replace(example, tokens_T=example.tokens_T[start:end], loss_mask_T=example.loss_mask_T[start:end],
                   stops=tuple(stop - start for stop in example.stops if start <= stop < end))
