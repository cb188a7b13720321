"""Conversations as tokens: what is trained on, with which template, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lora_kit import chat
from lora_kit.chat import encode, load_tokenizer, prompt_ids, stop_token_ids
from lora_kit.errors import DataError, ModelError, RecipeError
from lora_kit.types import Conversation, Message
from tests import tiny

# As Phi-4-mini writes it: a conversation that is not to go on ends with one more token.
PHI = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
# As Qwen3 writes it: the last answer gets an empty block of reasoning, earlier ones lose theirs.
QWEN3 = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% set parts = message['content'].split('</think>') %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_STOP = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
UPPER_CASE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ (message['content'] if loop.last else message['content'] | upper) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}{{ '<tool_call>' + (call['function'] | tojson) + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer_with(tmp_path_factory):
    """The byte tokenizer with a template; llama3's own tokens are added, as its tokenizer has them."""
    made = {}

    def make(template: str):
        if template not in made:
            made[template] = tokenizer = tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"), template)
            tokenizer.add_special_tokens({"extra_special_tokens": [
                "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>"]})
            tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
        return made[template]

    return make


@pytest.fixture(scope="module")
def chatml(tokenizer_with):
    return tokenizer_with(tiny.CHATML)


def talk(*contents: str | None, system: str | None = None, **fields) -> Conversation:
    """User and assistant in turn."""
    messages = [Message(role="system", content=system)] if system else []
    for index, content in enumerate(contents):
        messages.append(Message(role=("user", "assistant")[index % 2], content=content))
    return Conversation(messages=tuple(messages), origin="rows.jsonl:7", **fields)


def trained_texts(tokenizer, conversation, **options) -> list[str]:
    """The texts of the spans that are trained on, in all examples."""
    found = []
    for example in encode(tokenizer, conversation, **options):
        edges = np.flatnonzero(np.diff(example.loss_mask_T.astype(int), prepend=0, append=0))
        spans = zip(edges[::2], edges[1::2], strict=True)
        found += [tokenizer.decode(example.tokens_T[start:end]) for start, end in spans]
    return found


def only(tokenizer, conversation, **options):
    """The one example of a conversation."""
    example, = encode(tokenizer, conversation, **options)
    return example


TEMPLATES = {
    "chatml": (tiny.CHATML, "<|im_end|>"), "shipped chatml": (chat.template_text("chatml", None), "<|im_end|>"),
    "llama3": (chat.template_text("llama3", None), "<|eot_id|>"),
    "plain": (chat.template_text("plain", None), "<|im_end|>"),
    "generation": (GENERATION, "<|im_end|>"), "phi": (PHI, "<|im_end|>"),
}


