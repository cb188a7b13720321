"""Stage merge: base plus adapter as one plain model, with the proof that it is both.

The adapter is checked against the 16-bit base before any weights are read; then it is merged in fp32,
block of rows by block of rows (``merging``), and cast once to ``merge.dtype``. Both happen in a fresh process, and
another one makes the certificate from the files on disk, by four measurements:

1. *exact*: base and adapter, merged by peft in fp32, against base and adapter side by side in fp32;
2. *stored*: the weights on disk against the cast of peft's merge, tensor by tensor;
3. *faithful*: the model on disk, in its own type, against base and adapter in fp32, judged by
   the floor: the merge of (1), cast in memory and run in that type, which is what the type costs
   a model with these weights. Base and adapter run unmerged in that type stand beside it;
4. *kept*: how much of the adapter's change the stored weights still hold, layer by layer (``delta``).

An adapter that was trained on a quantized base is merged into the 16-bit base or into the quantized one, unpacked:
whichever scores better with it on held-out rows (``quantized_base``).

Reads the base, ``train/adapter`` and the token files; writes ``merge/model`` and
``merge/certificate.json``.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from lora_kit import certificate, combining, delta, isolate
from lora_kit.adapter import load_adapter
from lora_kit.adapter_check import check_adapter, read_adapter_config
from lora_kit.chat import load_tokenizer, stop_token_ids
from lora_kit.engines import configured_stop_ids, open_engine
from lora_kit.errors import ModelError, RecipeError
from lora_kit.events import Caution, Note, tell
from lora_kit.merging import Plan, Values, write_merged
from lora_kit.model import load_base, read_config, torch_dtype, weight_bytes
from lora_kit.model_files import TOKENIZER_FILES, copy_config, copy_tokenizer
from lora_kit.quantized_base import choose_base
from lora_kit.recipe import Recipe
from lora_kit.rundir import Run, write_json, writing
from lora_kit.sources import file_sha256
from lora_kit.types import Artifact, Result, Verdict
from lora_kit.units import bytes_text, number_text

EXACT_TOLERANCE = 1e-3
"""Largest difference of a log-probability (nats) that fp32 rounding may make between merged and unmerged."""
FLOOR_FACTOR = 3.0
"""A merged model may be this many times as far from fp32 as its type alone takes the same weights.

The floor has the rounding of the weights in it: against base and adapter unmerged in bf16, whose base needs no
rounding, right merges of SmolLM2-135M measured 0.9 to 3.2 times (most after few steps, when the adapter is small
beside the rounding of the weights). A fault smaller than the floor is seen by the tensors alone."""
FLOOR_EPSILON = 1e-6
"""Nats per token that are allowed on top: where the type is fp32 the floor is rounding in the 7th digit."""
MIN_PROJECTION, MAX_PROJECTION, MAX_NOISE = 0.95, 1.05, 0.4
"""How much of the adapter's change the stored weights must hold, and how much else, in units of it. Cast to bf16, a
change of 0.4 % of the weights keeps 0.97 with noise 0.38, and one of 0.3 % keeps 0.93 with 0.47 (normal weights)."""
MIN_LAYER_PROJECTION, MAX_LAYER_PROJECTION = 0.5, 1.5
"""The same for each layer, which may have been trained less than the others."""
MAX_INEXACT_SHARE = 1e-4
"""Share of a model's elements that may be one unit in the last place off (other order of sums)."""


