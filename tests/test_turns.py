"""Masks under the templates of many model families, and the faults of templates that must not pass.

``tests/templates/`` holds small templates in the manner of each family and, beside each, what is trained on
of one conversation: the rendered text with the trained spans between ⟦ and ⟧, examples separated by a line.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import numpy as np
import pytest

from lora_kit import chat, events
from lora_kit.chat import encode, prompt_ids, stop_token_ids
from lora_kit.data import masked_text
from lora_kit.errors import DataError, RecipeError
from lora_kit.tokens import batch_of
from lora_kit.turns import StopWords
from lora_kit.types import Conversation, Message
from tests import tiny

FOLDER = Path(__file__).parent / "templates"
BETWEEN = "\n--- example ---\n"

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}

# Family -> BOS, EOS, its other special tokens, added tokens that are not special.
FAMILIES = {
    "chatml": (None, "<|im_end|>", ["<|im_start|>"], []),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], []),
    "mistral": ("<s>", "</s>", [], ["[INST]", "[/INST]"]),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], []),
    "phi": (None, "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"], []),
    "qwen3": (None, "<|im_end|>", ["<|im_start|>"], ["<think>", "</think>", "<tool_call>", "</tool_call>"]),
    "deepseek": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", [], ["<｜User｜>", "<｜Assistant｜>"]),
    "deepseek_r1": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", [],
                    ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]),
    "zephyr": ("<s>", "</s>", [], []),
    "tulu": ("<s>", "</s>", [], []),
    "command_r": ("<BOS_TOKEN>", "<|END_OF_TURN_TOKEN|>", [
        "<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>",
        "<|END_RESPONSE|>"], []),
    "harmony": (None, "<|return|>", ["<|start|>", "<|channel|>", "<|message|>", "<|end|>"], []),
    "markers": (None, "<|im_end|>", ["<|im_start|>"], []),
    "hermes": (None, "<|im_end|>", ["<|im_start|>"], ["<tool_call>", "</tool_call>"]),
}
WITHOUT_SYSTEM = ("mistral", "gemma", "deepseek_r1")
WITH_TOOLS = ("qwen3", "hermes")
STOPS = {"gemma": "<end_of_turn>", "phi": "<|end|>"}
"""Families whose turns end in something other than EOS."""
CHANGING = ("qwen3", "harmony")
"""Families that render an answer differently once it is not the last."""


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory):
    """The byte tokenizer with a family's tokens and a template, by default the family's own."""
    from transformers import AddedToken

    def make(family: str, template: str | None = None):
        bos, eos, special, added = FAMILIES[family]
        template = template if template is not None else (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")
        tokenizer = tiny.save_tokenizer(tmp_path_factory.mktemp(family), template)
        # Phi's tokens take in the white space behind them, as the real ones do.
        special = [AddedToken(text, special=True, rstrip=family == "phi") for text in special]
        tokenizer.add_special_tokens({"eos_token": eos, "pad_token": eos, "extra_special_tokens": special,
                                      **({"bos_token": bos} if bos else {})})
        tokenizer.bos_token = bos
        tokenizer.add_tokens(added)
        return tokenizer

    return make


@pytest.fixture
def cautions():
    told = []
    chat._told.clear()
    with events.listening(lambda event: told.append(event.text) if isinstance(event, events.Caution) else None):
        yield told
    chat._told.clear()


def talk(*contents: str, system: str | None = None, weights: tuple[int, ...] = (), **fields) -> Conversation:
    messages = [Message(role="system", content=system)] if system else []
    for index, content in enumerate(contents):
        weight = weights[index // 2] if weights and index % 2 else 1
        messages.append(Message(role=("user", "assistant")[index % 2], content=content, weight=weight))
    return Conversation(messages=tuple(messages), origin="rows.jsonl:7", **fields)


def conversation_of(family: str) -> Conversation:
    if family == "hermes":
        return Conversation(origin="rows.jsonl:7", tools=(WEATHER,), messages=(
            Message(role="user", content="Weather?"),
            Message(role="assistant", content="Let me look.", tool_calls=(CALL, CALL)),
            Message(role="tool", content="rain"), Message(role="assistant", content="It rains."),
            Message(role="user", content="And now?"), Message(role="assistant", tool_calls=(CALL,))))
    if family == "qwen3":
        return Conversation(origin="rows.jsonl:7", tools=(WEATHER,), messages=(
            Message(role="system", content="Be kind."), Message(role="user", content="Hi"),
            Message(role="assistant", content="<think>\nA greeting.\n</think>\n\nHello."),
            Message(role="user", content="Weather?"),
            Message(role="assistant", content="<think>\nI look.\n</think>\n\n", tool_calls=(CALL,)),
            Message(role="tool", content="rain"),
            Message(role="assistant", content="<think>\nWet.\n</think>\n\nIt rains.")))
    system = None if family in WITHOUT_SYSTEM else "Be kind."
    return talk("Hi", "Hello  there. ", " How are you? ", "Fine, und dir? 👍", "Bye", "<b>Bye</b>", system=system)


def marked(tokenizer, conversation: Conversation, **options) -> str:
    return BETWEEN.join(masked_text(tokenizer, example) for example in encode(tokenizer, conversation, **options))


def trained(tokenizer, conversation: Conversation, **options) -> list[str]:
    return [part.split("⟧")[0] for part in marked(tokenizer, conversation, **options).split("⟦")[1:]]


# ---- families --------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_on_under_a_family_s_template(family, tokenizer_of):
    expected = (FOLDER / f"{family}.txt").read_text(encoding="utf-8").removesuffix("\n")
    assert marked(tokenizer_of(family), conversation_of(family)).removesuffix("\n") == expected


def test_every_template_has_its_family_and_its_masks():
    for kind in ("jinja", "txt"):
        assert {path.stem for path in FOLDER.glob(f"*.{kind}")} == set(FAMILIES)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "deepseek_r1"])
def test_what_stands_before_a_trained_turn_is_the_prompt_of_generation(family, tokenizer_of):
    tokenizer, conversation = tokenizer_of(family), conversation_of(family)
    messages = [message.as_dict() for message in conversation.messages]
    starts = [example.tokens_T[:start].tolist() for example in encode(tokenizer, conversation)
              for start in np.flatnonzero(np.diff(example.loss_mask_T.astype(int), prepend=0) == 1)]
    prompts = [prompt_ids(tokenizer, messages[:index], list(conversation.tools))
               for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert starts == prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stop_token_of_a_family_is_trained_on_in_every_turn(family, tokenizer_of):
    tokenizer = tokenizer_of(family)
    stop, eos = STOPS.get(family, tokenizer.eos_token), tokenizer.eos_token
    assert stop_token_ids(tokenizer) == tuple(sorted(tokenizer.convert_tokens_to_ids(each) for each in {stop, eos}))
    texts = trained(tokenizer, conversation_of(family))
    assert len(texts) == 3 and all(text.endswith(stop) for text in texts)
    ends = [example.tokens_T[end] for example in encode(tokenizer, conversation_of(family)) for end in example.stops]
    assert tokenizer.convert_ids_to_tokens(ends) == [stop] * 3


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in WITH_TOOLS])
def test_trained_text_is_the_answers_and_their_stop_tokens(family, tokenizer_of):
    tokenizer, draw = tokenizer_of(family), random.Random(family)
    stop = STOPS.get(family, tokenizer.eos_token)
    before, after = {"harmony": ("<|channel|>final<|message|>", ""), "mistral": (" ", ""),
                     "command_r": ("<|START_RESPONSE|>", "<|END_RESPONSE|>")}.get(family, ("", ""))
    for _ in range(20):
        words = ["a", "user", "assistant", "model", "<", "é", "👍", "\n", "[INST", "end", "I", " ", "think"]
        contents = [f"x{''.join(draw.choices(words, k=draw.randint(0, 6)))}y" for _ in range(2 * draw.randint(1, 4))]
        conversation = talk(*contents, system=None if family in WITHOUT_SYSTEM or draw.random() < 0.5 else "Be kind.")
        assert "".join(trained(tokenizer, conversation)) == "".join(
            f"{before}{answer}{after}{stop}" for answer in contents[1::2])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_examples_are_as_few_as_the_changes_allow(family, tokenizer_of):
    num_examples = {"harmony": 3, "qwen3": 2}.get(family, 1)
    assert len(encode(tokenizer_of(family), conversation_of(family))) == num_examples


# ---- what is chosen --------------------------------------------------------------------


@pytest.mark.parametrize("family", ["chatml", "markers", "phi", "harmony"])
def test_turns_by_weight_and_the_last_only(family, tokenizer_of):
    tokenizer = tokenizer_of(family)

    def answers(weights, **options):
        texts = trained(tokenizer, talk("a", "One", "b", "Two", "c", "Three", weights=weights), **options)
        return [name for text in texts for name in ("One", "Two", "Three") if name in text]

    assert answers((1, 1, 1)) == ["One", "Two", "Three"]
    assert answers((0, 1, 0)) == ["Two"] and answers((1, 0, 1)) == ["One", "Three"]
    assert answers((1, 1, 1), train_on="last") == ["Three"]
    assert answers((1, 1, 0), train_on="last") == answers((0, 0, 0)) == []


def test_a_conversation_without_a_trained_turn_is_an_example_without_a_mask(tokenizer_of):
    example, = encode(tokenizer_of("chatml"), talk("a", "One", weights=(0,)))
    assert not example.loss_mask_T.any() and len(example.tokens_T) > 10


def test_everything_is_the_prompt_too_but_no_turn_of_weight_0(tokenizer_of):
    tokenizer = tokenizer_of("phi")
    assert marked(tokenizer, talk("a", "One", "b", "Two"), train_on="everything") == (
        "⟦<|user|>a<|end|><|assistant|>One<|end|><|user|>b<|end|><|assistant|>Two<|end|><|endoftext|>⟧")
    assert marked(tokenizer, talk("a", "One", "b", "Two", weights=(0, 1)), train_on="everything") == (
        "⟦<|user|>a<|end|><|assistant|>⟧One<|end|>⟦<|user|>b<|end|><|assistant|>Two<|end|><|endoftext|>⟧")


def test_everything_leaves_out_what_the_template_changed(tokenizer_of):
    first, whole = marked(tokenizer_of("qwen3"), talk("a", "One", "b", "Two"), train_on="everything").split(BETWEEN)
    assert first.endswith("<|im_start|>assistant\n⟦<think>\n\n</think>\n\nOne<|im_end|>⟧\n")
    assert whole == ("⟦<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟧One⟦<|im_end|>\n<|im_start|>user\n"
                     "b<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nTwo<|im_end|>\n⟧")


@pytest.mark.parametrize("family", CHANGING)
def test_turns_that_change_may_be_refused_by_name(family, tokenizer_of):
    conversation = talk("a", "One", "b", "Two", system="Be kind.")
    with pytest.raises(DataError) as caught:
        encode(tokenizer_of(family), conversation, changed_turns="error")
    assert str(caught.value) == (
        "rows.jsonl:7: the chat template renders message 3 differently as the conversation grows; set "
        "data.changed_turns: split, which makes an example of each such turn")
    assert len(encode(tokenizer_of(family), talk("a", "One"), changed_turns="error")) == 1


# ---- tools -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["chatml", "llama3", "zephyr", "tulu", "phi", "deepseek"])
def test_tools_reach_any_family_through_the_system_message(family, tokenizer_of):
    tokenizer, call = tokenizer_of(family), '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}</tool_call>'
    if family in ("llama3", "zephyr", "tulu", "phi"):  # these write any role; a call without words stops some of them
        with pytest.raises((DataError, RecipeError), match="set data.tools: system"):
            encode(tokenizer, conversation_of("hermes"))
    conversation = conversation_of("hermes")
    stop = STOPS.get(family, tokenizer.eos_token)
    assert trained(tokenizer, conversation, tools_mode="system")[0] == f"Let me look.{call}{call}{stop}"
    assert trained(tokenizer, conversation, tools_mode="system")[-1] == f"{call}{stop}"


CHATML_END = "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CHATML_START = "{{ '<|im_start|>' + message['role'] + '\n' + (message['content'] or '') }}"
LISTED = "{% if tools %}{{ tools | tojson }}{% endif %}"
CALLED = "{% for call in message['tool_calls'] or [] %}{{ call['function'] | tojson }}{% endfor %}"


@pytest.mark.parametrize(("template", "error"), [
    (LISTED + "{% for message in messages %}" + CHATML_START + CALLED + CHATML_END, None),
    ("{% for message in messages %}" + CHATML_START + CALLED + CHATML_END, "ignores tools"),
    # The call's name stands in the definitions: that it is dropped shows all the same.
    (LISTED + "{% for message in messages %}" + CHATML_START + CHATML_END, "ignores tools"),
    (LISTED + "{% for message in messages %}" + CHATML_START
     + "{% for call in message['tool_calls'] or [] %}{{ call['function']['name'] }}{% endfor %}" + CHATML_END,
     "ignores tools"),
    (LISTED + "{% for message in messages if message['role'] != 'tool' %}" + CHATML_START + CALLED + CHATML_END,
     "leaves out message 3; name another with model.template, or set data.tools: system"),
    # Words beside a call are dropped, as some real templates do.
    (LISTED + "{% for message in messages %}{% if message['tool_calls'] %}{{ '<|im_start|>assistant\n' }}" + CALLED
     + "{% else %}" + CHATML_START + "{% endif %}" + CHATML_END, "leaves out message 2"),
])
def test_a_template_that_loses_a_part_of_the_tools_is_refused(template, error, tokenizer_of):
    tokenizer = tokenizer_of("chatml", template)
    if error is None:
        assert len(trained(tokenizer, conversation_of("hermes"))) == 3
    else:
        with pytest.raises((DataError, RecipeError), match=error):
            encode(tokenizer, conversation_of("hermes"))


# ---- faults of templates ---------------------------------------------------------------


@pytest.mark.parametrize(("changes", "error"), [
    ([("{{- '<|im_start|>' ~", "{{- '<s><s><|im_start|>' ~")], r"begins with two BOS tokens \(<s>\); take one"),
    ([(" ~ '<|im_end|>'", "")], "the chat template ends an assistant turn without a stop token"),
    ([("~ '<|im_end|>' -}}{%- endgen", "-}}{%- endgen"), ("{{- '\\n' -}}", "{{- '<|im_end|>\\n' -}}")],
     "the chat template's generation markers leave out the stop token; mend the template, or set data.stop_tokens: o"),
    ([("in messages -%}", "in messages if message.role != 'system' -%}")],
     "the chat template leaves out message 1; name"),
    ([("in messages -%}", "in messages[-2:] -%}")], "the chat template leaves out message 1; name"),
    ([("message.content ~ '<|im_end|>' -}}{%- endgen", "message.content[:5] ~ '<|im_end|>' -}}{%- endgen")],
     "the chat template leaves out message 3; name"),
])
def test_a_fault_in_a_template_is_found(changes, error, tokenizer_of):
    template = (FOLDER / "markers.jinja").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in template
        template = template.replace(old, new)
    tokenizer = tokenizer_of("markers", template)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    with pytest.raises(DataError, match=f"rows.jsonl:7: {error}"):
        encode(tokenizer, talk("Hi", "Hello there", "And?", "Fine", system="Be kind."))


def test_a_template_may_do_without_stop_tokens_when_the_recipe_says_so(tokenizer_of):
    template = "{% for message in messages %}{{ message.role ~ ': ' ~ message.content ~ '\n' }}{% endfor %}" \
               "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = tokenizer_of("chatml", template)
    assert marked(tokenizer, talk("Hi", "One", "b", "Two"), stop_tokens="optional") == (
        "user: Hi\nassistant: ⟦One⟧\nuser: b\nassistant: ⟦Two⟧\n")
    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_a_template_that_cuts_the_middle_of_an_answer_is_found(tokenizer_of):
    template = "{% for message in messages %}{{ '<|im_start|>' ~ message.role ~ '\n' " \
               "~ message.content | replace('no', '') ~ '<|im_end|>\n' }}{% endfor %}" \
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    tokenizer = tokenizer_of("chatml", template)
    assert trained(tokenizer, talk("Hi", "yes")) == ["yes<|im_end|>"]
    with pytest.raises(DataError, match="rows.jsonl:7: the chat template changes what message 4 says"):
        encode(tokenizer, talk("Hi", "yes", "Hi", "oh no!"))


def test_a_template_that_refuses_the_probe_is_asked_for_the_row_s_own_words(tokenizer_of):
    template = "{% for message in messages %}{% if 'mark' in message.content %}{{ raise_exception('no') }}{% endif %}" \
               "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}{% endfor %}" \
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    assert trained(tokenizer_of("chatml", template), talk("Hi", "yes")) == ["yes<|im_end|>"]
    dropping = template.replace("in messages", "in messages[1:]")
    with pytest.raises(DataError, match="leaves out message 1"):
        encode(tokenizer_of("chatml", dropping), talk("How?", "yes"))


# ---- BOS -------------------------------------------------------------------------------


def adding_bos(tokenizer):
    """The tokenizer, made to write its BOS before plain text as Llama's does."""
    from tokenizers.processors import TemplateProcessing

    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
    return tokenizer


