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

import math
import shutil
import time
from pathlib import Path
from typing import Any

from lora_kit import adapter as adapters
from lora_kit import (
    chat,
    checkpoint,
    divergence,
    flops,
    isolate,
    launch,
    libraries,
    model,
    preparation,
    processes,
    rows,
    stopwatch,
    tokens,
    trackers,
)
from lora_kit.errors import StoppedError
from lora_kit.events import Caution, Note, Progress, tell
from lora_kit.fast.steady import steady
from lora_kit.loss import accumulate
from lora_kit.optimizer import make_optimizer, set_learning_rate
from lora_kit.recipe import Recipe
from lora_kit.rehearsal import rehearse, telling_of_memory
from lora_kit.resume import Resume
from lora_kit.rundir import Run, writing
from lora_kit.schedule import count_steps, learning_rate_at, save_interval
from lora_kit.shares import Shares, evaluate_loss
from lora_kit.sources import file_sha256
from lora_kit.stop_rate import measure_stop_rate, prompts_of
from lora_kit.stop_signals import StopSignals
from lora_kit.training_log import TrainingLog
from lora_kit.training_model import count_parameters, model_with_adapter
from lora_kit.types import Artifact, Result
from lora_kit.units import number_text, seconds_text

SECTIONS = ("model", "lora", "train", "seed")


@stopwatch.one_start()
def stage(recipe: Recipe, run: Run) -> Result:
    """Train the adapter of ``run``, going on from its newest checkpoint when there is one.

    Raises:
        StoppedError: SIGINT, SIGTERM or SIGUSR1 came; a checkpoint is saved.
        DivergedError: a loss or gradient is not finite; the last checkpoint is from before it.
        RefusedError: there are checkpoints and none can be used.
        ModelError: rows in one pass teach something else than one by one (``train.prove``).
        InternalError: a batch is not what the token files say, or accumulation weighs rows wrongly.
        RecipeError: the batch cannot be split over the processes.
        MachineError: out of memory, with what to lower; no disk; another process has taken over the run.
    """
    todo = "run the same command again" if processes.num_launched() > 1 else f"go on with: lora-kit train {run.path}"
    with StopSignals(str(run.path), todo) as stop, telling_of_memory(recipe):
        return _train(recipe, run, stop)