def stage(recipe: Recipe, run: Run) -> Result:
    """Merge the run's adapter into its base and certify the result.

    Returns:
        Result with the artifact ``merged``, four verdicts, and the certificate's figures.

    Raises:
        ModelError: the adapter is not of this base, is broken, or cannot be merged rightly.
        MachineError: no room, or the process that merged was killed.
    """
    base, adapter = run.artifact("base"), run.artifact("adapter")
    work = run.work("merge")
    model_dir = work / "model"
    tokenizer_dir = adapter.tokenizer or base.tokenizer or base.path
    with writing(model_dir):
        model_dir.mkdir(parents=True, exist_ok=True)
    held_out = certificate.held_out_rows(run.stage_dir("data"))
    base_dir, candidates, unpacked = base.path, None, work / ".unpacked"
    if recipe.model.load_in != "16bit":
        base_dir, candidates = choose_base(base, adapter, recipe.model.load_in, held_out["rows"], unpacked)
        tell(Note(text="merged into the " + next(each["base"] for each in candidates if each["chosen"])
                       + ": loss of held-out answers with the adapter "
                       + ", ".join(f"{number_text(each['loss'])} on the {each['base']}" for each in candidates)))
    written, verdicts = _merge_and_certify(base_dir, adapter.path, tokenizer_dir, model_dir, recipe.merge.dtype,
                                           held_out, work)
    written["candidates"] = candidates
    shutil.rmtree(unpacked, ignore_errors=True)
    with writing(work / "certificate.json"):
        write_json(work / "certificate.json", written)
    return Result(
        summary=_summary(written, verdicts),
        artifacts=(Artifact(
            name="merged", path="merge/model", kind="hf", tokenizer="merge/model", size_bytes=written["size_bytes"],
            num_params=written["num_params"], adapter_sha256=adapter.adapter_sha256,
            template_sha256=adapter.template_sha256 or base.template_sha256,
        ),),
        verdicts=tuple(verdicts),
        figures={key: written[key] for key in (
            "merged", "floor", "unmerged", "exact", "adapter_change", "stored", "delta", "dtype", "split",
            "measured_on", "size_bytes", "bits_per_weight", "merge_seconds", "merge_peak_memory_bytes",
            "certificate_seconds")},
    )


def merge_adapter(base: Artifact, reference: str, adapter_dir: Path, out_dir: Path, dtype: str
                  ) -> tuple[str, list[Verdict]]:
    """Merge any adapter in PEFT layout into its base, outside of a run, and certify it on plain prose.

    Args:
        base: the model to merge into; ``reference`` is how the user named it.
        out_dir: the folder to write; it must not exist. ``lora_kit_certificate.json`` stands beside the weights.

    Returns:
        A line for people, and the verdicts.

    Raises:
        RecipeError: ``out_dir`` exists.
        ModelError: the adapter is not of this base, or cannot be merged rightly.
    """
    if out_dir.exists():
        raise RecipeError(str(out_dir), "exists already", "name a folder that does not")
    check_same_base(reference, Path(base.path), adapter_dir)
    check_adapter(Path(base.path), adapter_dir)
    tokenizer_dir = str(adapter_dir) if (adapter_dir / "tokenizer.json").exists() else base.tokenizer or base.path
    rows = [{**row, "set": "rows", "trained": [0] * len(row["tokens"])}
            for row in certificate.prose_rows(load_tokenizer(tokenizer_dir))]
    with writing(out_dir):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as name:
            work = Path(name)
            (work / "model").mkdir()
            written, verdicts = _merge_and_certify(base.path, str(adapter_dir), tokenizer_dir, work / "model", dtype,
                                                   {"split": "prose", "rows": rows}, work)
            write_json(work / "model" / "lora_kit_certificate.json", written)
            os.replace(work / "model", out_dir)
    return _summary(written, verdicts), verdicts


def merge_adapters(base: Artifact, reference: str, adapters: list[Path], out_dir: Path, dtype: str, *,
                   weights: list[float] | None = None, **options: Any) -> tuple[list[str], list[Verdict]]:
    """Make one adapter of several (see :mod:`lora_kit.combining`), merge it, and certify both steps.

    Args:
        weights: one for each adapter; equal shares of one when None.
        options: ``method``, ``density``, ``rank``, ``seed`` of :func:`lora_kit.combining.combine_adapters`.

    Returns:
        A line for people on each step, and the merge's verdicts. The adapter stands in ``adapter`` of ``out_dir``.

    Raises:
        RecipeError: ``out_dir`` exists, or the options do not fit.
        ModelError: an adapter is not of this base, or they cannot be combined so.
    """
    if out_dir.exists():
        raise RecipeError(str(out_dir), "exists already", "name a folder that does not")
    for folder in adapters:
        check_same_base(reference, Path(base.path), folder)
    with writing(out_dir):
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as name:
            combined, shares = Path(name) / "adapter", weights or [1 / len(adapters)] * len(adapters)
            told = isolate.call("lora_kit.combining:combine_to_folder", {
                "base_dir": base.path, "adapters": [str(folder) for folder in adapters], "weights": shares,
                "out_dir": str(combined), **options}).value
            if copy_tokenizer(adapters[0], combined):
                odd = [str(folder) for folder in adapters[1:] if not _same_tokenizer(folder, combined)]
                if odd:
                    tell(Caution(text=f"tokenizer and chat template are those of {adapters[0]}: others than those of "
                                      + ", ".join(odd)))
            line, verdicts = merge_adapter(base, reference, combined, out_dir, dtype)
            os.replace(combined, out_dir / "adapter")
    return [combining.in_words(told, len(adapters)), line], verdicts


