"""Where in a conversation's rendered text the assistant's turns stand, for any chat template.

Nothing is known of a template but what it writes. A turn is found from renders of growing
prefixes: it starts where the generation prompt for it ends, its words end where the template's
own words after an answer begin, and its stop token is the last special token that the template
writes there whether or not the conversation goes on. A template that renders an earlier turn
differently once others follow (reasoning stripped from history) is noticed by comparing: such a
turn is read from the render in which it is the last, as the model will meet it.

Characters only: no tokenizer, no torch. Reads and writes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from lora_kit.errors import DataError, RecipeError

Render = Callable[[list[dict[str, Any]], list[dict[str, Any]], bool], str]
"""(messages, tools, add_generation_prompt) -> text; DataError when the template refuses them."""

_MARK = "lora-kit was here"


@dataclass(frozen=True, kw_only=True)
class StopWords:
    """The texts of a tokenizer's added tokens: the special ones, and the others (``</think>``, ``</tool_call>``)."""

    special: Sequence[str]
    other: Sequence[str] = ()

    def in_order(self, text: str, start: int, end: int) -> list[tuple[int, int]]:
        """(start, end) of each special token in ``text[start:end]``; of the others where there is no special one."""
        for words in (self.special, self.other):
            found = []
            position = start
            while position < end:
                hits = [(text.find(word, position, end), -len(word), word) for word in words]
                hits = [hit for hit in hits if hit[0] >= 0]
                if not hits:
                    break
                at, _, word = min(hits)
                found.append((at, at + len(word)))
                position = at + len(word)
            if found:
                return found
        return []


@dataclass(frozen=True, kw_only=True)
class Turn:
    """An assistant's turn: characters ``[start, end)`` of a render are what the model is to write.

    ``stop`` is the span of the stop token, the last thing before ``end``; None when the template writes none.
    ``text`` is the render in which this turn is the last one; ``prompt_lost`` what the generation prompt ends
    with and that render lacks (a template that opens a block of reasoning only for generation).
    """

    index: int
    start: int
    end: int
    stop: tuple[int, int] | None
    text: str
    prompt_lost: str = ""


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """A rendered text of the first ``num_messages`` messages and the turns that are trained on in it."""

    text: str
    num_messages: int
    turns: Sequence[Turn]


