"""Train and merge from Python, then use the merged model with transformers alone.

    python examples/train_and_merge.py --recipe recipes/chat.yaml --set train.steps=10 --prompt "How was your day?"

run_recipe does what `lora-kit run` does, up to the stage that is asked for: what is done already is skipped.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_kit


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="recipes/chat.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe")
    parser.add_argument("--runs", default="runs")
    parser.add_argument("--prompt", default="How was your day?")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args(arguments)

    recipe = lora_kit.read_recipe(args.recipe, args.set)
    run = lora_kit.run_recipe(recipe, runs_dir=args.runs, until="merge")
    print(f"run {run.path}")
    for verdict in run.seal("merge")["verdicts"]:
        print(f"{verdict['outcome']}  {verdict['claim']}: {verdict['evidence']}")

    # From here on without lora-kit: the merged model is a plain folder.
    folder = run.artifact("merged").path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}], add_generation_prompt=True,
                                           return_tensors="pt", return_dict=True)
    tokens = model.generate(**prompt, max_new_tokens=args.max_new_tokens, do_sample=False)
    answer = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True)
    print(f"{args.prompt}\n  {answer}")
    return answer


if __name__ == "__main__":
    main()
