"""The faults that spoil a fine-tuning in silence, each planted in the code that runs, and each caught by a check.

The checks are general: they compare what a stage made with a count, or a measurement, that was made another way, and
know nothing of the fault. Where each stands:

| fault | what catches it |
|---|---|
| EOS masked | the recount of stop tokens in the token files; the recount of each batch |
| double BOS | the look at the token ids of every row and every prompt |
| neighbours leaking | the proof that packed rows teach what separate ones do |
| mean of means | the proof that a batch teaches the same whole and accumulated |
| silent cut | the tokens' own ends; the ledger's balance; the recount of the token files; the recount of each batch |
| stale cache | what prepared data says it was made of, against what there is now |
| misspelt target | every name of the recipe, against the modules that there are and that were adapted |
| padding by id | the recount of each batch |

A fault is planted by changing one place of a function, in the process of the test: :func:`plant`.
"""

from __future__ import annotations
import __future__

import inspect
import json
import os
import shutil
import textwrap
from collections.abc import Callable

import pytest

from lora_kit import adapter, chat, data, events, loss, packing, pipeline, prepared, tokens
from lora_kit.errors import DataError, InternalError, ModelError, RecipeError, RefusedError
from lora_kit.tokens import read_examples
from tests.data_place import Workplace, talk

ROWS = [talk(*(f"{('question', 'answer')[turn % 2]} {row}" + "?" * (row % 7) for turn in range(2 + 2 * (row % 2))))
        for row in range(24)]
"""Conversations of one and of two answers, of several lengths."""
GOOD = ("holds", "accumulates", "adds_up")


def plant(patch: pytest.MonkeyPatch, function: Callable, changes: dict[str, str]) -> None:
    """Change the running ``function``, for whoever calls it: each key stands in it once and becomes its value."""
    source = textwrap.dedent(inspect.getsource(function))
    for right, wrong in changes.items():
        assert source.count(right) == 1, f"{function.__qualname__} has {source.count(right)} of: {right}"
        source = source.replace(right, wrong)
    made: dict = {}
    exec(compile(source, "planted", "exec", __future__.annotations.compiler_flag), function.__globals__, made)
    patch.setattr(function, "__code__", made[function.__name__].__code__)


@pytest.fixture
def place(place, tmp_path, tiny_model) -> Workplace:
    """The usual place, with a base of its own that a test may change."""
    place.write("rows.jsonl", ROWS)
    place.base_folder = shutil.copytree(tiny_model, tmp_path / "base")
    return place


@pytest.fixture
def cautions():
    told: list[str] = []
    with events.listening(lambda event: told.append(event.text) if isinstance(event, events.Caution) else None):
        yield told


def train(place: Workplace, tmp_path, *overrides: str, fresh: bool = True):
    """Train four steps of eight rows in short passes, in a run of its own when ``fresh``; the run."""
    # Plain peft: these faults are planted in what it runs, and the fast path's own are in test_fast.py.
    settings = ("data.held_out_rows=4", "lora.rank=4", "train.steps=4", "train.batch_size=8", "train.precision=fp32",
                "train.micro_batch_size=2", "train.pack_tokens=200", "train.stop_prompts=0", "train.prove=true",
                "train.learning_rate=0.01", "train.fast=[]")
    return pipeline.run_recipe(place.recipe_file(*settings, *overrides), runs_dir=tmp_path / "runs", until="train",
                               fresh=fresh)


def packing_of(run) -> dict:
    return run.seal("train")["figures"]["packing"]


