"""Stage report: one page that shows what was trained, proven, measured and answered.

Everything comes from the run folder; nothing is measured here. The page is composed once
and written as HTML (one file, no script, no request) and as Markdown. Beside it lies a page to
browse the scored items.
Reads the run folder; writes ``report/index.html``, ``report/report.md`` and, where items were
scored, ``report/items.html``.
"""

from __future__ import annotations

from lora_kit import (
    report_costs,
    report_data,
    report_findings,
    report_items,
    report_proofs,
    report_sections,
    report_snippets,
    scored,
)
from lora_kit.recipe import Recipe
from lora_kit.report_document import Document, to_markdown
from lora_kit.report_findings import Findings, reference_text
from lora_kit.report_html import to_html
from lora_kit.rundir import Run, write_text, writing
from lora_kit.types import Result


def stage(recipe: Recipe, run: Run) -> Result:
    """Write the report of what ``run`` holds by now; stages that are missing are shown as such.

    Raises:
        RefusedError: a file of a finished stage is not JSON.
        MachineError: the folder cannot be written.
    """
    found = report_findings.read(recipe, run)
    document = compose(found)
    work = run.work("report")
    with writing(work):
        write_text(work / "index.html", to_html(document))
        write_text(work / "report.md", to_markdown(document))
        if found.answered:
            write_text(work / report_items.FILE, _items_page(found))
    owed = [name for name in report_findings.STAGES if name not in found.seals]
    missing = f"; not yet in it: {', '.join(owed)}" if owed else ""
    return Result(
        summary=f"{run.stage_dir('report') / 'index.html'}{missing}",
        figures={"stages": list(found.seals), "num_verdicts": len(found.verdicts())},
    )


def _items_page(found: Findings) -> str:
    subjects = [scored.read(path, name) for name, path in found.answered.items()]
    names = list(found.answered)
    return report_items.page(
        title=f"{found.recipe.name}: items", subtitle="Every item that was scored, with what each model answered.",
        facts=[("run", found.run_name), ("suite", (found.scores or {}).get("suite", "–"))], subjects=subjects,
        labels=names, pairs=report_items.pairs_of(names), links=[("index.html", "The report")])


def compose(found: Findings) -> Document:
    """The whole report of one run as blocks, for any writer."""
    return Document(
        title=found.recipe.name,
        subtitle=found.recipe.description,
        facts=[("run", found.run_name), ("base", reference_text(found.lock.get("base") or {})),
               ("opened", str(found.lock.get("opened", "–"))), ("seed", str(found.recipe.seed))],
        sections=[
            report_sections.summary(found),
            report_sections.training(found),
            report_costs.section(found),
            report_proofs.quality(found),
            report_proofs.answers(found),
            report_proofs.merge(found),
            report_proofs.quantized(found),
            report_proofs.bench(found),
            report_data.section(found),
            report_snippets.section(found),
            report_sections.machine(found),
        ],
    )
