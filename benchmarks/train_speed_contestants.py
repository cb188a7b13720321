"""One training of benchmarks/train_speed.py, in the process that this is.

    python benchmarks/train_speed_contestants.py REQUEST.json

REQUEST names a ``trainer`` (a function of TRAINERS), the base, the rows as they lie in token files, and the number
of threads; its ``answer`` is the file that the figures go to. Every trainer gets the same rows in the same order, a
LoRA with the same first values, and the same constant learning rate from the first step. What goes wrong is the last
line on standard error.

``losses_of_reference`` is what losses are measured against: peft in fp32, each row on its own, nothing padded or
packed. Its loop is written out here, with nothing of ``lora_kit/train.py``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))


def prepare(request: dict) -> dict[str, Any]:
    """The base (a tiny random model with ``tiny``), the token files of the recipe, and the losses to compare with."""
    from lora_kit import pipeline, tokens
    from lora_kit.recipe_file import read_recipe
    from tests import fetch, tiny

    folder = Path(request["folder"])
    base = tiny.save_model(folder / "tiny")[0] if request["tiny"] else fetch.base()
    os.environ["LORA_KIT_CACHE"] = request["cache"]  # the base above came from the user's own
    recipe = folder / "data.yaml"
    recipe.write_text(json.dumps({**request["recipe"], "model": {"base": str(base)}}))
    run = pipeline.run_recipe(read_recipe(recipe), runs_dir=folder / "runs", until="data", fresh=True)
    data_dir = run.stage_dir("data")
    examples = tokens.read_examples(data_dir, "train")
    lengths = [examples.length(row) for row in range(len(examples))]
    return {"base": str(base), "data_dir": str(data_dir), "num_rows": len(lengths),
            "num_tokens": sum(lengths), "longest": max(lengths),
            "num_trained": sum(examples.num_trained(row) for row in range(len(examples))),
            "losses": losses_of_reference({**request, "base": str(base), "data_dir": str(data_dir)})}


def losses_of_reference(request: dict) -> list[float]:
    """Losses of the steps by plain peft in fp32, a row at a time."""
    import torch

    from lora_kit import tokens
    from lora_kit.loss import loss_sum

    net = _model_with_adapter(request, "float32")
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=request["learning_rate"], weight_decay=0.0)
    net.train()
    losses = []
    for rows in _batches(request):
        batches = [tokens.batch_of([row], 0, "cpu") for row in rows]
        num_trained = sum(batch.num_trained_tokens for batch in batches)
        total = 0.0
        for batch in batches:
            summed = loss_sum(net, batch)
            (summed / num_trained).backward()
            total += float(summed.detach())
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total / num_trained)
    return losses


def _now(request: dict) -> float:
    """Seconds by the clock that ``request`` names: the wall's, or this process's CPU time over its threads."""
    return time.process_time() / request["threads"] if request["clock"] == "cpu" else time.perf_counter()


def train_here(request: dict) -> dict[str, Any]:
    """`lora-kit train` on a recipe that says what ``request`` does: its run folder's own figures."""
    from lora_kit import events, pipeline
    from lora_kit.recipe_file import read_recipe

    said: list[str] = []
    first_ended: list[float] = []
    ended: list[float] = []

    def listen(event: events.Event) -> None:
        if isinstance(event, events.Caution):
            said.append(event.text)
        elif isinstance(event, events.Progress) and event.stage == "train":
            first_ended.append(time.time())
            ended.append(_now(request))

    folder = Path(request["folder"])
    recipe = folder / "speed.yaml"
    train = {**request["recipe"]["train"], **request["options"], "steps": request["steps"]}
    recipe.write_text(json.dumps({**request["recipe"], "model": {"base": request["base"]}, "train": train}))
    with events.listening(listen):
        run = pipeline.run_recipe(read_recipe(recipe), runs_dir=folder / "runs", until="train", fresh=True)
    figures = run.seal("train")["figures"]
    losses, timings = ([json.loads(line) for line in (run.stage_dir("train") / name).read_text().splitlines()]
                       for name in ("metrics.jsonl", "timings.jsonl"))
    of_step = {entry["step"]: entry for entry in losses if "loss" in entry}
    timings = [entry for entry in timings if "step" in entry]  # not the parts of the start
    if request["clock"] == "cpu":  # the run's own figures are the clock's; a step is from the end of the one before it
        for entry, before, after in zip(timings[1:], ended, ended[1:], strict=False):
            entry["seconds"] = after - before
    return {
        "steps": [{"seconds": entry["seconds"], "tokens": entry["tokens"], "processed": entry["tokens"],
                   "trained": of_step[entry["step"]]["trained_tokens"], "loss": of_step[entry["step"]]["loss"]}
                  for entry in timings],
        "first_step_at": first_ended[0] - timings[0]["seconds"], "said": said, "precision": figures["precision"],
        "warm_up_seconds": sum(_numbers_called(figures, ("compile_seconds", "warm_up_seconds"))),
        "peak_memory_bytes": figures["peak_memory_bytes"],
    }


