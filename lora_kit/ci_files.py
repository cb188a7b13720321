"""What an evaluation came to, as files for CI: Markdown for a step's summary, and JSON for programs.

The Markdown has the gates first, then scores, differences and the items that changed most, and stays under the
size that a step's summary may have (1 MiB on GitHub): what does not fit is left out from the end, and said. The JSON
has a version (``format``), the outcome with its exit code, and everything that scores.json has; the items with
prompt, output, score and reason are the run's own ``eval/<artifact>/items.jsonl``, which it names. What
kept the evaluation from being done stands in both, so that an old or empty file is never taken for a good one.

Torch-free. Reads the run folder; writes the files that it is told to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_kit import junit, paired, report_findings, report_proofs, scored
from lora_kit.errors import GateFailed, GateInconclusive, LoraKitError
from lora_kit.report_document import (
    TONES,
    Block,
    Cell,
    Document,
    Link,
    Paragraph,
    Section,
    Table,
    Verdicts,
    printable,
    to_markdown,
)
from lora_kit.report_findings import reference_text
from lora_kit.rundir import Run, write_text, writing
from lora_kit.types import Verdict

FORMAT = 1
"""Version of the JSON; a key that goes or changes its meaning raises it."""
MOST_BYTES = 1024 * 1024
"""What GitHub takes of one step's summary."""
EXAMPLES = 3
"""Items that got worse, and better, of each task."""
_SPARE = 16 * 1024
"""Left for what else the step writes into its summary."""


@contextmanager
def reporting(run: Run, *, junit_path: Path | None = None, markdown: Path | None = None, json_path: Path | None = None,
              inconclusive: str | None = None) -> Iterator[None]:
    """Write the files that have a path when the block ends, however it ends.

    Args:
        inconclusive: what a gate that cannot be decided counts as: ``pass``, ``fail``, or None for what it is.

    Raises:
        MachineError: a file cannot be written.
    """
    with ExitStack() as stack:
        for path, of_run, of_error in (
            (markdown, lambda: markdown_of(run, inconclusive), lambda error: markdown_of_error(run, error)),
            (json_path, lambda: json_of(run, inconclusive), lambda error: json_of_error(run, error)),
        ):
            if path is not None:
                stack.enter_context(_written(path, of_run, of_error))
        stack.enter_context(junit.reporting(junit_path, run, inconclusive=inconclusive))
        yield


@contextmanager
def _written(path: Path, of_run: Callable[[], str], of_error: Callable[[LoraKitError], str]) -> Iterator[None]:
    with writing(path):
        path.touch()  # a place that cannot be written to is told now, not after the evaluation
        path.unlink()  # an earlier file would speak for this evaluation if it were killed
    try:
        yield
    except (GateFailed, GateInconclusive):
        with writing(path):
            write_text(path, of_run())
        raise
    except LoraKitError as error:
        with writing(path):
            write_text(path, of_error(error))
        raise
    else:
        with writing(path):
            write_text(path, of_run())


def markdown_of(run: Run, inconclusive: str | None = None, most_bytes: int = MOST_BYTES) -> str:
    """The summary of a run whose evaluation is done, in less than ``most_bytes``."""
    verdicts = _verdicts(run)
    outcome, _ = _outcome([verdict for _, verdict in verdicts], inconclusive)
    found = report_findings.read(run.recipe, run)
    quality = report_proofs.quality(found)
    # The gates stand in the table above, and a link into the run's folder leads nowhere from a summary.
    blocks = [block for block in quality.blocks if not isinstance(block, (Link, Verdicts))]
    document = Document(
        title=f"{outcome}: evaluation of {run.recipe.name}", subtitle="", facts=_facts(run),
        sections=[Section(anchor="gates", title="Gates", blocks=[_gates(verdicts)]), replace(quality, blocks=blocks),
                  *_examples(run)])
    return fitted(document, most_bytes)


