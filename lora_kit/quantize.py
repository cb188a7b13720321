"""Stage quantize: smaller forms of the merged model, each with what it cost, measured.

Every form is made from the merged 16-bit model in a process of its own, and measured in
another one from the files on disk: KL divergence, first choice, perplexity and greedy answers
against the merged model on held-out tokens and on plain prose; how much of the adapter's change its weights still hold
(``delta``) and how much of what training gained its answers keep (``gain``); size and bits per weight. There is no
threshold but the one that the recipe sets: without bounds the figures are reported as measured.
A form that an earlier try finished is not made again: where the working folder holds it from the same model and rows
(``Run.publishing``), and its files have the hashes that its certificate says.

Reads the base, the adapter, ``merge/model`` and the token files; writes ``quantize/<name>/model`` and
``quantize/<name>/certificate.json``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lora_kit import certificate, delta, engines, gain, isolate, quantizers, tokens
from lora_kit.adapter_check import check_adapter
from lora_kit.engines import Engine
from lora_kit.errors import MachineError, ModelError, RecipeError
from lora_kit.events import Caution, Note, Progress, Table, tell
from lora_kit.frontier import Candidate, Choice, choose
from lora_kit.model import read_config
from lora_kit.recipe import QuantizeForm, Recipe
from lora_kit.rundir import Run, write_json, writing
from lora_kit.sources import file_sha256
from lora_kit.types import Artifact, Result, Verdict
from lora_kit.units import bytes_text, number_text

CALIBRATION_TOKENS = 8192
"""Tokens of training rows that a method which looks at data is shown."""
_SPEED_PROMPT, _SPEED_TOKENS = 32, 24
CERTIFICATE = "certificate.json"


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
    named = [entry.name for entry in recipe.quantize if entry.target is None]
    for name in named:
        if named.count(name) > 1:
            raise RecipeError("quantize", f"names {name} twice", "keep one of them")
    names = [form.name for form in recipe.forms]
    for form in recipe.forms:
        check(form, config)
    work, artifacts, verdicts, figures = run.work("quantize"), [], [], {}
    before = {form.name: made for form in recipe.forms if (made := _made_before(form, work / form.name)) is not None}
    _remove_all_but(before, work)
    if before:
        tell(Note(text=f"made before from the same model, and whole: {', '.join(before)}"))
    recording, held_out = work / ".reference", certificate.held_out_rows(run.stage_dir("data"))
    reference = _reference(run, held_out, recording) if len(before) < len(names) else {}
    made_from = {"base_dir": run.artifact("base").path, "adapter_dir": run.artifact("adapter").path,
                 "data_dir": str(run.stage_dir("data"))}
    speed = isolate.call("lora_kit.quantize:speed_of", {"artifact": merged.as_dict()}).value
    for index, form in enumerate(recipe.forms):
        tell(Progress(stage="quantize", done=index, total=len(names), unit="form", fields={"making": form.name}))
        folder = work / form.name
        measured = before.get(form.name) or _make(form, merged, held_out, reference, folder, made_from)
        judged = judge(form, measured)
        measured["verdicts"] = [verdict.as_dict() for verdict in judged]
        with writing(folder):
            # Last of all that a form has: where it is there, the form is whole.
            write_json(folder / CERTIFICATE, measured)
        artifacts.append(_artifact(form, merged, folder, measured["size_bytes"]))
        verdicts += judged
        answers = {key: value for key, value in measured["answers"].items() if key != "samples"}
        figures[form.name] = {**{key: value for key, value in measured.items() if key != "losses"}, "answers": answers}
    shutil.rmtree(recording, ignore_errors=True)
    tell(Progress(stage="quantize", done=len(names), total=len(names), unit="form"))
    chosen = choose(candidates(merged, speed, figures, verdicts), recipe.choose)
    tell(as_table(figures))
    tell(choice_table(merged, speed, figures, chosen))
    tell(Note(text=recommendation(chosen)))
    return Result(
        summary=", ".join(f"{name} {bytes_text(form['size_bytes'])} (KL {number_text(form['mean_kl'], 2)})"
                          for name, form in figures.items())
                + ("; A BOUND WAS MISSED" if any(verdict.outcome == "FAIL" for verdict in verdicts) else ""),
        artifacts=tuple(artifacts), verdicts=tuple(verdicts),
        figures={"forms": figures, "choice": {**asdict(chosen), "merged": {
            "size_bytes": merged.size_bytes, "tokens_per_second": speed}}},
    )


def _made_before(form: QuantizeForm, folder: Path) -> dict[str, Any] | None:
    """What was measured of ``form`` in an earlier try, of this or another list of forms; None unless it is whole."""
    try:
        made = json.loads((folder / CERTIFICATE).read_text(encoding="utf-8"))
        whole = (made["artifact"] == form.name and made["files"]
                 and all(file_sha256(folder / "model" / name) == digest for name, digest in made["files"].items()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return made if whole else None


def _remove_all_but(names: Iterable[str], work: Path) -> None:
    with writing(work):
        for path in work.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _reference(run: Run, held_out: dict[str, Any], recording: Path) -> dict[str, Any]:
    """The merged model's probabilities on the rows, which go to ``recording``, and the base's losses of answers."""
    reference = isolate.call("lora_kit.certificate:record_reference", {
        "artifact": run.artifact("merged").as_dict(), "rows": held_out["rows"], "path": str(recording)}).value
    reference["base_losses"] = isolate.call("lora_kit.certificate:answer_losses", {
        "artifact": run.artifact("base").as_dict(), "rows": held_out["rows"]}).value
    return reference


def candidates(merged: Artifact, speed: float, figures: dict[str, dict[str, Any]], verdicts: list[Verdict]
               ) -> list[Candidate]:
    """The merged model and every form, as :func:`lora_kit.frontier.choose` takes them."""
    missed = {verdict.claim.partition(":")[0] for verdict in verdicts if verdict.outcome == "FAIL"}
    return [Candidate(name="merged", size_bytes=merged.size_bytes or 0, mean_kl=0.0, top1=1.0, gain=1.0,
                      tokens_per_second=speed)] + [
        Candidate(name=name, size_bytes=form["size_bytes"], mean_kl=form["mean_kl"], top1=form["top1_agreement"],
                  gain=form["gain"]["value"], tokens_per_second=form["tokens_per_second"], missed=name in missed)
        for name, form in figures.items()]


def choice_table(merged: Artifact, speed: float, figures: dict[str, dict[str, Any]], chosen: Choice) -> Table:
    """Every artifact with what decides between them, as texts."""
    rows = [["merged", bytes_text(merged.size_bytes), "0", "100.0%", "100 %", number_text(speed, 3),
             _mark("merged", chosen)]]
    rows += [[name, bytes_text(form["size_bytes"]), number_text(form["mean_kl"], 3), f"{form['top1_agreement']:.1%}",
              gain_text(form["gain"]), number_text(form["tokens_per_second"], 3), _mark(name, chosen)]
             for name, form in figures.items()]
    return Table(title="Which one", rows=rows, columns=(
        "artifact", "size", "mean KL", "same first choice", "gain kept", "decode tokens/s", ""))


def _mark(name: str, chosen: Choice) -> str:
    if name == chosen.recommended:
        return "recommended"
    return chosen.out.get(name) or ("no other is smaller and closer" if name in chosen.frontier else "")


def recommendation(chosen: Choice) -> str:
    """The choice in one sentence."""
    if chosen.recommended is None:
        return f"nothing to recommend: {chosen.why}"
    return f"recommended: {chosen.recommended}, {chosen.why}"


def check(form: QuantizeForm, config: dict[str, Any]) -> None:
    """Raise what :func:`stage` raises for ``form`` before any work is done; ``config`` is the model's config.json."""
    quantizer = quantizers.load(form.method)
    quantizer.check(config, form.type)
    install = quantizer.missing(form.type)
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
    if form.min_gain_retained is not None:
        verdicts.append(_judge_gain(form, measured["gain"]))
    return verdicts


