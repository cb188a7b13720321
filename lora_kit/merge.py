"""Stage merge: base plus adapter as one plain model, with the proof that it is both.

The adapter is checked against the 16-bit base before any weights are read; then it is merged in fp32,
block of rows by block of rows (``merging``), and cast once to ``merge.dtype``. Both happen in a fresh process, and
another one makes the certificate from the files on disk, by three measurements:

1. *exact*: base and adapter, merged by peft in fp32, against base and adapter side by side in fp32;
2. *stored*: the weights on disk against the cast of peft's merge, tensor by tensor;
3. *faithful*: the model on disk, in its own type, against base and adapter in fp32, judged by
   the floor: the merge of (1), cast in memory and run in that type, which is what the type costs
   a model with these weights. Base and adapter run unmerged in that type stand beside it.

Reads the base, ``train/adapter`` and the token files; writes ``merge/model`` and
``merge/certificate.json``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_kit import certificate, isolate
from lora_kit.adapter import load_adapter
from lora_kit.adapter_check import check_adapter
from lora_kit.chat import load_tokenizer
from lora_kit.engines import open_engine
from lora_kit.errors import ModelError
from lora_kit.merging import write_merged
from lora_kit.model import load_base, torch_dtype, weight_bytes
from lora_kit.model_files import copy_config, copy_tokenizer
from lora_kit.recipe import Recipe
from lora_kit.rundir import Run, write_json, writing
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
MAX_INEXACT_SHARE = 1e-4
"""Share of a model's elements that may be one unit in the last place off (other order of sums)."""


def stage(recipe: Recipe, run: Run) -> Result:
    """Merge the run's adapter into its base and certify the result.

    Returns:
        Result with the artifact ``merged``, three verdicts, and the certificate's figures.

    Raises:
        ModelError: the adapter is not of this base, is broken, or cannot be merged rightly.
        MachineError: no room, or the process that merged was killed.
    """
    base, adapter, dtype = run.artifact("base"), run.artifact("adapter"), recipe.merge.dtype
    work = run.work("merge")
    model_dir = work / "model"
    tokenizer_dir = adapter.tokenizer or base.tokenizer or base.path
    with writing(model_dir):
        model_dir.mkdir(parents=True, exist_ok=True)
    merged = isolate.call("lora_kit.merge:merge_to_folder", {
        "base_dir": base.path, "adapter_dir": adapter.path, "tokenizer_dir": tokenizer_dir, "out_dir": str(model_dir),
        "dtype": dtype,
    })
    held_out = certificate.held_out_rows(run.stage_dir("data"))
    certified = isolate.call("lora_kit.merge:certify", {
        "base_dir": base.path, "adapter_dir": adapter.path, "tokenizer_dir": tokenizer_dir,
        "merged_dir": str(model_dir), "dtype": dtype, "rows": held_out["rows"], "scratch_dir": str(work),
    })
    verdicts = judge(certified.value, dtype)
    written = {
        "artifact": "merged", "against": "base + adapter", "dtype": dtype, "split": held_out["split"],
        "measured_on": _measured_on(held_out["split"], certified.value["merged"]), **certified.value,
        "tolerances": {"exact_log_prob_difference": EXACT_TOLERANCE, "floor_factor": FLOOR_FACTOR,
                       "floor_epsilon": FLOOR_EPSILON, "inexact_share": MAX_INEXACT_SHARE},
        "verdicts": [verdict.as_dict() for verdict in verdicts],
        "merge_seconds": merged.seconds, "merge_peak_memory_bytes": merged.peak_memory_bytes,
        "certificate_seconds": certified.seconds, "certificate_peak_memory_bytes": certified.peak_memory_bytes,
    }
    with writing(work / "certificate.json"):
        write_json(work / "certificate.json", written)
    size = weight_bytes(model_dir)
    kl, failed = certified.value["merged"]["mean_kl"], [verdict for verdict in verdicts if verdict.outcome == "FAIL"]
    return Result(
        summary=f"{bytes_text(size)} in {dtype}, KL {number_text(kl, 2)} from base + adapter (floor "
                f"{number_text(certified.value['floor']['mean_kl'], 2)}; the adapter itself "
                f"{number_text(certified.value['adapter_change']['mean_kl'], 2)})"
                + ("; CERTIFICATE FAILED" if failed else ""),
        artifacts=(Artifact(
            name="merged", path="merge/model", kind="hf", tokenizer="merge/model", size_bytes=size,
            num_params=merged.value["num_params"], adapter_sha256=adapter.adapter_sha256,
            template_sha256=adapter.template_sha256 or base.template_sha256,
        ),),
        verdicts=tuple(verdicts),
        figures={key: written[key] for key in (
            "merged", "floor", "unmerged", "exact", "adapter_change", "stored", "dtype", "split", "measured_on",
            "merge_seconds", "merge_peak_memory_bytes", "certificate_seconds")} | {"size_bytes": size},
    )


