"""LoRA fine-tuning in one page: the loop of lora_kit/train.py without lora-kit.

    python examples/minimal_loop.py --model FOLDER --data rows.jsonl --steps 20

FOLDER holds a chat model in Hugging Face layout; each row is {"messages": [...]}. The losses
are those of `lora-kit train` on the same rows and settings (a test compares them), because

* an assistant's turn is trained on through its stop token, and nothing else is;
* the order is numpy's permutation seeded with [seed, epoch], epochs laid end to end;
* a step's loss is summed and divided by the trained tokens of the whole batch;
* the adapter is drawn right after torch.manual_seed(seed), and stays in fp32.
"""

import argparse
import json
import math

import numpy
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def tokens_and_labels(tokenizer, messages):
    """Token ids of the conversation and labels that are -100 outside of the assistant's turns."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels = encoded["input_ids"], [-100] * len(encoded["input_ids"])
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = len(tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True))
        end = len(tokenizer.apply_chat_template(messages[:index + 1], tokenize=False))
        turn = [t for t, (low, high) in enumerate(encoded["offset_mapping"]) if low >= start and high <= end]
        stop = max(t for t in turn if ids[t] in tokenizer.all_special_ids)
        for t in range(turn[0], stop + 1):
            labels[t] = ids[t]
    return ids, labels


def batches(num_rows, batch_size, seed):
    """Row numbers of one batch after another, without end."""
    epoch, waiting = 0, []
    while True:
        while len(waiting) < batch_size:
            waiting += numpy.random.default_rng([seed, epoch]).permutation(num_rows).tolist()
            epoch += 1
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def loss_sum(model, rows):
    """Summed negative log-likelihood of the trained tokens of ``rows``."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


def main(arguments=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--warmup", type=float, default=0.05)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="write the adapter here")
    args = parser.parse_args(arguments)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with open(args.data, encoding="utf-8") as file:
        rows = [tokens_and_labels(tokenizer, json.loads(line)["messages"]) for line in file if line.strip()]
    too_long = [number for number, (ids, _) in enumerate(rows, 1) if len(ids) > args.max_tokens]
    if too_long:
        raise SystemExit(f"{args.data}:{too_long[0]}: over {args.max_tokens} tokens")

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    torch.manual_seed(args.seed)
    model = get_peft_model(model, LoraConfig(
        r=args.rank, lora_alpha=args.alpha, target_modules="all-linear", task_type="CAUSAL_LM",
    ))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=args.learning_rate, weight_decay=0.0)
    num_warmup = round(args.warmup * args.steps)

    model.train()
    losses = []
    order = batches(len(rows), args.batch_size, args.seed)
    for step in range(args.steps):
        progress = (step - num_warmup) / max(1, args.steps - num_warmup)
        factor = (step + 1) / num_warmup if step < num_warmup else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * factor

        # Rows of like length share a micro-batch, so that little is padding.
        batch = sorted((rows[number] for number in next(order)), key=lambda row: -len(row[0]))
        num_trained = sum(label != -100 for _, labels in batch for label in labels[1:])
        total = 0.0
        for start in range(0, len(batch), args.micro_batch_size):
            loss = loss_sum(model, batch[start:start + args.micro_batch_size])
            (loss / num_trained).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / num_trained)
        print(f"step {step + 1}  loss {losses[-1]:.6f}")

    if args.out:
        model.save_pretrained(args.out)
    return losses


if __name__ == "__main__":
    main()
