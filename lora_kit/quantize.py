"""Stage quantize: smaller forms of the merged model, each with what it cost, measured.

Every form is made from the merged 16-bit model in a process of its own, and measured in
another one from the files on disk: KL divergence, first choice, perplexity and greedy answers
against the merged model on held-out tokens, size and bits per weight. There is no threshold but the one
that the recipe sets: without ``max_kl`` and ``min_top1`` the figures are reported as measured.

Reads ``merge/model`` and the token files; writes ``quantize/<name>/model`` and
``quantize/<name>/certificate.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kit import certificate, engines, isolate, quantizers
from lora_kit.errors import MachineError, ModelError, RecipeError
from lora_kit.events import Caution, Progress, Table, tell
from lora_kit.model import read_config
from lora_kit.recipe import QuantizeForm, Recipe
from lora_kit.rundir import Run, write_json, writing
from lora_kit.types import Artifact, Result, Verdict
from lora_kit.units import bytes_text, number_text


def stage(recipe: Recipe, run: Run) -> Result:
    """Make and measure every form that the recipe names.

    Returns:
        Result with an artifact for each form, verdicts where the recipe sets bounds, and figures by form.

    Raises:
        RecipeError: no such method or type.
        ModelError: the model cannot take that form.
        MachineError: a method's package is missing; it says how to install it.
    """
    if not recipe.quantize:
        return Result(summary="no form in the recipe", figures={"forms": {}})
    merged = run.artifact("merged")
    config = read_config(Path(merged.path))
    names = [form.name for form in recipe.quantize]
    for form in recipe.quantize:
        if names.count(form.name) > 1:
            raise RecipeError("quantize", f"names {form.name} twice", "keep one of them")
        check(form, config)
    held_out = certificate.held_out_rows(run.stage_dir("data"))
    work, artifacts, verdicts, figures = run.work("quantize"), [], [], {}
    recording = work / ".reference"
    reference = isolate.call("lora_kit.certificate:record_reference", {
        "artifact": merged.as_dict(), "rows": held_out["rows"], "path": str(recording)}).value
    for index, form in enumerate(recipe.quantize):
        tell(Progress(stage="quantize", done=index, total=len(names), unit="form", fields={"making": form.name}))
        artifact, measured = _make(form, merged, held_out, reference, work / form.name)
        judged = judge(form, measured)
        measured["verdicts"] = [verdict.as_dict() for verdict in judged]
        with writing(work / form.name):
            write_json(work / form.name / "certificate.json", measured)
        artifacts.append(artifact)
        verdicts += judged
        figures[form.name] = {key: value for key, value in measured.items() if key != "samples"}
    recording.unlink()
    tell(Progress(stage="quantize", done=len(names), total=len(names), unit="form"))
    tell(as_table(figures))
    return Result(
        summary=", ".join(f"{name} {bytes_text(form['size_bytes'])} (KL {number_text(form['mean_kl'], 2)})"
                          for name, form in figures.items())
                + ("; A BOUND WAS MISSED" if any(verdict.outcome == "FAIL" for verdict in verdicts) else ""),
        artifacts=tuple(artifacts), verdicts=tuple(verdicts), figures={"forms": figures},
    )


def check(form: QuantizeForm, config: dict[str, Any]) -> None:
    """Raise what :func:`stage` raises for ``form`` before any work is done; ``config`` is the model's config.json."""
    quantizer = quantizers.load(form.method)
    quantizer.check(config, form.type)
    install = quantizer.missing()
    if install:
        raise MachineError(f"quantize.method: {form.method}", "is not installed", install)


def judge(form: QuantizeForm, measured: dict[str, Any]) -> list[Verdict]:
    """Verdicts on the bounds that the recipe sets for ``form``; none where it sets none."""
    verdicts = []
    if form.max_kl is not None:
        error = number_text(measured["mean_kl_standard_error"], 2)
        verdicts.append(Verdict(
            outcome="PASS" if measured["mean_kl"] <= form.max_kl else "FAIL",
            claim=f"{form.name}: mean KL from the merged model at most {number_text(form.max_kl)}",
            evidence=f"{number_text(measured['mean_kl'])} ± {error} nats a token over {measured['measured_on']}",
        ))
    if form.min_top1 is not None:
        verdicts.append(Verdict(
            outcome="PASS" if measured["top1_agreement"] >= form.min_top1 else "FAIL",
            claim=f"{form.name}: at least {form.min_top1:.1%} of tokens keep the merged model's first choice",
            evidence=f"{measured['top1_agreement']:.2%} of {measured['measured_on']}",
        ))
    return verdicts