def _same_tokenizer(folder: Path, other: Path) -> bool:
    """Whether every file of a tokenizer that both folders have is the same in both."""
    return all((folder / name).read_bytes() == (other / name).read_bytes() for name in TOKENIZER_FILES
               if (folder / name).exists() and (other / name).exists())


def check_same_base(reference: str, base_dir: Path, adapter_dir: Path) -> None:
    """Refuse a base that is not the one that the adapter names, as far as names can tell.

    Two names differ when their last parts do, whatever the case: ``org/Llama-3.2-1B`` and a folder ``llama-3.2-1b`` are
    one base. An adapter that names a folder is not judged by it: nobody knows what it was called elsewhere.
    """
    named = str(read_adapter_config(adapter_dir).get("base_model_name_or_path") or "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+(@\w+)?", named) or Path(named).exists():
        return
    ours = str(read_config(base_dir).get("_name_or_path") or reference)
    last = [text.partition("@")[0].rstrip("/").rpartition("/")[2].lower() for text in (named, reference, ours)]
    if last[0] not in last[1:]:
        raise ModelError(str(adapter_dir), f"was trained on {named}, not on {reference}",
                         f"name --base {named}, or correct base_model_name_or_path in its adapter_config.json")


def _merge_and_certify(base_dir: str, adapter_dir: str, tokenizer_dir: str, model_dir: Path, dtype: str,
                       held_out: dict[str, Any], scratch: Path) -> tuple[dict[str, Any], list[Verdict]]:
    """Both processes, one after the other; what certificate.json says, and the verdicts."""
    merged = isolate.call("lora_kit.merge:merge_to_folder", {
        "base_dir": base_dir, "adapter_dir": adapter_dir, "tokenizer_dir": tokenizer_dir, "out_dir": str(model_dir),
        "dtype": dtype,
    })
    if dtype == "auto" and merged.value["dtype"] != "bf16":
        in_bf16 = merged.value["bf16"]
        tell(Note(text=f"merged in {merged.value['dtype']}: bf16 would keep {in_bf16['projection']:.0%} of the "
                       f"adapter's change, with noise {in_bf16['noise']:.2f} times as large as it"))
    dtype = merged.value["dtype"]
    certified = isolate.call("lora_kit.merge:certify", {
        "base_dir": base_dir, "adapter_dir": adapter_dir, "tokenizer_dir": tokenizer_dir, "merged_dir": str(model_dir),
        "dtype": dtype, "rows": held_out["rows"], "scratch_dir": str(scratch), "files": merged.value["files"],
    })
    size, verdicts = weight_bytes(model_dir), judge(certified.value, dtype)
    return {
        "artifact": "merged", "against": "base + adapter", "dtype": dtype, "split": held_out["split"],
        "measured_on": _measured_on(held_out["split"], certified.value["merged"]), **certified.value,
        "tolerances": {"exact_log_prob_difference": EXACT_TOLERANCE, "floor_factor": FLOOR_FACTOR,
                       "floor_epsilon": FLOOR_EPSILON, "inexact_share": MAX_INEXACT_SHARE,
                       "projection": [MIN_PROJECTION, MAX_PROJECTION], "noise": MAX_NOISE,
                       "layer_projection": [MIN_LAYER_PROJECTION, MAX_LAYER_PROJECTION]},
        "verdicts": [verdict.as_dict() for verdict in verdicts],
        "size_bytes": size, "num_params": merged.value["num_params"],
        "bits_per_weight": 8 * size / merged.value["num_params"],
        "untied": merged.value["untied"], "left_out": merged.value["left_out"], "files": merged.value["files"],
        "merge_seconds": merged.seconds, "merge_peak_memory_bytes": merged.peak_memory_bytes,
        "certificate_seconds": certified.seconds, "certificate_peak_memory_bytes": certified.peak_memory_bytes,
    }, verdicts


def _summary(written: dict[str, Any], verdicts: list[Verdict]) -> str:
    kl, floor, change = (number_text(written[key]["mean_kl"], 2) for key in ("merged", "floor", "adapter_change"))
    failed = any(verdict.outcome == "FAIL" for verdict in verdicts)
    return (f"{bytes_text(written['size_bytes'])} in {written['dtype']}, KL {kl} from base + adapter (floor {floor}; "
            f"the adapter itself {change})" + ("; CERTIFICATE FAILED" if failed else ""))


