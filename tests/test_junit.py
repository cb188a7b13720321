"""junit.py, read back by a JUnit parser: gates as test cases, an evaluation that was not done as an error."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from junitparser import Error, Failure, JUnitXml, Skipped

from lora_kit import junit
from lora_kit.errors import GateFailed, GateInconclusive, MachineError
from lora_kit.types import Verdict
from tests import tiny_run
from tests.test_report import HOSTILE

VERDICTS = {
    "merge": [Verdict(outcome="PASS", claim="merged equals base + adapter", evidence="7.6e-05 over 1990 tokens")],
    "eval": [Verdict(outcome="PASS", claim="loss: merged better than base", evidence="-0.4 [-0.5, -0.3]"),
             Verdict(outcome="FAIL", claim="loss: gguf no worse than merged", evidence="0.4 [0.3, 0.5]"),
             Verdict(outcome="INCONCLUSIVE", claim="f1: merged better than base", evidence="0.1 [-0.1, 0.3]")]}
SCORES = [{"task": "loss", "metric": "loss", "artifact": "merged", "value": 3.73, "num_items": 64, "num_errors": 2}]


def run_of(verdicts, name="chat"):
    seals = {stage: {"verdicts": [each.as_dict() for each in of]} for stage, of in verdicts.items()}
    seals["eval"] |= {"seconds": 12.5, "versions": {"torch": "2.13.0", "llama-cpp-python": None}, "figures": {
        "suite": "chat", "scores": SCORES,
        "not_measured": [{"artifact": "gguf", "task": "f1", "why": "the process crashed"}]}}
    return SimpleNamespace(path=Path("runs/chat/1"), recipe=SimpleNamespace(name=name), seal=seals.get,
                           resolved={"base": {"reference": "pypi:base==1"}})


def parsed(text):
    found = JUnitXml.fromstring(text.encode())
    [suite] = found
    assert (found.tests, found.failures, found.errors, found.skipped) == (
        suite.tests, suite.failures, suite.errors, suite.skipped)
    return suite


def test_a_test_case_for_each_gate():
    suite = parsed(junit.of_run(run_of(VERDICTS)))
    assert (suite.tests, suite.failures, suite.errors, suite.skipped, suite.time) == (4, 1, 0, 1, 12.5)
    cases = {case.name: case for case in suite}
    assert cases["loss: merged better than base"].is_passed and cases["merged equals base + adapter"].is_passed
    assert cases["merged equals base + adapter"].classname == "lora-kit.chat.merge"
    [failure] = cases["loss: gguf no worse than merged"].result
    assert isinstance(failure, Failure) and failure.type == "FAIL" and failure.message == "FAIL: 0.4 [0.3, 0.5]"
    [skipped] = cases["f1: merged better than base"].result
    assert isinstance(skipped, Skipped) and skipped.message == "INCONCLUSIVE: 0.1 [-0.1, 0.3]"


@pytest.mark.parametrize(("policy", "kind", "failures"), [(None, Skipped, 1), ("pass", Skipped, 1),
                                                          ("fail", Failure, 2)])
def test_what_cannot_be_decided_follows_the_policy(policy, kind, failures):
    suite = parsed(junit.of_run(run_of(VERDICTS), inconclusive=policy))
    [found] = next(case for case in suite if case.name.startswith("f1")).result
    assert isinstance(found, kind) and found.type == "INCONCLUSIVE" and suite.failures == failures


def test_properties_say_what_was_evaluated_and_on_how_many_items():
    suite = parsed(junit.of_run(run_of(VERDICTS)))
    found = {each.name: each.value for each in suite.properties()}
    assert found["suite"] == "chat" and found["base"] == "pypi:base==1" and found["version torch"] == "2.13.0"
    assert found["score loss loss merged"] == "3.73" and found["items loss loss merged"] == "64, 2 errors"
    assert found["not measured gguf f1"] == "the process crashed" and "version llama-cpp-python" not in found
    assert next(iter(suite)).system_out == (
        "outcome: PASS\nclaim: merged equals base + adapter\nevidence: 7.6e-05 over 1990 tokens")


def test_any_text_is_still_xml():
    hostile = HOSTILE + "\uffff\ufffe]]>"
    suite = parsed(junit.of_run(run_of(
        {"eval": [Verdict(outcome="FAIL", claim=hostile, evidence=hostile)]}, name=hostile)))
    [case] = suite
    assert "<script>alert('x')</script>" in case.name and "]]>" in case.result[0].message


def test_the_file_is_written_however_the_evaluation_ends(tmp_path):
    path, run = tmp_path / "junit.xml", run_of(VERDICTS)
    for error in (GateFailed("a", "FAIL"), GateInconclusive("a", "INCONCLUSIVE")):
        with pytest.raises(type(error)), junit.reporting(path, run):
            raise error
        assert parsed(path.read_text()).tests == 4
    with pytest.raises(MachineError), junit.reporting(path, run):
        raise MachineError("engine llamacpp", "is not installed", "install it")
    [case] = parsed(path.read_text())
    assert isinstance(case.result[0], Error) and case.result[0].message == (
        "engine llamacpp: is not installed; install it")
    with pytest.raises(KeyboardInterrupt), junit.reporting(path, run):
        raise KeyboardInterrupt
    assert not path.exists()  # nothing speaks for an evaluation that was killed
    with junit.reporting(None, run):
        pass


def test_the_verb_writes_it_with_gates_that_fail(tiny_model, tmp_path_factory, tmp_path):
    world = tiny_run.copy(tiny_run.finished(tiny_model, tmp_path_factory), tmp_path)
    seal = world.run / "eval" / "stage.json"
    fields = json.loads(seal.read_text())
    fields["verdicts"] = [each.as_dict() for each in VERDICTS["eval"]]
    seal.write_text(json.dumps(fields))
    done = world.lora_kit("eval", world.run, "--junit", "junit.xml")
    assert done.returncode == 1 and "loss: gguf no worse than merged: FAIL" in done.stderr
    suite = parsed((tmp_path / "junit.xml").read_text())
    assert suite.failures == 1 and suite.name == "lora-kit.tiny.eval" and suite.tests >= 4
    done = world.lora_kit("eval", world.run, "--junit", "nowhere/junit.xml")
    assert done.returncode == 6 and "nowhere" in done.stderr and "Traceback" not in done.stderr
