"""The losses of `lora-kit train` beside those of TRL's SFTTrainer, on the same token ids in the same order.

    python benchmarks/losses_against_trl.py             SmolLM2-135M in fp32, the golden conversations
    python benchmarks/losses_against_trl.py --quick     a tiny random model in its place

TRL serves as an oracle that shares no code of ours above peft: its trainer, its collator, its loss. It gets our
token ids and labels as they lie in the run's token files. ``--check`` exits 1 when a step's losses are over 1e-4
apart (relative). Needs trl (`make install-dev` brings it); ``--json PATH`` writes the figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

TOLERANCE = 1e-4


def losses_of_trl(base: Path, data_dir: Path, settings: dict) -> list[float]:
    """Loss of each step by SFTTrainer on the train split in ``data_dir``, in nats per trained token."""
    import torch
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from lora_kit import adapter, chat, model, tokens
    from lora_kit.recipe import LoraSection

    examples = tokens.read_examples(data_dir, "train")
    stream = tokens.stream_of_batches(len(examples), settings["batch_size"], settings["seed"], 0)
    rows = [examples[row] for _ in range(settings["steps"]) for row in next(stream)]
    labels = [[int(token) if trained and index else tokens.IGNORED for index, (token, trained) in enumerate(
        zip(row.tokens_T, row.loss_mask_T, strict=True))] for row in rows]
    dataset = Dataset.from_dict({"input_ids": [row.tokens_T.tolist() for row in rows], "labels": labels})
    net = adapter.add_adapter(model.load_base(base, dtype="fp32", device="cpu"),
                              LoraSection(rank=settings["rank"], alpha=settings["alpha"]), settings["seed"])
    seen: list[float] = []

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *arguments, **options):
            loss = super().training_step(*arguments, **options)
            seen.append(float(loss.detach()))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=net, train_dataset=dataset, processing_class=chat.load_tokenizer(base), args=SFTConfig(
                output_dir=folder, max_steps=settings["steps"], per_device_train_batch_size=settings["batch_size"],
                learning_rate=settings["learning_rate"], lr_scheduler_type="cosine", warmup_steps=0,
                weight_decay=0.0, max_grad_norm=1.0, bf16=False, fp16=False, gradient_checkpointing=False,
                max_length=None, packing=False, report_to="none", save_strategy="no", disable_tqdm=True,
                dataset_kwargs={"skip_prepare_dataset": True}, use_cpu=True, logging_strategy="no"))
        trainer.train()
    return seen


def compare(base: Path) -> tuple[list[float], list[float]]:
    """(ours, TRL's) losses on the golden conversations."""
    from lora_kit import rundir
    from tests import golden_losses

    with tempfile.TemporaryDirectory() as folder:
        ours = golden_losses.measure(base, Path(folder))
        data_dir = rundir.open_run(rundir.newest(Path(folder) / "runs")).stage_dir("data")
        return ours, losses_of_trl(base, data_dir, golden_losses.SETTINGS)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model in place of SmolLM2-135M")
    parser.add_argument("--check", action="store_true", help=f"exit 1 over {TOLERANCE:g}")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    import torch

    from lora_kit import hardware
    from tests import fetch, tiny

    torch.set_num_threads(hardware.usable_cores())
    with tempfile.TemporaryDirectory() as folder:
        base = tiny.save_model(Path(folder) / "tiny")[0] if args.quick else fetch.base()
        ours, theirs = compare(base)
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)]
    print("step  lora-kit    SFTTrainer  relative difference")
    for step, (a, b, difference) in enumerate(zip(ours, theirs, apart, strict=True), 1):
        print(f"{step:4}  {a:.7f}  {b:.7f}  {difference:.1e}")
    print(f"largest difference {max(apart):.1e}, tolerance {TOLERANCE:g}")
    if args.json:
        args.json.write_text(json.dumps({"lora_kit": ours, "trl": theirs, "largest_difference": max(apart)}))
    return int(args.check and max(apart) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