def judge(measured: dict[str, Any], dtype: str) -> list[Verdict]:
    """The verdicts on what :func:`certify` measured: exact, stored, faithful, kept."""
    exact, stored, floor = measured["exact"], measured["stored"], measured["floor"]["mean_kl"]
    merged, change = measured["merged"], measured["adapter_change"]["mean_kl"]
    difference = exact["max_log_prob_difference"]
    inexact = stored["num_inexact"] / max(1, stored["num_elements"])
    kinds = {"names_differing": "tensors missing or extra", "config_differing": "config.json says something else of",
             "files_differing": "no longer what was written"}
    odd = {text: stored[key] for key, text in kinds.items() if stored[key]}
    whole = not stored["num_wrong"] and not odd and inexact <= MAX_INEXACT_SHARE
    bound = FLOOR_FACTOR * floor + FLOOR_EPSILON
    note = "" if change > bound else (
        f"; the adapter itself changes the model by {number_text(change)}, too little for this measure to see it "
        "missing: that the stored weights hold it is shown tensor by tensor")
    return [
        Verdict(
            outcome=_outcome(difference <= EXACT_TOLERANCE),
            claim=f"merged in fp32 equals base + adapter in fp32 within {number_text(EXACT_TOLERANCE)}",
            evidence=f"largest difference of a log-probability {number_text(difference)} over "
                     f"{exact['num_positions']} tokens",
        ),
        Verdict(
            outcome=_outcome(whole),
            claim=f"the stored weights are that merge, cast once to {dtype}",
            evidence=f"of {stored['num_elements']} elements in {stored['num_tensors']} tensors {stored['num_wrong']} "
                     f"are wrong and {stored['num_inexact']} off by one unit in the last place"
                     + "".join(f"; {text}: {', '.join(names[:3])}" for text, names in odd.items()),
        ),
        Verdict(
            outcome=_outcome(merged["mean_kl"] <= bound),
            claim=f"the stored model is as close to base + adapter as {dtype} allows "
                  f"(mean KL at most {FLOOR_FACTOR:g} x floor + {FLOOR_EPSILON:g})",
            evidence=f"mean KL {number_text(merged['mean_kl'])} ± {number_text(merged['mean_kl_standard_error'], 2)}, "
                     f"floor {number_text(floor)}, top-1 agreement {merged['top1_agreement']:.2%} over "
                     f"{merged['num_positions']} tokens{note}",
        ),
        _judge_kept(measured["delta"], dtype),
    ]


def _judge_kept(kept: dict[str, Any], dtype: str) -> Verdict:
    """Whether the stored weights hold the adapter's change."""
    claim = (f"the stored weights hold the adapter's change ({MIN_PROJECTION:.0%} to {MAX_PROJECTION:.0%} of it, "
             f"{MIN_LAYER_PROJECTION:.0%} to {MAX_LAYER_PROJECTION:.0%} in every layer, noise at most {MAX_NOISE:g} "
             "times as large)")
    if kept["missing"]:
        return Verdict(outcome="FAIL", claim=claim, evidence=f"{kept['missing'][0]} is not in the files"
                       + (f", nor are {len(kept['missing']) - 1} more" if len(kept["missing"]) > 1 else ""))
    odd = [name for name, layer in kept["by_layer"].items()
           if not MIN_LAYER_PROJECTION <= layer["projection"] <= MAX_LAYER_PROJECTION]
    whole = survives(kept)
    advice = ""
    if not whole and not odd and dtype == "bf16" and MIN_PROJECTION / 2 < kept["projection"] < MAX_PROJECTION:
        advice = ("; the change is small beside the steps of bf16: merge.dtype: fp16 or auto keeps it"
                  if kept["relative_norm"] < 0.005 else "")
    return Verdict(
        outcome=_outcome(whole and not odd), claim=claim,
        evidence=f"projection {kept['projection']:.3f}, noise {kept['noise']:.3f}, sign right in {kept['sign']:.1%}; "
                 f"the change is {number_text(100 * kept['relative_norm'], 2)} % of the weights"
                 + (f"; layers that differ: {delta.by_layer_text(kept)}" if odd else "") + advice)


def survives(kept: dict[str, Any]) -> bool:
    """Whether figures of :func:`lora_kit.delta.measure` over all layers lie within the bounds of a merge."""
    return MIN_PROJECTION <= kept["projection"] <= MAX_PROJECTION and kept["noise"] <= MAX_NOISE