def losses_of(run) -> list[float]:
    lines = map(json.loads, (run.stage_dir("train") / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_without_a_fault_no_check_objects(place, tmp_path, cautions):
    packed, padded = train(place, tmp_path), train(place, tmp_path, "train.packing=false")
    assert packing_of(packed)["budget"] and all(packing_of(packed)["proof"][key] for key in GOOD)
    assert packing_of(padded)["budget"] is None and all(packing_of(padded)["proof"][key] for key in GOOD[1:])
    assert losses_of(packed) == pytest.approx(losses_of(padded), rel=1e-5)
    assert cautions == []


# ---- EOS masked ------------------------------------------------------------------------


@pytest.mark.parametrize(("turns", "error", "told"), [
    ("all", RecipeError, "no stop token would be trained on"),
    ("all but the last", RefusedError, "train 24 stop tokens by recount, the ledger says 36 turns end in one"),
])
def test_eos_masked(place, monkeypatch, turns, error, told):
    """A turn is trained on without its end."""
    kept = "set()" if turns == "all" else "({stop} if turn is rendering.turns[-1] else set())"
    plant(monkeypatch, chat._masked, {
        "mask_T[sorted(trained)] = 1": f"mask_T[sorted(trained - {{stop}} | {kept})] = 1"})
    with pytest.raises(error, match=told):
        place.prepare("data.held_out_rows=0")


def test_eos_masked_in_the_batch(place, tmp_path, monkeypatch):
    """The labels leave out every token that is the pad token, which is the stop token as well."""
    plant(monkeypatch, packing.packed_batch_of, {
        "example.loss_mask_T == 1": "(example.loss_mask_T == 1) & (example.tokens_T != 2)"})
    with pytest.raises(InternalError, match=r"batch of rows.jsonl:\d+.*: holds \d+ trained tokens of \d+ by recount"):
        train(place, tmp_path, "train.prove=false")


# ---- double BOS ------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["tokenizer", "template", "text"])
def test_double_bos(place, monkeypatch, by):
    from tokenizers.processors import TemplateProcessing

    tokenizer = place.tokenizer()
    if by == "template":
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    else:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)])
    tokenizer.save_pretrained(place.base_folder)
    if by == "tokenizer":  # it writes one before what the template wrote
        plant(monkeypatch, chat._tokens_of, {"add_special_tokens=False": "add_special_tokens=True"})
    if by == "text":
        place.write("rows.jsonl", [{"text": f"<|im_start|>number {row}"} for row in range(8)])
    with pytest.raises(DataError, match=r"rows.jsonl:\d+: begins with two BOS tokens \(<\|im_start\|>\)"):
        place.prepare()
    if by != "text":
        with pytest.raises(DataError, match="prompt: begins with two BOS tokens"):
            chat.prompt_ids(place.tokenizer(), [{"role": "user", "content": "Hi"}])


# ---- neighbours leaking ----------------------------------------------------------------


@pytest.mark.parametrize(("attention", "function", "changes"), [
    ("sdpa", packing.attend_per_document, {
        "list(document_lengths or (query_BHTD.shape[2],))": "[query_BHTD.shape[2]]"}),
    ("eager", packing.packed_batch_of, {  # rows are told apart by their positions
        "joined([numpy.arange(len(example.tokens_T)) for example in examples])":
        "torch.arange(sum(lengths))[None]"}),
])
def test_neighbours_leaking(place, tmp_path, monkeypatch, cautions, attention, function, changes):
    """A packed row reads the row before it: found before the first step, and rows are padded."""
    padded = losses_of(train(place, tmp_path, f"model.attention={attention}", "train.packing=false"))
    plant(monkeypatch, function, changes)
    leaking = train(place, tmp_path, f"model.attention={attention}", "train.prove=false")
    assert losses_of(leaking) != pytest.approx(padded, rel=1e-3), "the fault is none"
    found = train(place, tmp_path, f"model.attention={attention}")
    assert not packing_of(found)["proof"]["holds"] and packing_of(found)["budget"] is None
    assert any("two packed rows differ by" in text for text in cautions)
    assert losses_of(found) == pytest.approx(padded, rel=1e-5)


def test_neighbours_leaking_into_a_row_s_first_token(place, tmp_path, monkeypatch, cautions):
    """What a row begins with is predicted from the row before it, where all of a row is trained on."""
    place.write("rows.jsonl", [{"text": f"number {row} is a number" + "!" * row} for row in range(24)])
    plant(monkeypatch, packing.packed_batch_of, {"label_T[:1] = IGNORED": "pass"})
    assert packing_of(train(place, tmp_path))["budget"] is None
    assert any("two packed rows differ by" in text for text in cautions)
    with pytest.raises(InternalError, match="trained tokens of"):
        train(place, tmp_path, "train.prove=false")


