"""One training step in parts, and the share of the machine's matrix ceiling that it reaches.

    python benchmarks/train_profile.py             SmolLM2-135M on the rows of recipes/chat.yaml
    python benchmarks/train_profile.py --quick     a tiny random model in its place

What is measured is the train stage itself: this program listens to its steps, lets two pass, times ``--steps`` of them,
and looks at the next ``--profiled`` ones with torch's profiler. Whatever the stage does to the model, it does here.

Each operation belongs to the innermost part that it was made in: attention (with rotary positions), linear layers
(with their adapters), norms, activation (what the feed-forward part does besides its linear layers), head and loss; a
backward operation to the part of the forward one that it is the gradient of. Where one module or backward node spans
several parts, a matrix product counts for the linear layers and a batched one for attention. Seconds are each
operation's own time: on a CPU the calling thread's, on an accelerator its kernels', and what is left of the step's
time by the clock is the host's (``device idle``).

The share of the ceiling is what the step needs (lora_kit/flops.py says how that is counted) over its seconds, over the
rate of one large matrix product of the training's dtype with the same threads, measured right before and right after;
the better of the two counts. Nothing here depends on the device: accelerate chooses it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

WARM_STEPS = 2
_SCOPE = "part: "
_NODE = "autograd::engine::evaluate_function: "
PARTS = ("attention", "linear layers", "norms", "activation", "head and loss", "residuals and others")
ORDER = ("data", *(f"forward, {part}" for part in PARTS), *(f"backward, {part}" for part in PARTS), "clipping",
         "optimizer", "other", "device idle")
_PRODUCTS = ("mm", "addmm", "linear", "mkldnn_linear", "_scaled_mm")
_ATTENTION = ("bmm", "baddbmm", "softmax", "_softmax", "_softmax_backward_data")
_ATTENTION_WORDS = ("scaled_dot_product", "flash_attention", "flash_attn", "efficient_attention")


class Done(Exception):
    """Enough was seen: ends the training that is looked at."""


def part_of_module(module) -> str | None:
    """The part that a module's own operations belong to; None where they stay in the part around it."""
    kind = type(module).__name__
    if "Attention" in kind:
        return "attention"
    if "Norm" in kind:
        return "norms"
    if hasattr(module, "base_layer") or "Linear" in kind or "Conv1D" in kind:
        return "linear layers"
    if type(module).__module__.startswith("peft."):
        return None
    if "MLP" in kind or "FeedForward" in kind or any(word in kind for word in ("SiLU", "GELU", "Activation")):
        return "activation"
    return "residuals and others" if "Layer" in kind or kind.endswith("Model") else None


@contextmanager
def scopes(seen: dict[str, Any]) -> Iterator[None]:
    """Mark modules, and the stage's pieces around them, for the profiler.

    Hooks are the global ones of torch, so that no module carries a hook that could keep a quick path from it.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from torch.nn.modules import module as torch_module

    from lora_kit import flops, loss, packing, shares, tokens

    parts: dict[int, str | None] = {}
    open_scopes: list[tuple[int, Any]] = []

    def enter(module, _inputs) -> None:
        if not seen["profiling"]:
            return
        if id(module) not in parts:
            net = seen.get("net")
            head = net.get_output_embeddings() if net is not None else None
            parts[id(module)] = "head and loss" if module is head else part_of_module(module)
        if parts[id(module)] is not None:
            scope = torch.profiler.record_function(_SCOPE + parts[id(module)])
            scope.__enter__()
            open_scopes.append((id(module), scope))

    def leave(module, _inputs, _output) -> None:
        if open_scopes and open_scopes[-1][0] == id(module):
            open_scopes.pop()[1].__exit__(None, None, None)

    def within(name: str, function):
        def called(*arguments, **options):
            if name == "head and loss":
                seen["net"] = _plain(arguments[0])
            with torch.profiler.record_function(_SCOPE + name):
                return function(*arguments, **options)
        return called

    def measured(device, precision, **options) -> float:
        seen["device"], seen["dtype"] = device, precision
        seen["ceilings"].append(measure_ceiling(device, precision, **options))
        return seen["ceilings"][-1]

    measure_ceiling = flops.measure_ceiling
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(flops, "measure_ceiling", measured))
        for owner, attribute, name in (
                (shares, "loss_sum", "head and loss"), (loss, "loss_sum", "head and loss"),
                (packing, "packed_batch_of", "data"), (tokens, "batch_of", "data"),
                (Accelerator, "clip_grad_norm_", "clipping"), (AcceleratedOptimizer, "step", "optimizer"),
                (AcceleratedOptimizer, "zero_grad", "optimizer")):
            stack.enter_context(mock.patch.object(owner, attribute, within(name, getattr(owner, attribute))))
        before = torch_module.register_module_forward_pre_hook(enter)
        stack.callback(before.remove)
        after = torch_module.register_module_forward_hook(leave)
        stack.callback(after.remove)
        yield


def _plain(model):
    """The causal LM under the wrappers of several processes and of peft."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def by_part(events, device: str) -> dict[str, float]:
    """Seconds of each part (a name of ORDER) in the profiler's ``events``."""
    events = [event for event in events if event.device_type.name == "CPU"]
    made_in: dict[int, tuple[float, str]] = {}
    for event in events:
        if event.sequence_nr >= 0 and _node_of(event) is None:
            # Of the forward operations with one number the last made the node that carries it.
            last = made_in.get(event.sequence_nr, (-1.0, ""))
            if event.time_range.start >= last[0]:
                made_in[event.sequence_nr] = (event.time_range.start, _scope_of(event) or "")
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        own = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        if own and not (device != "cpu" and event.name.startswith(_SCOPE)):
            seconds[_part_of(event, made_in)] += own / 1e6
    return dict(seconds)


