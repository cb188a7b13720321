"""Conversations as token ids with a loss mask.

The tokenizer's own chat template renders; which tokens are an assistant's turn is found
from how the template renders growing prefixes of the conversation, so that it works for
templates with and without generation markers. A trained turn runs from the first token
after the generation prompt through its stop token.

Shape suffix: T tokens of one example. Reads tokenizer folders; writes one when a recipe
names another template. (`transformers` is imported inside functions: it loads torch.)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lora_kit.errors import DataError, ModelError, RecipeError
from lora_kit.types import Conversation, Example

_TEMPLATES = Path(__file__).parent / "templates"
_MARK = "lora-kit was here"

TOOL_PROMPT = (
    "You can call functions. To call one, answer with <tool_call>{\"name\": ..., \"arguments\": {...}}</tool_call> "
    "and nothing else. Functions:\n"
)
"""What stands before the JSON of the tools in the system message (``data.tools: system``)."""


def template_names() -> list[str]:
    """Names of the templates that come with lora-kit."""
    return sorted(path.stem for path in _TEMPLATES.glob("*.jinja"))


def template_text(name: str, relative_to: Path) -> str:
    """The template called ``name``, or in the file ``name`` relative to the recipe."""
    path = _TEMPLATES / f"{name}.jinja"
    if not path.exists():
        path = relative_to / name
    if not path.is_file():
        raise RecipeError("model.template", f"'{name}' is neither a known template nor a file",
                          f"known: {', '.join(template_names())}")
    return path.read_text(encoding="utf-8")


def load_tokenizer(folder: Path | str):
    """The Hugging Face tokenizer in ``folder``; ModelError when there is none that loads."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ModelError(str(folder), "no such folder", "check the path of the model")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - a broken tokenizer.json raises whatever the parser meets first
        raise ModelError(str(folder), f"has no tokenizer that loads ({_short(error)})",
                         "check the model folder") from None


def encode(tokenizer, conversation: Conversation, *, tools_mode: str = "template") -> Example:
    """Token ids of a conversation and a mask of the tokens to train on.

    Args:
        conversation: whose assistant turns are trained on; of a ``text`` row, every token.
        tools_mode: ``template`` or ``system``; see the recipe's ``data.tools``.

    Returns:
        Example with tokens_T int32 and loss_mask_T uint8; each trained turn includes its stop token.

    Raises:
        DataError: the template cannot render this conversation, ends a turn without a stop token, or rewrites
            what an earlier turn says.
        RecipeError: the conversation has tools or calls and the template ignores them.
    """
    import numpy

    if conversation.trains_all:
        ids = list(tokenizer(conversation.messages[0].content, add_special_tokens=True)["input_ids"])
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids.append(tokenizer.eos_token_id)
        return Example(tokens_T=numpy.array(ids, numpy.int32), loss_mask_T=numpy.ones(len(ids), numpy.uint8),
                       origin=conversation.origin)
    messages, tools = rendered_form(conversation, tools_mode)
    _check_tools_reach(tokenizer, messages, tools, conversation.origin)
    text, turns = _assistant_turns(tokenizer, messages, tools, conversation.origin)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    special_ids = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    mask = numpy.zeros(len(ids), numpy.uint8)
    for start, content_end, end in turns:
        inside = [t for t, (low, high) in enumerate(offsets) if low >= start and high <= end and high > low]
        stops = [t for t in inside if ids[t] in special_ids and offsets[t][0] >= content_end]
        if not stops:
            raise DataError(conversation.origin, "the chat template ends an assistant turn without a stop token",
                            "name another with model.template")
        # The first special token after the answer ends it. What the template writes behind it (a newline in
        # ChatML, an end of text in Phi) is never generated: not trained on.
        mask[inside[0]:stops[0] + 1] = 1
    return Example(tokens_T=numpy.array(ids, numpy.int32), loss_mask_T=mask, origin=conversation.origin)


def count_tokens(tokenizer, conversation: Conversation, *, tools_mode: str = "template") -> int:
    """How many tokens :func:`encode` makes of a conversation, without finding its mask, which takes longer."""
    messages, tools = rendered_form(conversation, tools_mode)
    text = render(tokenizer, messages, tools, add_generation_prompt=False, origin=conversation.origin)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *,
               tools_mode: str = "template") -> list[int]:
    """Token ids of ``messages`` followed by the template's generation prompt."""
    if tools_mode == "system":
        messages, tools = _tools_into_system(messages, tools or [])
    text = render(tokenizer, messages, tools, add_generation_prompt=True, origin="prompt")
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def stop_token_ids(tokenizer) -> tuple[int, ...]:
    """Ids that end an assistant turn: the tokenizer's EOS and what the chat template writes after an answer."""
    found = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if tokenizer.chat_template:
        from lora_kit.types import Message

        probe = Conversation(messages=(Message(role="user", content="a"), Message(role="assistant", content="b")),
                             origin="probe")
        example = encode(tokenizer, probe)
        found.add(int(example.tokens_T[example.loss_mask_T.nonzero()[0][-1]]))
    return tuple(sorted(found))