@pytest.mark.parametrize("family", [family for family, (bos, *_) in FAMILIES.items()
                                    if bos and family not in ("zephyr", "tulu")])
def test_a_tokenizer_that_adds_a_bos_does_not_double_the_template_s(family, tokenizer_of, cautions):
    tokenizer = adding_bos(tokenizer_of(family))
    example, = encode(tokenizer, conversation_of(family))
    assert example.tokens_T.tolist().count(tokenizer.bos_token_id) == 1
    assert example.tokens_T[0] == tokenizer.bos_token_id and not any("BOS" in text for text in cautions)


def test_a_template_without_the_tokenizer_s_bos_is_told_once(tokenizer_of, cautions):
    tokenizer = adding_bos(tokenizer_of("zephyr"))
    for _ in range(3):
        encode(tokenizer, talk("Hi", "Hello"))
    assert cautions == ["the chat template writes no BOS token (<s>), which the tokenizer writes before plain text; "
                        "the template is followed"]


def test_plain_text_has_one_bos(tokenizer_of):
    tokenizer = adding_bos(tokenizer_of("llama3"))

    def text(words):
        return Conversation(messages=(Message(role="assistant", content=words),), origin="a.txt:1", trains_all=True)

    assert masked_text(tokenizer, encode(tokenizer, text("once"))[0]) == "⟦<|begin_of_text|>once<|eot_id|>⟧"
    with pytest.raises(DataError, match=r"a.txt:1: begins with two BOS tokens \(<\|begin_of_text\|>\)"):
        encode(tokenizer, text("<|begin_of_text|>once"))


