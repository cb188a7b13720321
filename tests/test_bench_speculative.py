"""bench_speculative.py: what an assistant drafts and a model accepts, exactly; predictions by hand; the verb."""

import dataclasses
import json

import pytest
import torch

from lora_kit import bench_speculative, report_serving, speculative
from lora_kit.errors import ModelError
from tests import tiny
from tests.test_lean_decoder import build

PROMPTS = [[5 + row, 9, 30 + row, 7, 11] for row in range(8)]


def test_a_model_that_drafts_for_itself_is_always_right():
    model = build("llama")
    drafter = speculative.Assistant(model)
    for prompt in PROMPTS:  # one drafter, several answers
        plain = speculative.answer(model, prompt, new_tokens=61, drafted=0)
        quick = speculative.answer(model, prompt, new_tokens=61, drafted=4, drafter=drafter)
        assert quick.tokens == plain.tokens
        # 60 tokens after the first, five a pass.
        assert (quick.passes, quick.drafted, quick.accepted, quick.rejected) == (12, 48, 48, 0)
        assert quick.acceptance == 1.0 and quick.tokens_per_pass == 5.0


def test_a_model_that_is_always_wrong_gains_nothing_and_changes_nothing():
    model, wrong = build("llama"), build("llama")
    chosen = {token for prompt in PROMPTS
              for token in speculative.answer(model, prompt, new_tokens=30, drafted=0).tokens}
    never = next(token for token in range(320) if token not in chosen)

    class Head(torch.nn.Module):
        def forward(self, hidden):
            return torch.nn.functional.one_hot(torch.tensor(never), 320).expand(*hidden.shape[:-1], 320).float()

    wrong.lm_head = Head()
    for prompt in PROMPTS:
        plain = speculative.answer(model, prompt, new_tokens=30, drafted=0)
        quick = speculative.answer(model, prompt, new_tokens=30, drafted=4, drafter=speculative.Assistant(wrong))
        assert quick.tokens == plain.tokens and quick.accepted == 0
        # Drafts are 4 tokens, and fewer when fewer are left: 3, 2, 1 and none for the last token.
        assert (quick.passes, quick.drafted, quick.rejected) == (29, 25 * 4 + 3 + 2 + 1, 28)