def _train(recipe: Recipe, run: Run, stop: StopSignals) -> Result:
    import torch

    isolate.reset_peak_memory()
    started = time.perf_counter()
    settings, work = recipe.train, run.work("train")
    trackers.check_installed(settings.track)
    accelerator = processes.make_accelerator(settings, **trackers.options_of_accelerator(settings.track, work))
    data_dir = run.stage_dir("data")
    train_rows = tokens.read_examples(data_dir, "train")
    held_out_rows = tokens.read_examples(data_dir, "held_out")
    num_steps = count_steps(settings, len(train_rows))
    launch.check_split(settings.batch_size, accelerator.num_processes)

    libraries.import_for_training(recipe, run.resolved["base"]["artifact"]["path"])
    net = model_with_adapter(recipe, run, accelerator, train_rows)
    start = work / "start" if recipe.lora.changes_base and not settings.from_adapter else None
    named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    trainable = [parameter for _, parameter in named]
    num_trainable, num_params = count_parameters(net)
    optimizer = accelerator.prepare_optimizer(make_optimizer(named, settings, accelerator.device.type))
    wrapped = net if settings.shard == "fsdp" and accelerator.num_processes > 1 else accelerator.prepare_model(net)
    log = TrainingLog(work, accelerator)
    checkpoints = Resume(run, named, optimizer, log, accelerator)
    state: dict[str, Any] = checkpoints.find({
        "step": 0, "evaluated": None, "best_loss": None, "best_step": None, "held_out_before": None,
        "train_seconds": 0.0, "tokens_total": 0, "trained_tokens": 0, "tokens_padded": 0, "flops": 0,
        "recent_losses": [], "spikes": [], "start_sha256": adapters.sha256_of(adapters.adapter_tensors(net))})
    tracking = trackers.start(accelerator, recipe, run.path.name, work)
    save_every = save_interval(settings, num_steps)
    cost, ceiling = flops.count(net), flops.ceiling_of_all(accelerator, processes.precision_of(accelerator))
    prepared = preparation.prepare(net, recipe, train_rows, num_steps, accelerator,
                                   processes.precision_of(accelerator), state.get("fast_parts"))
    state["fast_parts"] = preparation.parts_in_use(prepared["fast"])
    shares = Shares(settings, prepared["packing"]["budget"], accelerator, preparation.shares_prefix(prepared["fast"]))

    def stop_after_saving(taken: tuple | None = None) -> None:
        checkpoints.save(state, taken)
        done = f"stopped after step {state['step']} of {num_steps}, checkpoint saved"
        raise StoppedError(stop.where, done, stop.todo)

    def batches_from(step: int):
        return tokens.stream_of_batches(len(train_rows), settings.batch_size, recipe.seed, step)

    rehearsed = rehearse(recipe, wrapped, trainable, optimizer.optimizer, checkpoints, state,
                         batches_from(state["step"]), num_steps - state["step"], shares, train_rows, held_out_rows,
                         accelerator, work) if settings.rehearse and state["step"] < num_steps else None
    checkpoints.load()
    batches = batches_from(state["step"])
    wrapped.train()
    checkpoints.start_random(recipe.seed)
    stop.note_only()
    start_up = None
    with tracking, steady():
        while True:
            step = state["step"]
            at_end = step == num_steps
            # Held-out rows: before the first step, after the last, and as often as the recipe says.
            due = step == 0 or at_end or (settings.eval_every and step % settings.eval_every == 0)
            if due and len(held_out_rows) and state["evaluated"] != step:
                current = evaluate_loss(wrapped, held_out_rows, shares, accelerator,
                                        lambda: stop.requested(accelerator))
                wrapped.train()
                if current is None:
                    stop_after_saving()
                if not math.isfinite(current):
                    divergence.refuse_evaluation(step, current)
                log.metrics({"step": step, "held_out_loss": current, "num_rows": len(held_out_rows)})
                when = f"after step {step}" if step else "before the first step"
                tell(Note(text=f"held-out loss {when}: {number_text(current)}"))
                state["evaluated"] = step
                if step == 0:
                    state["held_out_before"] = current
                else:
                    state["held_out_after"] = current
                    if state["best_loss"] is None or current < state["best_loss"]:
                        state["best_loss"], state["best_step"] = current, step
                        if settings.keep == "best":
                            checkpoints.save(state)
            if at_end or (step and step % save_every == 0):
                checkpoints.save(state)
            if not at_end and stop.requested(accelerator):
                stop_after_saving()
            start_up = start_up or log.start_up(stopwatch.end(), step)
            if at_end:
                break

            # One optimizer step: every process takes its share of the batch, in micro-batches.
            step_started, taken = time.perf_counter(), checkpoint.take_random()
            batch_rows = next(batches)
            rate = learning_rate_at(step, num_steps, settings)
            set_learning_rate(optimizer, rate)
            num_trained = sum(train_rows.num_trained(row) for row in batch_rows)
            passes = (shares.batch_of(micro, train_rows) for micro in shares.of(batch_rows, train_rows))
            total = accumulate(wrapped, passes, num_trained, accelerator,
                               abandon=lambda: stop.requested_here(accelerator))
            if total is None:  # the step is made anew when the run goes on, with the random numbers that it began with
                stop_after_saving(taken)
            loss = float(accelerator.reduce(total, "sum")) / num_trained
            grad_norm = float(accelerator.clip_grad_norm_(trainable, settings.max_grad_norm))
            if not (math.isfinite(loss) and (math.isfinite(grad_norm) or settings.precision == "fp16")):
                divergence.refuse_step(step + 1, loss, grad_norm, wrapped, batch_rows, shares, train_rows, accelerator)
            divergence.watch_for_spike(state, loss, [train_rows.origins[row] for row in batch_rows])
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
            state["flops"] += needed or 0
            log.metrics({"step": step + 1, "loss": loss, "learning_rate": rate, "grad_norm": grad_norm,
                         "trained_tokens": num_trained, "epoch": (step + 1) * settings.batch_size / len(train_rows)})
            log.timings({"step": step + 1, "seconds": seconds, "tokens": num_tokens,
                         "tokens_per_second": num_tokens / seconds, "trained_tokens_per_second": num_trained / seconds,
                         "flops": needed})
            tell(Progress(stage="train", done=step + 1, total=num_steps, fields={
                "loss": number_text(loss), "tokens/s": f"{state['tokens_total'] / state['train_seconds']:.0f}",
                "left": seconds_text(state["train_seconds"] / (step + 1) * (num_steps - step - 1))}))

    # Whatever comes now is made again from the last checkpoint.
    stop.end_at_once(f"stopped after the last of {num_steps} steps, checkpoint saved")
    if settings.keep == "best" and state["best_step"] not in (None, num_steps):
        checkpoints.load_best(state["best_step"])
        tell(Note(text=f"kept the adapter of step {state['best_step']}, which had the lowest held-out loss"))
    _write_adapter(net, work / "adapter", recipe, accelerator, start)
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
            "loss_spikes": state["spikes"],
            "kept": settings.keep, "peak_memory_bytes": isolate.peak_memory_bytes(),
            "device_peak_memory_bytes": _device_peak(accelerator), "tokens_per_second":
            state["tokens_total"] / state["train_seconds"], "trained_tokens": state["trained_tokens"],
            "tokens_total": state["tokens_total"], "num_trainable_params": num_trainable, "num_params": num_params,
            "precision": processes.precision_of(accelerator), "device": str(accelerator.device),
            "num_processes": accelerator.num_processes, "threads": torch.get_num_threads(), **prepared,
            "rehearsal": rehearsed,
            "tokens_padded": state["tokens_padded"], "stops": stops, "start": start_up,
            "flops": state["flops"] or None, "ceiling_flops_per_second": ceiling,
        },
    )


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


def _write_adapter(net, folder: Path, recipe: Recipe, accelerator, start: Path | None) -> None:
    tensors = adapters.adapter_tensors(net)
    if not accelerator.is_main_process:
        return
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        adapters.save_adapter(net, folder, recipe.model.base, tensors, start)


def _device_peak(accelerator) -> int | None:
    import torch

    return torch.cuda.max_memory_allocated() if accelerator.device.type == "cuda" else None
