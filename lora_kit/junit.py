"""What the gates of a run came to, as JUnit XML: the form in which CI systems list tests.

A test case for each claim that the evaluation decides, and for each certificate that it stands on,
since those end a run with the same exit code. PASS is a test that passed, FAIL a failure.
INCONCLUSIVE is a skipped test that says so, or a failure where such gates count as one. What kept the
evaluation from being done is an error, so that an empty file is never taken for a green one.

Torch-free; standard library. Reads the run folder; writes the file that it is told to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lora_kit.errors import GateFailed, GateInconclusive, LoraKitError
from lora_kit.report_document import printable
from lora_kit.report_findings import reference_text
from lora_kit.rundir import Run, write_text, writing
from lora_kit.types import Verdict

STAGES = ("merge", "quantize", "eval")
"""Stages whose verdicts an evaluation answers for."""
_NO_XML = re.compile("[\ufffe\uffff]")


@contextmanager
def reporting(path: Path | None, run: Run, *, inconclusive: str | None = None) -> Iterator[None]:
    """Write ``path`` when the block ends, however it ends; None writes nothing.

    Args:
        inconclusive: ``fail``: a gate that cannot be decided is a failure; else it is a skipped test.

    Raises:
        MachineError: the file cannot be written.
    """
    if path is None:
        yield
        return
    with writing(path):
        path.touch()  # a place that cannot be written to is told now, not after the evaluation
        path.unlink()  # an earlier file would speak for this evaluation if it were killed
    try:
        yield
    except (GateFailed, GateInconclusive):
        _write(path, of_run(run, inconclusive=inconclusive))
        raise
    except LoraKitError as error:
        _write(path, of_error(run, error))
        raise
    else:
        _write(path, of_run(run, inconclusive=inconclusive))


def _write(path: Path, text: str) -> None:
    with writing(path):
        write_text(path, text)


def of_run(run: Run, *, inconclusive: str | None = None) -> str:
    """The XML of a run whose evaluation is done."""
    verdicts = [(stage, Verdict(**fields)) for stage in STAGES
                for fields in (run.seal(stage) or {}).get("verdicts", ())]
    seal = run.seal("eval") or {}
    cases = [_case(run, stage, verdict, inconclusive) for stage, verdict in verdicts]
    return _xml(run, cases, _properties(run, seal), seal.get("seconds"))


def of_error(run: Run, error: LoraKitError) -> str:
    """The XML of an evaluation that could not be done: one test case that is an error."""
    case = ElementTree.Element("testcase", {"classname": _class_name(run, "eval"), "name": "the evaluation is done"})
    told = ElementTree.SubElement(case, "error", {"type": type(error).__name__, "message": _text(str(error))})
    told.text = f"exit code {error.exit_code}"
    return _xml(run, [case], [("run", str(run.path))], None)


def _case(run: Run, stage: str, verdict: Verdict, inconclusive: str | None) -> ElementTree.Element:
    case = ElementTree.Element("testcase", {"classname": _class_name(run, stage), "name": _text(verdict.claim)})
    message = f"{verdict.outcome}: {verdict.evidence}"
    if verdict.outcome == "FAIL" or verdict.outcome == "INCONCLUSIVE" and inconclusive == "fail":
        told = ElementTree.SubElement(case, "failure", {"type": verdict.outcome, "message": _text(message)})
        told.text = _text(f"{verdict.claim}\n{verdict.evidence}")
    elif verdict.outcome == "INCONCLUSIVE":
        ElementTree.SubElement(case, "skipped", {"type": verdict.outcome, "message": _text(message)})
    about = [f"{name}: {value}" for name, value in verdict.as_dict().items() if value is not None]
    ElementTree.SubElement(case, "system-out").text = _text("\n".join(about))
    return case


def _properties(run: Run, seal: dict[str, Any]) -> list[tuple[str, str]]:
    """What was evaluated and with what, and how many items each score stands on."""
    figures = seal.get("figures") or {}
    found = [("run", str(run.path)), ("recipe", run.recipe.name), ("suite", figures.get("suite", "")),
             ("base", reference_text(run.resolved.get("base") or {}))]
    found += [(f"version {name}", version) for name, version in (seal.get("versions") or {}).items() if version]
    for score in figures.get("scores", ()):
        name = f"{score['task']} {score['metric']} {score['artifact']}"
        found.append((f"score {name}", json.dumps(score["value"])))
        found.append((f"items {name}", f"{score['num_items']}, {score['num_errors']} errors"))
    found += [(f"check {check['artifact']}", f"{check['outcome']}: {check['evidence']}")
              for check in figures.get("checks", ())]
    found += [(f"overlap {task}", about["why_not"] or f"{about['num_overlapping']} of {about['num_items']} items")
              for task, about in (figures.get("overlap") or {}).items()]
    found += [(f"not measured {entry['artifact']} {entry['task']}", entry["why"])
              for entry in figures.get("not_measured", ())]
    return found


def _xml(run: Run, cases: Sequence[ElementTree.Element], properties: Sequence[tuple[str, str]],
         seconds: float | None) -> str:
    counts = {"tests": str(len(cases))}
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        counts[name] = str(sum(case.find(tag) is not None for case in cases))
    if seconds is not None:
        counts["time"] = f"{seconds:.3f}"
    root = ElementTree.Element("testsuites", {"name": "lora-kit", **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _class_name(run, "eval"), **counts})
    told = ElementTree.SubElement(suite, "properties")
    for name, value in properties:
        ElementTree.SubElement(told, "property", {"name": _text(name), "value": _text(value)})
    suite.extend(cases)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _class_name(run: Run, stage: str) -> str:
    return _text(f"lora-kit.{run.recipe.name}.{stage}")


def _text(value: object) -> str:
    """Text that XML can hold."""
    return _NO_XML.sub("\ufffd", printable(value))