# ---- masks -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_answer_is_trained_on_with_its_stop_token_and_nothing_else(name, tokenizer_with):
    template, stop = TEMPLATES[name]
    conversation = talk("Hi", "Hello there.", "How are you?", "Fine, und dir? 👍", system="Be kind.")
    texts = trained_texts(tokenizer_with(template), conversation)
    before = " " if name == "plain" else ""
    assert texts == [f"{before}Hello there.{stop}", f"{before}Fine, und dir? 👍{stop}"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_each_answer_is_what_the_mask_leaves_out(name, tokenizer_with):
    tokenizer = tokenizer_with(TEMPLATES[name][0])
    conversation = talk("Hi", "Hello", "And you?", "Good", "Bye", "Bye")
    example = only(tokenizer, conversation)
    starts = np.flatnonzero(np.diff(example.loss_mask_T.astype(int), prepend=0) == 1)
    messages = [message.as_dict() for message in conversation.messages]
    for turn, start in enumerate(starts):
        prompt = prompt_ids(tokenizer, messages[:2 * turn + 1])
        assert prompt == example.tokens_T[:start].tolist()
    assert len(starts) == 3


def test_the_tokens_are_those_of_the_rendered_text(chatml):
    example = only(chatml, talk("Hi", "Hello"))
    assert chatml.decode(example.tokens_T) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n")
    assert (example.tokens_T.dtype, example.loss_mask_T.dtype) == (np.int32, np.uint8)
    assert example.origin == "rows.jsonl:7"


def test_tokens_are_counted_as_they_are_encoded(chatml, tokenizer_with):
    for conversation in (talk("Hi", "Hello"), talk("Hi", "Hello", "And?", "Fine", system="Be kind.")):
        assert chat.count_tokens(chatml, conversation) == len(only(chatml, conversation).tokens_T)
    for mode in ("template", "system"):
        encoded = only(tokenizer_with(TOOLS), tool_talk(), tools_mode=mode)
        assert chat.count_tokens(tokenizer_with(TOOLS), tool_talk(), tools_mode=mode) == len(encoded.tokens_T)


@pytest.mark.parametrize("answer", [
    "k", "think", "im", "end", "n", "\n", "  spaces  ", "user", "<", "Hi",
    "<|im_end|>", "say <|im_end|> twice<|im_end|>",
])
def test_an_answer_that_looks_like_the_template_is_trained_on_whole(answer, tokenizer_with):
    for template in (tiny.CHATML, PHI, QWEN3):
        texts = trained_texts(tokenizer_with(template), talk("Hi", answer, "Hi", answer))
        thought = "<think>\n\n</think>\n\n" if template is QWEN3 else ""
        assert texts == [f"{thought}{answer}<|im_end|>"] * 2


def test_a_turn_that_the_template_changes_later_is_an_example_of_its_own(tokenizer_with):
    tokenizer = tokenizer_with(QWEN3)
    assert trained_texts(tokenizer, talk("Hi", "One")) == ["<think>\n\n</think>\n\nOne<|im_end|>"]
    examples = encode(tokenizer, talk("Hi", "One", "On", "Two"))
    assert [tokenizer.decode(example.tokens_T) for example in examples] == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nOne<|im_end|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nOne<|im_end|>\n"
        "<|im_start|>user\nOn<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nTwo<|im_end|>\n"]
    assert {example.origin for example in examples} == {"rows.jsonl:7"}
    assert trained_texts(tokenizer, talk("Hi", "One", "On", "Two")) == [
        "<think>\n\n</think>\n\nOne<|im_end|>", "<think>\n\n</think>\n\nTwo<|im_end|>"]


def test_plain_text_is_trained_on_whole_and_ends(chatml):
    example = only(chatml, talk("once upon a time", trains_all=True))
    assert chatml.decode(example.tokens_T) == "once upon a time<|im_end|>"
    assert example.loss_mask_T.all() and len(example.tokens_T) == 17
    assert only(chatml, talk("ended<|im_end|>", trains_all=True)).tokens_T.tolist().count(2) == 1


def test_plain_text_serves_a_tokenizer_without_an_end(tmp_path):
    tokenizer = tiny.save_tokenizer(tmp_path)
    tokenizer.eos_token = None
    assert len(only(tokenizer, talk("four", trains_all=True), stop_tokens="optional").tokens_T) == 4
    with pytest.raises(DataError, match="has no end-of-text token to end the text with; set data.stop_tokens: opt"):
        encode(tokenizer, talk("four", trains_all=True))


# ---- refusals --------------------------------------------------------------------------


def test_a_template_that_rewrites_history_is_refused_by_name(tokenizer_with):
    with pytest.raises(DataError) as caught:
        encode(tokenizer_with(UPPER_CASE), talk("Hi", "Hello", "Hi", "Again"))
    assert str(caught.value) == (
        "rows.jsonl:7: the chat template renders message 2 differently as the conversation grows, so its tokens cannot "
        "be told apart; name another with model.template")
    with pytest.raises(DataError, match="rows.jsonl:7: the chat template changes what message 2 says; name another"):
        encode(tokenizer_with(QWEN3), talk("Hi", "<think>hm</think>One", "On", "Two"))  # drops the reasoning at once


def test_a_template_without_stop_tokens_is_refused(tokenizer_with):
    with pytest.raises(DataError, match="rows.jsonl:7: the chat template ends an assistant turn without a stop token"):
        encode(tokenizer_with(NO_STOP), talk("Hi", "Hello"))