def rendered_form(conversation: Conversation, tools_mode: str) -> tuple[list[dict], list[dict]]:
    """Messages and tools as they are handed to the template, the same in training, eval and export."""
    messages = [message.as_dict() for message in conversation.messages]
    if tools_mode == "system":
        return _tools_into_system(messages, list(conversation.tools))
    return messages, list(conversation.tools)


def tool_call_text(name: str, arguments: dict[str, Any]) -> str:
    """A tool call as text, the form that ``data.tools: system`` trains."""
    return "<tool_call>" + json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False) + "</tool_call>"


def render(tokenizer, messages: list[dict], tools: list[dict] | None, *, add_generation_prompt: bool,
           origin: str) -> str:
    """The template's text for ``messages``; DataError with ``origin`` when it refuses them."""
    if not tokenizer.chat_template:
        raise ModelError("model", "this tokenizer has no chat template",
                         f"set model.template to one of: {', '.join(template_names())}")
    try:
        return tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False,
                                             add_generation_prompt=add_generation_prompt)
    except Exception as error:  # noqa: BLE001 - jinja raises whatever the template raises
        raise DataError(origin, f"the chat template cannot render this row ({_short(error)})",
                        "mend the row, or set data.tools: system when it has tool calls") from None


def template_sha256(tokenizer) -> str | None:
    """SHA-256 of the chat template's text (of all of them as JSON, where a model has several), None without one."""
    template = tokenizer.chat_template
    if not template:
        return None
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _assistant_turns(tokenizer, messages, tools, origin) -> tuple[str, list[tuple[int, int, int]]]:
    """The rendered text, and of each assistant turn where it starts, where its content ends and where it ends at most.

    A turn starts where the generation prompt for it ends. Some templates render a turn differently once others
    follow (Qwen3 adds an empty reasoning block to the last answer, Phi an end of text): then it ends where its
    content does, and a turn whose content is rewritten is refused.
    """
    whole = render(tokenizer, messages, tools, add_generation_prompt=False, origin=origin)
    turns = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:index], tools, add_generation_prompt=True, origin=origin)
        after = render(tokenizer, messages[:index + 1], tools, add_generation_prompt=False, origin=origin)
        stable = after.startswith(before) and whole.startswith(after)
        content_end = None if message.get("tool_calls") else _end_of_content(tokenizer, messages, tools, index, whole)
        if not whole.startswith(before) or (content_end is None and not stable):
            raise DataError(origin, f"the chat template renders message {index + 1} differently as the conversation "
                            "grows, so its tokens cannot be told apart", "name another with model.template")
        end = len(after) if stable else len(whole)
        if content_end is None:
            content_end = _last_special(tokenizer, whole, len(before), end)
        turns.append((len(before), content_end, end))
    return whole, turns


def _end_of_content(tokenizer, messages, tools, index: int, whole: str) -> int | None:
    """Where the content of message ``index`` ends in ``whole``, None when the template changes it.

    Found by rendering other words in its place: searched for, a short answer ("k") would be found in the
    template's own words (<think>).
    """
    marked = [*messages[:index], {**messages[index], "content": _MARK}, *messages[index + 1:]]
    position = render(tokenizer, marked, tools, add_generation_prompt=False, origin="").find(_MARK)
    content = messages[index].get("content") or ""
    for text in (content, content.strip()):
        if position >= 0 and whole.startswith(text, position):
            return position + len(text)
    return None


def _last_special(tokenizer, text: str, start: int, end: int) -> int:
    """Where the last special token in ``text[start:end]`` begins: a turn of tool calls may hold several."""
    positions = [text.rfind(token.content, start, end) for token in tokenizer.added_tokens_decoder.values()]
    return max(positions, default=end) if max(positions, default=-1) >= 0 else end


def _tools_into_system(messages: list[dict], tools: list[dict]) -> tuple[list[dict], list[dict]]:
    plain = []
    for message in messages:
        content = message.get("content") or ""
        for call in message.get("tool_calls") or ():
            function = call.get("function", call)
            content += tool_call_text(function["name"], function["arguments"])
        if message["role"] == "tool":
            content = f"<tool_response>{content}</tool_response>"
        plain.append({"role": message["role"], "content": content})
    if tools:
        functions = [tool.get("function", tool) for tool in tools]
        text = TOOL_PROMPT + json.dumps(functions, ensure_ascii=False)
        if plain and plain[0]["role"] == "system":
            plain[0] = {"role": "system", "content": plain[0]["content"] + "\n\n" + text}
        else:
            plain.insert(0, {"role": "system", "content": text})
    return plain, []


def _check_tools_reach(tokenizer, messages, tools, origin) -> None:
    """RecipeError when the template drops the tools or the calls: it would train on nothing of them."""
    if not tools and not any(message.get("tool_calls") for message in messages):
        return
    whole = render(tokenizer, messages, tools, add_generation_prompt=False, origin=origin)
    names = [tool.get("function", tool).get("name", "") for tool in tools]
    called = [call.get("function", call).get("name", "") for message in messages
              for call in message.get("tool_calls") or ()]
    without = render(tokenizer, messages, None, add_generation_prompt=False, origin=origin)
    if (tools and whole == without) or any(name not in whole for name in [*names, *called]):
        raise RecipeError("data.tools", f"the model's chat template ignores tools (seen at {origin})",
                          "set data.tools: system, which puts them into the system message")
