"""Items: what is asked, what is left out, what is drawn, and examples that are never held out."""

import json
from pathlib import Path

import pytest

from lora_kit import items, rows
from lora_kit.errors import DataError
from lora_kit.metrics import tool_call
from lora_kit.recipe import Recipe
from lora_kit.suite import GenerateTask, Task, TextTask


def tool(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {"x": {"type": "integer"}, "o": {"type": "object"}}, "required": ["x"]}}}


def row(number: int, name: str, system: str | None = None) -> dict:
    call = {"type": "function", "function": {"name": name, "arguments": {"x": number, "o": {"k": "v"}}}}
    messages = [{"role": "user", "content": f"call {name} with {number}"}, {"role": "assistant", "tool_calls": [call]}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, "tools": [tool(name)], "answer": f"{number}", "offered": [tool(name)]}


@pytest.fixture
def folder(tmp_path) -> Path:
    train = [row(number, f"train_{number % 3}") for number in range(12)]
    test = [row(number, name, "be brief" if number == 2 else None)
            for number, name in enumerate(["new_a", "train_1", "new_b", "new_a", "new_a"])]
    roles = ("user", "assistant", "user", "assistant")
    chat = [{"messages": [{"role": role, "content": text} for role, text in zip(
        roles, (f"q{n}", f"a{n}", "more", "end"), strict=True)]} for n in range(4)]
    for name, entries in (("train", train), ("test", test), ("chat", chat)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return tmp_path


def recipe(train="train.jsonl", **fields) -> Recipe:
    return Recipe(name="r", model={"base": "b"}, data={"train": {"source": train}}, **fields)


def make(folder, spec, of=None, held_out=()):
    task = Task(name="t", folder=folder, spec=GenerateTask(kind="generate", **spec))
    return items.make_items(task, of or recipe(), folder, list(held_out))


def held_out(folder, *numbers):
    entries = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    from lora_kit.formats import messages

    return [messages.to_conversation(entries[number], f"train.jsonl:{number + 1}") for number in numbers]


def test_functions_that_training_shows_are_left_out_and_clusters_are_functions(folder):
    found = make(folder, dict(data="test.jsonl", metrics="tool_call", cluster_by="function",
                              leave_out="functions_in_training"))
    assert (found.num_rows, found.num_left_out, len(found.items)) == (5, 1, 4)
    assert [item.cluster for item in found.items] == ["new_a", "new_b", "new_a", "new_a"]
    assert [item.item_id for item in found.items] == [f"test.jsonl:{line}" for line in (1, 3, 4, 5)]
    assert [message["role"] for message in found.items[1].messages] == ["system", "user"]


def test_a_tool_calls_own_answer_scores_full_against_its_target(folder):
    item = make(folder, dict(data="test.jsonl", metrics="tool_call")).items[0]
    functions = json.loads(item.inputs["functions"])
    right = json.dumps({"name": "new_a", "arguments": {"x": 0, "o": {"k": "V"}}})
    assert tool_call.score(right, item.target, functions=functions) == (1.0, "")
    assert tool_call.score(right.replace("0", "1"), item.target, functions=functions)[0] == 0.0


def test_target_and_inputs_come_from_the_row(folder):
    spec = dict(data="test.jsonl", metrics="tool_call", target="answer", inputs={"functions": "offered"})
    item = make(folder, spec).items[4]
    assert item.target == "4" and json.loads(item.inputs["functions"]) == [tool("new_a")]
    with pytest.raises(DataError, match="test.jsonl:1: the row has no 'truth', which the task reads; it has: messages"):
        make(folder, dict(data="test.jsonl", metrics="tool_call", target="truth"))


def test_the_last_turn_is_the_target_and_what_stands_before_it_the_prompt(folder):
    found = make(folder, dict(data="chat.jsonl", metrics="rouge_l"))
    assert found.items[2].target == "end"
    assert [message["content"] for message in found.items[2].messages] == ["q2", "a2", "more"]
    assert found.items[2].cluster == "chat.jsonl:3"


def test_held_out_rows_are_items_too_and_plain_text_is_not(folder):
    text = rows.from_json(json.dumps({"messages": [{"role": "user", "content": "x"}], "tools": [], "origin": "t:1",
                                      "trains_all": True}))
    found = make(folder, dict(data="held_out", metrics="tool_call"), held_out=[*held_out(folder, 3, 5), text])
    assert [item.item_id for item in found.items] == ["train.jsonl:4", "train.jsonl:6"]
    assert found.unusable == {"plain text has no question": 1}
    with pytest.raises(DataError, match="task t: none of its 1 rows is usable; most: plain text has no question"):
        make(folder, dict(data="held_out", metrics="rouge_l"), held_out=[text])


def test_limit_draws_the_same_items_each_time_and_others_for_another_seed(folder):
    spec = dict(data="test.jsonl", metrics="tool_call")
    drawn = [[item.item_id for item in make(folder, spec, recipe(seed=seed, eval={"limit": 2})).items]
             for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1] and all(len(ids) == 2 and ids == sorted(ids) for ids in drawn)
    assert len({tuple(ids) for ids in drawn}) > 1
    assert make(folder, spec, recipe(eval={"limit": 2})).num_not_drawn == 3


def test_examples_are_drawn_from_training_and_never_from_held_out_rows(folder):
    spec = dict(data="test.jsonl", metrics="tool_call", num_fewshot=2)
    kept = held_out(folder, *range(2, 12))
    found = make(folder, spec, held_out=kept).examples
    asked = sorted(example["messages"][0]["content"] for example in found)
    assert asked == ["call train_0 with 0", "call train_1 with 1"]
    assert make(folder, spec).examples == make(folder, spec).examples
    assert make(folder, spec, held_out=held_out(folder, *range(12))).examples == []


def test_examples_are_of_the_items_kind_and_one_exchange_long(folder):
    of = Recipe(name="r", model={"base": "b"}, data={"train": [{"source": "train.jsonl"}, {"source": "chat.jsonl"}]})
    tools = make(folder, dict(data="test.jsonl", metrics="tool_call", num_fewshot=3), of).examples
    assert len(tools) == 3 and all(example["messages"][-1]["tool_calls"] for example in tools)
    chats = make(folder, dict(data="chat.jsonl", metrics="rouge_l", num_fewshot=3), of).examples
    assert len(chats) == 3 and all(len(example["messages"]) == 2 and not example["tools"] for example in chats)


@pytest.mark.archives
def texts(folder, of=None, name_of=lambda number: {}, **spec):
    rows_of = [{"text": "word " * number, **name_of(number)} for number in (2, 10, 30, 60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in rows_of))
    task = Task(name="t", folder=folder, spec=TextTask(kind="text", data="texts.jsonl", **spec))
    return items.make_items(task, of or recipe(), folder, [])


def test_texts_are_cut_at_a_blank_and_short_ones_left_out(folder):
    found = texts(folder, min_chars=40, max_chars=101)
    assert [len(item.target) for item in found.items] == [49, 99, 99]  # "word word ... word", never a part of one
    assert (found.num_rows, found.num_left_out, found.num_not_drawn) == (4, 1, 0)
    assert found.items[0].messages == [] and found.items[0].item_id == "texts.jsonl:2"


def test_texts_may_be_a_key_of_the_row_and_share_a_file(folder):
    found = texts(folder, name_of=lambda number: {"name": f"row {number}"}, text="name", min_chars=1,
                  cluster_by="file")
    assert [item.target for item in found.items] == ["row 2", "row 10", "row 30", "row 60"]
    assert {item.cluster for item in found.items} == {"texts.jsonl"}


def test_the_smaller_limit_draws_the_texts(folder):
    assert len(texts(folder, min_chars=1, limit=3).items) == 3
    assert len(texts(folder, recipe(eval={"limit": 2}), min_chars=1, limit=3).items) == 2
    with pytest.raises(DataError, match="none of its 4 rows has a text of 900 characters; lower min_chars"):
        texts(folder, min_chars=900)


def test_a_word_without_end_is_cut_where_it_must_be():
    assert items._cut("a" * 10, 4) == "aaaa" and items._cut("ab cd ef", 5) == "ab cd" and items._cut("ab cd", 4) == "ab"


def test_the_benchmarks_items_without_functions_of_training(archive_member):
    from lora_kit.suite import read_suite

    package = "pypi:bfcl-eval==2026.3.23/bfcl_eval/data"
    for split in ("simple_python", "multiple", "live_simple"):
        archive_member(f"{package}/BFCL_v4_{split}.json")
        archive_member(f"{package}/possible_answer/BFCL_v4_{split}.json")
    of = Recipe(name="r", model={"base": "b"}, data={"train": [
        {"source": f"{package}/BFCL_v4_{split}.json", "format": "bfcl"} for split in ("simple_python", "multiple")]})
    task = next(task for task in read_suite("tools", Path(".")).tasks if task.name == "bfcl_live_simple")
    found = items.make_items(task, of, Path("."), [])
    # Two items accept nothing for some key, so that by the benchmark's own rules no answer to them is right.
    assert found.unusable == {"no acceptable value": 2}
    assert (found.num_rows, found.num_left_out, len(found.items)) == (258, 20, 236)
    assert len({item.cluster for item in found.items}) == 83 and len(found.examples) == 3
    for item in found.items:
        call = first_right_answer(item)
        assert tool_call.score(call, item.target, functions=item.inputs["functions"]) == (1.0, ""), item.item_id


def first_right_answer(item) -> str:
    """The call that training on this row would teach."""
    from lora_kit.formats.bfcl import first_answer

    [(name, arguments)] = first_answer(json.loads(item.target), json.loads(item.inputs["functions"]))
    return json.dumps({"name": name, "arguments": arguments})


def test_a_system_message_stands_in_place_of_the_rows_own(folder):
    found = make(folder, dict(data="test.jsonl", metrics="tool_call", system="call a function"))
    for item in found.items:
        assert [message["role"] for message in item.messages] == ["system", "user"]
        assert item.messages[0]["content"] == "call a function"


def question(answers, **fields) -> dict:
    return {"prompt": "q", "completion": "a", "answers": answers, **fields}


def write(folder, *entries):
    (folder / "questions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_a_list_of_texts_is_several_references_unless_values_are_compared(folder):
    write(folder, question({"text": ["a", "an a"], "start": [1]}), question({"text": ["b"]}))
    spec = dict(data="questions.jsonl", target="answers.text")
    assert [item.target for item in make(folder, spec | {"metrics": "squad_em"}).items] == [["a", "an a"], ["b"]]
    assert [item.target for item in make(folder, spec | {"metrics": "json_match"}).items] == ['["a", "an a"]', '["b"]']
    with pytest.raises(DataError, match="the row has no 'answers.label', which the task reads; it has: prompt"):
        make(folder, spec | {"metrics": "squad_em", "target": "answers.label"})


def test_assertions_of_the_task_and_of_the_row_come_together(folder):
    write(folder, question([], check=[{"contains": "a"}]), question([], check={"max_words": 3}))
    spec = dict(data="questions.jsonl", metrics="all_assertions", assertions=[{"max_chars": 9}])
    assert [json.loads(item.inputs["assertions"]) for item in make(folder, spec).items] == [[{"max_chars": 9}]] * 2
    spec["inputs"] = {"assertions": "check"}
    assert [json.loads(item.inputs["assertions"]) for item in make(folder, spec).items] == [
        [{"max_chars": 9}, {"contains": ["a"]}], [{"max_chars": 9}, {"max_words": 3}]]
    write(folder, question([], check=[{"contain": "a"}]))
    with pytest.raises(DataError, match="assertion 0.contain"):
        make(folder, spec)