def _judge_gain(form: QuantizeForm, kept: dict[str, Any]) -> Verdict:
    bound = form.min_gain_retained
    claim = f"{form.name}: at least {bound:.0%} of what training gained in the loss of answers is kept"
    if kept["value"] is None:
        return Verdict(outcome="INCONCLUSIVE", claim=claim, evidence=kept["why_not"])
    low, high = kept["ci_low"], kept["ci_high"]
    if low is None:
        return Verdict(outcome="INCONCLUSIVE", claim=claim, evidence=f"{kept['value']:.1%}, over one row alone")
    outcome = "PASS" if low >= bound else "FAIL" if high < bound else "INCONCLUSIVE"
    return Verdict(
        outcome=outcome, claim=claim,
        evidence=f"{kept['value']:.1%} (95 % interval {low:.1%} to {high:.1%}) over {kept['num_weights']} answer "
                 f"tokens of {kept['num_rows']} rows")


def as_table(figures: dict[str, dict[str, Any]]) -> Table:
    """The forms side by side, as texts."""
    rows = [
        [name, bytes_text(form["size_bytes"]), f"{form['bits_per_weight']:.2f}", number_text(form["mean_kl"], 3),
         number_text(form["p999_kl"], 3), f"{form['top1_agreement']:.1%}", f"{form['perplexity_ratio']:.3f}",
         gain_text(form["gain"]), number_text(form["prose"]["mean_kl"], 3), form["engine"]]
        for name, form in figures.items()
    ]
    return Table(
        title="Quantized forms against the merged model",
        columns=("form", "size", "bits/weight", "mean KL", "99.9 % KL", "same first choice", "perplexity ratio",
                 "gain kept", "KL on prose", "engine"),
        rows=rows,
    )