def train_with_trl(request: dict) -> dict[str, Any]:
    """SFTTrainer: its defaults, and what ``options`` name beside them."""
    from trl import SFTConfig, SFTTrainer

    options = request["options"]
    layout = options.get("layout", "padded")
    arguments: dict[str, Any] = {
        "padded": {}, "length-grouped": {"train_sampling_strategy": "group_by_length"},
        # Without a longest row to hold to: there is none over it, and TRL asks for this.
        "padding-free": {"padding_free": True, "max_length": None},
        "packing": {"packing": True, "max_length": request["block"], "per_device_train_batch_size": 1},
    }[layout]
    if "checkpointing" in options:
        arguments["gradient_checkpointing"] = options["checkpointing"]
    if options.get("precision") == "fp32":
        arguments["bf16"] = False
    net = _model_with_adapter(request, "bfloat16" if options.get("precision") == "bf16-weights" else "float32")
    arguments |= {"torch_compile": True} if options.get("compile") else {}
    return _train_with(SFTTrainer, SFTConfig, net, request, arguments)


def train_with_hf(request: dict) -> dict[str, Any]:
    """transformers' Trainer on a peft model, with its own collator for labels."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    from lora_kit import chat

    precision = request["options"]["precision"]
    net = _model_with_adapter(request, "bfloat16" if precision == "bf16-weights" else "float32")
    tokenizer = chat.load_tokenizer(request["base"])
    tokenizer.padding_side = "right"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return _train_with(Trainer, TrainingArguments, net, request, {"bf16": precision != "fp32"},
                       data_collator=DataCollatorForSeq2Seq(tokenizer))


def _train_with(trainer_class, config_class, net, request: dict, arguments: dict[str, Any],
                **more: Any) -> dict[str, Any]:
    """Steps of a trainer of transformers, each from the end of the one before it."""
    import datasets
    from transformers import TrainerCallback

    from lora_kit import chat
    from lora_kit.tokens import IGNORED

    datasets.disable_progress_bars()
    steps: list[dict[str, Any]] = []
    begun: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *_, **__):
            begun.append(time.time())
            self.ended = _now(request)

        def on_step_end(self, *_, **__):
            now = _now(request)
            steps[-1]["seconds"], self.ended = now - self.ended, now

    class Counted(trainer_class):
        def _get_train_sampler(self, *given, **named):
            sampler = super()._get_train_sampler(*given, **named)
            return Spread(sampler, request["batch_size"]) if arguments.get("train_sampling_strategy") else sampler

        def training_step(self, model, inputs, *rest, **options):
            mask = inputs.get("attention_mask")
            processed = inputs["input_ids"].numel()
            step = {"tokens": processed if mask is None else int(mask.sum()), "processed": processed,
                    "trained": int((inputs["labels"][:, 1:] != IGNORED).sum())}
            loss = super().training_step(model, inputs, *rest, **options)
            steps.append({**step, "loss": float(loss.detach())})
            return loss

    settings = {
        "output_dir": str(Path(request["folder"]) / "trainer"), "max_steps": request["steps"], "use_cpu": True,
        "per_device_train_batch_size": request["batch_size"], "learning_rate": request["learning_rate"],
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "save_strategy": "no",
        "report_to": "none", "logging_strategy": "no", "disable_tqdm": True}
    trainer = Counted(
        model=net, args=config_class(**{**settings, **arguments}), train_dataset=_dataset(request),
        processing_class=chat.load_tokenizer(request["base"]), callbacks=[Clock()], **more)
    trainer.train()
    return {"steps": steps, "first_step_at": begun[0]}


class Spread:
    """A sampler's batches as they are, in an order of which any few are like the whole epoch.

    Grouping by length begins with the longest rows, which cost the least a token: the first steps would be no measure
    of an epoch.
    """

    def __init__(self, sampler, batch_size: int) -> None:
        self.sampler, self.batch_size = sampler, batch_size

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        rows = list(self.sampler)
        whole = len(rows) // self.batch_size * self.batch_size
        batches = [rows[start:start + self.batch_size] for start in range(0, whole, self.batch_size)]
        # Multiples of the golden section lie apart from each other, however many are taken.
        order = sorted(range(len(batches)), key=lambda place: place * 0.6180339887498949 % 1)
        return iter([row for place in order for row in batches[place]] + rows[whole:])


def _model_with_adapter(request: dict, dtype: str):
    """The base as a trainer of transformers would load it, with the adapter that lora-kit would start from."""
    import torch
    from transformers import AutoModelForCausalLM

    from lora_kit import adapter
    from lora_kit.recipe import LoraSection

    base = AutoModelForCausalLM.from_pretrained(request["base"], dtype=getattr(torch, dtype))
    return adapter.add_adapter(base, LoraSection(**request["recipe"]["lora"]), request["recipe"]["seed"])


def _batches(request: dict) -> Iterator[list]:
    """The examples of each step, in the order of `lora-kit train`."""
    from lora_kit import tokens

    examples = tokens.read_examples(Path(request["data_dir"]), "train")
    stream = tokens.stream_of_batches(len(examples), request["batch_size"], request["recipe"]["seed"], 0)
    for _ in range(request["steps"]):
        yield [examples[row] for row in next(stream)]


def _dataset(request: dict):
    """Token ids and labels of the rows that the steps take; of all rows where the trainer chooses among them."""
    from datasets import Dataset

    from lora_kit.tokens import IGNORED

    if request["options"].get("own_order"):
        needed = max(request["steps"], -(-request["num_rows"] // request["batch_size"]))
        request = {**request, "steps": needed}
    rows = [row for batch in _batches(request) for row in batch]
    labels = [[int(token) if trained and index else IGNORED for index, (token, trained) in enumerate(
        zip(row.tokens_T, row.loss_mask_T, strict=True))] for row in rows]
    return Dataset.from_dict({"input_ids": [row.tokens_T.tolist() for row in rows], "labels": labels})


def _numbers_called(figures: Any, names: tuple[str, ...]) -> Iterator[float]:
    """Numbers under one of ``names``, wherever in ``figures`` they stand."""
    if isinstance(figures, dict):
        for name, value in figures.items():
            if name in names and isinstance(value, (int, float)):
                yield value
            else:
                yield from _numbers_called(value, names)


TRAINERS = {"prepare": prepare, "lora-kit": train_here, "trl": train_with_trl, "hf": train_with_hf}


def main(path: Path) -> int:
    request = json.loads(path.read_text())
    try:
        trainer = TRAINERS[request["trainer"]]
        import torch

        torch.set_num_threads(request["threads"])
        answer = trainer(request)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is one line of the table
        print(" ".join(f"{type(error).__name__}: {error}".split())[:400], file=sys.stderr)
        return 1
    from lora_kit import hardware, isolate

    answer["peak_memory_bytes"] = max(isolate.peak_memory_bytes(), answer.get("peak_memory_bytes", 0))
    answer["matrix_gflops"] = hardware.measure_matrix_gflops()
    Path(request["answer"]).write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