def _part_of(event, made_in: dict[int, tuple[float, str]]) -> str:
    node, scope = _node_of(event), _scope_of(event)
    if node is None:
        return scope if scope in ORDER else f"forward, {_by_name(event, scope)}" if scope in PARTS else "other"
    made = scope or made_in.get(node.sequence_nr, (0.0, ""))[1]  # a scope inside: work done again (checkpointing)
    return f"backward, {_by_name(event, made if made in PARTS else 'residuals and others')}"


def _by_name(event, part: str) -> str:
    """``part``, or the one that the operation's name speaks for where a module or node spans several."""
    if part in ("linear layers", "head and loss", "norms"):
        return part
    while event is not None and not event.name.startswith((_NODE, _SCOPE)):
        name = event.name.rpartition("::")[2]
        if name in _PRODUCTS:
            return "linear layers"
        if name in _ATTENTION or any(word in name for word in _ATTENTION_WORDS):
            return "attention"
        event = event.cpu_parent
    return part


def _node_of(event):
    """The backward node that ``event`` runs in; None in a forward pass."""
    while event is not None and not event.name.startswith(_NODE):
        event = event.cpu_parent
    return event


def _scope_of(event) -> str | None:
    """The innermost part around ``event``, inside its backward node where it runs in one."""
    while event is not None and not event.name.startswith((_SCOPE, _NODE)):
        event = event.cpu_parent
    return event.name.removeprefix(_SCOPE) if event is not None and event.name.startswith(_SCOPE) else None