def gain_text(kept: dict[str, Any]) -> str:
    """``97 % (95 to 99)``, or that it cannot be told."""
    if kept["value"] is None:
        return "cannot tell"
    interval = "" if kept["ci_low"] is None else f" ({100 * kept['ci_low']:.0f} to {100 * kept['ci_high']:.0f})"
    return f"{100 * kept['value']:.0f} %{interval}"


def quantize_to_folder(method: str, type: str, merged_dir: str, out_dir: str, data_dir: str) -> dict[str, Any]:
    """Run one quantizer; to be called in a fresh process.

    Returns:
        ``note``: what a reader of the figures must know; ``files``: SHA-256 of each file.
    """
    out = Path(out_dir)
    note = quantizers.load(method).quantize(Path(merged_dir), out, type, calibration_rows(Path(data_dir)))
    return {"note": note, "files": {str(path.relative_to(out)): file_sha256(path)
                                    for path in sorted(out.rglob("*")) if path.is_file()}}


def calibration_rows(data_dir: Path, most_tokens: int = CALIBRATION_TOKENS) -> list[list[int]]:
    """Token ids of training rows, drawn in a fixed order, up to ``most_tokens`` together: never of held-out ones."""
    examples = tokens.read_examples(data_dir, "train")
    rows, left = [], most_tokens
    for index in np.random.default_rng(0).permutation(len(examples)):
        row = [int(token) for token in examples[int(index)].tokens_T[:left]]
        rows += [row] if len(row) > 1 else []
        left -= len(row)
        if left < 2:
            break
    return rows