def _outcome(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def _measured_on(split: str, figures: dict[str, Any]) -> str:
    where = {"held_out": "held-out rows", "prose": "paragraphs of plain prose"}.get(
        split, "training rows (no row is held out)")
    return f"{figures['num_positions']} tokens of {figures['num_rows']} {where}"


def merge_to_folder(base_dir: str, adapter_dir: str, tokenizer_dir: str, out_dir: str, dtype: str) -> dict[str, Any]:
    """Merge the adapter into the base in fp32 and write it to ``out_dir``, cast once to ``dtype``.

    To be called in a fresh process. Raises as :func:`stage`.

    Args:
        dtype: ``bf16``, ``fp16``, ``fp32``, or ``auto``: bf16 where the adapter's change survives it, else fp16, or
            fp32 where a value does not fit into that.

    Returns:
        ``dtype``, ``num_params``, ``untied`` and ``left_out`` of the :class:`lora_kit.merging.Plan`, and ``bf16``: what
        bf16 would keep of the change (None where a type was asked for); ``files``: SHA-256 of each file of weights.
    """
    base, out, in_bf16 = Path(base_dir), Path(out_dir), None
    plan = check_adapter(base, Path(adapter_dir))
    if dtype == "auto":
        in_bf16 = _after_cast(plan, "bf16")
        dtype = "bf16" if survives(in_bf16) else "fp16"
    with writing(out):
        try:
            files = write_merged(plan, out, dtype)
        except ModelError:
            if in_bf16 is None or dtype != "fp16":
                raise
            dtype = "fp32"
            files = write_merged(plan, out, dtype)
        copy_config(plan.config, base, out, dtype)
        copy_tokenizer(Path(tokenizer_dir), out)
    return {"dtype": dtype, "num_params": plan.num_params, "untied": plan.untied, "left_out": list(plan.left_out),
            "bf16": in_bf16, "files": files}


def _after_cast(plan: Plan, dtype: str) -> dict[str, Any]:
    """What a cast keeps of the change, over the first rows of every tensor: enough to choose a type by."""
    kind = torch_dtype(dtype)
    with Values(plan) as values:
        return delta.measure(plan, lambda target, first, last: values.after(target, first, last).to(kind).float(),
                             most_blocks=1)


def _unmerged(base_dir: str, adapter_dir: str, dtype: str, device: str):
    """Base with the adapter on it; ModelError when peft did not take every tensor of the adapter's file."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    model = load_adapter(load_base(base_dir, dtype=dtype, device=device), adapter_dir)
    stored = load_file(Path(adapter_dir) / "adapter_model.safetensors")
    # Left to itself peft asks the hub whether the base's vocabulary has changed.
    held = model.state_dict() | get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, tensor in stored.items():
        if ".original_module." in name:
            continue
        # Ends that peft saves because they are adapted or grew stand under the names of its layers.
        found = held.get(name, held.get(name.replace(".modules_to_save.", ".")))
        if found is None or not torch.equal(found.cpu(), tensor.to(found.dtype)):
            raise ModelError(adapter_dir, f"peft does not load its tensor {name}", "train the adapter again")
    return model


def _merged_fp32(model):
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError("adapter", f"cannot be merged ({error})", "train the adapter again") from None


def certify(
    base_dir: str, adapter_dir: str, tokenizer_dir: str, merged_dir: str, dtype: str, rows: list[dict[str, Any]],
    scratch_dir: str, files: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Measure the merged folder against base and adapter; to be called in a fresh process.

    Args:
        files: SHA-256 of each file of weights as it was written, where that is known.

    Returns:
        Figures of :func:`lora_kit.certificate.compare` against base + adapter in fp32, for ``adapter_change`` (the
        base alone), ``exact`` (merged in fp32), ``floor`` (that merge cast to ``dtype``), ``unmerged`` (base +
        adapter in ``dtype``) and ``merged`` (the files on disk, in ``dtype``); ``stored``: num_tensors, num_elements,
        num_wrong, num_inexact, names_differing, config_differing (keys of config.json that say something else than the
        merge makes of the base's), files_differing (files that are no longer what was written); ``delta``: see
        :func:`lora_kit.delta.measure`; ``answers`` of the files on disk: see
        :func:`lora_kit.greedy.compare_answers`.
    """
    from lora_kit.engines.hf import HfEngine

    stale = read_config(Path(merged_dir)).get("quantization_config")
    if stale:  # whatever loads it would quantize the weights in silence, or take them for packed ones
        raise ModelError(merged_dir, f"config.json says that it is quantized ({stale.get('quant_method')}), and its "
                         "weights are not", "merge again into the 16-bit base")
    tokenizer = load_tokenizer(tokenizer_dir)
    stop_ids = {*stop_token_ids(tokenizer), *configured_stop_ids(Path(base_dir))}

    def engine_of(model) -> HfEngine:
        return HfEngine(model, tokenizer, stop_ids=stop_ids)

    device = certificate.roomy_device(3 * weight_bytes(Path(base_dir)))
    plan = check_adapter(Path(base_dir), Path(adapter_dir))
    measured: dict[str, Any] = {"delta": delta.measure(plan, delta.of_folder(Path(merged_dir)))}
    with tempfile.TemporaryDirectory(prefix=".certificate-", dir=scratch_dir) as folder:
        tuned = _unmerged(base_dir, adapter_dir, "fp32", device)
        recorded = certificate.record_engine(engine_of(tuned), rows, Path(folder) / "recording")
        reference = certificate.recording_of(recorded)
        with tuned.disable_adapter():
            measured["adapter_change"] = certificate.compare(reference, engine_of(tuned))
        plain = _merged_fp32(tuned)
        measured["exact"] = certificate.compare(reference, engine_of(plain))
        measured["stored"] = compare_tensors(plain.state_dict(), Path(merged_dir), dtype, plain) | {
            "config_differing": _config_differing(plan.config, Path(merged_dir), dtype),
            "files_differing": sorted(name for name, sha256 in (files or {}).items()
                                      if file_sha256(Path(merged_dir) / name) != sha256)}
        with engine_of(plain.to(torch_dtype(dtype))) as floor:
            measured["floor"] = certificate.compare(reference, floor)
        del tuned, plain
        with engine_of(_unmerged(base_dir, adapter_dir, dtype, device)) as unmerged:
            measured["unmerged"] = certificate.compare(reference, unmerged)
        with open_engine(Artifact(name="merged", path=merged_dir, kind="hf"), device=device) as engine:
            found = certificate.measure_engine(recorded, engine)
    measured |= {key: found.pop(key) for key in ("engine", "answers")}
    return measured | {"merged": found}


def _config_differing(expected: dict[str, Any], folder: Path, dtype: str) -> list[str]:
    found = read_config(folder)
    expected = {**expected, "dtype": str(torch_dtype(dtype)).removeprefix("torch.")}
    if "torch_dtype" in expected:
        expected["torch_dtype"] = expected["dtype"]
    return sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))