def as_table(figures: dict[str, dict[str, Any]]) -> Table:
    """The forms side by side, as texts."""
    rows = [
        [name, bytes_text(form["size_bytes"]), f"{form['bits_per_weight']:.2f}", number_text(form["mean_kl"], 3),
         number_text(form["p999_kl"], 3), f"{form['top1_agreement']:.1%}", f"{form['perplexity_ratio']:.3f}",
         form["engine"]]
        for name, form in figures.items()
    ]
    return Table(
        title="Quantized forms against the merged model",
        columns=("form", "size", "bits/weight", "mean KL", "99.9 % KL", "same first choice", "perplexity ratio",
                 "engine"),
        rows=rows,
    )


def quantize_to_folder(method: str, type: str, merged_dir: str, out_dir: str) -> None:
    """Run one quantizer; to be called in a fresh process."""
    quantizers.load(method).quantize(Path(merged_dir), Path(out_dir), type)


def _make(
    form: QuantizeForm, merged: Artifact, held_out: dict[str, Any], reference: dict[str, Any], folder: Path
) -> tuple[Artifact, dict[str, Any]]:
    """One form, made and measured; its Artifact (paths relative to the run) and the certificate's figures."""
    quantizer, out_dir = quantizers.load(form.method), folder / "model"
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    made = isolate.call("lora_kit.quantize:quantize_to_folder", {
        "method": form.method, "type": form.type, "merged_dir": merged.path, "out_dir": str(out_dir),
    })
    path = _weights_path(quantizer.KIND, out_dir)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
    prefer = _engines_for(quantizer.KIND)
    here = Artifact(name=form.name, path=str(path), kind=quantizer.KIND, tokenizer=merged.tokenizer or merged.path,
                    num_params=merged.num_params, size_bytes=size)
    measured = isolate.call("lora_kit.certificate:measure", {
        "reference": reference, "candidate": here.as_dict(), "prefer": prefer, "rows": held_out["rows"],
    })
    figures = measured.value
    where = "held-out rows" if held_out["split"] == "held_out" else "training rows (no row is held out)"
    if figures["tokenizer_differences"]:
        tell(Caution(text=f"{form.name}: llama.cpp splits {figures['tokenizer_differences']} of {figures['num_rows']} "
                          "texts into other tokens than the tokenizer that the model was trained with"))
    certificate_fields = {
        "artifact": form.name, "against": "merged", "split": held_out["split"],
        "measured_on": f"{figures['num_positions']} tokens of {figures['num_rows']} {where}", **figures,
        "engine_note": _engine_note(quantizer.KIND, prefer), "size_bytes": size,
        "bits_per_weight": 8 * size / merged.num_params if merged.num_params else None,
        "size_ratio": size / merged.size_bytes if merged.size_bytes else None,
        "quantize_seconds": made.seconds, "quantize_peak_memory_bytes": made.peak_memory_bytes,
        "certificate_seconds": measured.seconds, "certificate_peak_memory_bytes": measured.peak_memory_bytes,
    }
    relative = Path("quantize") / form.name / path.relative_to(folder)
    tokenizer = "merge/model" if quantizer.KIND == "gguf" else str(relative)
    return Artifact(
        name=form.name, path=str(relative), kind=quantizer.KIND, tokenizer=tokenizer, num_params=merged.num_params,
        size_bytes=size, adapter_sha256=merged.adapter_sha256, template_sha256=merged.template_sha256,
    ), certificate_fields


def _weights_path(kind: str, out_dir: Path) -> Path:
    if kind == "hf":
        return out_dir
    found = sorted(out_dir.glob("*.gguf"))
    if len(found) != 1:
        raise ModelError(str(out_dir), f"holds {len(found)} GGUF files where one was expected", "quantize again")
    return found[0]


def _engines_for(kind: str) -> list[str] | None:
    return ["llamacpp", "hf"] if kind == "gguf" else None


def _engine_note(kind: str, prefer: list[str] | None) -> str:
    """What a reader must know about the engine that measured."""
    if kind == "gguf" and prefer and engines.missing(prefer[0]):
        return ("read by transformers, weights dequantized: llama.cpp is not installed, so its own arithmetic is not "
                f"measured ({engines.missing(prefer[0])})")
    return ""
