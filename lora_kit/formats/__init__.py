"""Dataset formats: one file each, a row of the file in, a Conversation out.

To add a format, write one file in this folder. Its name is the value of ``format:`` in a
recipe; there is no list to enter it in. It has:

``EXAMPLE``
    a literal row (dict), shown in the documentation. The tests hold every format to it:
    it is detected as this format and no other, and it gives a conversation.
``fits(record) -> bool``
    whether a row has this format's keys. It looks at keys and kinds of values only, must
    not raise, and must be false for every other format's rows: detection has no order.
    Keys whose value is None are left out before it is asked.
``to_conversation(record, origin) -> Conversation``
    the row as messages. It ends in ``conversation(...)`` below, which holds the rules
    that all formats share, and raises ``UnusableRow(reason)`` for a row that cannot be
    trained on. The reason is short and the same for every such row: the ledger counts by it.
``records(path, shown="") -> Iterator[(origin, record)]``, optional
    for a file that is not read row by row (``bfcl`` joins two files). ``companions(name)``
    then names the other files it reads, relative to the first, so that a source that is
    unpacked from an archive unpacks them too.
``records_of(reference) -> Iterator[(origin, record)]``, optional
    for rows that come from no data file (``python_docstrings``).

A test goes to ``tests/formats/test_<name>.py``. Formats never import each other; what
they share stands here. Standard library only; reads and writes nothing.
"""

from __future__ import annotations

import difflib
import importlib
import itertools
import json
import pkgutil
from collections import Counter
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from lora_kit.errors import DataError, RecipeError
from lora_kit.types import Conversation, Message

DETECTION_ROWS = 20
"""Rows that detection looks at."""

_ROLES = {
    "system": "system", "developer": "system", "user": "user", "assistant": "assistant",
    "tool": "tool", "function": "tool",
}


