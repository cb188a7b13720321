"""Listen to what stages tell while they work, and draw the loss as training goes.

    python examples/watch_training.py --recipe recipes/chat.yaml --set train.steps=40

Nothing below the command line prints: whoever listens decides what is shown. What was told can be read again in
train/metrics.jsonl.
"""

import argparse
import json

import lora_kit
from lora_kit.events import Caution, Progress, StageFinished, StageSkipped


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="recipes/chat.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--width", type=int, default=60, help="of the first step's bar")
    args = parser.parse_args(arguments)
    losses = []

    def show(event):
        if isinstance(event, Progress) and event.stage == "train":
            losses.append(float(event.fields["loss"]))
            bar = "#" * round(args.width * losses[-1] / losses[0])
            print(f"{event.done:5}/{event.total} {bar} {losses[-1]}")
        elif isinstance(event, StageFinished):
            print(f"{event.stage}: {event.summary}")
        elif isinstance(event, (StageSkipped, Caution)):
            print(getattr(event, "text", "") or f"{event.stage}: {event.why}")

    recipe = lora_kit.read_recipe(args.recipe, args.set)
    with lora_kit.listening(show):
        run = lora_kit.run_recipe(recipe, runs_dir=args.runs, until="train")

    metrics = run.stage_dir("train") / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    for line in lines:
        if "held_out_loss" in line:
            print(f"held-out loss after step {line['step']}: {line['held_out_loss']:.3f} over {line['num_rows']} rows")
    return losses


if __name__ == "__main__":
    main()
