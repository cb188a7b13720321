"""Stage data: every row and every token is accounted for, whatever is dropped, cut, weighted or held out."""

from __future__ import annotations

import math
import os
from collections import Counter

import numpy
import pytest

from lora_kit import chat, data, prepared, rundir, tokens
from lora_kit.errors import DataError, RecipeError, RefusedError
from lora_kit.events import listening
from lora_kit.model import find_base
from lora_kit.rows import read_held_out
from lora_kit.tokens import read_examples
from tests import nobody
from tests.data_place import (
    ROWS,
    Workplace,
    check,
    counts_of,
    origins_of,
    reasons_of,
    talk,
)

# ---- what is used ----------------------------------------------------------------------


def test_every_row_is_rendered_masked_and_named(place):
    found = place.prepare("data.held_out_rows=0")
    examples = read_examples(found.folder, "train")
    assert [example.origin for example in examples] == [f"rows.jsonl:{line}" for line in range(1, 21)]
    tokenizer = place.tokenizer()
    for example, row in zip(examples, ROWS, strict=True):
        question, answer = (message["content"] for message in row["messages"])
        text = data.masked_text(tokenizer, example)
        assert text == (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n⟦{answer}<|im_end|>⟧\n")
    counts = counts_of(found)
    assert (counts["rows_in"], counts["rows_used"]) == (20, 20)
    assert found.ledger()["reasons"] == []
    lengths = sorted(len(example.tokens_T) for example in examples)
    assert found.ledger()["lengths"] == {
        "median": (lengths[9] + lengths[10]) / 2, "max": lengths[-1], "mean": pytest.approx(sum(lengths) / 20)}


def test_the_preview_shows_the_mask(place):
    found = place.prepare("data.held_out_rows=0")
    preview = (found.folder / "preview.txt").read_text()
    assert preview.startswith("Trained tokens stand between ⟦ and ⟧")
    assert "--- rows.jsonl:1\n" in preview and "⟦answer 0<|im_end|>⟧" in preview
    assert preview.count("---") == 3


def test_unusable_rows_are_in_the_ledger_with_their_reason(place):
    place.write("rows.jsonl", [*ROWS, {"messages": []}, {"messages": []}, talk("only a question")])
    found = place.prepare("data.held_out_rows=0", "data.max_dropped=0.2")
    assert reasons_of(found) == {("train", "no messages"): 2, ("train", "no assistant turn"): 1}
    assert (counts_of(found)["rows_unusable"], counts_of(found)["rows_used"]) == (3, 20)
    examples = {item["reason"]: item["examples"] for item in found.ledger()["reasons"]}
    assert examples["no messages"] == ["rows.jsonl:21", "rows.jsonl:22"]


def test_too_many_unusable_rows_are_an_error(place):
    place.write("rows.jsonl", [*ROWS, *[talk("only a question")] * 5, {"messages": []}])
    with pytest.raises(DataError) as caught:
        place.prepare()
    assert str(caught.value) == (
        "rows.jsonl: 6 of 26 rows are unusable, over data.max_dropped (0.1); most: no assistant turn, first at "
        "rows.jsonl:21; mend them or raise data.max_dropped")
    assert caught.value.exit_code == 4
    place.prepare("data.max_dropped=0.25")


def test_no_usable_row_is_an_error(place):
    place.write("rows.jsonl", [talk("only a question")] * 3)
    with pytest.raises(DataError, match="rows.jsonl: none of its 3 rows is usable; most: no assistant turn, first at "
                                        "rows.jsonl:1"):
        place.prepare("data.max_dropped=1")


@pytest.mark.parametrize(("content", "told"), [
    ("", "rows.jsonl: is empty (0 bytes)"), ('{"messages": [{"role": "us', "rows.jsonl:1: the file ends in the middle"),
    ("[1]\n[2]\n", "rows.jsonl:1: is a list, not an object"), ('{"a": 1}\n', "rows.jsonl: rows with the keys a fit no"),
])
def test_a_broken_data_file_is_one_line(place, content, told):
    (place.folder / "rows.jsonl").write_text(content)
    with pytest.raises(DataError) as caught:
        place.prepare()
    assert str(caught.value).startswith(told)


def test_a_failed_preparation_leaves_nothing_in_the_cache(place, tmp_path):
    place.write("rows.jsonl", [talk("only a question")] * 3)
    with pytest.raises(DataError):
        place.prepare()
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_a_folder_is_no_data_file(place):
    with pytest.raises(DataError, match=r"\.: is a folder; name a \.jsonl"):
        place.prepare(train=".")


def test_a_missing_file_that_looks_like_a_hub_name_is_explained(place):
    with pytest.raises(DataError, match="data/rows: no such file or folder beside the recipe; check the path, or write "
                                        "hub:data/rows"):
        place.prepare(train="data/rows")


# ---- formats ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["messages", "sharegpt", "alpaca", "prompt_completion", "text", "two_party"])
def test_a_format_is_detected_and_told(place, name):
    from lora_kit import formats

    place.write("rows.jsonl", [formats.load(name).EXAMPLE] * 4)
    told = []
    options = ("data.held_out_rows=0", "data.max_tokens=2000", "data.tools=system")
    with listening(told.append):
        found = place.prepare(*options)
    assert f"rows.jsonl: format {name}" in [getattr(event, "text", "") for event in told]
    assert counts_of(found)["rows_used"] == 4
    named = place.prepare(*options, train=f"[{{source: rows.jsonl, format: {name}}}]")
    assert counts_of(named) == counts_of(found) and named.key != found.key


def test_rows_of_a_format_that_reads_two_files_must_be_named(place):
    from lora_kit.formats import bfcl

    row = {key: value for key, value in bfcl.EXAMPLE.items() if key != "ground_truth"}
    place.write("rows.jsonl", [row] * 3)
    with pytest.raises(DataError, match="rows.jsonl: has rows of format bfcl, which reads more than one file; write "
                                        "format: bfcl beside the source"):
        place.prepare()


def test_questions_are_joined_with_the_answers_beside_them(place):
    from lora_kit.formats import bfcl

    questions = [{**bfcl.EXAMPLE, "id": f"q{index}"} for index in range(4)]
    answers = [{"id": row["id"], "ground_truth": row.pop("ground_truth")} for row in questions]
    place.write("rows.jsonl", questions)
    place.write("possible_answer/rows.jsonl", answers)
    options = ("data.held_out_rows=0", "data.max_tokens=2000", "data.tools=system")
    source = "[{source: rows.jsonl, format: bfcl}]"
    found = place.prepare(*options, train=source)
    assert counts_of(found)["rows_used"] == 4
    assert "<tool_call>" in (found.folder / "preview.txt").read_text()
    answers[0]["ground_truth"] = [{"triangle_area": {"base": [11], "height": [5]}}]
    place.write("possible_answer/rows.jsonl", answers)
    assert not place.find(*options, train=source)[1].exists, "other answers are other data"


def test_a_template_that_ignores_tools_stops_the_stage(place):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    place.write("rows.jsonl", [talk(f"a {index}", "b", tools=[tool]) for index in range(4)])
    with pytest.raises(RecipeError, match=r"data.tools: the model's chat template ignores tools \(seen at rows.jsonl:"):
        place.prepare()
    found = place.prepare("data.tools=system", "data.max_tokens=500", "data.held_out_rows=0")
    assert '"name": "f"' in (found.folder / "preview.txt").read_text()


# ---- rows that the template refuses ----------------------------------------------------

PICKY = ("{% for m in messages %}{% if 'bad' in m['content'] %}{{ raise_exception('no bad words') }}{% endif %}"
         "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.fixture
def picky(place) -> Workplace:
    (place.folder / "picky.jinja").write_text(PICKY)
    return place


def test_rows_that_the_template_refuses_are_in_the_ledger(picky):
    picky.write("rows.jsonl", [*ROWS, talk("a bad word", "x")])
    found = picky.prepare("data.held_out_rows=0", "model.template=picky.jinja")
    assert (counts_of(found)["rows_used"], counts_of(found)["rows_dropped"]) == (20, 1)
    reason = next(iter(reasons_of(found)))[1]
    assert reason == "the chat template cannot render this row (TemplateError: no bad words)"


def test_a_template_that_refuses_too_many_rows_is_an_error(picky):
    picky.write("rows.jsonl", [*ROWS, *[talk(f"bad {index}", "x") for index in range(3)]])
    with pytest.raises(DataError) as caught:
        picky.prepare("data.held_out_rows=0", "model.template=picky.jinja")
    assert str(caught.value).startswith(
        "rows.jsonl:21: the chat template cannot render this row (TemplateError: no bad words); that befell more rows "
        "than data.max_dropped allows (0.1); mend the row")


# ---- too long --------------------------------------------------------------------------

LONG = talk("long", "x" * 300)


def test_a_row_that_is_too_long_is_an_error(place):
    place.write("rows.jsonl", [*ROWS, LONG])
    with pytest.raises(DataError, match=r"rows.jsonl:21: has \d+ tokens, over data.max_tokens \(200\); raise it, or "
                                        "set data.too_long: drop, cut_end, cut_start or split_turns"):
        place.prepare("data.held_out_rows=0")


def test_a_row_that_is_too_long_is_dropped(place):
    place.write("rows.jsonl", [*ROWS, LONG])
    found = place.prepare("data.held_out_rows=0", "data.too_long=drop")
    counts = counts_of(found)
    assert (counts["rows_used"], counts["rows_dropped"], counts["tokens_cut"]) == (20, 1, 0)
    assert counts["tokens_dropped"] > 300
    assert reasons_of(found) == {("train", "over 200 tokens"): 1}


def test_a_row_that_is_too_long_loses_its_end(place):
    place.write("rows.jsonl", [*ROWS, LONG])
    found = place.prepare("data.held_out_rows=0", "data.too_long=cut_end")
    counts, examples = counts_of(found), read_examples(found.folder, "train")
    whole = len(chat.encode(place.tokenizer(), prepared_conversation(LONG))[0].tokens_T)
    assert counts["rows_used"] == 21 and examples.length(20) == 200
    assert counts["tokens_cut"] == whole - 200
    assert reasons_of(found) == {("train", "end cut off at 200 tokens"): 1}


def test_a_row_that_is_too_long_loses_its_start(place):
    place.write("rows.jsonl", [*ROWS, LONG])
    found = place.prepare("data.held_out_rows=0", "data.too_long=cut_start")
    counts, examples = counts_of(found), read_examples(found.folder, "train")
    whole = chat.encode(place.tokenizer(), prepared_conversation(LONG))[0].tokens_T
    assert examples[20].tokens_T.tolist() == whole[-200:].tolist()
    assert (counts["rows_used"], counts["tokens_cut"]) == (21, len(whole) - 200)
    assert reasons_of(found) == {("train", "start cut off at 200 tokens"): 1}
    # Its first token belongs to the answer, and nothing predicts it: one trained token less than the mask has.
    assert examples.num_trained(20) == int(examples[20].loss_mask_T.sum()) - 1


def test_a_row_that_is_too_long_is_split_at_its_turns(place):
    turns = [f"turn {turn} " * 8 for turn in range(8)]
    row = talk(*turns)
    row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    place.write("rows.jsonl", [*ROWS, row])
    found = place.prepare("data.held_out_rows=0", "data.too_long=split_turns")
    counts, examples, tokenizer = counts_of(found), read_examples(found.folder, "train"), place.tokenizer()
    texts = [tokenizer.decode(examples[row].tokens_T) for row in range(20, len(examples))]
    assert len(texts) == 4 and all(examples.length(row) <= 200 for row in range(len(examples)))
    assert all(text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n") for text in texts)
    assert [turn for text in texts for turn in turns if turn in text] == turns
    assert origins_of(found)[20:] == ["rows.jsonl:21"] * 4
    system = len(tokenizer("<|im_start|>system\nBe brief.<|im_end|>\n")["input_ids"])
    assert (counts["rows_in"], counts["rows_split"], counts["rows_used"]) == (21, 3, 24)
    assert counts["tokens_repeated"] == 3 * system and counts["tokens_cut"] == 0
    assert reasons_of(found) == {("train", "split at its turns, over 200 tokens"): 1}


def test_an_exchange_that_is_too_long_by_itself_is_dropped_and_named(place):
    place.write("rows.jsonl", [*ROWS, talk("a", "b", "c", "x" * 300, "d", "e")])
    found = place.prepare("data.held_out_rows=0", "data.too_long=split_turns")
    counts = counts_of(found)
    assert (counts["rows_used"], counts["rows_dropped"], counts["rows_split"]) == (22, 1, 2)
    [dropped] = [item for item in found.ledger()["reasons"] if item["reason"] == "one exchange over 200 tokens"]
    assert dropped["examples"] == ["rows.jsonl:21"] and dropped["tokens"] == counts["tokens_dropped"] > 300


def test_a_long_text_is_split_into_stretches_that_lose_nothing(place):
    place.write("rows.jsonl", [{"text": "y" * 500}, {"text": "short"}])
    place.write("held.jsonl", [{"text": "z" * 450}])
    found = place.prepare("data.held_out=held.jsonl", "data.too_long=split_turns")
    assert [read_examples(found.folder, "train").length(row) for row in range(4)] == [200, 200, 101, 6]
    assert counts_of(found)["tokens_repeated"] == counts_of(found)["tokens_cut"] == 0
    assert counts_of(found)["turns_trained"] == 2  # an end each, whatever the number of stretches
    assert [len(conversation.messages[0].content) for conversation in read_held_out(found.folder)][:2] == [200, 200]


def prepared_conversation(row: dict):
    from lora_kit.formats import messages

    return messages.to_conversation(row, "x")


def test_a_row_whose_question_fills_it_trains_nothing(place):
    place.write("rows.jsonl", [*ROWS, talk("x" * 300, "late answer")])
    found = place.prepare("data.held_out_rows=0", "data.too_long=cut_end")
    counts = counts_of(found)
    assert (counts["rows_used"], counts["rows_dropped"], counts["tokens_dropped"]) == (20, 1, 200)
    assert ("train", "no trained token left") in reasons_of(found)


def test_a_row_without_a_trained_token_is_named(place):
    place.write("rows.jsonl", [*ROWS, talk("x" * 300, "late answer")])
    told = []
    with listening(told.append):
        found = place.prepare("data.held_out_rows=0", "data.too_long=cut_end")
    assert "1 rows have no trained token left and are dropped: rows.jsonl:21" in [
        getattr(event, "text", "") for event in told]
    [reason] = [item for item in found.ledger()["reasons"] if item["reason"] == "no trained token left"]
    assert (reason["source"], reason["examples"]) == ("rows.jsonl", ["rows.jsonl:21"])


def test_when_all_rows_are_too_long_none_is_left(place):
    place.write("rows.jsonl", [talk(f"long {index}", "x" * 300) for index in range(3)])
    with pytest.raises(DataError, match="data.train: no row is left to train on; 3 over 200 tokens"):
        place.prepare("data.held_out_rows=0", "data.too_long=drop")


# ---- turns, limits, weights ------------------------------------------------------------


def test_turns_after_max_turns_are_cut_and_counted(place):
    rows = [talk(*(f"message {index}.{turn}" for turn in range(6))) for index in range(5)]
    place.write("rows.jsonl", rows)
    found = place.prepare("data.held_out_rows=0", train="[{source: rows.jsonl, max_turns: 3}]")
    tokenizer = place.tokenizer()
    short = sum(len(chat.encode(tokenizer, prepared_conversation(talk(*(
        message["content"] for message in row["messages"][:2]))))[0].tokens_T) for row in rows)
    whole = sum(len(chat.encode(tokenizer, prepared_conversation(row))[0].tokens_T) for row in rows)
    counts = counts_of(found)
    assert (counts["tokens_in"], counts["tokens_cut"]) == (whole, whole - short)
    assert reasons_of(found) == {("train", "messages after max_turns cut off"): 5}


def test_turns_are_counted_for_each_source_of_the_same_file(place):
    place.write("rows.jsonl", [talk("a", "b", "c", "d")] * 3)
    found = place.prepare("data.held_out_rows=0", train="[{source: rows.jsonl, max_turns: 2}, {source: rows.jsonl}]")
    assert reasons_of(found) == {("train", "messages after max_turns cut off"): 3}
    assert counts_of(found)["rows_used"] == 6


def test_a_limit_draws_rows_with_the_seed(place):
    one, same, other = (place.prepare("data.held_out_rows=0", f"seed={seed}", f"data.max_tokens={most}",
                                      train="[{source: rows.jsonl, limit: 8}]")
                        for seed, most in ((0, 200), (0, 201), (1, 200)))
    assert len(set(origins_of(one))) == 8
    assert origins_of(one) == origins_of(same) != origins_of(other)
    assert origins_of(one) == sorted(origins_of(one), key=lambda origin: int(origin.rpartition(":")[2]))
    assert reasons_of(one) == {("train", "over the source's limit"): 12}


@pytest.mark.parametrize(("weight", "used", "repeated", "left_out"), [
    (1, 20, 0, 0), (0.5, 10, 0, 10), (2, 40, 20, 0), (2.25, 45, 25, 0), (0.03, 1, 0, 19),
])
def test_a_weight_draws_or_repeats_rows(place, weight, used, repeated, left_out):
    found = place.prepare("data.held_out_rows=0", train=f"[{{source: rows.jsonl, weight: {weight}}}]")
    counts = counts_of(found)
    assert (counts["rows_used"], counts["rows_repeated"], counts["rows_left_out"]) == (used, repeated, left_out)
    often = Counter(origins_of(found)).values()
    assert max(often) <= math.ceil(weight) and (weight < 1 or min(often) >= math.floor(weight))


def test_sources_are_mixed_by_their_weights(place):
    place.write("more.jsonl", [talk(f"other {index}", "x") for index in range(10)])
    found = place.prepare("data.held_out_rows=0",
                          train="[{source: rows.jsonl, weight: 0.5}, {source: more.jsonl, weight: 3}]")
    assert Counter(origin.partition(":")[0] for origin in origins_of(found)) == {"rows.jsonl": 10, "more.jsonl": 30}


# ---- held out --------------------------------------------------------------------------


def test_held_out_rows_are_split_off_and_never_trained_on(place):
    found = place.prepare("data.held_out_rows=6")
    train, held_out = origins_of(found), origins_of(found, "held_out")
    assert (len(train), len(held_out)) == (14, 6) and not set(train) & set(held_out)
    assert [conversation.origin for conversation in read_held_out(found.folder)] == held_out
    assert origins_of(place.prepare("data.held_out_rows=6", "data.max_tokens=201"), "held_out") == held_out
    assert origins_of(place.prepare("data.held_out_rows=6", "seed=1"), "held_out") != held_out
    assert counts_of(found)["rows_in"] == 14 and counts_of(found, "held_out")["rows_in"] == 6


def test_a_copy_of_a_held_out_row_is_not_trained_on(place):
    place.write("rows.jsonl", ROWS + ROWS[:10])
    found = place.prepare("data.held_out_rows=10")

    def texts(split):
        return {place.tokenizer().decode(example.tokens_T) for example in read_examples(found.folder, split)}

    assert texts("held_out") and not texts("train") & texts("held_out")
    left_out = reasons_of(found)["train", "same as a held-out row"]
    assert left_out > 0 and counts_of(found)["rows_left_out"] == left_out


def test_held_out_rows_of_their_own_file_are_not_trained_on(place):
    place.write("held.jsonl", [*ROWS[:2], talk("unseen", "row")])
    found = place.prepare("data.held_out=held.jsonl")
    assert origins_of(found, "held_out") == ["held.jsonl:1", "held.jsonl:2", "held.jsonl:3"]
    assert origins_of(found) == [f"rows.jsonl:{line}" for line in range(3, 21)]
    assert reasons_of(found) == {("train", "same as a held-out row"): 2}


def test_at_most_half_of_the_rows_are_held_out(place):
    assert len(origins_of(place.prepare("data.held_out_rows=64"), "held_out")) == 10


def test_one_row_cannot_be_held_out_and_trained_on(place):
    place.write("rows.jsonl", ROWS[:1])
    with pytest.raises(DataError, match="data.train: 1 usable row, which leaves none to hold out"):
        place.prepare()
    assert counts_of(place.prepare("data.held_out_rows=0"))["rows_used"] == 1


def test_a_held_out_row_that_was_dropped_is_not_among_the_conversations(place):
    place.write("held.jsonl", [LONG, talk("short", "row")])
    found = place.prepare("data.held_out=held.jsonl", "data.too_long=drop")
    assert [conversation.origin for conversation in read_held_out(found.folder)] == ["held.jsonl:2"]


# ---- the cache -------------------------------------------------------------------------


def prepare_again(place, monkeypatch, **options) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(data.chat, "encode", lambda *_, **__: pytest.fail("rendered again"))
        place.prepare(**options)


def test_what_lies_in_the_cache_is_not_rendered_again(place, monkeypatch):
    place.prepare()
    prepare_again(place, monkeypatch)


def test_a_changed_file_of_the_same_name_and_size_is_noticed(place):
    first = place.prepare()
    path = place.folder / "rows.jsonl"
    content, stat = path.read_text(), path.stat()
    path.write_text(content.replace("answer 3", "ANSWER 3"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = place.prepare()
    assert path.stat().st_size == stat.st_size
    assert first.key != second.key and first.folder != second.folder


def test_an_untouched_recipe_of_other_training_has_the_same_data(place):
    assert place.find("train.steps=3")[1].key == place.find("lora.rank=4", "bench.repeats=1")[1].key
    assert place.find("data.max_tokens=100")[1].key != place.find()[1].key


def test_a_damaged_cache_is_made_again(place):
    found = place.prepare()
    before = (found.folder / "train.tokens.npy").read_bytes()
    path = found.folder / "train.tokens.npy"
    path.chmod(0o644)
    path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    told = []
    with listening(told.append):
        place.prepare()
    assert path.read_bytes() == before
    assert [event.text for event in told if "is not what was written there" in getattr(event, "text", "")]


def test_the_cache_s_files_are_closed_to_writing(place):
    assert {path.stat().st_mode & 0o777 for path in place.prepare().folder.iterdir()} == {0o444}


@pytest.mark.parametrize("planted", ["tokens lost", "row lost", "mask emptied"])
def test_files_that_were_shortened_after_writing_stop_the_stage(place, tmp_path, monkeypatch, planted):
    class Shortening(tokens.ExampleWriter):
        def __exit__(self, *error):
            super().__exit__(*error)
            if self.split == "train":
                parts = {name: numpy.load(self.folder / f"train.{name}.npy") for name in ("tokens", "mask", "offsets")}
                if planted == "tokens lost":
                    parts["tokens"] = parts["tokens"][:-5]
                elif planted == "mask emptied":
                    parts["mask"][parts["offsets"][3]:parts["offsets"][4]] = 0
                else:
                    last = parts["offsets"][-2]
                    parts = {"tokens": parts["tokens"][:last], "mask": parts["mask"][:last],
                             "offsets": parts["offsets"][:-1]}
                for name, array in parts.items():
                    numpy.save(self.folder / f"train.{name}.npy", array)

    monkeypatch.setattr(tokens, "ExampleWriter", Shortening)
    with pytest.raises(RefusedError, match="token files are not whole|by recount, the ledger says"):
        place.prepare()
    assert list((tmp_path / "cache" / "data").iterdir()) == [], "what is refused does not stay in the cache"


@nobody.needs_root
def test_an_unwritable_cache_is_one_line(place, tmp_path):
    place.find()
    code = """
try:
    data.prepare(recipe, found, base)
except LoraKitError as error:
    print(error.exit_code, error)
"""
    imports = f"""
from pathlib import Path
from lora_kit import data, prepared
from lora_kit.errors import LoraKitError
from lora_kit.model import find_base
from lora_kit.recipe_file import parse_recipe
recipe = parse_recipe("model: {{base: {place.base_folder}}}\\ndata: {{train: rows.jsonl}}\\n",
                      Path({str(place.folder)!r}) / "mine.yaml").recipe
base = find_base(recipe.model, Path({str(place.folder)!r}))
found = prepared.find(recipe, Path({str(place.folder)!r}), base)
"""
    cache = tmp_path / "cache"
    lines = nobody.run(imports, code, cache)
    assert len(lines) == 1
    assert lines[0].startswith(f"6 {cache}/data: cannot be written (Permission denied)")


# ---- the stage -------------------------------------------------------------------------


def test_the_stage_links_the_data_into_the_run(place, tmp_path):
    recipe_file = place.recipe_file("data.held_out_rows=6")
    base = find_base(recipe_file.recipe.model, place.folder)
    run = rundir.create(tmp_path / "runs", recipe_file, {"base": base, "recipe_path": "", "overrides": []})
    with run.publishing("data") as work:
        result = data.stage(recipe_file.recipe, run)
        assert {path.name for path in work.iterdir()} >= {
            "train.tokens.npy", "held_out.tokens.npy", "held_out.jsonl", "ledger.json", "preview.txt", "manifest.json"}
        check(work)
    trained = result.figures["ledger"]["splits"]["train"]["tokens_trained"]
    assert result.summary.startswith(f"14 rows to train on ({trained:,} of ") and result.summary.endswith("6 held out")


@pytest.mark.archives
@pytest.mark.real_model
def test_the_default_recipe_s_data(smollm2_base, archive_member, tmp_path, monkeypatch):
    from lora_kit import shipped
    from lora_kit.recipe_file import read_recipe

    path = archive_member("pypi:chitchat-dataset==0.9.0/chitchat_dataset/dataset.json")
    monkeypatch.setenv("LORA_KIT_CACHE", str(tmp_path / "cache"))
    recipe_file = read_recipe(shipped.recipe_path("chat"), [
        f"model.base={smollm2_base}", "model.sha256=null", f"data.train.0.source={path}", "data.train.0.sha256=null"])
    base = find_base(recipe_file.recipe.model, tmp_path)
    found = prepared.find(recipe_file.recipe, tmp_path, base)
    data.prepare(recipe_file.recipe, found, base)
    check(found.folder)
    assert (counts_of(found)["rows_used"], counts_of(found, "held_out")["rows_used"]) == (192, 48)
    assert reasons_of(found)["train", "single speaker"] == 3_150