def measure(recipe_file, folder: Path, *, num_steps: int, num_profiled: int) -> dict[str, Any]:
    """Train ``recipe_file`` until enough steps were seen; returns the figures that ``show`` prints."""
    import torch

    from lora_kit import events, flops, pipeline, rundir

    seen: dict[str, Any] = {"profiling": False, "marks": [], "ceilings": []}
    profiler = torch.profiler.profile(acc_events=True)

    def wait() -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def listen(event) -> None:
        if not isinstance(event, events.Progress) or event.stage != "train":
            return
        wait()
        seen["marks"].append(time.perf_counter())
        if event.done == WARM_STEPS + num_steps:
            seen["profiling"] = True
            profiler.start()
            seen["profile_began"] = time.perf_counter()
        elif event.done == WARM_STEPS + num_steps + num_profiled:
            seen["profile_seconds"] = time.perf_counter() - seen["profile_began"]
            profiler.stop()
            raise Done

    with events.listening(listen), scopes(seen):
        try:
            pipeline.run_recipe(recipe_file, runs_dir=folder, until="train", fresh=True)
        except Done:
            flops.measure_ceiling(seen["device"], seen["dtype"])
    device = seen["device"].type
    lines = [json.loads(line) for line in
             (rundir.newest(folder) / "train" / "timings.jsonl").read_text().splitlines()]
    timed = [line for line in lines if "step" in line][WARM_STEPS:WARM_STEPS + num_steps]
    marks = seen["marks"][WARM_STEPS - 1:WARM_STEPS + num_steps]
    parts = {name: seconds / num_profiled for name, seconds in by_part(profiler.events(), device).items()}
    profiled = seen["profile_seconds"] / num_profiled
    # What is left of the clock's time: on a CPU Python between the operations, else the device waiting for the host.
    left = "other" if device == "cpu" else "device idle"
    parts[left] = parts.get(left, 0.0) + max(0.0, profiled - sum(parts.values()))
    seconds = (marks[-1] - marks[0]) / num_steps
    step_flops = sum(line["flops"] for line in timed) / num_steps if all(line.get("flops") for line in timed) else None
    ceiling = max(seen["ceilings"])
    return {
        "device": _device_name(seen["device"]), "dtype": seen["dtype"],
        "threads": torch.get_num_threads(), "num_steps": num_steps, "num_profiled": num_profiled,
        "step_seconds": seconds, "profiled_step_seconds": profiled,
        "tokens_per_step": sum(line["tokens"] for line in timed) / num_steps,
        "tokens_per_second": sum(line["tokens"] for line in timed) / (marks[-1] - marks[0]),
        "parts": {name: parts[name] for name in ORDER if name in parts},
        "step_flops": step_flops, "ceiling_flops_per_second": ceiling,
        "utilisation": step_flops / seconds / ceiling if step_flops else None,
    }


def _device_name(device) -> str:
    import torch

    from lora_kit import hardware

    return hardware.cpu_model() if device.type == "cpu" else f"{device}: {torch.cuda.get_device_name(device)}" \
        if device.type == "cuda" else str(device)


def show(figures: dict[str, Any]) -> None:
    """Print the figures: a line on each part, then what the step reaches of the ceiling."""
    total = sum(figures["parts"].values())
    print(f"{figures['device']}, {figures['dtype']}, {figures['threads']} CPU threads\n")
    print(f"{'part of a step':34} {'seconds':>9} {'share':>7}")
    for name, seconds in figures["parts"].items():
        print(f"{name:34} {seconds:9.4f} {seconds / total:7.1%}")
    print(f"{'with the profiler':34} {figures['profiled_step_seconds']:9.4f}")
    print(f"{'without it':34} {figures['step_seconds']:9.4f}   {figures['tokens_per_second']:,.0f} tokens/s, "
          f"{figures['tokens_per_step']:,.0f} a step")
    if figures["utilisation"] is None:
        print("share of the ceiling: not counted for this model")
        return
    print(f"{'share of the ceiling':34} {figures['utilisation']:9.1%}   "
          f"{figures['step_flops'] / figures['step_seconds'] / 1e12:.3g} of "
          f"{figures['ceiling_flops_per_second'] / 1e12:.3g} TFLOP/s, {figures['step_flops'] / 1e12:.3g} TFLOP a step")


def main(arguments: list[str] | None = None) -> int:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", type=Path, default=_ROOT / "recipes" / "chat.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--steps", type=int, default=4, help="steps timed without the profiler")
    parser.add_argument("--profiled", type=int, default=2, help="steps looked at with it")
    parser.add_argument("--threads", type=int, help="CPU threads; default: what torch takes")
    parser.add_argument("--quick", action="store_true", help="a tiny random model and a few rows")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    args = parser.parse_args(arguments)
    from lora_kit.recipe_file import read_recipe

    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ):
        folder, recipe = Path(name), args.recipe
        if args.quick:
            from tests import tiny, tiny_run

            os.environ["LORA_KIT_CACHE"] = str(folder / "cache")
            recipe = tiny_run.write_recipe(folder / "tiny", tiny.save_model(folder / "model")[0])
        if args.threads:
            import torch

            torch.set_num_threads(args.threads)
        num_steps = WARM_STEPS + args.steps + args.profiled
        settings = [f"train.steps={num_steps + 1}", "train.prove=false", "data.held_out_rows=4", *args.set]
        figures = measure(read_recipe(recipe, settings), folder / "runs", num_steps=args.steps,
                          num_profiled=args.profiled)
    show(figures)
    if args.json:
        args.json.write_text(json.dumps({"recipe": "tiny" if args.quick else recipe.name, **figures}, indent=1) + "\n",
                             encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