def test_an_unrelated_model_is_seldom_right():
    model, other = build("llama"), build("llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))
    answers = [speculative.answer(model, prompt, new_tokens=30, drafted=4, drafter=speculative.Assistant(other))
               for prompt in PROMPTS]
    rate = speculative.acceptance_rate(sum(each.accepted for each in answers), sum(each.rejected for each in answers))
    assert rate < 0.2
    for prompt, each in zip(PROMPTS, answers, strict=True):
        assert each.tokens == speculative.answer(model, prompt, new_tokens=30, drafted=0).tokens


def test_the_rate_leaves_out_what_was_not_looked_at():
    assert speculative.acceptance_rate(6, 2) == 0.75
    assert speculative.acceptance_rate(0, 3) == 0.0 and speculative.acceptance_rate(0, 0) is None


@pytest.mark.parametrize(("acceptance", "drafted", "cost", "expected"), [
    # Table 1 of Leviathan et al. 2023: the speed gained, to its two decimals.
    (0.6, 2, 0.0, 1.96), (0.7, 3, 0.0, 2.53), (0.8, 2, 0.0, 2.44), (0.8, 5, 0.0, 3.69), (0.9, 10, 0.0, 6.86),
    (1.0, 4, 0.25, 2.5), (0.0, 4, 0.25, 0.5)])
def test_the_predicted_speed_up(acceptance, drafted, cost, expected):
    assert speculative.predicted_speedup(acceptance, drafted, cost) == pytest.approx(expected, abs=0.005)


def test_ways_side_by_side():
    model = build("llama")
    found = bench_speculative.of_models(model, PROMPTS, drafted=4, new_tokens=31, assistant=build("llama"))
    ways = {way["way"]: way for way in found["ways"]}
    assert list(ways) == ["plain", "prompt lookup", "assistant"]
    own = ways["assistant"]
    # 30 tokens in passes of five: all drafted ones were right.
    assert (own["passes"], own["drafted"], own["accepted"], own["rejected"]) == (8 * 6, 8 * 24, 8 * 24, 0)
    assert own["acceptance_rate"] == 1.0 and own["apart"] == []
    assert own["predicted"] == pytest.approx(5 / (4 * own["cost_ratio"] + 1))
    one, several = found["pass_seconds"]
    assert own["predicted_here"] == pytest.approx(5 / (4 * own["cost_ratio"] + several / one))
    assert own["measured"]["num_pairs"] == 8 and ways["plain"]["measured"] is None
    assert ways["plain"]["passes"] == 8 * 30 and ways["plain"]["tokens_per_second"] > 0
    assert found["logit_noise"] < 1e-4  # fp32
    shown = report_serving.PARTS["speculative"]
    rows = shown.rows(found | {"artifact": "merged", "assistant": "base"})
    assert [row[0] for row in rows] == ["plain", "prompt lookup", "assistant base"]
    assert rows[2][2] == "192 of 192, rate 1.00" and rows[2][-1] == "8 of 8"
    assert {len(row) for row in rows} == {len(shown.columns)}


def test_where_answers_part_and_why():
    model = build("llama")
    plain = [speculative.answer(model, PROMPTS[0], new_tokens=6, drafted=0)]
    tokens = list(plain[0].tokens)
    tokens[3] = (tokens[3] + 1) % 320
    other = [dataclasses.replace(plain[0], tokens=tuple(tokens))]
    [place] = bench_speculative._apart(model, PROMPTS[:1], plain, other, noise=1e-6)
    logits = model(input_ids=torch.tensor([[*PROMPTS[0], *tokens[:3]]])).logits[0, -1].detach()
    assert (place["prompt"], place["position"], place["near_tie"]) == (1, 3, False)
    assert place["margin"] == pytest.approx(abs(float(logits[plain[0].tokens[3]] - logits[tokens[3]])), abs=1e-5)
    assert bench_speculative._apart(model, PROMPTS[:1], plain, other, noise=place["margin"])[0]["near_tie"]
    found = {"artifact": "m", "prompts": 1, "drafted": 4, "pass_seconds": [0.1, 0.2], "logit_noise": 1e-6,
             "ways": [{"way": "prompt lookup", "apart": [place]}]}
    assert any("prompt 1 parts at token 4 by" in line and "more than rounding" in line
               for line in report_serving.PARTS["speculative"].lines(found))


def test_an_assistant_with_another_tokenizer_is_refused(tiny_model, tmp_path):
    folder, tokenizer = tiny.save_model(tmp_path / "other")
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(folder)
    own, other = ({"name": path.name, "path": str(path), "tokenizer": str(path)} for path in (tiny_model, folder))
    bench_speculative.check_tokenizers(own, own)
    with pytest.raises(ModelError, match="assistant: other: has another tokenizer"):
        bench_speculative.check_tokenizers(own, other)


def test_the_verb_measures_a_run_and_one_artifact(finished_world):
    told = finished_world.lora_kit("bench", finished_world.run, "--assistant", "base")
    assert told.returncode == 0, told.stderr
    assert "Speculative decoding of merged: 8 prompts" in told.stdout and "assistant base" in told.stdout
    found = json.loads((finished_world.run / "bench" / "bench.json").read_text())["serving"]["speculative"]
    assert [way["way"] for way in found["ways"]] == ["plain", "prompt lookup", "assistant", "plain, own loop"]
    assert found["artifact"] == "merged" and all(way["measured"] for way in found["ways"][1:])
    report = finished_world.lora_kit("report", finished_world.run)
    assert report.returncode == 0, report.stderr
    assert "Speculative decoding of merged" in (finished_world.run / "report" / "report.md").read_text()
    before = (finished_world.run / "recipe.yaml").read_text(), (finished_world.run / "lock.json").read_text()
    single = finished_world.lora_kit("bench", f"{finished_world.run}/adapter", "--speculative")
    assert single.returncode == 0, single.stderr
    assert "Speculative decoding of adapter" in single.stdout and "assistant base" in single.stdout
    assert before == ((finished_world.run / "recipe.yaml").read_text(), (finished_world.run / "lock.json").read_text())


@pytest.mark.parametrize(("arguments", "code", "said"), [
    (("{run}", "--assistant", "nowhere"), 5, "nowhere"),
    (("{run}/merged", "--assistant", "gguf-q8_0"), 2, "not run by transformers"),
    (("{run}/gguf-q8_0", "--speculative"), 2, "transformers"),
    (("model", "--speculative"), 2, "lies in no run")])
def test_what_cannot_be_measured_is_one_line(finished_world, arguments, code, said):
    told = finished_world.lora_kit("bench", *(each.format(run=finished_world.run) for each in arguments))
    assert told.returncode == code and said in told.stderr and len(told.stderr.strip().splitlines()) == 1
