"""Everything a run has found, read from its folder once for the report.

A stage that was not run leaves None or an empty list; what is missing says why through
:meth:`Findings.why_missing`. Reads the run folder and the base's config.json; writes nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_kit import scored
from lora_kit.errors import RefusedError
from lora_kit.recipe import Recipe
from lora_kit.types import Artifact, Verdict

STAGES = ("data", "train", "merge", "quantize", "bench", "eval")
"""The stages whose results the report shows, in their order."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What the run folder holds. Dictionaries are the stages' own JSON files."""

    recipe: Recipe
    recipe_text: str
    run_name: str
    lock: dict[str, Any]
    seals: dict[str, dict[str, Any]]
    artifacts: dict[str, Artifact]
    config: dict[str, Any] | None
    ledger: dict[str, Any] | None
    preview: str | None
    steps: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    merge_certificate: dict[str, Any] | None
    certificates: dict[str, dict[str, Any]]
    bench: dict[str, Any] | None
    scores: dict[str, Any] | None
    samples: list[dict[str, Any]]
    overlap: list[dict[str, Any]] | None = None
    answered: dict[str, Path] = field(default_factory=dict)
    """Items files of whoever was scored."""
    servers: list[dict[str, Any]] = field(default_factory=list)
    """What was measured of servers with this run's prompts (``bench_url.py``)."""

    def figures(self, stage: str) -> dict[str, Any]:
        """Figures of a finished stage; empty while it is not done."""
        return self.seals.get(stage, {}).get("figures") or {}

    def points(self) -> dict[str, dict[str, Any]]:
        """Bench points by artifact."""
        return {point["artifact"]: point for point in (self.bench or {}).get("points", ())}

    def verdicts(self) -> list[tuple[str, Verdict]]:
        """(stage, verdict) of every finished stage, each once."""
        found = []
        for stage in STAGES:
            for fields in self.seals.get(stage, {}).get("verdicts", ()):
                found.append((stage, Verdict(**fields)))
        return found

    def mean_kl(self, name: str) -> float | None:
        """Nats a token from the artifact before it: merged from base + adapter, a form from merged."""
        if name == "merged":
            return ((self.merge_certificate or {}).get("merged") or {}).get("mean_kl")
        return (self.certificates.get(name) or {}).get("mean_kl")

    def outcomes_of(self, name: str) -> list[str]:
        """Outcomes of the verdicts about an artifact: of its certificate, and of the gates that name it."""
        certificate = self.merge_certificate if name == "merged" else self.certificates.get(name)
        found = [verdict["outcome"] for verdict in (certificate or {}).get("verdicts", ())]
        found += [check["outcome"] for check in (self.scores or {}).get("checks", ())
                  if check["artifact"] == name and check["outcome"] == "FAIL"]
        gates = (self.scores or {}).get("verdicts", ())
        return found + [verdict["outcome"] for verdict in gates if verdict.get("artifact") == name]

    def why_missing(self, stage: str) -> str:
        """Why a figure of ``stage`` is not there."""
        if stage in self.seals:
            return "the stage left no such figure"
        return f"stage {stage} has not been run"


def read(recipe: Recipe, run: Any) -> Findings:
    """Read the folder of ``run`` (a :class:`lora_kit.rundir.Run`).

    Raises:
        RefusedError: a file of a finished stage is not JSON.
    """
    seals = {stage: seal for stage in STAGES if (seal := run.seal(stage)) is not None}
    artifacts = run.artifacts()
    metrics = _json_lines(run.stage_dir("train") / "metrics.jsonl")
    return Findings(
        recipe=recipe,
        recipe_text=_text(run.path / "recipe.yaml") or "",
        run_name=Path(run.path).name,
        lock=run.resolved,
        seals=seals,
        artifacts=artifacts,
        config=_json(Path(artifacts["base"].path) / "config.json") if "base" in artifacts else None,
        ledger=_json(run.stage_dir("data") / "ledger.json"),
        overlap=_json(run.stage_dir("data") / "overlap.json"),
        preview=_text(run.stage_dir("data") / "preview.txt"),
        steps=[line for line in metrics if line.get("loss") is not None],
        held_out=[line for line in metrics if line.get("held_out_loss") is not None],
        timings=_json_lines(run.stage_dir("train") / "timings.jsonl"),
        merge_certificate=_json(run.stage_dir("merge") / "certificate.json"),
        certificates={
            form.name: certificate for form in recipe.forms
            if (certificate := _json(run.stage_dir("quantize") / form.name / "certificate.json")) is not None
        },
        bench=_json(run.stage_dir("bench") / "bench.json"),
        scores=_json(run.stage_dir("eval") / "scores.json"),
        answered=scored.subjects_in(run.stage_dir("eval")) if "eval" in seals else {},
        samples=(_json(run.stage_dir("eval") / "samples.json") or {}).get("samples", []),
        servers=[_json(path) for path in sorted((Path(run.path) / "servers").glob("*.json"))],
    )


def reference_text(source: dict[str, Any]) -> str:
    """How lock.json names a model or data source: its reference, and the revision it was pinned to."""
    reference, revision = str(source.get("reference", "–")), source.get("revision")
    return reference if not revision or str(revision) in reference else f"{reference} @ {revision}"


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _json(path: Path) -> Any:
    text = _text(path)
    if text is None:
        return None
    try:
        return json.loads(text)
    except ValueError:
        raise RefusedError(str(path), "is not JSON", "remove it, or the stage's folder, and run it again") from None


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that a stopped process left half written is passed over."""
    lines = (_text(path) or "").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                found.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise RefusedError(f"{path}:{number}", "is not JSON", "remove the stage's folder and run it again") \
                    from None
    return found
