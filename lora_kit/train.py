"""Stage train: the loop, top to bottom.

accelerate gives device, precision and processes; peft the adapter; the order of the
examples is a function of (seed, epoch) and their position a global count, so that a run
goes on where it stopped. The loss of a step is summed over every micro-batch and process
and divided by the trained tokens of the whole batch: splitting it changes nothing. Rows are
packed end to end where the model keeps them apart, and parts of it are replaced by faster ones of the
same results: ``preparation.py`` does both and proves them on the model.

`examples/minimal_loop.py` is this loop without checkpoints, processes and the run folder.

Reads the data stage's token files and the base. Writes ``train/``: ``adapter/`` (PEFT
layout), ``metrics.jsonl``, ``timings.jsonl``, ``checkpoints/``.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_kit import adapter as adapters
from lora_kit import (
    adapter_start,
    chat,
    checkpoint,
    flops,
    isolate,
    libraries,
    model,
    packing,
    preparation,
    rows,
    stopwatch,
    tokens,
    trackers,
)
from lora_kit.errors import DivergedError, RecipeError, StoppedError
from lora_kit.events import Caution, Note, Progress, tell
from lora_kit.ledger import check_batch, padded_tokens
from lora_kit.loss import accumulate, loss_sum
from lora_kit.optimizer import make_optimizer, set_learning_rate
from lora_kit.recipe import Recipe, TrainSection
from lora_kit.rundir import Run, writing
from lora_kit.schedule import count_steps, learning_rate_at, save_interval
from lora_kit.sources import file_sha256
from lora_kit.stop_rate import measure_stop_rate, prompts_of
from lora_kit.types import Artifact, Batch, Result
from lora_kit.units import number_text, seconds_text

SECTIONS = ("model", "lora", "train", "seed")


@stopwatch.one_start()
def stage(recipe: Recipe, run: Run) -> Result:
    """Train the adapter of ``run``, going on from its newest checkpoint when there is one.

    Raises:
        StoppedError: SIGINT or SIGTERM came; a checkpoint is saved.
        DivergedError: a loss or gradient is not finite; the last checkpoint is from before it.
        ModelError: rows in one pass teach something else than one by one (``train.prove``).
        InternalError: a batch is not what the token files say, or accumulation weighs rows wrongly.
        RecipeError: the batch cannot be split over the processes.
    """
    import torch

    isolate.reset_peak_memory()
    started = time.perf_counter()
    settings, work = recipe.train, run.work("train")
    trackers.check_installed(settings.track)
    accelerator = _accelerator(settings, **trackers.options_of_accelerator(settings.track, work))
    data_dir = run.stage_dir("data")
    train_rows = tokens.read_examples(data_dir, "train")
    held_out_rows = tokens.read_examples(data_dir, "held_out")
    num_steps = count_steps(settings, len(train_rows))
    _check_split(settings, accelerator.num_processes)

    libraries.import_for_training(recipe, run.resolved["base"]["artifact"]["path"])
    net = _model_with_adapter(recipe, run, accelerator, train_rows)
    start = work / "start" if recipe.lora.changes_base and not settings.from_adapter else None
    named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    trainable = [parameter for _, parameter in named]
    num_trainable, num_params = count_parameters(net)
    optimizer = accelerator.prepare_optimizer(make_optimizer(named, settings, accelerator.device.type))
    wrapped = net if settings.shard == "fsdp" and accelerator.num_processes > 1 else accelerator.prepare_model(net)
    log = _Log(work, accelerator)
    state: dict[str, Any] = {"step": 0, "best_loss": None, "best_step": None, "held_out_before": None,
                             "train_seconds": 0.0, "tokens_total": 0, "trained_tokens": 0, "tokens_padded": 0,
                             "flops": 0, "start_sha256": adapters.sha256_of(adapters.adapter_tensors(net))}
    state = _go_on_from(work, state, named, optimizer, log)
    tracking = trackers.start(accelerator, recipe, run.path.name, work)
    stop = _StopSignals()
    save_every = save_interval(settings, num_steps)
    cost, ceiling = flops.count(net), flops.ceiling_of_all(accelerator, _precision(settings, accelerator))
    prepared = preparation.prepare(net, recipe, train_rows, num_steps, accelerator, _precision(settings, accelerator),
                                   state.get("fast_parts"))
    state["fast_parts"] = preparation.parts_in_use(prepared["fast"])
    shares = _Shares(settings, prepared["packing"]["budget"], accelerator, preparation.shares_prefix(prepared["fast"]))

    def held_out_loss() -> float | None:
        return evaluate_loss(wrapped, held_out_rows, shares, accelerator)

    def save() -> Path:
        return _save_checkpoint(work, state, named, optimizer, log, accelerator)

    if state["step"] == 0 and len(held_out_rows):
        state["held_out_before"] = held_out_loss()
        log.metrics({"step": 0, "held_out_loss": state["held_out_before"], "num_rows": len(held_out_rows)})
        tell(Note(text=f"held-out loss before the first step: {number_text(state['held_out_before'])}"))

    batches = tokens.stream_of_batches(len(train_rows), settings.batch_size, recipe.seed, state["step"])
    wrapped.train()
    start_up = log.start_up(stopwatch.end(), state["step"])
    with stop, tracking:
        while state["step"] < num_steps:
            step, step_started = state["step"], time.perf_counter()
            batch_rows = next(batches)
            rate = learning_rate_at(step, num_steps, settings)
            set_learning_rate(optimizer, rate)

            # One optimizer step: every process takes its share of the batch, in micro-batches.
            num_trained = sum(train_rows.num_trained(row) for row in batch_rows)
            passes = (shares.batch_of(micro, train_rows) for micro in shares.of(batch_rows, train_rows))
            total = accumulate(wrapped, passes, num_trained, accelerator)
            loss = float(accelerator.reduce(total, "sum")) / num_trained
            grad_norm = float(accelerator.clip_grad_norm_(trainable, settings.max_grad_norm))
            if not (math.isfinite(loss) and (math.isfinite(grad_norm) or settings.precision == "fp16")):
                _diverged(step + 1, loss, grad_norm, [train_rows.origins[row] for row in batch_rows])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            seconds = time.perf_counter() - step_started
            num_tokens = sum(train_rows.length(row) for row in batch_rows)
            state["step"] = step + 1
            state["train_seconds"] += seconds
            state["tokens_total"] += num_tokens
            state["trained_tokens"] += num_trained
            state["tokens_padded"] += shares.padding_of(batch_rows, train_rows)
            needed = cost.of_rows(map(train_rows.length, batch_rows), num_trained) if cost else None
            if "flops" in state:
                state["flops"] += needed or 0
            log.metrics({"step": step + 1, "loss": loss, "learning_rate": rate, "grad_norm": grad_norm,
                         "trained_tokens": num_trained, "epoch": (step + 1) * settings.batch_size / len(train_rows)})
            log.timings({"step": step + 1, "seconds": seconds, "tokens": num_tokens,
                         "tokens_per_second": num_tokens / seconds, "trained_tokens_per_second": num_trained / seconds,
                         "flops": needed})
            tell(Progress(stage="train", done=step + 1, total=num_steps, fields={
                "loss": number_text(loss), "tokens/s": f"{state['tokens_total'] / state['train_seconds']:.0f}",
                "left": seconds_text(state["train_seconds"] / (step + 1) * (num_steps - step - 1))}))

            finished = state["step"] == num_steps
            due = settings.eval_every and state["step"] % settings.eval_every == 0
            if len(held_out_rows) and (finished or due):
                current = held_out_loss()
                wrapped.train()
                log.metrics({"step": state["step"], "held_out_loss": current, "num_rows": len(held_out_rows)})
                tell(Note(text=f"held-out loss after step {state['step']}: {number_text(current)}"))
                if not math.isfinite(current):
                    _diverged(state["step"], current, grad_norm, ["held-out rows"])
                if state["best_loss"] is None or current < state["best_loss"]:
                    state["best_loss"], state["best_step"] = current, state["step"]
                    if settings.keep == "best":
                        _write_adapter(net, work / "best", recipe, accelerator, start)
                state["held_out_after"] = current
            if finished or state["step"] % save_every == 0 or stop.requested(accelerator):
                save()
            if stop.requested(accelerator) and not finished:
                raise StoppedError(
                    str(run.path), f"stopped after step {state['step']} of {num_steps}, checkpoint saved",
                    "run the same command again" if accelerator.num_processes > 1 else
                    f"go on with: lora-kit train {run.path}")

    _write_adapter(net, work / "adapter", recipe, accelerator, start)
    if settings.keep == "best" and state["best_step"] not in (None, num_steps) and accelerator.is_main_process:
        with writing(work):
            shutil.rmtree(work / "adapter")
            shutil.copytree(work / "best", work / "adapter")
        tell(Note(text=f"kept the adapter of step {state['best_step']}, which had the lowest held-out loss"))
    stops = _stop_rate(recipe, run, net, accelerator)
    accelerator.wait_for_everyone()
    adapters.check_trained(work / "adapter", state.get("start_sha256"), start)
    adapter = Artifact(
        name="adapter", path="train/adapter", kind="adapter", base=run.resolved["base"]["artifact"]["path"],
        tokenizer=run.resolved["base"]["artifact"]["tokenizer"],  # with the recipe's template, when it names one
        adapter_sha256=file_sha256(work / "adapter" / "adapter_model.safetensors"), num_params=num_trainable,
        size_bytes=model.weight_bytes(work / "adapter"),
    )
    before, after = state["held_out_before"], state.get("held_out_after")
    change = f", held-out loss {before:.3f} → {after:.3f}" if before is not None and after is not None else ""
    return Result(
        summary=f"{num_steps} steps, {state['trained_tokens']:,} tokens trained{change}",
        artifacts=(adapter,),
        figures={
            "steps": num_steps, "train_seconds": state["train_seconds"], "stage_seconds": time.perf_counter() - started,
            "held_out_before": before, "held_out_after": after, "best_step": state["best_step"],
            "kept": settings.keep, "peak_memory_bytes": isolate.peak_memory_bytes(),
            "device_peak_memory_bytes": _device_peak(accelerator), "tokens_per_second":
            state["tokens_total"] / state["train_seconds"], "trained_tokens": state["trained_tokens"],
            "tokens_total": state["tokens_total"], "num_trainable_params": num_trainable, "num_params": num_params,
            "precision": _precision(settings, accelerator), "device": str(accelerator.device),
            "num_processes": accelerator.num_processes, "threads": torch.get_num_threads(), **prepared,
            "tokens_padded": state["tokens_padded"], "stops": stops, "start": start_up,
            "flops": state.get("flops") or None, "ceiling_flops_per_second": ceiling,
        },
    )


class _Shares:
    """What this process takes of a batch, pass by pass, packed within ``budget`` tokens or padded (None)."""

    def __init__(self, settings: TrainSection, budget: int | None, accelerator, share_prefix: bool = False) -> None:
        self.budget, self.micro_batch_size, self.accelerator = budget, settings.micro_batch_size, accelerator
        self.share_prefix = share_prefix

    def of(self, rows: Sequence[int], examples: tokens.ExampleFile) -> list[list[int]]:
        return packing.micro_batches(
            rows, examples.length, micro_batch_size=self.micro_batch_size, budget=self.budget,
            process=self.accelerator.process_index, num_processes=self.accelerator.num_processes)

    def padding_of(self, rows: Sequence[int], examples: tokens.ExampleFile) -> int:
        """Tokens of padding that all processes together make of ``rows``."""
        if self.budget is not None:
            return 0
        number = self.accelerator.num_processes
        plans = (packing.micro_batches(rows, examples.length, micro_batch_size=self.micro_batch_size, budget=None,
                                       process=process, num_processes=number) for process in range(number))
        lengths = {row: examples.length(row) for row in rows}
        return sum(padded_tokens(lengths, plan) for plan in plans)

    def batch_of(self, micro: Sequence[int], examples: tokens.ExampleFile) -> Batch:
        """One forward pass, recounted: InternalError when it trains on other than what the token files say."""
        chosen = [examples[row] for row in micro]
        if self.budget is None:
            batch = tokens.batch_of(chosen, 0, self.accelerator.device)
        else:
            batch = packing.packed_batch_of(chosen, self.accelerator.device, self.share_prefix)
        check_batch(batch, num_trained=sum(map(examples.num_trained, micro)),
                    num_tokens=sum(map(examples.length, micro)), origins=[example.origin for example in chosen])
        return batch


@stopwatch.part("held-out loss")
def evaluate_loss(net, examples: tokens.ExampleFile, shares: _Shares, accelerator) -> float | None:
    """Mean loss in nats over all trained tokens of ``examples``, over all processes; None without rows."""
    import torch

    if not len(examples):
        return None
    net.eval()
    totals = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for micro in shares.of(range(len(examples)), examples):
            # A process that has no rows left takes part with one that does not count.
            batch = shares.batch_of(micro or [0], examples)
            with accelerator.autocast():
                summed = float(loss_sum(net, batch))
            totals += torch.tensor([summed, batch.num_trained_tokens]) * bool(micro)
    totals = accelerator.reduce(totals.to(accelerator.device).float() if accelerator.device.type == "mps"
                                else totals.to(accelerator.device), "sum")
    return float(totals[0] / totals[1])


def _stop_rate(recipe: Recipe, run: Run, net, accelerator) -> dict[str, Any] | None:
    """What the main process measures of the model as it is now; None where nothing was."""
    settings = recipe.train
    if not settings.stop_prompts or not accelerator.is_main_process:
        return None
    if settings.shard == "fsdp" and accelerator.num_processes > 1:
        tell(Caution(text="the stop rate is not measured: the weights are sharded"))
        return None
    preparation.plain(net)
    tokenizer = chat.load_tokenizer(run.resolved["base"]["artifact"]["tokenizer"])
    most = getattr(net.config.get_text_config(), "max_position_embeddings", None) or recipe.data.max_tokens
    prompts = prompts_of(tokenizer, rows.read_held_out(run.stage_dir("data")), settings.stop_prompts,
                         most - settings.stop_within, recipe.data.tools)
    with accelerator.autocast():
        found = measure_stop_rate(net, tokenizer, prompts, settings.stop_within)
    if found:
        tell(Note(text=f"{found['num_stopped']} of {found['num_prompts']} answers to held-out prompts stop by "
                       f"themselves within {settings.stop_within} tokens"))
        if not found["num_stopped"]:
            tell(Caution(text="no answer stops by itself: train for longer, raise train.stop_within, or check "
                              "that the stop token is trained on (lora-kit data RECIPE --show 1)"))
    return found


def count_parameters(net) -> tuple[int, int]:
    """(trainable, all) parameters; 4-bit weights are counted by what they stand for."""
    trainable = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    total = 0
    for parameter in net.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        total += math.prod(shape) if shape is not None else parameter.numel()
    return trainable, total


def _accelerator(settings: TrainSection, **options: Any):
    import torch

    with stopwatch.importing():
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

    precision = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}.get(settings.precision)
    if precision is None:
        precision = "bf16" if _has_bf16() else "no"
    if precision == "fp16" and not torch.accelerator.is_available():
        raise RecipeError("train.precision", "fp16 trains only on a GPU", "set bf16, fp32 or auto")
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    # accelerate keeps the precision of the first training of a process for all later ones; ours have their own.
    AcceleratorState._reset_state()
    # Without cpu=True accelerate 1.15 forms no group of processes on a machine without a GPU.
    accelerator = Accelerator(mixed_precision=precision, cpu=not torch.accelerator.is_available(), **options)
    if accelerator.num_processes != expected:
        # Measured: `accelerate launch --cpu --num_processes 2` silently runs one process.
        raise RecipeError("launch", f"{expected} processes were launched and {accelerator.num_processes} take part",
                          "launch with torchrun --nproc_per_node, or accelerate launch --multi_gpu")
    return accelerator


def _has_bf16() -> bool:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.backends.mps.is_available():
        return False
    from lora_kit.hardware import cpu_supports_bf16

    return cpu_supports_bf16()


def _precision(settings: TrainSection, accelerator) -> str:
    return {"bf16": "bf16", "fp16": "fp16"}.get(accelerator.mixed_precision, "fp32")


def _check_split(settings: TrainSection, num_processes: int) -> None:
    if settings.batch_size % num_processes:
        below = settings.batch_size // num_processes * num_processes
        raise RecipeError("train.batch_size", f"{settings.batch_size} examples cannot be shared by {num_processes} "
                          "processes", f"use {below or num_processes} or {below + num_processes}")


def _model_with_adapter(recipe: Recipe, run: Run, accelerator, train_rows: tokens.ExampleFile):
    import torch

    settings, lora = recipe.train, recipe.lora
    base = run.resolved["base"]["artifact"]
    # Frozen weights are held in the arithmetic's own type; the adapter stays in fp32 either way.
    dtype = _precision(settings, accelerator)

    def load():
        net = model.load_base(base["path"], dtype=dtype, device=accelerator.device, load_in=recipe.model.load_in,
                              attention=recipe.model.attention)
        if recipe.model.load_in == "16bit":
            return net
        from peft import prepare_model_for_kbit_training

        return prepare_model_for_kbit_training(net, use_gradient_checkpointing=False)

    token_ids = (adapters.token_ids_of(lora.trainable_tokens, chat.load_tokenizer(base["tokenizer"]))
                 if lora.trainable_tokens else [])
    if settings.from_adapter:
        folder = Path(settings.from_adapter).expanduser()
        net = adapters.continue_adapter(load(), folder if folder.is_absolute() else run.recipe_file.folder / folder)
    elif lora.prepared:
        start = run.work("train") / "start"
        if accelerator.is_main_process and not start.exists():
            tell(Note(text=f"computing the adapter's first values ({lora.init}), once"))
            adapter_start.write_start(load(), lora, recipe.seed, train_rows, start, reference=recipe.model.base,
                                      micro_batch_size=settings.micro_batch_size, token_ids=token_ids)
        accelerator.wait_for_everyone()
        net = adapter_start.adapter_from_start(load(), lora, start)
        torch.manual_seed(recipe.seed)
    else:
        net = adapters.add_adapter(load(), lora, recipe.seed, token_ids)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if settings.gradient_checkpointing:
        net.activation_checkpointing_enable({"use_reentrant": False})
        net.enable_input_require_grads()
    if settings.shard == "fsdp" and accelerator.num_processes > 1:
        _shard(net)
    return net


def _shard(net) -> None:
    """FSDP2 over all processes: each decoder layer, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for module in net.get_base_model().model.layers:
        fully_shard(module)
    fully_shard(net)