def judge(measured: dict[str, Any], dtype: str) -> list[Verdict]:
    """The verdicts on what :func:`certify` measured: exact, stored, faithful."""
    exact, stored, floor = measured["exact"], measured["stored"], measured["floor"]["mean_kl"]
    merged, change = measured["merged"], measured["adapter_change"]["mean_kl"]
    difference = exact["max_log_prob_difference"]
    inexact = stored["num_inexact"] / max(1, stored["num_elements"])
    whole = not stored["num_wrong"] and not stored["names_differing"] and inexact <= MAX_INEXACT_SHARE
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
                     + (f"; tensors missing or extra: {', '.join(stored['names_differing'][:3])}"
                        if stored["names_differing"] else ""),
        ),
        Verdict(
            outcome=_outcome(merged["mean_kl"] <= bound),
            claim=f"the stored model is as close to base + adapter as {dtype} allows "
                  f"(mean KL at most {FLOOR_FACTOR:g} x floor + {FLOOR_EPSILON:g})",
            evidence=f"mean KL {number_text(merged['mean_kl'])} ± {number_text(merged['mean_kl_standard_error'], 2)}, "
                     f"floor {number_text(floor)}, top-1 agreement {merged['top1_agreement']:.2%} over "
                     f"{merged['num_positions']} tokens{note}",
        ),
    ]


def _outcome(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def _measured_on(split: str, figures: dict[str, Any]) -> str:
    where = "held-out rows" if split == "held_out" else "training rows (no row is held out)"
    return f"{figures['num_positions']} tokens of {figures['num_rows']} {where}"


def merge_to_folder(base_dir: str, adapter_dir: str, tokenizer_dir: str, out_dir: str, dtype: str) -> dict[str, Any]:
    """Merge the adapter into the base in fp32 and write it to ``out_dir``, cast once to ``dtype``.

    To be called in a fresh process. Returns ``num_params``, ``untied`` and ``left_out`` of the
    :class:`lora_kit.merging.Plan`. Raises as :func:`stage`.
    """
    base, out = Path(base_dir), Path(out_dir)
    plan = check_adapter(base, Path(adapter_dir))
    with writing(out):
        write_merged(plan, out, dtype)
        copy_config(plan.config, base, out, dtype)
        copy_tokenizer(Path(tokenizer_dir), out)
    return {"num_params": plan.num_params, "untied": plan.untied, "left_out": list(plan.left_out)}


def _unmerged(base_dir: str, adapter_dir: str, dtype: str, device: str):
    """Base with the adapter on it; ModelError when peft did not take every tensor of the adapter's file."""
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    model = load_adapter(load_base(base_dir, dtype=dtype, device=device), adapter_dir)
    stored = load_file(Path(adapter_dir) / "adapter_model.safetensors")
    # Left to itself peft asks the hub whether the base's vocabulary has changed.
    held = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, tensor in stored.items():
        if name not in held or not torch.equal(held[name].cpu(), tensor.to(held[name].dtype)):
            raise ModelError(adapter_dir, f"peft does not load its tensor {name}", "train the adapter again")
    return model


def _merged_fp32(model):
    try:
        return model.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ModelError("adapter", f"cannot be merged ({error})", "train the adapter again") from None


def certify(
    base_dir: str, adapter_dir: str, tokenizer_dir: str, merged_dir: str, dtype: str, rows: list[dict[str, Any]],
    scratch_dir: str,
) -> dict[str, Any]:
    """Measure the merged folder against base and adapter; to be called in a fresh process.

    Returns:
        Figures of :func:`lora_kit.certificate.compare` against base + adapter in fp32, for ``adapter_change`` (the
        base alone), ``exact`` (merged in fp32), ``floor`` (that merge cast to ``dtype``), ``unmerged`` (base +
        adapter in ``dtype``) and ``merged`` (the files on disk, in ``dtype``); ``stored``: num_tensors, num_elements,
        num_wrong, num_inexact, names_differing.
    """
    from lora_kit.engines.hf import HfEngine

    tokenizer = load_tokenizer(tokenizer_dir)
    device = certificate.roomy_device(3 * weight_bytes(Path(base_dir)))
    scratch, measured = Path(scratch_dir), {}
    tuned = _unmerged(base_dir, adapter_dir, "fp32", device)
    with certificate.recorded(HfEngine(tuned, tokenizer, stop_ids=()), rows, scratch) as reference:
        with tuned.disable_adapter():
            measured["adapter_change"] = certificate.compare(reference, HfEngine(tuned, tokenizer, stop_ids=()))
        plain = _merged_fp32(tuned)
        measured["exact"] = certificate.compare(reference, HfEngine(plain, tokenizer, stop_ids=()))
        measured["stored"] = compare_tensors(plain.state_dict(), Path(merged_dir), dtype, plain)
        with HfEngine(plain.to(torch_dtype(dtype)), tokenizer, stop_ids=()) as floor:
            measured["floor"] = certificate.compare(reference, floor)
        del tuned, plain
        with HfEngine(_unmerged(base_dir, adapter_dir, dtype, device), tokenizer, stop_ids=()) as unmerged:
            measured["unmerged"] = certificate.compare(reference, unmerged)
        merged = Artifact(name="merged", path=merged_dir, kind="hf")
        with open_engine(merged, device=device) as engine:
            measured["merged"] = certificate.compare(reference, engine)
            measured["engine"] = engine.name
    return measured


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
