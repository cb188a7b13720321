"""What all scores say together: stages, flips, gates against artifacts and locks, and the cap on errors."""

import pytest

from lora_kit import comparison
from lora_kit.claims import Gate
from lora_kit.errors import MachineError

KEY = ("answers", "exact_match")
HIGHER = {KEY: True}


def lines(scores):
    return [{"item_id": str(number), "score": score, "cluster": str(number), "weight": 1, "error": "it is too long"}
            for number, score in enumerate(scores)]


def scored(**by_name):
    return {name.replace("_", "/"): {KEY: lines(scores)} for name, scores in by_name.items()}


RIGHT, WRONG = [1.0] * 60, [0.0] * 60


def test_stages_follow_the_recipe_and_locks_stand_beside():
    names = ["base", "base-fewshot", "adapter", "merged", "gguf-q8_0", "baseline/merged", "baseline/gone"]
    assert comparison.stage_pairs(names) == [
        ("adapter", "base"), ("merged", "adapter"), ("gguf-q8_0", "merged"), ("merged", "baseline/merged")]
    assert comparison.stage_pairs(["base", "gguf-q8_0"]) == []


def test_differences_flips_and_verdicts_by_stage():
    found = comparison.compare(
        scored(base=WRONG[:30] + RIGHT[:30], merged=RIGHT[:58] + WRONG[:2], gguf=RIGHT[:57] + WRONG[:3]),
        [Gate(task="answers", metric="exact_match", better_than="base"),
         Gate(task="answers", metric="exact_match", artifact="gguf", no_worse_than="merged", margin=0.15),
         Gate(task="answers", metric="exact_match", artifact="gguf", at_least=0.8)], HIGHER, [])
    assert [(each["artifact"], each["baseline"], round(each["difference"], 3)) for each in found.differences] == [
        ("merged", "base", 0.467), ("gguf", "base", 0.45), ("gguf", "merged", -0.017)]
    assert [(each["artifact"], each["baseline"], each["num_worse"], each["num_better"]) for each in found.flips] == [
        ("merged", "base", 2, 30), ("gguf", "merged", 1, 0)]
    assert [verdict.outcome for verdict in found.verdicts] == ["PASS", "PASS", "PASS"]
    assert [score.artifact for score in found.scores] == ["base", "merged", "gguf"]


@pytest.mark.parametrize("name, locked, outcome, evidence", [
    ("baseline", {"baseline_merged": RIGHT}, "FAIL", "difference -0.5"),
    ("baseline", {"baseline_base": WRONG}, "PASS", "difference 0.5"),  # a lock of the base alone
    ("baseline/base", {"baseline_base": WRONG, "baseline_merged": RIGHT}, "PASS", "difference 0.5"),
    ("baseline", {}, "INCONCLUSIVE", "no baseline was given"),
    ("baseline/other", {"baseline_merged": RIGHT}, "INCONCLUSIVE", "the baseline has no scores of other on answers"),
])
def test_gates_against_a_lock(name, locked, outcome, evidence):
    gate = Gate(task="answers", metric="exact_match", no_worse_than=name, margin=0.1)
    found = comparison.compare(scored(merged=RIGHT[:30] + WRONG[:30], **locked), [gate], HIGHER, [])
    [verdict] = found.verdicts
    assert verdict.outcome == outcome and verdict.evidence.startswith(evidence), verdict
    assert [score.artifact for score in found.scores] == ["merged"]  # a lock's scores are not this run's


def test_what_was_not_measured_keeps_its_gate_open():
    gate = Gate(task="answers", metric="exact_match", artifact="gguf", at_least=0.5)
    why = [{"artifact": "gguf", "task": "answers", "why": "no engine"}]
    [verdict] = comparison.compare(scored(merged=RIGHT), [gate], HIGHER, why).verdicts
    assert (verdict.outcome, verdict.evidence) == ("INCONCLUSIVE", "gguf was not measured: no engine")


def test_a_corpus_metric_is_compared_by_its_value():
    by_name = scored(base=WRONG, merged=RIGHT)
    for name, value in (("base", [1, 4]), ("merged", [3, 4])):
        for number, line in enumerate(by_name[name][KEY]):
            line["outcome"] = [value[0] + (number % 2), value[1]]

    def ratio(outcomes):
        return sum(top for top, _ in outcomes) / sum(bottom for _, bottom in outcomes)

    gate = Gate(task="answers", metric="exact_match", better_than="base")
    found = comparison.compare(by_name, [gate], HIGHER, [], {KEY: ratio})
    assert [score.value for score in found.scores] == [pytest.approx(0.375), pytest.approx(0.875)]
    assert found.scores[0].ci_low < 0.375 < found.scores[0].ci_high
    assert found.differences[0]["difference"] == pytest.approx(0.5) and found.verdicts[0].outcome == "PASS"
    assert found.differences[0]["method"] == "BCa bootstrap"


def test_more_errors_than_allowed_fail_the_evaluation_as_environment():
    some = scored(base=RIGHT, merged=[None] * 6 + RIGHT[:54])
    comparison.check_errors(some, 0.1, "work")
    with pytest.raises(MachineError) as error:
        comparison.check_errors(some, 0.09, "work")
    assert error.value.exit_code == 6
    assert str(error.value) == (
        "task answers: 6 of 60 items of merged have no exact_match, more than eval.max_errors allows (9 %); the first: "
        "it is too long; correct it, or raise eval.max_errors; the items are in work/merged/items.jsonl")
    comparison.check_errors(scored(base=[None]), 1.0, "work")


def test_forms_keep_a_share_of_what_a_target_gained():
    by_name = scored(base=WRONG, merged=RIGHT[:40] + WRONG[:20], gguf=RIGHT[:30] + WRONG[:30], adapter=RIGHT)
    by_name["base-fewshot"] = by_name["base"]
    target = Gate(task="answers", metric="exact_match", better_than="base")
    [kept] = comparison.compare(by_name, [target, target], HIGHER, []).gains
    assert (kept["task"], kept["metric"], kept["artifact"], kept["num_items"]) == ("answers", "exact_match", "gguf", 60)
    assert kept["value"] == 0.75 and 0.5 < kept["ci_low"] < 0.75 < kept["ci_high"] < 1
    retained = Gate(task="answers", metric="exact_match", no_worse_than="base", margin=0.1)
    assert comparison.compare(by_name, [retained], HIGHER, []).gains == []
    del by_name["base"]
    assert comparison.compare(by_name, [], HIGHER, []).gains == []
