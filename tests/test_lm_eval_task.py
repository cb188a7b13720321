"""Task files of lm-evaluation-harness: what they ask, compared with that library itself, and what is not read."""

import json
from pathlib import Path

import pytest

from lora_kit import chat, items, multiple_choice
from lora_kit.chat import load_tokenizer
from lora_kit.errors import DataError, RecipeError
from lora_kit.recipe import Recipe
from lora_kit.suite import read_suite

ROWS = [
    {"q": "What is red?", "options": ["a rose", "the sea", "grass", "snow"], "gold": 0, "topic": "plants"},
    {"q": "Two and two is  ", "options": ["four", "Fünf", "a hundred and one"], "gold": 0, "topic": "sums"},
    {"q": "Name a bird:\n", "options": ["a hen", "cod"], "gold": 0, "topic": "animals", "hint": "it has feathers"},
    {"q": "Snow is", "options": ["hot", "white"], "gold": 1, "topic": "plants"},
    {"q": "7 x 6 =", "options": ["it is 42", "it is 24"], "gold": 0, "topic": "sums"},
]
DATA = """\
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl, dev: {folder}/dev.jsonl}}}}
"""
FIELDS = """\
test_split: test
doc_to_text: q
doc_to_choice: options
doc_to_target: gold
"""
CHOICE = FIELDS + "output_type: multiple_choice\n"
FILES = {
    "plain": CHOICE + "metric_list: [{metric: acc_norm}, {metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "templates": """\
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{q.strip()}}\\n{% for o in options %}{{loop.index}}. {{o}}\\n{% endfor %}A:"
doc_to_choice: "{{options}}"
doc_to_target: "{{gold}}"
description: "About {{topic}}.\\n"
target_delimiter: "\\n"
""",
    "names the answer": """\
test_split: test
output_type: multiple_choice
doc_to_text: "{{q|regex_replace('i', 'I')}}"
doc_to_choice: options
doc_to_target: "{{options[gold]}}"
""",
    "letters": """\
test_split: test
output_type: multiple_choice
doc_to_text: q
doc_to_choice: [A, B]
doc_to_target: "{{'A' if gold == 0 else 'B'}}"
""",
    "several right": CHOICE.replace("doc_to_target: gold", "doc_to_target: '[{{gold}}, 1]'"),
    "samples": CHOICE + """\
num_fewshot: 2
fewshot_config:
  sampler: first_n
  samples: [{q: Up or down?, options: [up, down], gold: 1}, {q: A fish is, options: [cod, hen], gold: 0}]
""",
    "first of a split": CHOICE + """\
num_fewshot: 2
fewshot_split: dev
fewshot_config: {sampler: first_n, target_delimiter: ' => ', fewshot_delimiter: "\\n"}
""",
    "first of its own": CHOICE + "num_fewshot: 3\nfewshot_split: test\nfewshot_config: {sampler: first_n}\n",
    "drawn": CHOICE + "num_fewshot: 2\nfewshot_split: dev\nfewshot_delimiter: '##'\n",
    "drawn from its own": CHOICE + "num_fewshot: 2\nfewshot_split: test\n",
    "no split named": CHOICE + "num_fewshot: 1\nvalidation_split: dev\n",
    "validation": CHOICE.replace("test_split", "validation_split") + """\
num_fewshot: 1
fewshot_config:
  sampler: first_n
  samples: [{q: 7 x 6 =, options: [it is 42, it is 24], gold: 0, topic: sums}, {q: Up, options: [up], gold: 0}]
""",
    "continuation": """\
test_split: test
output_type: loglikelihood
doc_to_text: q
doc_to_target: " {{options[gold]}}"
num_fewshot: 1
fewshot_split: dev
fewshot_config: {sampler: first_n}
""",
    "chat": CHOICE + """\
num_fewshot: 2
fewshot_split: dev
description: "Choose."
system_instruction: "Be brief."
fewshot_config: {sampler: first_n}
apply_chat_template: true
""",
    "chat in one turn": CHOICE + """\