class Talk:
    """A conversation under one template.

    Args:
        messages, tools: as they are handed to the template.
        render: the template.
        stops: the tokenizer's added tokens.
        origin: ``file:line``, for errors.
        shift: messages that were put before the row's own, so that errors count the row's.

    Raises:
        DataError: the template refuses the conversation or leaves out a message.
        RecipeError: it leaves out tools or calls.
    """

    def __init__(self, messages: list[dict], tools: list[dict], render: Render, stops: StopWords, *, origin: str,
                 shift: int = 0) -> None:
        self.messages, self.tools, self.stops, self.origin, self.shift = messages, tools, stops, origin, shift
        self._render = render
        self.whole = render(messages, tools, False)
        self._check_all_reaches()

    def turn(self, index: int) -> Turn:
        """The assistant's turn that is message ``index``, read from the render in which it is the last.

        Raises:
            DataError: the template changes what the message says even there, or what stands before it, so that
                its characters cannot be told apart.
        """
        head, message = self.messages[:index], self.messages[index]
        before = self._render(head, self.tools, True) if head else ""
        own = self.whole if index + 1 == len(self.messages) else self._render(
            self.messages[:index + 1], self.tools, False)
        marked = self._render([*head, {"role": message["role"], "content": _MARK}], self.tools, False)
        position = marked.rfind(_MARK)
        start = len(before)
        if not head or not own.startswith(before):
            # The marked render keeps an answer that begins like the lost part ("<b>" and "<think>") out of the prompt.
            start = len(commonprefix([own, marked])) if not head else len(commonprefix([before, own, marked]))
            if head and start < len(commonprefix([before, self._render(head, self.tools, False)])):
                raise self._changed(index, "so its tokens cannot be told apart", "name another with model.template")
        tail = marked[position + len(_MARK):]
        end_of_words = len(own) - len(tail)
        if position >= 0 and own.endswith(tail) and end_of_words >= start:
            stop = self._stop(head, own, end_of_words, tail)
        else:
            # A turn that ends otherwise than a plain answer (calls may): its last special token ends it.
            found = self.stops.in_order(own, start, len(own))
            stop = found[-1] if found else None
            end_of_words = stop[0] if stop else len(own)
        said, words = _squeezed(own[:end_of_words]), _squeezed(message.get("content") or "")
        if words not in said if message.get("tool_calls") else not said.endswith(words):
            raise DataError(self.origin, f"the chat template changes what message {self._number(index)} says",
                            "name another with model.template")
        return Turn(index=index, start=start, end=stop[1] if stop else end_of_words, stop=stop, text=own,
                    prompt_lost=before[start:])

    def renderings(self, indices: Iterable[int], *, changed: str) -> list[Rendering]:
        """The fewest renders in which each turn of ``indices`` stands as in the one where it is the last.

        The whole conversation serves every turn before which, and in which, nothing changes as it grows; the
        others are read from shorter renders, each of which serves as many as it can. In the order of the turns;
        the whole conversation, when it serves any, comes last.

        Args:
            changed: ``split`` as said above, or ``error``: DataError for such a turn, by name.
        """
        waiting = [self.turn(index) for index in indices]
        found = []
        text, num_messages = self.whole, len(self.messages)
        while waiting:
            served = [turn for turn in waiting if text.startswith(turn.text[:turn.end])]
            waiting = [turn for turn in waiting if turn not in served]
            if served:
                found.append(Rendering(text=text, num_messages=num_messages, turns=served))
            if waiting and changed == "error":
                raise self._changed(waiting[0].index, "", "set data.changed_turns: split, which makes an example of "
                                    "each such turn")
            if waiting:
                text, num_messages = waiting[-1].text, waiting[-1].index + 1
        return found[::-1]

    def span_in_whole(self, index: int) -> tuple[int, int]:
        """Where the words of message ``index`` stand in the whole conversation, also when it changes them."""
        marked = self._render([*self.messages[:index], {"role": self.messages[index]["role"], "content": _MARK},
                               *self.messages[index + 1:]], self.tools, False)
        position = marked.rfind(_MARK)
        # Not what differs: an answer may begin or end with the mark's own letters.
        if position >= 0 and self.whole.startswith(marked[:position]):
            tail = marked[position + len(_MARK):]
            if self.whole.endswith(tail) and position + len(tail) <= len(self.whole):
                return position, len(self.whole) - len(tail)
        raise self._changed(index, "so its tokens cannot be told apart", "name another with model.template")

    def _stop(self, head: list[dict], own: str, end_of_words: int, tail: str) -> tuple[int, int] | None:
        """The stop token of a turn after whose words the template writes ``tail``.

        What is written only at the end of a conversation (Phi's end of text) is no part of the turn: of several
        special tokens the last one counts that also stands there when the conversation goes on.
        """
        found = self.stops.in_order(own, end_of_words, len(own))
        if len(found) < 2:
            return found[0] if found else None
        more = [{"role": "assistant", "content": _MARK}, {"role": "user", "content": "and then?"}]
        try:
            longer = self._render([*head, *more], self.tools, False)
        except DataError:
            return found[0]
        position = longer.rfind(_MARK)
        same = commonprefix([tail, longer[position + len(_MARK):]]) if position >= 0 else ""
        return next((stop for stop in reversed(found) if stop[1] <= end_of_words + len(same)), found[0])

    def _check_all_reaches(self) -> None:
        """Every message, tool and call must come through the template: one that drops some would train on nothing.

        Asked with words in their places that stand nowhere else: searched for, a short message ("a") would be found
        in the template's own words. A template that refuses those words is asked for the row's own.
        """
        messages, tools, sought = _marked_copy(self.messages, self.tools)
        try:
            text = self._render(messages, tools, False).casefold()
            missing = [place for place, mark, _ in sought if mark not in text]
        except DataError:
            text = _squeezed(self.whole)
            missing = [place for place, _, words in sought if _squeezed(words) not in text]
        if "tools" in missing:
            raise RecipeError("data.tools", f"the model's chat template ignores tools (seen at {self.origin})",
                              "set data.tools: system, which puts them into the system message")
        if missing:
            has_calls = any(message.get("tool_calls") for message in self.messages)
            raise DataError(self.origin, f"the chat template leaves out message {self._number(missing[0])}",
                            "name another with model.template" + (", or set data.tools: system" if has_calls else ""))

    def _changed(self, index: int, so: str, todo: str) -> DataError:
        what = f"the chat template renders message {self._number(index)} differently as the conversation grows"
        return DataError(self.origin, f"{what}, {so}" if so else what, todo)

    def _number(self, index: int) -> int:
        return index + 1 - self.shift


def _squeezed(text: str) -> str:
    """``text`` without white space, which templates trim and add."""
    return "".join(text.split())


def _marked_copy(messages: list[dict], tools: list[dict]) -> tuple[list[dict], list[dict], list[tuple[Any, str, str]]]:
    """Copies with a mark in every place that says something, and (place, mark, the row's own words) of each.

    A place is a message's index or ``tools``. Marks are lower case, as they are sought.
    """
    # Each apart: of a call that stands twice, deepcopy of all together would make one.
    messages, tools = [dict(message) for message in messages], [copy.deepcopy(tool) for tool in tools]
    sought: list[tuple[Any, str, str]] = []

    def mark(place: Any, words: str) -> str:
        sought.append((place, f"lora-kit mark {len(sought)} here", words))
        return sought[-1][1]

    for index, message in enumerate(messages):
        if (message.get("content") or "").strip():
            message["content"] = mark(index, message["content"])
        if message.get("tool_calls"):
            message["tool_calls"] = [copy.deepcopy(call) for call in message["tool_calls"]]
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            function["name"] = mark("tools", function["name"])
            for key, value in (function.get("arguments") or {}).items():
                if isinstance(value, str) and value.strip():
                    function["arguments"][key] = mark("tools", value)
    for tool in tools:
        function = tool.get("function", tool)
        function["name"] = mark("tools", function.get("name", ""))
    return messages, tools, sought