def test_a_template_that_refuses_a_row_is_quoted_in_one_line(tokenizer_with):
    tokenizer = tokenizer_with("{{ raise_exception('System role\nnot supported') }}")
    with pytest.raises(DataError) as caught:
        encode(tokenizer, talk("Hi", "Hello"))
    assert "rows.jsonl:7: the chat template cannot render this row (" in str(caught.value)
    assert "System role not supported" in str(caught.value)


def test_a_template_cannot_reach_the_machine(tokenizer_with):
    tokenizer = tokenizer_with("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(DataError, match="SecurityError"):
        encode(tokenizer, talk("Hi", "Hello"))


def test_a_tokenizer_without_a_template_is_told_which_there_are(tmp_path):
    tokenizer = tiny.save_tokenizer(tmp_path, template=None)
    with pytest.raises(ModelError, match="this tokenizer has no chat template; set model.template to one of: chatml, "
                                         "llama3, plain"):
        encode(tokenizer, talk("Hi", "Hello"))
    assert stop_token_ids(tokenizer) == (2,)
    assert chat.template_sha256(tokenizer) is None


# ---- tools -----------------------------------------------------------------------------

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}


def tool_talk(content: str | None = None, tools=(WEATHER,)) -> Conversation:
    return Conversation(origin="rows.jsonl:3", tools=tuple(tools), messages=(
        Message(role="user", content="How is it in Köln?"),
        Message(role="assistant", content=content, tool_calls=(CALL,)),
        Message(role="tool", content="rain", name="weather"),
        Message(role="assistant", content="It rains."),
    ))


def test_tools_reach_the_model_through_a_template_that_has_them(tokenizer_with):
    tokenizer = tokenizer_with(TOOLS)
    texts = trained_texts(tokenizer, tool_talk())
    assert len(texts) == 2 and texts[1] == "It rains.<|im_end|>"
    assert texts[0].startswith("<tool_call>") and texts[0].endswith("</tool_call><|im_end|>") and "weather" in texts[0]
    assert '"parameters"' in tokenizer.decode(only(tokenizer, tool_talk()).tokens_T)


def test_a_template_that_ignores_tools_is_an_error_with_a_way_out(chatml):
    with pytest.raises(RecipeError) as caught:
        encode(chatml, tool_talk(content=""))
    assert str(caught.value) == ("data.tools: the model's chat template ignores tools (seen at rows.jsonl:3); set "
                                 "data.tools: system, which puts them into the system message")


def test_a_template_that_drops_the_calls_is_an_error_also_without_tools(chatml):
    with pytest.raises(RecipeError, match="ignores tools"):
        encode(chatml, tool_talk(content="", tools=()))


def test_calls_without_content_point_to_the_system_message(chatml):
    with pytest.raises(DataError, match="cannot render this row .*set data.tools: system when it has tool calls"):
        encode(chatml, tool_talk(content=None))


@pytest.mark.parametrize("content", [None, "", "Let me look. "])
def test_tools_in_the_system_message(chatml, content):
    example = only(chatml, tool_talk(content), tools_mode="system")
    text = chatml.decode(example.tokens_T)
    assert text.startswith(f"<|im_start|>system\n{chat.TOOL_PROMPT}[{json.dumps(WEATHER['function'])}]<|im_end|>\n")
    assert "<|im_start|>tool\n<tool_response>rain</tool_response><|im_end|>" in text
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
    assert trained_texts(chatml, tool_talk(content), tools_mode="system") == [
        f"{content or ''}{call}<|im_end|>", "It rains.<|im_end|>"]


def test_a_system_message_of_the_row_s_own_stays_before_the_tools(chatml):
    conversation = talk("Hi", "Hello", system="Be kind.", tools=(WEATHER,))
    text = chatml.decode(only(chatml, conversation, tools_mode="system").tokens_T)
    assert text.startswith(f"<|im_start|>system\nBe kind.\n\n{chat.TOOL_PROMPT}")


def test_without_tools_the_system_mode_changes_nothing(chatml):
    assert only(chatml, talk("Hi", "Hello"), tools_mode="system").tokens_T.tolist() == (
        only(chatml, talk("Hi", "Hello")).tokens_T.tolist())


