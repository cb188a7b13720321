"""The recipe's choice of what is trained on, through the stage data: weights, turns that change, stop tokens."""

from __future__ import annotations

import shutil

import pytest

from lora_kit import chat, data
from lora_kit.errors import DataError, RecipeError
from lora_kit.rows import read_held_out
from lora_kit.tokens import read_examples
from tests.test_data import Workplace, counts_of, reasons_of, talk

# Earlier answers lose their mark once another follows, as reasoning is stripped from history.
CHANGING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '!' if loop.last }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
).replace("{{ '!' if loop.last }}", "{{ '!' if loop.last and message['role'] == 'assistant' else '' }}")


@pytest.fixture
def place(tmp_path, tiny_model, monkeypatch) -> Workplace:
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    return Workplace(tmp_path / "recipes", base)


def prepare(place, *overrides: str):
    recipe, found, base = place.find("data.held_out_rows=0", *overrides)
    data.prepare(recipe, found, base)
    return found


def shown(place, found) -> list[str]:
    return [data.masked_text(place.tokenizer(), example) for example in read_examples(found.folder, "train")]


def weighed(*contents: str, weights: tuple) -> dict:
    row = talk(*contents)
    for message, weight in zip(row["messages"][1::2], weights, strict=True):
        message["weight"] = weight
    return row


def test_weights_and_the_choice_of_turns_reach_the_token_files(place):
    place.write("rows.jsonl", [weighed("a", "One", "b", "Two", weights=(0, 1)), talk("a", "One", "b", "Two")])
    first, second = shown(place, prepare(place))
    assert "⟦Two<|im_end|>⟧" in first and "One<|im_end|>" in first and first.count("⟦") == 1
    assert second.count("⟦") == 2
    assert [text.count("⟦") for text in shown(place, prepare(place, "data.train_on=last"))] == [1, 1]
    assert shown(place, prepare(place, "data.train_on=everything"))[1].startswith("⟦<|im_start|>user\na<|im_end|>\n<")


def test_a_row_without_a_trained_turn_is_dropped_and_counted(place):
    place.write("rows.jsonl", [talk("a", "One"), weighed("b", "Two", weights=(False,))])
    found = prepare(place)
    assert (counts_of(found)["rows_used"], counts_of(found)["rows_dropped"]) == (1, 1)
    assert reasons_of(found) == {("train", "no trained token left"): 1}


def test_a_weight_between_0_and_1_stops_the_stage_at_its_line(place):
    place.write("rows.jsonl", [talk("a", "One"), weighed("b", "Two", weights=(0.5,))])
    with pytest.raises(DataError, match="rows.jsonl:2: a message has weight 0.5; use 0"):
        prepare(place)


def test_a_held_out_row_is_held_out_whatever_its_weights(place):
    place.write("rows.jsonl", [talk("a", "One", "b", "Two"), talk("c", "Three")])
    place.write("other.jsonl", [weighed("a", "One", "b", "Two", weights=(0, 1))])
    recipe, found, base = place.find("data.held_out=[{source: other.jsonl}]")
    data.prepare(recipe, found, base)
    assert reasons_of(found) == {("train", "same as a held-out row"): 1}
    assert [message.weight for message in read_held_out(found.folder)[0].messages] == [1, 0, 1, 1]


def test_turns_that_the_template_changes_are_examples_of_their_own(place):
    tokenizer = place.tokenizer()
    tokenizer.chat_template = CHANGING
    tokenizer.save_pretrained(place.base_folder)
    place.write("rows.jsonl", [talk("a", "One", "b", "Two"), talk("c", "Three")])
    found = prepare(place)
    texts = shown(place, found)
    assert [text.split("⟦")[1].split("⟧")[0] for text in texts] == [
        "One!<|im_end|>", "Two!<|im_end|>", "Three!<|im_end|>"]
    assert "assistant\nOne<|im_end|>" in texts[1] and texts[1].count("⟦") == 1
    assert [example.origin for example in read_examples(found.folder, "train")] == [
        "rows.jsonl:1", "rows.jsonl:1", "rows.jsonl:2"]
    counts = counts_of(found)
    assert (counts["rows_used"], counts["rows_split"], counts["rows_dropped"]) == (3, 1, 0)
    assert counts["tokens_in"] == sum(len(text) for text in texts) - 2 * 3 - sum(
        text.count(mark) * (len(mark) - 1) for text in texts for mark in ("<|im_start|>", "<|im_end|>"))
    assert reasons_of(found) == {("train", "made several examples, as the chat template changes earlier turns"): 1}
    with pytest.raises(DataError, match="rows.jsonl:1: the chat template renders message 2 differently as the"):
        prepare(place, "data.changed_turns=error")


def test_one_of_several_examples_that_is_too_long_leaves_the_row_in_use(place):
    tokenizer = place.tokenizer()
    tokenizer.chat_template = CHANGING
    tokenizer.save_pretrained(place.base_folder)
    place.write("rows.jsonl", [talk("a", "One", "b", "x" * 300), talk("c", "y" * 300), talk("c", "Three")])
    found = prepare(place, "data.too_long=drop")
    counts = counts_of(found)
    assert (counts["rows_used"], counts["rows_dropped"], len(read_examples(found.folder, "train"))) == (2, 2, 2)
    assert counts["rows_in"] + counts["rows_split"] == 4
    assert reasons_of(found)[("train", "over 200 tokens")] == 2


def test_a_recipe_that_cuts_off_every_stop_token_is_refused(place):
    place.write("rows.jsonl", [talk("a", "x" * 300)] * 3)
    with pytest.raises(RecipeError, match="data.stop_tokens: no stop token would be trained on, so the model would not "
                                          "learn to stop; raise data.max_tokens when ends are cut off, or set"):
        prepare(place, "data.too_long=cut_end")
    found = prepare(place, "data.too_long=cut_end", "data.stop_tokens=optional")
    assert counts_of(found)["rows_used"] == 3


def test_the_section_hands_on_what_encode_takes(place):
    recipe, *_ = place.find("data.tools=system", "data.train_on=last")
    assert recipe.data.encoding == {
        "tools_mode": "system", "train_on": "last", "stop_tokens": "required", "changed_turns": "split"}
    chat.encode(place.tokenizer(), read_conversation(), **recipe.data.encoding)


def read_conversation():
    from lora_kit.formats import messages

    return messages.to_conversation(talk("a", "One"), "x")