def _adapter_tensors(named) -> dict[str, Any]:
    return {name: checkpoint.whole(parameter.detach()) for name, parameter in named}


def _save_checkpoint(work: Path, state: dict, named, optimizer, log: _Log, accelerator) -> Path | None:
    adapter = _adapter_tensors(named)
    moments = checkpoint.optimizer_tensors(optimizer.optimizer)
    if not accelerator.is_main_process:
        return None
    return checkpoint.save(work / "checkpoints", state["step"], {"adapter": adapter, "optimizer": moments},
                           {**state, "random": checkpoint.random_state(), "metrics_offsets": log.sealed_offsets()})


def _go_on_from(work: Path, state: dict, named, optimizer, log: _Log) -> dict:
    found = checkpoint.newest(work / "checkpoints")
    if found is None:
        log.truncate({})
        return state
    import torch

    saved = checkpoint.load_tensors(found, "adapter")
    with torch.no_grad():
        for name, parameter in named:
            parameter.copy_(checkpoint.like(saved[name], parameter))
    checkpoint.load_optimizer_tensors(optimizer.optimizer, checkpoint.load_tensors(found, "optimizer"))
    checkpoint.restore_random_state(found.state["random"])
    log.truncate(found.state["metrics_offsets"])
    tell(Note(text=f"going on from {found.folder.name}"))
    return {key: value for key, value in found.state.items() if key not in ("random", "metrics_offsets")}