def fitted(document: Document, most_bytes: int = MOST_BYTES) -> str:
    """``document`` as Markdown of less than ``most_bytes``; what does not fit is left out, the last blocks first."""
    room, sections, left_out = most_bytes - _SPARE, list(document.sections), 0
    while True:
        note = [] if not left_out else [Section(anchor="left-out", title="Left out", blocks=[Paragraph(
            text=f"{left_out} blocks did not fit into a step's summary; all is in the run's folder.")])]
        text = to_markdown(replace(document, sections=[*sections, *note]))
        over = len(text.encode()) - room
        if over <= 0:
            return text
        if not sections:
            return text.encode()[:room].decode("utf-8", "ignore")
        # As many of the last blocks as are too much, at once.
        last = sections[-1]
        blocks: list[Block] = list(last.blocks)
        while blocks and over > 0:
            alone = Section(anchor="", title="", blocks=[blocks[-1]])
            over -= len(to_markdown(replace(document, facts=[], sections=[alone])).encode())
            blocks.pop()
            left_out += 1
        sections[-1:] = [replace(last, blocks=blocks)] if blocks else []


def markdown_of_error(run: Run, error: LoraKitError) -> str:
    """The summary of an evaluation that could not be done."""
    blocks = [Paragraph(text=str(error)), Paragraph(text=f"exit code {error.exit_code}")]
    return fitted(Document(title=f"ERROR: evaluation of {run.recipe.name}", subtitle="", facts=_facts(run), sections=[
        Section(anchor="error", title="The evaluation was not done", blocks=blocks)]))


def json_of(run: Run, inconclusive: str | None = None) -> str:
    """Everything that the evaluation says, as JSON."""
    verdicts = _verdicts(run)
    outcome, exit_code = _outcome([verdict for _, verdict in verdicts], inconclusive)
    path = run.stage_dir("eval") / "scores.json"
    scores = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    scores = {key: value for key, value in scores.items() if key not in ("format", "verdicts", "seconds")}
    seal = run.seal("eval") or {}
    return _text({
        "format": FORMAT, "outcome": outcome, "exit_code": exit_code, "run": str(run.path), "recipe": run.recipe.name,
        "base": reference_text(run.resolved.get("base") or {}), "versions": seal.get("versions") or {},
        "seconds": seal.get("seconds"),
        "verdicts": [{"stage": stage, **verdict.as_dict()} for stage, verdict in verdicts],
        "items": {name: str(path) for name, path in scored.subjects_in(run.stage_dir("eval")).items()},
        **scores})


def json_of_error(run: Run, error: LoraKitError) -> str:
    """What kept the evaluation from being done, as JSON."""
    return _text({"format": FORMAT, "outcome": "ERROR", "exit_code": error.exit_code, "run": str(run.path),
                  "recipe": run.recipe.name, "error": {"where": error.where, "what": error.what, "todo": error.todo}})


def _text(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _verdicts(run: Run) -> list[tuple[str, Verdict]]:
    return [(stage, Verdict(**fields)) for stage in junit.STAGES
            for fields in (run.seal(stage) or {}).get("verdicts", ())]


def _outcome(verdicts: list[Verdict], inconclusive: str | None) -> tuple[str, int]:
    """The outcome of all together, and the exit code that goes with it."""
    outcomes = {verdict.outcome for verdict in verdicts}
    if "FAIL" in outcomes or (inconclusive == "fail" and "INCONCLUSIVE" in outcomes):
        return "FAIL", 1
    if "INCONCLUSIVE" in outcomes and inconclusive != "pass":
        return "INCONCLUSIVE", 3
    return "PASS", 0


def _facts(run: Run) -> list[tuple[str, str]]:
    suite = ((run.seal("eval") or {}).get("figures") or {}).get("suite")
    return [("run", str(run.path)), ("base", reference_text(run.resolved.get("base") or {})),
            *([("suite", str(suite))] if suite else [])]


def _gates(verdicts: list[tuple[str, Verdict]]) -> Table:
    order = ("FAIL", "INCONCLUSIVE", "PASS")
    rows: list[list[str | Cell]] = [
        [Cell(text=verdict.outcome, tone=TONES[verdict.outcome]), stage, verdict.claim, printable(verdict.evidence)]
        for stage, verdict in sorted(verdicts, key=lambda entry: order.index(entry[1].outcome))]
    return Table(columns=("verdict", "stage", "claim", "evidence"), rows=rows)


def _examples(run: Run) -> list[Section]:
    """The items that changed most from the base to the merged model, where both were scored."""
    found = scored.subjects_in(run.stage_dir("eval"))
    if not {"base", "merged"} <= set(found):
        return []
    try:
        compared = paired.compare(scored.read(found["base"]), scored.read(found["merged"]), num_examples=EXAMPLES)
    except LoraKitError:  # nothing that both were asked
        return []
    return [replace(section, title=f"{section.title}: base (A) and merged (B)")
            for section in paired.document(compared).sections[1:]]