@pytest.mark.parametrize("mode", ["template", "system"])
def test_tools_are_the_same_in_training_and_in_a_prompt(mode, tokenizer_with):
    tokenizer = tokenizer_with(TOOLS)
    conversation = tool_talk("")
    example = only(tokenizer, conversation, tools_mode=mode)
    starts = np.flatnonzero(np.diff(example.loss_mask_T.astype(int), prepend=0) == 1)
    messages = [message.as_dict() for message in conversation.messages]
    for start, end in zip(starts, (1, 3), strict=True):
        assert prompt_ids(tokenizer, messages[:end], [WEATHER], tools_mode=mode) == example.tokens_T[:start].tolist()


def test_a_tool_call_s_text_is_read_back():
    from lora_kit.tool_calls import parse_calls

    call = parse_calls(chat.tool_call_text("weather", {"city": "Köln", "days": [1, 2]}))[0]
    assert (call.name, call.arguments) == ("weather", {"city": "Köln", "days": [1, 2]})


# ---- stop tokens and templates ---------------------------------------------------------


@pytest.mark.parametrize(("name", "stops"), [("chatml", ["<|im_end|>"]), ("llama3", ["<|eot_id|>", "<|im_end|>"])])
def test_stop_tokens_are_the_end_of_text_and_the_template_s_own(name, stops, tokenizer_with):
    tokenizer = tokenizer_with(TEMPLATES[name][0])
    assert stop_token_ids(tokenizer) == tuple(sorted(tokenizer.convert_tokens_to_ids(stops)))


def test_templates_are_found_by_name_and_by_path(tmp_path):
    assert chat.template_names() == ["chatml", "llama3", "plain"]
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert chat.template_text("mine.jinja", tmp_path) == "{{ messages }}"
    with pytest.raises(RecipeError, match="model.template: 'chatlm' is neither a known template nor a file; known: c"):
        chat.template_text("chatlm", tmp_path)


def test_a_template_s_hash_follows_its_text(tokenizer_with):
    hashes = {chat.template_sha256(tokenizer_with(template)) for template, _ in TEMPLATES.values()}
    assert len(hashes) == len({template for template, _ in TEMPLATES.values()})


def test_several_templates_of_one_model_have_one_hash(tmp_path):
    tokenizer = tiny.save_tokenizer(tmp_path)
    tokenizer.chat_template = {"default": tiny.CHATML, "tool_use": TOOLS}
    assert len(chat.template_sha256(tokenizer)) == 64
    assert trained_texts(tokenizer, talk("Hi", "Hello")) == ["Hello<|im_end|>"]


# ---- loading ---------------------------------------------------------------------------


@pytest.mark.parametrize(("damage", "told"), [
    ("missing", "no such folder"), ("no tokenizer", "has no tokenizer that loads"),
    ("cut off", "has no tokenizer that loads"), ("other json", "has no tokenizer that loads"),
])
def test_a_tokenizer_that_does_not_load_is_one_line(tmp_path, damage, told):
    folder = tmp_path / "model"
    if damage != "missing":
        tiny.save_tokenizer(folder)
        path = folder / "tokenizer.json"
        {"no tokenizer": path.unlink, "cut off": lambda: path.write_text(path.read_text()[:200]),
         "other json": lambda: path.write_text('{"a": 1}')}[damage]()
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    assert str(caught.value).startswith(f"{folder}: {told}") and len(str(caught.value)) < 500


@pytest.mark.real_model
def test_the_default_base_trains_on_its_answers(smollm2_base):
    tokenizer = load_tokenizer(smollm2_base)
    conversation = talk("Hi", "Hello there.", "And you?", "Fine. 👍")
    assert trained_texts(tokenizer, conversation) == ["Hello there.<|im_end|>", "Fine. 👍<|im_end|>"]
    assert stop_token_ids(tokenizer) == (2,)
    example = only(tokenizer, conversation)
    start = int(np.flatnonzero(example.loss_mask_T)[0])
    assert prompt_ids(tokenizer, [{"role": "user", "content": "Hi"}]) == example.tokens_T[:start].tolist()
