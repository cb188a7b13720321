"""One question to the base and to the model that was made of it, one after the other.

    python examples/compare_before_after.py --recipe recipes/chat.yaml --prompt "What did you do today?"

open_engine loads any artifact of a run: base, adapter, merged or a quantized form, and all of them answer alike.
"""

import argparse

import lora_kit
from lora_kit.chat import prompt_ids


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="recipes/chat.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--artifacts", nargs="+", default=["base", "merged"])
    parser.add_argument("--prompt", default="What did you do today?")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args(arguments)

    recipe = lora_kit.read_recipe(args.recipe, args.set)
    needed = "quantize" if set(args.artifacts) - {"base", "adapter", "merged"} else "merge"
    run = lora_kit.run_recipe(recipe, runs_dir=args.runs, until=needed)
    answers = {}
    for name in args.artifacts:
        with lora_kit.open_engine(run.artifact(name)) as engine:
            prompt = prompt_ids(engine.tokenizer, [{"role": "user", "content": args.prompt}])
            answers[name] = engine.generate([prompt], max_new_tokens=args.max_new_tokens)[0].text
        print(f"{name} ({engine.name}): {answers[name]}")
    return answers


if __name__ == "__main__":
    main()