def compare_tensors(expected: dict[str, Any], folder: Path, dtype: str, model: Any = None) -> dict[str, Any]:
    """The safetensors of ``folder`` against ``expected`` (name to fp32 tensor), cast to ``dtype``.

    Args:
        model: the model that ``expected`` is of: its tied weights are stored once.

    Returns:
        num_tensors, num_elements, num_wrong (off by more than one unit in the last place, or of another type or
        shape), num_inexact (off by at most that), names_differing (tensors that only one side has).
    """
    import torch
    from safetensors import safe_open

    wanted, kind = dict(expected), torch_dtype(dtype)
    if model is not None and model.config.tie_word_embeddings:
        for name in getattr(model, "_tied_weights_keys", None) or ():
            wanted.pop(name, None)
    counts = {"num_tensors": 0, "num_elements": 0, "num_wrong": 0, "num_inexact": 0}
    extra = []
    # One unit in the last place; fp32 sums in another order are off by several, which no 16-bit model notices.
    steps = 1 if dtype != "fp32" else 16
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - safe_open has no __iter__
                stored = file.get_tensor(name)
                if name not in wanted:
                    extra.append(name)
                    continue
                right = wanted.pop(name).cpu().to(kind)
                counts["num_tensors"] += 1
                counts["num_elements"] += right.numel()
                if stored.dtype != kind or stored.shape != right.shape:
                    counts["num_wrong"] += right.numel()
                elif not torch.equal(stored, right):
                    apart = (stored.double() - right.double()).abs()
                    reach = steps * torch.finfo(kind).eps * right.double().abs() + torch.finfo(kind).tiny
                    wrong = int((~(apart <= reach)).sum())  # NaN counts as wrong
                    counts["num_wrong"] += wrong
                    counts["num_inexact"] += int((stored != right).sum()) - wrong
    return counts | {"names_differing": sorted([*extra, *wanted])}
