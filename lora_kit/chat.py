"""Conversations as token ids with a loss mask.

The tokenizer's own chat template renders; which characters are an assistant's turn is found
by ``turns.py`` from how the template renders growing prefixes of the conversation, so that it
works for templates with and without generation markers. A trained turn runs from the first
token after the generation prompt through its stop token. A token that holds characters of both
the prompt and the answer (a tokenizer may merge them) is not trained on.

Shape suffix: T tokens of one example. Reads tokenizer folders; writes one when a recipe
names another template. (`transformers` is imported inside functions: it loads torch.)
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy

from lora_kit.errors import DataError, ModelError, RecipeError
from lora_kit.events import Caution, tell
from lora_kit.turns import Rendering, StopWords, Talk, Turn
from lora_kit.types import Conversation, Example

_TEMPLATES = Path(__file__).parent / "templates"
_TOKENS_AT_ONCE = 4_000_000
_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")

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


def encode(tokenizer, conversation: Conversation, *, tools_mode: str = "template", train_on: str = "all",
           stop_tokens: str = "required", changed_turns: str = "split") -> list[Example]:
    """Token ids of a conversation and masks of the tokens to train on.

    One example, or several where the template changes earlier turns as the conversation grows: each has the turns
    that stand in it as the model will meet them, and each turn is trained on in one of them. They all have the
    conversation's origin. When no turn is trained on (weight 0), the one example has a mask of zeros.

    Args:
        conversation: whose assistant turns are trained on, except those of weight 0; of a ``text`` row, every token.
        tools_mode: ``template`` or ``system``; see the recipe's ``data.tools``.
        train_on: ``all`` assistant turns, the ``last`` only, or ``everything``; see ``data.train_on``.
        stop_tokens: ``required`` or ``optional``; see ``data.stop_tokens``.
        changed_turns: ``split`` or ``error``; see ``data.changed_turns``.

    Returns:
        Examples with tokens_T int32 and loss_mask_T uint8; each trained turn includes its stop token.

    Raises:
        DataError: the template cannot render this conversation, leaves out or rewrites a message, ends a trained turn
            without a stop token that is trained on, or writes two BOS tokens.
        RecipeError: the conversation has tools or calls and the template ignores them.
        ModelError: the tokenizer has no template, or cannot tell which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise ModelError("model", "this tokenizer cannot tell which characters a token stands for",
                         "use a model folder with a tokenizer.json")
    if conversation.trains_all:
        return [_plain_text(tokenizer, conversation, stop_tokens)]
    talk = _talk(tokenizer, conversation, tools_mode)
    spoken = [index for index, message in enumerate(talk.messages) if message["role"] == "assistant"]
    weights = [message.weight for message in conversation.messages if message.role == "assistant"]
    wanted = [index for index, weight in zip(spoken, weights, strict=True) if weight]
    if train_on == "last":
        wanted = [index for index in wanted if index == spoken[-1]]
    renderings = talk.renderings(wanted, changed=changed_turns)
    if not renderings or train_on == "everything" and renderings[-1].num_messages < len(talk.messages):
        renderings.append(Rendering(text=talk.whole, num_messages=len(talk.messages), turns=()))
    examples = []
    for rendering in renderings:
        ids, mask_T, stops = _masked(tokenizer, talk, rendering, stop_tokens)
        if train_on == "everything" and rendering is renderings[-1]:
            mask_T = _everything(tokenizer, talk, rendering, mask_T, spoken)
        examples.append(Example(tokens_T=numpy.array(ids, numpy.int32), loss_mask_T=mask_T, origin=talk.origin,
                                stops=stops))
    return examples


def check_stops(tokenizer, tokens: numpy.ndarray, mask: numpy.ndarray) -> None:
    """RecipeError unless a stop token is trained on in ``tokens`` (of all examples, with their ``mask``).

    The turns' ends may have been cut off (``data.too_long: cut_end``): a model trained so would not learn to stop.
    """
    stops = {tokenizer.eos_token_id, *stop_token_ids(tokenizer)} - {None}
    for start in range(0, len(tokens), _TOKENS_AT_ONCE):  # they may be larger than memory
        part = slice(start, start + _TOKENS_AT_ONCE)
        if numpy.isin(tokens[part][mask[part] == 1], list(stops)).any():
            return
    raise RecipeError("data.stop_tokens", "no stop token would be trained on, so the model would not learn to stop",
                      "raise data.max_tokens when ends are cut off, or set data.stop_tokens: optional")