num_fewshot: 1
fewshot_split: dev
description: "About {{topic}}:\\n"
fewshot_config: {sampler: first_n}
apply_chat_template: true
fewshot_as_multiturn: false
""",
    "rolling": "test_split: test\noutput_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: q\n",
}
LIBRARY = "name the task under lm_eval: of the suite, which runs it through its own library"


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, rows in (("rows", ROWS), ("dev", ROWS[2:] + ROWS[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suites").mkdir()
    return tmp_path


def read(folder: Path, text: str, *, data: str = DATA):
    """The task of ``text`` and its items, read through a suite that names the file."""
    (folder / "mine.yaml").write_text(data.format(folder=folder) + text)
    (folder / "suites" / "s.yaml").write_text("tasks: [../mine.yaml]\n")
    [task] = read_suite("suites/s.yaml", folder).tasks
    recipe = Recipe(name="r", model={"base": "b"}, data={"train": {"source": "x.jsonl"}})
    return task, items.make_items(task, recipe, folder, [])


def problems(folder: Path, text: str, data: str = DATA) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(folder, text, data=data)
    return [line.replace(f"{folder}/suites/../", "") for line in caught.value.lines()]


@pytest.mark.parametrize("name", FILES)
def test_requests_are_those_of_the_library(folder, tiny_model, name, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="an extra")
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    task, made = read(folder, FILES[name])
    own = [line for line in FILES[name].splitlines(True) if line.partition(":")[0] in (
        "apply_chat_template", "fewshot_as_multiturn", "system_instruction")]
    path = folder / "mine.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if line not in own))
    theirs = TaskManager(include_path=str(folder), include_defaults=False).load(["mine"])["tasks"]["mine"]
    theirs.set_fewshot_seed(1234)
    tokenizer = load_tokenizer(tiny_model)
    theirs.build_all_requests(
        system_instruction=task.spec.system_instruction, apply_chat_template=task.spec.apply_chat_template,
        fewshot_as_multiturn=task.spec.fewshot_as_multiturn,
        chat_template=lambda messages, **options: tokenizer.apply_chat_template(messages, tokenize=False, **options))
    expected: dict = {}
    for instance in theirs.instances:
        expected.setdefault(instance.doc_id, []).append(instance.args)
    assert lm_eval.__version__ and len(made.items) == len(expected) == len(ROWS)
    assert theirs._metric_fn_list.keys() >= set(task.metrics)

    class Encoder(TemplateLM):
        eot_token_id, backend = 2, "causal"
        loglikelihood_rolling = generate_until = _loglikelihood_tokens = None

        def tok_encode(self, string, add_special_tokens=None, **_options):
            return tokenizer.encode(string)

    encoder = Encoder()
    for index, item in enumerate(made.items):
        about = item.likelihood
        if "messages" in about:
            about["context"] = chat.render(tokenizer, about["messages"], None, add_generation_prompt=True, origin="")
            assert about["messages"][0]["role"] == "system" and len(about["messages"]) == (6 if name == "chat" else 2)
        if name == "rolling":
            assert [(about["continuations"][0],)] == expected[index]
            continue
        assert [(about["context"], each) for each in about["continuations"]] == expected[index]
        question = multiple_choice.encode(tokenizer, about["context"], about["continuations"])
        for (context, continuation), ours in zip(expected[index], question.continuations, strict=True):
            ids = encoder._encode_pair(context, continuation)
            assert (list(question.context), list(ours)) == ids
        found = [(-float(len(each)), False) for each in about["continuations"]]
        scored = theirs.process_results(theirs.eval_docs[index], found)
        if name != "continuation":
            values = [value for value, _ in found]
            for metric in task.metrics:
                mine = multiple_choice.values_of(metric, values, about["choices"])
                assert float(mine.index(max(mine)) in about["gold"]) == scored[metric]


def test_items_say_what_is_asked_without_the_library(folder):
    task, made = read(folder, FILES["samples"].replace("num_fewshot: 2", "num_fewshot: 1"))
    assert task.name == "mine" and task.metrics == ["acc", "acc_norm"] and task.num_fewshot == 0
    first = made.items[0]
    assert first.item_id == f"{folder}/rows.jsonl:1" or first.item_id.endswith("rows.jsonl:1")
    assert first.likelihood == {
        "context": "Up or down? down\n\nWhat is red?", "gold": [0],
        "continuations": [" a rose", " the sea", " grass", " snow"], "choices": ["a rose", "the sea", "grass", "snow"]}
    assert first.target == "a rose" and first.messages == [{"role": "user", "content": "What is red?"}]


def test_lora_kits_own_fields_name_rows_and_clusters(folder):
    text = ("kind: multiple_choice\ndata: rows.jsonl\ndoc_to_text: q\ndoc_to_choice: options\ndoc_to_target: gold\n"
            "cluster_by: topic\nnum_fewshot: 1\nfewshot_data: dev.jsonl\n")
    _, made = read(folder, text, data="")
    assert [item.cluster for item in made.items] == ["plants", "sums", "animals", "plants", "sums"]
    _, of_itself = read(folder, text.replace("dev.jsonl", "rows.jsonl"), data="")
    assert all(item.likelihood["context"].count(item.messages[0]["content"]) == 1 for item in of_itself.items)


def test_a_data_file_is_looked_for_beside_the_task_then_where_lora_kit_runs(folder, monkeypatch):
    data = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: rows.jsonl}}}}\n"
    here = folder / "elsewhere"
    here.mkdir()
    assert read(folder, FILES["plain"], data=data)[1].num_rows == 5
    (folder / "rows.jsonl").rename(here / "rows.jsonl")
    monkeypatch.chdir(here)
    assert read(folder, FILES["plain"], data=data)[1].num_rows == 5


@pytest.mark.parametrize(("text", "told"), [
    ("output_type: generate_until\ntest_split: test\n",
     f"4: output_type 'generate_until' is not read here; write kind: generate, or {LIBRARY}"),
    (FILES["plain"] + "process_docs: !function utils.f\n",
     f"10: 'process_docs' is code (!function utils.f), which no file of lora-kit runs; {LIBRARY}"),
    (FILES["plain"].replace("acc_norm", "f1"),
     "9: metric 'f1' of multiple_choice is not computed here; known: acc, acc_norm, acc_bytes; or " + LIBRARY),
    (FILES["plain"].replace("better: true", "better: false"), "9: 'higher_is_better' is False, which acc is not; "
                                                              "correct it"),
    (FILES["plain"].replace("test_split: test", "test_split: tset"),
     "3: no file is named for split 'tset'; there are: test, dev"),
    (FILES["plain"].replace("doc_to_choice: options\n", ""),
     "1: 'doc_to_choice' is missing; say which key of the row holds the choices"),
    (FILES["plain"].replace("doc_to_text: q", "doc_to_text: '{{q'"),
     "5: 'doc_to_text' is no template that jinja2 reads (unexpected end of template, expected 'end of print "
     "statement'.); correct it"),
    (FILES["samples"].replace("num_fewshot: 2", "num_fewshot: 3"),
     "9: 'num_fewshot' is 3, and fewshot_config.samples has 2; add some, or lower it"),
    (FILES["plain"] + "doc_to_txt: q\n", "10: unknown key 'doc_to_txt'; did you mean 'doc_to_text'?"),
])
def test_what_is_not_read_is_named_with_its_line(folder, text, told):
    assert problems(folder, text) == [f"mine.yaml:{told}"]


@pytest.mark.parametrize(("text", "told"), [
    (FIELDS.replace("doc_to_target: gold", "doc_to_target: topic"), "its target 'plants' is none of its 4 choices"),
    (FIELDS.replace("doc_to_text: q", "doc_to_text: '{{hint.upper()}}'"), "the template '{{hint.upper()}}' fails"),
    (FIELDS.replace("doc_to_text: q", "doc_to_text: '{{q.__class__.__mro__}}'"), "fails (access to attribute"),
    (FIELDS.replace("doc_to_choice: options", "doc_to_choice: topic"), "doc_to_choice gives no list of texts"),
    (FIELDS.replace("doc_to_text: q", "doc_to_text: gold"), "doc_to_text gives 0, the number of a context"),
])
def test_rows_that_do_not_fit_are_named(folder, text, told):
    with pytest.raises(DataError) as caught:
        read(folder, text + "output_type: multiple_choice\n")
    assert told in str(caught.value) and "rows.jsonl:" in str(caught.value)


def test_white_space_and_empty_contexts_are_split_as_in_the_library(tiny_model):
    tokenizer = load_tokenizer(tiny_model)
    decode = tokenizer.decode
    question = multiple_choice.encode(tokenizer, "a b \n", [" c", "d"])
    assert decode(question.context) == "a b" and [decode(each) for each in question.continuations] == [" \n c", " \nd"]
    question = multiple_choice.encode(tokenizer, "", ["xy"])
    assert question.context == (tokenizer.bos_token_id,) and decode(question.continuations[0]) == "xy"