class UnusableRow(Exception):
    """A row that cannot be trained on; ``reason`` is what the ledger counts it under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


# ---- finding a format -------------------------------------------------------------------


def names() -> list[str]:
    """The formats, sorted: the files of this folder that do not begin with an underscore."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def load(name: str) -> ModuleType:
    """The module of the format ``name``.

    Raises:
        RecipeError: there is no such format; the nearest name is proposed.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError("format", f"there is no format {name!r}", f"{hint}known: {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}")


def detect(records: Iterable[dict[str, Any]], shown: str) -> str:
    """The one format that the first rows of ``records`` fit (at most 20 are looked at).

    At least half of them must fit it: a row that fits nothing is left to the ledger,
    rows of two formats are an error.

    Raises:
        DataError: no rows, no format or several; names the keys that the rows have.
    """
    rows = [
        {key: value for key, value in record.items() if value is not None}
        for record in itertools.islice(records, DETECTION_ROWS)
    ]
    if not rows:
        raise DataError(shown, "holds no rows", "name a file that has some")
    modules = {name: load(name) for name in names()}
    fitting = Counter(name for row in rows for name, module in modules.items() if module.fits(row))
    if len(fitting) == 1 and 2 * fitting.total() >= len(rows):
        return next(iter(fitting))
    keys = ", ".join(dict.fromkeys(str(key) for row in rows for key in row)) or "none"
    if len(fitting) > 1:
        what = f"rows with the keys {keys} fit several formats: {', '.join(sorted(fitting))}"
    else:
        what = f"rows with the keys {keys} fit no format (known: {', '.join(modules)})"
    raise DataError(shown, what, "name one as format: in the recipe, or rename the keys as that format has them")


# ---- what formats share -----------------------------------------------------------------


def conversation(
    messages: Sequence[Message], *, origin: str, tools: Sequence[dict[str, Any]] = ()
) -> Conversation:
    """``messages`` as a Conversation, when every chat template can render them.

    The rules: at least one assistant turn; a system message only at the start; after it
    user and assistant take turns, the user first; a tool's answer follows a call or
    another tool's answer, and the assistant follows tools' answers. User turns have
    content, assistant turns content or calls.

    Raises:
        UnusableRow: no messages, no assistant turn, empty content, broken characters,
            roles out of order.
    """
    if not messages:
        raise UnusableRow("no messages")
    if not any(message.role == "assistant" for message in messages):
        raise UnusableRow("no assistant turn")
    before = "start"
    for message in messages:
        filled = bool(message.content and message.content.strip())
        if message.role == "user" and not filled or message.role == "assistant" and not (filled or message.tool_calls):
            raise UnusableRow("empty content")
        check_characters(message.content)
        if message.role not in _MAY_FOLLOW[before]:
            raise UnusableRow("roles out of order")
        before = "call" if message.tool_calls else message.role
    return Conversation(messages=tuple(messages), origin=origin, tools=tuple(tools))


_MAY_FOLLOW = {
    "start": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "call": ("tool", "user"),
    "tool": ("tool", "assistant"),
}


def check_characters(content: str | None) -> None:
    r"""Raise UnusableRow("broken characters") for content that is no text.

    Half an emoji ("\ud83d" alone) is legal JSON, but cannot be encoded, and no tokenizer takes it.
    """
    try:
        (content or "").encode()
    except UnicodeEncodeError:
        raise UnusableRow("broken characters") from None


def message_of(raw: Any, origin: str = "row") -> Message:
    """A message as OpenAI writes them: role, content, tool_calls, name, tool_call_id, weight.

    ``developer`` is system, ``function`` is tool, and the older ``function_call`` is one
    tool call. Keys whose value is None count as absent (Arrow files fill them in).

    Raises:
        UnusableRow: bad role, content is not text, broken tool call.
        DataError: a weight other than 0 and 1, at ``origin``.
    """
    if not isinstance(raw, dict):
        raise UnusableRow("message is not an object")
    role = raw.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise UnusableRow("bad role")
    calls = raw.get("tool_calls")
    if calls is None and raw.get("function_call") is not None:
        calls = [raw["function_call"]]
    name, call_id = raw.get("name"), raw.get("tool_call_id")
    return Message(
        role=_ROLES[role],
        content=text_of(raw.get("content")),
        tool_calls=tool_calls_of(calls),
        name=name if isinstance(name, str) else None,
        tool_call_id=call_id if isinstance(call_id, str) else None,
        weight=weight_of(raw.get("weight"), origin),
    )


def weight_of(weight: Any, origin: str) -> int:
    """OpenAI's mark of an assistant turn that is trained on (1, the default) or not (0); also a bool or 1.0.

    Raises:
        DataError: anything else. The rows mean something that training does not do, so this is no unusable row
            to be counted: training on the others would not be what was asked for either.
    """
    if weight is None:
        return 1
    if not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise DataError(origin, f"a message has weight {weight!r}",
                        "use 0 (not trained on) or 1; data.train[].weight weighs whole sources")
    return int(weight)


def text_of(content: Any) -> str | None:
    """Content as one string: text as it is, a list of text parts joined, None for none.

    Raises:
        UnusableRow: it is or holds something else, an image for one.
    """
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UnusableRow("content is not text")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str) or isinstance(part, dict) and part.get("type", "text") != "text":
            raise UnusableRow("content is not text")
        texts.append(text)
    return "".join(texts)


def tool_calls_of(calls: Any) -> tuple[dict[str, Any], ...]:
    """Tool calls as chat templates read them: ``{"type", "function": {"name", "arguments": dict}}``, id when given.

    Takes OpenAI's objects and bare ``{"name", "arguments"}``, one or a list, also as a
    JSON string; the arguments may be an object or a JSON string of one.

    Raises:
        UnusableRow: broken tool call.
    """
    calls = _from_json(calls, "broken tool call")
    if calls is None:
        return ()
    read = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") or call if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnusableRow("broken tool call")
        arguments = _from_json(function.get("arguments") or {}, "broken tool call")
        if not isinstance(arguments, dict):
            raise UnusableRow("broken tool call")
        marks = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        read.append({**marks, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return tuple(read)


def tools_of(tools: Any) -> tuple[dict[str, Any], ...]:
    """Tool definitions as OpenAI's objects ``{"type": "function", "function": {...}}``.

    Takes those and bare functions (``name``, ``description``, ``parameters``), as a list
    or as a JSON string of one.

    Raises:
        UnusableRow: broken tools.
    """
    tools = _from_json(tools, "broken tools")
    if tools is None:
        return ()
    if not isinstance(tools, list):
        raise UnusableRow("broken tools")
    read = []
    for tool in tools:
        tool = _from_json(tool, "broken tools")
        function = tool.get("function") or tool if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnusableRow("broken tools")
        read.append({"type": "function", "function": {k: v for k, v in function.items() if v is not None}})
    return tuple(read)


def _from_json(value: Any, reason: str) -> Any:
    """``value``, or what it says when it is a string of JSON; an empty string is None."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise UnusableRow(reason) from None