# ---- mean of means over accumulation ---------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("packed", ["true", "false"])
def test_mean_of_means(place, tmp_path, monkeypatch, precision, packed):
    """Each pass of a batch counts the same, however many tokens it trains."""
    settings = (f"train.packing={packed}", f"train.precision={precision}")
    right = losses_of(train(place, tmp_path, *settings))
    plant(monkeypatch, loss.accumulate, {
        "waiting = iter(batches)": "batches = list(batches); waiting = iter(batches)",
        "/ num_trained)": "/ batch.num_trained_tokens / len(batches))"})
    wrong = losses_of(train(place, tmp_path, *settings, "train.prove=false"))
    assert wrong != pytest.approx(right, rel=1e-4), "the fault is none"
    with pytest.raises(InternalError, match=r"train.prove: loss .* rows.jsonl:\d+, accumulated, differ by 0\."):
        train(place, tmp_path, *settings)


@pytest.mark.parametrize("packed", ["true", "false"])
def test_a_mean_in_the_loss(place, tmp_path, monkeypatch, cautions, packed):
    """The loss of a pass is its mean already, where the sum is meant."""
    plant(monkeypatch, loss.loss_sum, {'reduction="sum"': 'reduction="mean"'})
    told = r"rows.jsonl:\d+ in one pass differ by 0.* from those of a pass each"
    with pytest.raises(ModelError, match=f"train.prove: loss .*{told}"):
        train(place, tmp_path, f"train.packing={packed}")
    # In bf16 rounding alone may be large: it is told.
    run = train(place, tmp_path, f"train.packing={packed}", "train.precision=bf16")
    assert not packing_of(run)["proof"]["adds_up"]
    assert any("rounding, or a fault; train.precision: fp32 tells them apart" in text for text in cautions)


# ---- silent cut ------------------------------------------------------------------------

_CUT = "length = min(60, len(example.tokens_T)); example = Example(tokens_T=example.tokens_T[:60], " \
       "loss_mask_T=example.loss_mask_T[:60], origin=example.origin)"


@pytest.mark.parametrize(("function", "changes", "error", "told"), [
    (chat._tokens_of, {"return_offsets_mapping=True)": "return_offsets_mapping=True, truncation=True, max_length=60)"},
     DataError, r"rows.jsonl:\d+: the tokenizer has no token for its last \d+ characters"),
    (chat.encode, {"numpy.array(ids, numpy.int32), loss_mask_T=mask_T":
                   "numpy.array(ids[:60], numpy.int32), loss_mask_T=mask_T[:60]"},
     RefusedError, "stop tokens by recount, the ledger says"),
    (data._Preparation._taken, {"self.ledger.count(split, source, tokens_cut=length - most)": "pass"},
     InternalError, "the ledger of the train rows does not balance"),
    (tokens.ExampleWriter.append, {"example.tokens_T, numpy.int32": "example.tokens_T[:60], numpy.int32"},
     RefusedError, "the train token files are not whole"),
    (tokens.batch_of, {"length = len(example.tokens_T)": _CUT},
     InternalError, r"batch of rows.jsonl:\d+.*: holds"),
], ids=["in the tokenizer", "after it", "of a long row", "in the files", "in the batch"])
def test_silent_cut(place, tmp_path, monkeypatch, function, changes, error, told):
    """A row loses its end, and no count says so."""
    plant(monkeypatch, function, changes)
    most = ("data.max_tokens=60", "data.too_long=cut_end") if function is data._Preparation._taken else ()
    with pytest.raises(error, match=told):
        train(place, tmp_path, "train.packing=false", *most)


# ---- stale cache -----------------------------------------------------------------------