def decode_speed(engine: Engine) -> float:
    """Tokens a second that ``engine`` decodes for one prompt, the quickest of three after a warm-up."""
    generator, rates = np.random.default_rng(0), []
    for _ in range(4):
        prompt = generator.integers(min(100, engine.num_tokens // 2), engine.num_tokens, _SPEED_PROMPT).tolist()
        rates.append((_SPEED_TOKENS - 1) / engine.time_once([prompt], _SPEED_TOKENS)["decode_seconds"])
    return max(rates[1:])


def speed_of(artifact: dict[str, Any]) -> float:
    """:func:`decode_speed` of an artifact; to be called in a fresh process."""
    with engines.open_engine(Artifact(**artifact), dtype="fastest") as engine:
        return decode_speed(engine)


def certify_form(reference: dict[str, Any], candidate: dict[str, Any], prefer: list[str] | None, method: str,
                 base_dir: str, adapter_dir: str) -> dict[str, Any]:
    """Measure a form that is on disk; to be called in a fresh process.

    Returns:
        What :func:`lora_kit.certificate.measure_engine` returns, ``delta`` (see :func:`lora_kit.delta.measure`; None
        where its weights cannot be read) and ``gain`` (see :func:`lora_kit.gain.retained`).
    """
    artifact = Artifact(**candidate)
    with engines.open_engine(artifact, prefer=prefer) as engine:
        figures = certificate.measure_engine(reference, engine)
        speed = decode_speed(engine)
        plan = check_adapter(Path(base_dir), Path(adapter_dir))
        # Last: once its weights were read, bitsandbytes' int8 layers compute no more.
        if artifact.kind == "hf":
            read = delta.of_model(engine.model)
        else:
            read = quantizers.load(method).reader(Path(artifact.path), plan)
        kept = delta.measure(plan, read)
    tuned, form, weights = zip(*figures["losses"], strict=True)
    return figures | {"delta": kept, "gain": gain.retained(reference["base_losses"], tuned, form, weights),
                      "tokens_per_second": speed}


def _make(
    form: QuantizeForm, merged: Artifact, held_out: dict[str, Any], reference: dict[str, Any], folder: Path,
    made_from: dict[str, str],
) -> dict[str, Any]:
    """One form, made and measured: the certificate's figures."""
    quantizer, out_dir = quantizers.load(form.method), folder / "model"
    with writing(out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
    made = isolate.call("lora_kit.quantize:quantize_to_folder", {
        "method": form.method, "type": form.type, "merged_dir": merged.path, "out_dir": str(out_dir),
        "data_dir": made_from["data_dir"],
    })
    path = _weights_path(quantizer.KIND, out_dir)
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))
    prefer = _engines_for(quantizer.KIND)
    here = Artifact(name=form.name, path=str(path), kind=quantizer.KIND, tokenizer=merged.tokenizer or merged.path,
                    num_params=merged.num_params, size_bytes=size)
    measured = isolate.call("lora_kit.quantize:certify_form", {
        "reference": reference, "candidate": here.as_dict(), "prefer": prefer, "method": form.method,
        "base_dir": made_from["base_dir"], "adapter_dir": made_from["adapter_dir"],
    })
    figures = measured.value
    where = "held-out rows" if held_out["split"] == "held_out" else "training rows (no row is held out)"
    if figures["tokenizer_differences"]:
        tell(Caution(text=f"{form.name}: llama.cpp splits {figures['tokenizer_differences']} of {figures['num_rows']} "
                          "texts into other tokens than the tokenizer that the model was trained with"))
    return {
        "artifact": form.name, "against": "merged", "split": held_out["split"],
        "measured_on": f"{figures['num_positions']} tokens of {figures['num_rows']} {where}", **figures,
        "engine_note": _engine_note(quantizer.KIND, prefer), "note": made.value["note"], "files": made.value["files"],
        "size_bytes": size,
        "bits_per_weight": 8 * size / merged.num_params if merged.num_params else None,
        "size_ratio": size / merged.size_bytes if merged.size_bytes else None,
        "quantize_seconds": made.seconds, "quantize_peak_memory_bytes": made.peak_memory_bytes,
        "certificate_seconds": measured.seconds, "certificate_peak_memory_bytes": measured.peak_memory_bytes,
    }


def _artifact(form: QuantizeForm, merged: Artifact, folder: Path, size: int) -> Artifact:
    """What ``folder`` holds, with paths relative to the run."""
    kind = quantizers.load(form.method).KIND
    relative = Path("quantize") / form.name / _weights_path(kind, folder / "model").relative_to(folder)
    tokenizer = "merge/model" if kind == "gguf" else str(relative)
    return Artifact(
        name=form.name, path=str(relative), kind=kind, tokenizer=tokenizer, num_params=merged.num_params,
        size_bytes=size, adapter_sha256=merged.adapter_sha256, template_sha256=merged.template_sha256)


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