def _write_adapter(net, folder: Path, recipe: Recipe, accelerator, start: Path | None) -> None:
    tensors = adapters.adapter_tensors(net)
    if not accelerator.is_main_process:
        return
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        adapters.save_adapter(net, folder, recipe.model.base, tensors, start)


def _diverged(step: int, loss: float, grad_norm: float, origins: list[str]) -> None:
    shown = ", ".join(origins[:4]) + (f" and {len(origins) - 4} more" if len(origins) > 4 else "")
    raise DivergedError(f"train step {step}", f"loss {loss}, gradient norm {grad_norm} (rows {shown})",
                        "lower train.learning_rate; the last checkpoint is from before this step")


def _device_peak(accelerator) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if accelerator.device.type == "cuda" else None


class _Log:
    """metrics.jsonl (what was computed) and timings.jsonl (what the clock said), written by the main process."""

    def __init__(self, work: Path, accelerator) -> None:
        self.paths = {"metrics": work / "metrics.jsonl", "timings": work / "timings.jsonl"}
        self.writes, self.accelerator = accelerator.is_main_process, accelerator

    def truncate(self, offsets: dict[str, int]) -> None:
        """Cut each file to the length that the checkpoint sealed (0 without one) and go on from there."""
        for name, path in self.paths.items() if self.writes else ():
            with writing(path), open(path, "ab") as file:
                file.truncate(offsets.get(name, 0))

    def metrics(self, values: dict[str, Any]) -> None:
        self._write("metrics", values)
        if self.accelerator.trackers:
            numbers, step = trackers.told(values)
            self.accelerator.log(numbers, step=step)

    def timings(self, values: dict[str, Any]) -> None:
        self._write("timings", values)

    def start_up(self, took: dict[str, Any] | None, step: int) -> dict[str, Any] | None:
        """Write down and tell what came before the first step after ``step``; hands it on."""
        if took is not None:
            for name, spent in took["parts"].items():
                self.timings({"part": name, "before_step": step + 1, **spent})
            tell(Note(text=f"ready to train after {stopwatch.start_text(took)}"))
        return took

    def _write(self, name: str, values: dict[str, Any]) -> None:
        if self.writes:
            with writing(self.paths[name]), open(self.paths[name], "ab") as file:
                file.write((json.dumps(values) + "\n").encode())

    def sealed_offsets(self) -> dict[str, int]:
        """Length of each file, after its lines have reached the disk."""
        offsets = {}
        for name, path in self.paths.items():
            with writing(path), open(path, "ab") as file:
                os.fsync(file.fileno())
                offsets[name] = file.tell()
        return offsets


class _StopSignals:
    """SIGINT and SIGTERM ask for a stop after the step; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = False
        self.earlier: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self.earlier[number] = signal.signal(number, self._note)
            except ValueError:  # not in the main thread: whoever called us handles signals
                break
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        tell(Caution(text="stopping after this step; a second Ctrl-C stops at once"))

    def requested(self, accelerator) -> bool:
        """Whether any process was asked to stop; all processes get the same answer."""
        if accelerator.num_processes == 1:
            return self.received
        import torch

        return bool(accelerator.reduce(torch.tensor(float(self.received), device=accelerator.device), "sum"))