def test_a_doubled_bos_is_found_in_a_prompt_too(tokenizer_of):
    template = "{{ bos_token }}" + (FOLDER / "llama3.jinja").read_text(encoding="utf-8").replace("{{- bos", "{{ bos")
    with pytest.raises(DataError, match="prompt: begins with two BOS tokens"):
        prompt_ids(tokenizer_of("llama3", template), [{"role": "user", "content": "Hi"}])


# ---- tokens over a boundary, padding ---------------------------------------------------


def test_a_token_over_the_boundary_of_prompt_and_answer_is_not_trained_on(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet, ":Y", "ok"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[(":", "Y"), ("o", "k")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role ~ ':' ~ message.content ~ ('</s>' if message.role == 'assistant' "
        "else ' ') }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
    assert marked(tokenizer, talk("Hi", "Yes ok", "b", "Aha ok")) == (
        "user:Hi assistant:Y⟦es ok</s>⟧user:b assistant:⟦Aha ok</s>⟧")
    # The same at the end, where no special token keeps the answer and what follows apart.
    tokenizer.chat_template = tokenizer.chat_template.replace("'</s>' if", "'k ' if").replace("else ' '", "else 'k '")
    assert marked(tokenizer, talk("Hi", "Ano"), stop_tokens="optional") == "user:Hik assistant:⟦An⟧ok "


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_hides_no_stop_token_also_when_it_is_the_same_token(family, tokenizer_of):
    tokenizer = tokenizer_of(family)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples = [*encode(tokenizer, conversation_of(family)),
                *encode(tokenizer, talk("Hi", "Hello there, and some more words to make it the longest. " * 20))]
    batch = batch_of(examples, tokenizer.pad_token_id, "cpu")
    for row, example in enumerate(examples):
        length = len(example.tokens_T)
        assert batch.attention_mask_BT[row].tolist() == [1] * length + [0] * (batch.tokens_BT.shape[1] - length)
        labels = batch.labels_BT[row].tolist()
        assert [label for label in labels if label != -100] == example.tokens_T[example.loss_mask_T == 1].tolist()


# ---- markers ---------------------------------------------------------------------------


def test_markers_and_growing_renders_agree(tokenizer_of, cautions):
    assert len(trained(tokenizer_of("markers"), conversation_of("markers"))) == 3
    assert cautions == []


def test_markers_that_cover_something_else_are_followed_and_told_once(tokenizer_of, cautions):
    template = (FOLDER / "markers.jinja").read_text(encoding="utf-8").replace(
        "'<|im_end|>' -}}{%- endgeneration -%}", "'<|im_end|>\\n' -}}{%- endgeneration -%}").replace(
        "{{- '\\n' -}}", "{{- '\\n' if message.role != 'assistant' else '' -}}")
    texts = trained(tokenizer_of("markers", template), talk("a", "One", "b", "Two"))
    assert texts == ["One<|im_end|>\n", "Two<|im_end|>\n"]
    assert cautions == ["the chat template's generation markers cover 'One<|im_end|>\\n' where the turn it renders is "
                        "'One<|im_end|>' (seen at rows.jsonl:7); the markers are followed"]


def test_markers_never_train_the_prompt(tokenizer_of):
    template = (FOLDER / "markers.jinja").read_text(encoding="utf-8").replace(
        "{{- '<|im_start|>' ~ message.role ~ '\\n' -}}", "").replace(
        "{%- generation -%}{{- ", "{%- generation -%}{{- '<|im_start|>assistant\\n' ~ ").replace(
        "    {{- message.content", "    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content")
    texts = trained(tokenizer_of("markers", template), talk("a", "One", "b", "Two"))
    assert texts == ["One<|im_end|>", "Two<|im_end|>"]


def test_markers_may_leave_out_the_stop_token_when_the_recipe_says_so(tokenizer_of, cautions):
    template = (FOLDER / "markers.jinja").read_text(encoding="utf-8").replace(
        "~ '<|im_end|>' -}}{%- endgeneration -%}", "-}}{%- endgeneration -%}{{- '<|im_end|>' -}}")
    assert trained(tokenizer_of("markers", template), talk("a", "One"), stop_tokens="optional") == ["One"]
    assert len(cautions) == 1


# ---- smaller matters -------------------------------------------------------------------


def test_a_prompt_that_opens_reasoning_is_told(tokenizer_of, cautions):
    tokenizer = tokenizer_of("deepseek_r1")
    assert marked(tokenizer, talk("Hi", "<b>Hello</b>")) == (
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>⟦<b>Hello</b><｜end▁of▁sentence｜>⟧")
    assert cautions == ["the chat template's generation prompt ends in '<think>\\n', which its render of an answer "
                        "lacks (seen at rows.jsonl:7); answers are trained without it"]
    with pytest.raises(DataError, match="changes what message 2 says"):
        encode(tokenizer, talk("Hi", "<think>hm</think>Hello"))


def test_a_conversation_cut_before_every_stop_token_is_an_error(tokenizer_of):
    tokenizer = tokenizer_of("gemma")
    example, = encode(tokenizer, talk("Hi", "Hello"))
    chat.check_stops(tokenizer, example.tokens_T, example.loss_mask_T)
    with pytest.raises(RecipeError, match="data.stop_tokens: no stop token would be trained on, so the"):
        chat.check_stops(tokenizer, example.tokens_T[:-2], example.loss_mask_T[:-2])


def test_stop_tokens_are_looked_for_a_slice_at_a_time(tokenizer_of, monkeypatch):
    """The files may be larger than memory: of 8 million tokens, no more than a slice's share is held."""
    import tracemalloc

    tokenizer = tokenizer_of("gemma")
    monkeypatch.setattr(chat, "_TOKENS_AT_ONCE", 100_000)
    tokens_T, mask_T = numpy.full(8_000_000, 5, numpy.int32), numpy.ones(8_000_000, numpy.uint8)
    tokens_T[-1] = tokenizer.eos_token_id
    chat.stop_token_ids(tokenizer)  # what it renders is not counted
    tracemalloc.start()
    try:
        chat.check_stops(tokenizer, tokens_T, mask_T)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_the_longest_special_token_at_a_place_is_found():
    stops = StopWords(special=["<|end|>", "<|end|>s"], other=["x"])
    assert stops.in_order("ax<|end|>s.<|end|>", 0, 18) == [(2, 10), (11, 18)]
    assert stops.in_order("ax", 0, 2) == [(1, 2)] and stops.in_order("a", 0, 1) == []
