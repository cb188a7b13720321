"""A recipe file's mistakes: each with its line, the nearest key, and all at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_kit.errors import RecipeError
from lora_kit.recipe_file import parse_recipe, read_recipe

LEAST = "model:\n  base: ./base\ndata:\n  train:\n    - source: rows.jsonl\n"
"""The five lines that every recipe needs; what a test adds begins on line 6."""


def parse(text: str, *overrides: str):
    return parse_recipe(text, Path("/home/me/mine.yaml"), overrides, shown_as="mine.yaml")


def problems_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(text, *overrides)
    assert caught.value.exit_code == 2
    return caught.value.lines()


def test_the_least_recipe_is_read():
    file = parse(LEAST)
    assert file.recipe.name == "mine"
    assert file.folder == Path("/home/me")
    assert (file.text, file.overrides) == (LEAST, ())


@pytest.mark.parametrize(("added", "told"), [
    ("trian:\n  steps: 3\n", "mine.yaml:6: unknown key 'trian'; did you mean 'train'?"),
    ("train:\n  learning_rat: 1\n", "mine.yaml:7: unknown key 'train.learning_rat'; did you mean 'learning_rate'?"),
    ("merge:\n  zzz: 1\n", "mine.yaml:7: unknown key 'merge.zzz'; known keys here: dtype"),
    ("quantize:\n  - {method: gguf, type: q8_0}\n  - method: gguf\n    typ: bf16\n",
     "mine.yaml:8: 'quantize.1.type' is missing; add it"),
    ("cost:\n  currency: EUR\n", "mine.yaml:6: 'cost.price_per_hour' is missing; add it"),
    ("train:\n  steps: many\n", "mine.yaml:7: 'train.steps' is 'many'; input should be a valid integer"),
    ("train:\n  steps: yes\n", "mine.yaml:7: 'train.steps' is 'yes'; input should be a valid integer"),
    ("train:\n  steps: true\n", "mine.yaml:7: 'train.steps' is True; a number is meant here"),
    ("train:\n  steps: -1\n", "mine.yaml:7: 'train.steps' is -1; input should be greater than or equal to 1"),
    ("train:\n  schedule: cosin\n", "mine.yaml:7: 'train.schedule' is 'cosin'; input should be 'cosine' or 'constant'"),
    ("train:\n  epochs: .inf\n", "mine.yaml:7: 'train.epochs' is inf; input should be a finite number"),
    ("train: 5\n", "mine.yaml:6: 'train' is 5; write its keys below it: epochs, steps, "),
    ("lora: [1]\n", "mine.yaml:6: 'lora' is a list; write its keys below it: rank, alpha, "),
    ("merge:\n", "mine.yaml:6: 'merge' is empty; write its keys below it: dtype"),
    ("bench:\n  artifacts: merged\n", "mine.yaml:7: 'bench.artifacts' is 'merged'; input should be a valid list"),
    ("name: my recipe\n", "mine.yaml:6: 'name' is 'my recipe'; string should match pattern"),
    ("lora:\n  rank: 8\n  rank: 9\n", "mine.yaml:8: key 'rank' stands twice, first on line 7; remove one of them"),
    ("quantize: {method: ggguf, type: q8_0}\n",
     "mine.yaml:6: 'quantize.method' is 'ggguf', and there is no such quantizer; did you mean 'gguf'?"),
    ("quantize:\n  - {method: gptq, type: int4}\n",
     "mine.yaml:7: 'quantize.0.method' is 'gptq', and there is no such quantizer; known: auto_round, bitsandbytes, "
     "gguf, torchao"),
])
def test_a_mistake_is_told_with_its_line(added, told):
    assert problems_of(LEAST + added)[0].startswith(told)


def test_a_mistake_in_a_list_is_told_with_its_position():
    text = LEAST + "    - source: more.jsonl\n      formt: text\n    - sauce: x\n"
    assert problems_of(text) == [
        "mine.yaml:7: unknown key 'data.train.1.formt'; did you mean 'format'?",
        "mine.yaml:8: 'data.train.2.source' is missing; add it",
        "mine.yaml:8: unknown key 'data.train.2.sauce'; did you mean 'source'?",
    ]


def test_a_single_mapping_where_a_list_may_stand_is_told_with_its_own_lines():
    text = "model: {base: b}\ndata:\n  train:\n    source: rows.jsonl\n    formt: text\n"
    assert problems_of(text) == ["mine.yaml:5: unknown key 'data.train.formt'; did you mean 'format'?"]


def test_a_format_that_does_not_exist_is_told_before_anything_is_read():
    assert problems_of(LEAST + "      format: mesages\n") == [
        "mine.yaml:6: 'data.train.0.format' is 'mesages', and there is no such format; did you mean 'messages'?"]


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file():
    text = ("seed: minus\nmodel:\n  base: b\n  attention: none\ntrain:\n  steps: 3\n  steps: 4\n  epocs: 1\n"
            "lora: {rank: 0}\n")
    assert [line.split(";")[0] for line in problems_of(text, "bench.repeat=3", "nonsense")] == [
        "--set bench.repeat=3: unknown key 'bench.repeat'",
        "--set nonsense: is not key=value",
        "mine.yaml:1: 'seed' is 'minus'",
        "mine.yaml:1: 'data' is missing",
        "mine.yaml:4: 'model.attention' is 'none'",
        "mine.yaml:7: key 'steps' stands twice, first on line 6",
        "mine.yaml:8: unknown key 'train.epocs'",
        "mine.yaml:9: 'lora.rank' is 0",
    ]


@pytest.mark.parametrize(("text", "told"), [
    ("model: {base: b}\n", "mine.yaml:1: 'data' is missing; add it"),
    ("model:\n  sha256: " + "a" * 64 + "\ndata: {train: a.jsonl}\n", "mine.yaml:1: 'model.base' is missing; add it"),
    ("model: {base: b}\ndata:\n  train: []\n", "mine.yaml:3: 'data.train' is a list; list should have at least 1 item"),
])
def test_what_is_missing_is_told_at_its_section(text, told):
    assert problems_of(text)[0].startswith(told)


SOURCE = "model:\n  base: ./base\ndata:\n  train:\n    - source: {source}\n      {key}: {value}\n"


@pytest.mark.parametrize(("added", "told"), [
    ("train:\n  epochs: 1\n  steps: 3\n", "mine.yaml:7: 'train.epochs' has no effect: train.steps is given too"),
    ("  held_out: held.jsonl\n  held_out_rows: 5\n",
     "mine.yaml:7: 'data.held_out_rows' has no effect: data.held_out names its own sources"),
    ("  held_out:\n    - {source: h.jsonl, weight: 2}\n",
     "mine.yaml:7: 'data.held_out.0.weight' has no effect: held-out rows are read once"),
    ("  held_out_rows: 0\ntrain:\n  eval_every: 5\n",
     "mine.yaml:8: 'train.eval_every' has no effect: nothing is held out"),
    ("  held_out_rows: 0\ntrain:\n  keep: best\n",
     "mine.yaml:8: 'train.keep' has no effect: without held-out rows no step is best"),
    ("  held_out_rows: 0\neval:\n  samples: 2\n", "mine.yaml:8: 'eval.samples' has no effect: nothing is held out"),
    ("eval:\n  samples: 0\n  sample_tokens: 9\n", "mine.yaml:8: 'eval.sample_tokens' has no effect: eval.samples is 0"),
    ("quantize:\n  - {method: gguf, type: q8_0}\n  - {method: gguf, type: q8_0}\n",
     "mine.yaml:8: 'quantize.1' has no effect: gguf-q8_0 stands twice"),
    ("bench:\n  artifacts: [base, mergd]\n", "mine.yaml:7: no artifact 'mergd' comes of this recipe"),
    ("eval:\n  artifacts: [gguf-q8_0]\n", "mine.yaml:7: no artifact 'gguf-q8_0' comes of this recipe"),
])
def test_a_key_without_effect_is_an_error(added, told):
    problems = problems_of(LEAST + added)
    assert len(problems) == 1 and problems[0].startswith(told), problems


@pytest.mark.parametrize(("line", "told"), [
    ("layer_replication: [[0, 1]]", "'lora.layer_replication' is refused: peft 0.21 merges repeated layers wrongly"),
    ("bias: all", "'lora.bias' is refused: peft cannot switch a trained bias of the base off again"),
    ("lora_alpha: 8", "'lora.lora_alpha' is called 'alpha' here; write alpha"),
    ("init: loftq", "'lora.init' is 'loftq'; refused: LoftQ needs a CUDA device"),
    ("init: lora_ga", "'lora.init' is 'lora_ga'; refused: LoRA-GA needs the gradients of the whole base"),
    ("init: pisa", "'lora.init' is 'pisa'; did you mean 'pissa'?"),
    ("init: pissa_niter_x", "'lora.init' is 'pissa_niter_x'; did you mean 'pissa_niter_N'?"),
    ("layers_pattern: h", "'lora.layers_pattern' has no effect: lora.layers names no layers"),
])
def test_peft_s_options_are_told_by_name(line, told):
    problems = problems_of(LEAST + f"lora:\n  {line}\n")
    assert len(problems) == 1 and problems[0].startswith(f"mine.yaml:7: {told}"), problems


@pytest.mark.parametrize("init", ["pissa", "olora", "corda", "mica", "orthogonal"])
def test_a_rounded_base_is_not_split(init):
    problems = problems_of(LEAST + f"lora:\n  init: {init}\n", "model.load_in=4bit")
    assert len(problems) == 1 and f"'lora.init' is '{init}', which is made from or like the base's exact" in problems[0]


@pytest.mark.parametrize("name", ["rank", "alpha", "dropout", "targets", "rslora", "dora", "init", "layers", "exclude"])
def test_an_adapter_to_go_on_from_has_a_shape_of_its_own(name):
    value = {"targets": "q_proj", "rslora": "true", "dora": "true", "dropout": "0.1", "init": "eva",
             "layers": "[1]", "exclude": "v_proj"}.get(name, "4")
    problems = problems_of(LEAST + f"train: {{from_adapter: ./adapter}}\nlora:\n  {name}: {value}\n")
    assert problems == [f"mine.yaml:8: 'lora.{name}' has no effect: train.from_adapter brings its own; remove it"]


@pytest.mark.parametrize(("source", "key", "value", "told"), [
    ("rows.jsonl", "split", "test", "only a hub: dataset has one"),
    ("rows.jsonl", "subset", "en", "only a hub: dataset has one"),
    ("rows.jsonl", "sha256", "a" * 64, "only a pypi: archive is checked by it"),
])
def test_a_key_of_another_kind_of_source_is_an_error(source, key, value, told):
    problems = problems_of(SOURCE.format(source=source, key=key, value=value))
    assert problems == [f"mine.yaml:6: 'data.train.0.{key}' has no effect: {told}; remove it"]


def test_the_same_keys_are_fine_where_they_have_an_effect():
    parse(SOURCE.format(source="hub:org/data", key="split", value="test"))
    parse(SOURCE.format(source="pypi:a==1/b.json", key="sha256", value="a" * 64))
    parse(LEAST + "  held_out_rows: 0\ntrain: {steps: 3}\nbench: {artifacts: [base, adapter, merged]}\n")


def test_the_base_s_sha256_is_of_an_archive():
    text = LEAST.replace("  base: ./base\n", "  base: ./base\n  sha256: " + "a" * 64 + "\n")
    assert problems_of(text) == [
        "mine.yaml:3: 'model.sha256' has no effect: only a pypi: archive is checked by it; remove it"]


# ---- --set -----------------------------------------------------------------------------


def test_set_overrides_any_key():
    recipe = parse(LEAST + "train:\n  steps: 5\n", "train.steps=10", "train.learning_rate=1e-4", "seed=3",
                   "lora.targets=[q_proj, v_proj]", "data.train.0.limit=7", "description=a b").recipe
    assert (recipe.train.steps, recipe.train.learning_rate, recipe.seed) == (10, 1e-4, 3)
    assert recipe.lora.targets == ["q_proj", "v_proj"]
    assert (recipe.data.train[0].limit, recipe.description) == (7, "a b")


def test_set_makes_sections_and_takes_a_whole_one():
    recipe = parse(LEAST, "cost.price_per_hour=2", "quantize=[{method: gguf, type: q8_0}]").recipe
    assert recipe.cost.price_per_hour == 2 and recipe.quantize[0].name == "gguf-q8_0"


def test_set_steps_takes_the_place_of_epochs_and_the_other_way_round():
    assert parse(LEAST + "train: {epochs: 2}\n", "train.steps=10").recipe.train.epochs is None
    assert parse(LEAST + "train: {steps: 2}\n", "train.epochs=0.5").recipe.train.steps is None
    assert parse(LEAST + "train: {epochs: 2}\n", "train.steps=null").recipe.train.epochs == 2


def test_the_last_of_two_overrides_counts():
    assert parse(LEAST, "train.steps=1", "train.steps=2").recipe.train.steps == 2


@pytest.mark.parametrize(("override", "told"), [
    ("train.steps", "--set train.steps: is not key=value; write it like --set train.steps=10"),
    ("=3", "--set =3: is not key=value"),
    ("train.stepz=3", "--set train.stepz=3: unknown key 'train.stepz'; did you mean 'steps'?"),
    ("train.steps=few", "--set train.steps=few: 'train.steps' is 'few'; input should be a valid integer"),
    ("train.steps=", "--set train.steps=: is fine"),
    ("train=3", "--set train=3: 'train' is 3; write its keys below it: epochs, "),
    ("train.steps=[1", "--set train.steps=[1: the value is not valid YAML; quote it"),
    ("data.train.1.limit=3", "--set data.train.1.limit=3: 'data.train.1' is not in the recipe; check the key"),
    ("data.train.first=3", "--set data.train.first=3: 'data.train.first' is not in the recipe; check the key"),
    ("seed.x=1", "--set seed.x=1: 'seed' is 5"),
    ("data.train.0.limit.x=4", "--set data.train.0.limit.x=4: 'data.train.0.limit' is a section; input should be"),
])
def test_a_bad_override_names_itself(override, told):
    if told.endswith("is fine"):
        assert parse(LEAST, override).recipe.train.steps is None
        return
    assert problems_of(LEAST, override)[0].startswith(told.replace("'seed' is 5", "'seed' is a section"))


def test_two_overrides_that_exclude_each_other_are_told():
    assert problems_of(LEAST, "train.steps=3", "train.epochs=1") == [
        "--set train.epochs=1: 'train.epochs' has no effect: train.steps is given too; keep one of them"]


# ---- files -----------------------------------------------------------------------------


def test_a_recipe_is_read_from_its_file(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(LEAST)
    monkeypatch.chdir(tmp_path)
    file = read_recipe("mine.yaml")
    assert file.path == tmp_path / "mine.yaml" and file.recipe.name == "mine"


def test_an_error_calls_the_file_as_the_user_did(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(LEAST + "seeed: 1\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"^mine\.yaml:6: unknown key 'seeed'; did you mean 'seed'\?$"):
        read_recipe("mine.yaml")


def test_a_misspelt_shipped_recipe_is_guessed(tmp_path):
    with pytest.raises(RecipeError, match=r"no such recipe; did you mean recipes/chat\.yaml\? lora-kit init chat"):
        read_recipe(tmp_path / "chatt.yaml")
    with pytest.raises(RecipeError, match="no such recipe; lora-kit init copies one of: .*chat"):
        read_recipe(tmp_path / "qqqqqqqqqq.yaml")


@pytest.mark.parametrize(("content", "told"), [
    (b"", "is empty; write at least model.base and data.train, or start with lora-kit init"),
    (b"\x80\x81GGUF", "cannot be read"), (b"model: [\n", "is not valid YAML"),
])
def test_a_file_that_is_no_recipe_is_one_line(tmp_path, content, told):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        read_recipe(path)
    assert told in str(caught.value) and len(caught.value.lines()) == 1


def test_weights_in_8_bits_cannot_be_shared():
    text = LEAST.replace("base: ./base\n", "base: ./base\n  load_in: 8bit\n") + "train: {shard: fsdp}\n"
    assert problems_of(text) == ["mine.yaml:7: 'fsdp' cannot share weights of load_in: 8bit; set model.load_in: 4bit "
                                 "or 16bit, or train.shard: none"]
    assert parse(text.replace("8bit", "4bit")).recipe.train.shard == "fsdp"