@pytest.mark.parametrize(("part", "lost"), [
    ("sources", {"[item.reference, item.sha256, item.revision]": "[item.reference]"}),
    ("tokenizer", {'base["content"]': "None"}),
    ("code", {"code_sha256()": "None"}),
    ("data", {'recipe.section_json("data", "seed")': "None"}),
])
def test_stale_cache(place, monkeypatch, cautions, part, lost):
    """The key forgets a part of what decides the tokens, that part changes, and the folder of before is found."""
    plant(monkeypatch, prepared.find, lost)
    before = place.prepare()
    path = place.folder / "rows.jsonl"
    if part == "sources":  # another content of the same name, size and time
        stat = path.stat()
        path.write_text(path.read_text().replace("answer", "ANSWER"))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_size == stat.st_size
    elif part == "tokenizer":
        tokenizer = place.tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace("\n", ":\n")
        tokenizer.save_pretrained(place.base_folder)
    elif part == "code":
        monkeypatch.setattr(prepared, "code_sha256", lambda: "of another version")
    kept = [example.tokens_T.tolist() for example in read_examples(before.folder, "train")]
    after = place.prepare(*(["data.train_on=last"] if part == "data" else []))
    assert after.folder == before.folder, "the fault is none"
    assert [text for text in cautions if f"was made of other things ({part})" in text]
    if part in ("sources", "tokenizer"):
        assert [example.tokens_T.tolist() for example in read_examples(after.folder, "train")] != kept


def test_a_changed_file_of_the_same_name_size_and_time_is_another_run(place, tmp_path):
    before = train(place, tmp_path, fresh=False)
    path = place.folder / "rows.jsonl"
    stat = path.stat()
    path.write_text(path.read_text().replace("answer", "ANSWER"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = train(place, tmp_path, fresh=False)
    assert after.path != before.path and path.stat().st_size == stat.st_size
    texts = [place.tokenizer().decode(read_examples(run.stage_dir("data"), "train")[0].tokens_T)
             for run in (before, after)]
    assert "answer" in texts[0] and "ANSWER" in texts[1]


# ---- misspelt target among right ones --------------------------------------------------


@pytest.mark.parametrize("blind", [False, True])
def test_misspelt_target_among_right_ones(place, tmp_path, monkeypatch, blind):
    """peft adapts the others without a word; asked before it, and again of what it made."""
    import torch
    from peft import LoraConfig, get_peft_model

    from lora_kit.model import load_base

    silent = get_peft_model(load_base(place.base_folder, dtype="fp32"), LoraConfig(target_modules=["v_proj", "q_porj"]))
    assert silent.base_model.targeted_module_names and isinstance(silent, torch.nn.Module)
    told = "'q_porj' matches no module that can be adapted; did you mean 'q_proj'"
    if blind:  # the names are not looked at before peft is asked
        plant(monkeypatch, adapter._check_targets, {
            "[module for full, module in supported.items() if _ends(full, name)]": "[None]"})
        told = "no module 'q_porj' is adapted"
    with pytest.raises(RecipeError, match=f"lora.targets: {told}"):
        train(place, tmp_path, "lora.targets=[v_proj, q_porj]")


def test_a_target_that_an_exclusion_takes_away_is_told(place, tmp_path):
    with pytest.raises(RecipeError, match="lora.targets: no module 'q_proj' is adapted; check lora.exclude"):
        train(place, tmp_path, "lora.targets=[v_proj, q_proj]", "lora.exclude=[q_proj]")


# ---- padding by id ---------------------------------------------------------------------


@pytest.mark.parametrize("changes", [
    {"example.loss_mask_T == 1": "(example.loss_mask_T == 1) & (example.tokens_T != 2)"},
    {"mask_BT[row, :length] = 1": "mask_BT[row, :length] = example.tokens_T != 2"},
    {"mask_BT[row, :length] = 1": "mask_BT[row] = 1"},
], ids=["labels", "attention", "padding is read"])
def test_padding_by_id(place, tmp_path, monkeypatch, changes):
    """What is padding is told by the pad token's id, 2, which is the stop token of every turn."""
    assert place.tokenizer().pad_token_id == place.tokenizer().eos_token_id == 2
    plant(monkeypatch, tokens.batch_of, changes)
    with pytest.raises(InternalError, match=r"batch of rows.jsonl:\d+.*: holds \d+ trained tokens of \d+ by recount"):
        train(place, tmp_path, "train.packing=false", "train.prove=false")