def count_tokens(tokenizer, conversation: Conversation, *, tools_mode: str = "template") -> int:
    """How many tokens :func:`encode` makes of a conversation, without finding its mask, which takes longer."""
    messages, tools = rendered_form(conversation, tools_mode)
    if conversation.trains_all:
        return len(_plain_ids(tokenizer, conversation))
    text = render(tokenizer, messages, tools, add_generation_prompt=False, origin=conversation.origin)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(tokenizer, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, *,
               tools_mode: str = "template") -> list[int]:
    """Token ids of ``messages`` followed by the template's generation prompt."""
    if tools_mode == "system":
        messages, tools = _tools_into_system(messages, tools or [])
    text = render(tokenizer, messages, tools, add_generation_prompt=True, origin="prompt")
    ids, _ = _tokens_of(tokenizer, text, "prompt")
    _check_bos(tokenizer, ids, "prompt")
    return ids


def stop_token_ids(tokenizer) -> tuple[int, ...]:
    """Ids that end an assistant turn: the tokenizer's EOS and what the chat template writes after an answer."""
    found = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    if tokenizer.chat_template:
        from lora_kit.types import Message

        probe = Conversation(messages=(Message(role="user", content="a"), Message(role="assistant", content="b")),
                             origin="probe")
        turn = _talk(tokenizer, probe, "template").turn(1)
        if turn.stop:
            ids, offsets = _tokens_of(tokenizer, turn.text, "probe")
            found.add(int(ids[_stop_at(ids, offsets, turn)]))
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


def _talk(tokenizer, conversation: Conversation, tools_mode: str) -> Talk:
    messages, tools = rendered_form(conversation, tools_mode)

    def rendered(messages: list[dict], tools: list[dict], add_generation_prompt: bool) -> str:
        return render(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt,
                      origin=conversation.origin)

    added = list(tokenizer.added_tokens_decoder.values())
    special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    stops = StopWords(special=sorted(special), other=[token.content for token in added if token.content not in special])
    return Talk(messages, tools, rendered, stops, origin=conversation.origin,
                shift=len(messages) - len(conversation.messages))


