"""The quantize stage: forms made and measured from disk, bounds judged only where the recipe sets them."""

import json

import pytest

from lora_kit import certificate, engines, merge, quantize
from lora_kit.chat import load_tokenizer
from lora_kit.errors import MachineError, ModelError, RecipeError
from lora_kit.events import Note, Table, listening
from lora_kit.recipe import QuantizeForm
from lora_kit.types import Artifact
from tests import fake_run, tiny

FORMS = [{"method": "bitsandbytes", "type": "nf4", "min_top1": 0.999},
         {"method": "gguf", "type": "q8_0", "max_kl": 0.05}]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The stage run once on a merged model: (run, result, events)."""
    path = tmp_path_factory.mktemp("quantize")
    base, _ = tiny.save_model(path / "base", dtype="bfloat16", hidden=128, initializer_range=0.1)
    adapter = fake_run.save_adapter(base, path / "adapter", size=0.1)
    folder = path / "merge" / "model"
    folder.mkdir(parents=True)
    merge.merge_to_folder(str(base), str(adapter), str(base), str(folder), "auto")
    run = fake_run.FakeRun(path, base, adapter)
    size = (folder / "model.safetensors").stat().st_size
    run._artifacts["merged"] = Artifact(name="merged", path=str(folder), kind="hf", tokenizer=str(folder),
                                        num_params=size // 2, size_bytes=size, adapter_sha256="0" * 64)
    fake_run.save_rows(path / "data", load_tokenizer(folder))
    heard = []
    with listening(heard.append):
        result = quantize.stage(fake_run.recipe(quantize=FORMS), run)
    run.publish("quantize", result)
    return run, result, heard


def test_every_form_is_an_artifact_that_opens(done):
    run, result, _ = done
    assert [artifact.path for artifact in result.artifacts] == [
        "quantize/bitsandbytes-nf4/model", "quantize/gguf-q8_0/model/model.gguf"]
    for artifact in result.artifacts:
        found = run.artifact(artifact.name)
        assert artifact.adapter_sha256 == "0" * 64
        with engines.open_engine(found, prefer="hf") as engine:
            assert engine.generate([[5, 6, 7]], max_new_tokens=3, ignore_stop=True)[0].tokens


def test_figures_are_measured_and_written(done):
    run, result, _ = done
    nf4, q8 = (json.loads((run.path / "quantize" / name / "certificate.json").read_text())
               for name in ("bitsandbytes-nf4", "gguf-q8_0"))
    assert 1e-6 < q8["mean_kl"] < nf4["mean_kl"] < 1
    assert 0.9 < q8["top1_agreement"] <= 1 and 0.5 < nf4["top1_agreement"] < 1
    assert nf4["perplexity_ratio"] == pytest.approx(nf4["perplexity_candidate"] / nf4["perplexity_reference"])
    assert 8.5 < q8["bits_per_weight"] < 10 and q8["size_bytes"] == result.artifacts[1].size_bytes
    assert q8["split"] == "held_out" and "6 held-out rows" in q8["measured_on"]
    assert q8["reference"] == "transformers fp32" and nf4["engine"] == "transformers bf16, bitsandbytes"
    assert len(q8["answers"]["samples"]) == 6 and q8["answers"]["stopped"]["share"] <= 1
    assert q8["prose"]["num_rows"] == 14 and 0 < q8["prose"]["mean_kl"] < nf4["prose"]["mean_kl"]
    assert "samples" not in result.figures["forms"]["gguf-q8_0"]["answers"]
    assert result.figures["forms"]["gguf-q8_0"]["mean_kl"] == q8["mean_kl"]
    assert not (run.path / "quantize" / ".reference").exists()


def test_every_type_of_bitsandbytes_is_certified(done, tmp_path):
    """int8 layers must be timed before their weights are read."""
    run, _, _ = done
    folder = run.artifact("merged").path
    (tmp_path / "model").mkdir()
    quantize.quantize_to_folder("bitsandbytes", "int8", folder, str(tmp_path / "model"), str(run.path / "data"))
    rows = certificate.held_out_rows(run.path / "data", 200)["rows"]
    reference = certificate.record_reference(artifact=run.artifact("merged").as_dict(), rows=rows,
                                             path=str(tmp_path / "recording"))
    reference["base_losses"] = certificate.answer_losses(artifact=run.artifact("base").as_dict(), rows=rows)
    found = quantize.certify_form(
        reference, Artifact(name="q", path=str(tmp_path / "model"), kind="hf").as_dict(), None, "bitsandbytes",
        run.artifact("base").path, run.artifact("adapter").path)
    assert found["tokens_per_second"] > 0 and 1e-6 < found["mean_kl"] < 0.1
    assert found["delta"]["projection"] == pytest.approx(1, abs=0.03) and found["delta"]["missing"] == []


def test_what_is_left_of_the_adapter_is_measured_in_the_files(done):
    run, _, _ = done
    nf4, q8 = (json.loads((run.path / "quantize" / name / "certificate.json").read_text())["delta"]
               for name in ("bitsandbytes-nf4", "gguf-q8_0"))
    for kept in (nf4, q8):
        # Quantized from the merged model: all of the change in expectation, and noise on top.
        assert kept["projection"] == pytest.approx(1, abs=0.05) and kept["missing"] == []
        assert set(kept["by_layer"]) == {"0", "1"} and kept["by_layer"]["1"]["num_tensors"] == 7
    assert q8["noise"] < 0.2 < nf4["noise"] and nf4["sign"] < q8["sign"]


def test_the_gain_is_told_with_its_interval_or_why_not(done):
    run, _, _ = done
    gain = json.loads((run.path / "quantize" / "gguf-q8_0" / "certificate.json").read_text())["gain"]
    # A random adapter gains nothing; what it lost of the base's score, a form "keeps" too.
    assert gain["num_rows"] == 6 and gain["num_weights"] > 100
    assert gain["why_not"] or gain["ci_low"] < gain["value"] < gain["ci_high"]


def test_the_engine_is_named(done):
    run, _, _ = done
    q8 = json.loads((run.path / "quantize" / "gguf-q8_0" / "certificate.json").read_text())
    if engines.missing("llamacpp"):
        assert q8["engine"] == "transformers fp32, dequantized" and "is not measured" in q8["engine_note"]
    else:
        assert (q8["engine"], q8["engine_note"], q8["tokenizer_differences"]) == ("llama.cpp", "", 0)


def test_only_the_recipes_bounds_are_judged(done):
    _, result, _ = done
    assert [verdict.outcome for verdict in result.verdicts] == ["FAIL", "PASS"]
    assert result.verdicts[0].claim == ("bitsandbytes-nf4: at least 99.9% of tokens keep the merged model's first "
                                        "choice")
    assert result.summary.endswith("A BOUND WAS MISSED")


def test_a_table_is_told(done):
    _, result, heard = done
    tables = [event for event in heard if isinstance(event, Table)]
    assert [row[0] for row in tables[0].rows] == ["bitsandbytes-nf4", "gguf-q8_0"]
    assert [row[0] for row in tables[1].rows] == ["merged", "bitsandbytes-nf4", "gguf-q8_0"]
    assert tables[1].rows[1][-1] == "misses its own bound"


def test_one_is_recommended_within_the_budget(done):
    _, result, heard = done
    choice = result.figures["choice"]
    assert choice["recommended"] in ("merged", "gguf-q8_0") and "bitsandbytes-nf4" in choice["out"]
    assert any(isinstance(event, Note) and event.text.startswith(f"recommended: {choice['recommended']}, the smallest")
               for event in heard)
    assert result.figures["forms"]["gguf-q8_0"]["tokens_per_second"] > 1


def test_calibration_rows_are_training_rows(tmp_path):
    folder = fake_run.save_token_rows(tmp_path, [list(range(10)), [1], list(range(20, 45))])
    rows = quantize.calibration_rows(folder)
    assert sorted(map(len, rows)) == [10, 25] and sum(map(len, quantize.calibration_rows(folder, 12))) in (10, 12)


def test_without_llama_cpp_the_file_is_read_by_transformers_and_that_is_said(monkeypatch):
    monkeypatch.setattr(engines, "missing", lambda name: 'pip install "lora-kit[llamacpp]"')
    note = quantize._engine_note("gguf", quantize._engines_for("gguf"))
    assert "dequantized" in note and 'pip install "lora-kit[llamacpp]"' in note


def test_judge_without_bounds_says_nothing():
    figures = {"mean_kl": 1.0, "mean_kl_standard_error": None, "top1_agreement": 0.1, "measured_on": "10 tokens"}
    assert quantize.judge(QuantizeForm(method="gguf", type="q8_0"), figures) == []
    bounded = quantize.judge(QuantizeForm(method="gguf", type="q8_0", max_kl=2.0, min_top1=0.2), figures)
    assert [verdict.outcome for verdict in bounded] == ["PASS", "FAIL"]


@pytest.mark.parametrize(("gain", "outcome", "evidence"), [
    ({"value": 0.97, "ci_low": 0.95, "ci_high": 0.99, "num_weights": 300, "num_rows": 9}, "PASS",
     "97.0% (95 % interval 95.0% to 99.0%) over 300 answer tokens of 9 rows"),
    ({"value": 0.91, "ci_low": 0.85, "ci_high": 0.95, "num_weights": 300, "num_rows": 9}, "INCONCLUSIVE", "91.0%"),
    ({"value": 0.8, "ci_low": 0.7, "ci_high": 0.89, "num_weights": 300, "num_rows": 9}, "FAIL", "80.0%"),
    ({"value": None, "why_not": "nothing is scored"}, "INCONCLUSIVE", "nothing is scored"),
    ({"value": 0.99, "ci_low": None, "ci_high": None}, "INCONCLUSIVE", "over one row alone"),
])
def test_the_gain_is_judged_by_its_interval(gain, outcome, evidence):
    verdict, = quantize.judge(QuantizeForm(method="gguf", type="q8_0", min_gain_retained=0.9), {"gain": gain})
    assert verdict.outcome == outcome and evidence in verdict.evidence and "at least 90%" in verdict.claim


def test_no_form_is_no_work(tmp_path):
    result = quantize.stage(fake_run.recipe(), fake_run.FakeRun(tmp_path, tmp_path))
    assert result.summary == "no form in the recipe" and result.artifacts == ()


@pytest.mark.parametrize(("forms", "error", "what"), [
    ([{"method": "gptq", "type": "int4"}], RecipeError, "'gptq' is not a method"),
    ([{"method": "gguf", "type": "q4_9"}], RecipeError, "'q4_9' is not a type of gguf"),
    ([{"method": "gguf", "type": "q8_0"}] * 2, RecipeError, "names gguf-q8_0 twice"),
])
def test_bad_forms_are_told_before_any_work(forms, error, what, done, monkeypatch):
    run, _, _ = done
    monkeypatch.setattr(quantize.isolate, "call", lambda *a, **k: pytest.fail("work was begun"))
    with pytest.raises(error, match=what):
        quantize.stage(fake_run.recipe(quantize=forms), run)


def test_a_missing_package_names_its_install_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MachineError) as error:
        quantize.check(QuantizeForm(method="bitsandbytes", type="nf4"), {})
    assert str(error.value).endswith("is not installed; pip install bitsandbytes")


def test_a_model_that_the_method_cannot_take():
    with pytest.raises(ModelError, match="architecture GPT2LMHeadModel"):
        quantize.check(QuantizeForm(method="gguf", type="q8_0"), {"architectures": ["GPT2LMHeadModel"]})