def _tokens_of(tokenizer, text: str, origin: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a rendered text, and which characters each stands for; DataError when they end before the text."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    _check_end(text, offsets, origin)
    return ids, offsets


def _check_end(text: str, offsets: list[tuple[int, int]], origin: str) -> None:
    """DataError when ``text`` goes on after its last token: a tokenizer that cuts, which nobody would be told."""
    left = text[max((high for _, high in offsets), default=0):]
    if left.strip():
        raise DataError(origin, f"the tokenizer has no token for its last {len(left)} characters",
                        "it truncates or drops them: mend the model's tokenizer, or the row")


def _masked(tokenizer, talk: Talk, rendering: Rendering, stop_tokens: str
            ) -> tuple[list[int], numpy.ndarray, tuple[int, ...]]:
    """Token ids of a rendering, the mask (T,) of its turns, and where the stop tokens stand that are trained on."""
    ids, offsets = _tokens_of(tokenizer, rendering.text, talk.origin)
    _check_bos(tokenizer, ids, talk.origin)
    marked = _marked_by_template(tokenizer, talk, rendering, ids)
    mask_T = numpy.zeros(len(ids), numpy.uint8)
    stops = []
    for turn in rendering.turns:
        # Only tokens that begin in the turn: one that begins before it holds the prompt's characters too.
        inside = [t for t, (low, high) in enumerate(offsets) if turn.start <= low < turn.end and high > low]
        if not turn.stop:
            # The last token may hold characters of what follows: not trained on either.
            inside = [t for t in inside if offsets[t][1] <= turn.end]
        stop = _stop_at(ids, offsets, turn) if turn.stop else None
        if turn.stop is None and stop_tokens == "required":
            raise DataError(talk.origin, "the chat template ends an assistant turn without a stop token",
                            "name another with model.template, or set data.stop_tokens: optional")
        if turn.prompt_lost:
            _tell_once(tokenizer, "prompt", f"the chat template's generation prompt ends in {turn.prompt_lost!r}, "
                       f"which its render of an answer lacks (seen at {talk.origin}); answers are trained without it")
        trained = set(range(inside[0], (inside[-1] if stop is None else stop) + 1)) if inside else set()
        if marked is not None:
            by_markers = {t for t in marked if turn.start <= offsets[t][0] < len(turn.text)}
            if by_markers != trained:
                _tell_once(tokenizer, "markers", "the chat template's generation markers cover "
                           f"{_decoded(tokenizer, ids, by_markers)!r} where the turn it renders is "
                           f"{_decoded(tokenizer, ids, trained)!r} (seen at {talk.origin}); the markers are followed")
            trained = by_markers
        if stop_tokens == "required" and stop not in trained:
            raise DataError(talk.origin, "the chat template's generation markers leave out the stop token",
                            "mend the template, or set data.stop_tokens: optional")
        mask_T[sorted(trained)] = 1
        stops += [stop] if stop in trained else []
    return ids, mask_T, tuple(stops)


def _stop_at(ids: list[int], offsets: list[tuple[int, int]], turn: Turn) -> int:
    """The position of a turn's stop token. It may take in white space around it, so that its offsets are wider."""
    start, end = turn.stop
    return next(t for t, (low, high) in enumerate(offsets) if low <= start and high >= end)


def _marked_by_template(tokenizer, talk: Talk, rendering: Rendering, ids: list[int]) -> set[int] | None:
    """Positions of the tokens between the template's generation markers; None when it has no markers."""
    if not _MARKERS.search(tokenizer.get_chat_template(None, talk.tools or None)):
        return None
    marked = tokenizer.apply_chat_template(
        talk.messages[:rendering.num_messages], tools=talk.tools or None, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True)
    assert list(marked["input_ids"]) == ids, f"{talk.origin}: the tokens change with the markers"
    return {t for t, flag in enumerate(marked["assistant_masks"]) if flag}


def _everything(tokenizer, talk: Talk, rendering: Rendering, mask_T: numpy.ndarray, spoken: list[int]) -> numpy.ndarray:
    """A mask (T,) of the whole conversation, except what is trained on elsewhere or not at all.

    Left out are turns of weight 0, and earlier turns in the form into which the template changed them.
    """
    offsets = _tokens_of(tokenizer, rendering.text, talk.origin)[1]
    everything_T = numpy.ones_like(mask_T)
    served = {turn.index for turn in rendering.turns}
    for index in spoken:
        if index in served:
            continue
        turn = talk.turn(index)
        span = (turn.start, turn.end) if talk.whole.startswith(turn.text[:turn.end]) else talk.span_in_whole(index)
        outside = [not (low < span[1] and high > span[0]) for low, high in offsets]
        everything_T &= numpy.array(outside, numpy.uint8)
    return everything_T | mask_T


def _plain_text(tokenizer, conversation: Conversation, stop_tokens: str) -> Example:
    if tokenizer.eos_token_id is None and stop_tokens == "required":
        raise DataError(conversation.origin, "the tokenizer has no end-of-text token to end the text with",
                        "set data.stop_tokens: optional to train without one")
    ids = _plain_ids(tokenizer, conversation)
    _check_bos(tokenizer, ids, conversation.origin)
    return Example(tokens_T=numpy.array(ids, numpy.int32), loss_mask_T=numpy.ones(len(ids), numpy.uint8),
                   origin=conversation.origin, stops=(len(ids) - 1,) if ids[-1:] == [tokenizer.eos_token_id] else ())


def _plain_ids(tokenizer, conversation: Conversation) -> list[int]:
    text = conversation.messages[0].content
    encoded = tokenizer(text, add_special_tokens=True, return_offsets_mapping=True)
    _check_end(text, encoded["offset_mapping"], conversation.origin)
    ids = list(encoded["input_ids"])
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    return ids


def _check_bos(tokenizer, ids: list[int], origin: str) -> None:
    """DataError for two BOS tokens; a caution when there is none where the tokenizer would write one."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    if ids[:2] == [bos, bos]:
        raise DataError(origin, f"begins with two BOS tokens ({tokenizer.bos_token})",
                        "take one out of the chat template, or out of the row when it is plain text")
    if ids[:1] != [bos] and tokenizer("", add_special_tokens=True)["input_ids"][:1] == [bos]:
        _tell_once(tokenizer, "bos", f"the chat template writes no BOS token ({tokenizer.bos_token}), which the "
                   "tokenizer writes before plain text; the template is followed")


def _decoded(tokenizer, ids: list[int], positions: set[int]) -> str:
    return tokenizer.decode([ids[t] for t in sorted(positions)])


_told: set[tuple[str | None, str]] = set()


def _tell_once(tokenizer, about: str, text: str) -> None:
    """A caution about a template, at the first row that shows it: its others would say the same."""
    key = (template_sha256(tokenizer), about)
    if key not in _told:
        _told.add(key)
        tell(Caution(text=text))


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
