"""A run folder as stages see it, made by hand: base, adapter and token files, nothing trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from lora_kit.recipe import Recipe
from lora_kit.tokens import write_examples
from lora_kit.types import Artifact, Example, Result


class FakeRun:
    """Stands in for rundir.Run: what a stage reads and writes, without recipes, locks or seals."""

    def __init__(self, path: Path, base: Path, adapter: Path | None = None) -> None:
        self.path, self.resolved = path, {"base": {"artifact": {"path": str(base)}}}
        self._artifacts = {"base": Artifact(name="base", path=str(base), kind="hf", tokenizer=str(base))}
        if adapter is not None:
            self._artifacts["adapter"] = Artifact(name="adapter", path=str(adapter), kind="adapter", base=str(base))

    def stage_dir(self, stage: str) -> Path:
        return self.path / stage

    def work(self, stage: str) -> Path:
        folder = self.path / f".{stage}.working"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def artifact(self, name: str) -> Artifact:
        return self._artifacts[name]

    def publish(self, stage: str, result: Result) -> None:
        """Put the working folder in place and know the result's artifacts, as the pipeline does."""
        self.work(stage).rename(self.stage_dir(stage))
        for artifact in result.artifacts:
            self._artifacts[artifact.name] = replace(
                artifact, path=str(self.path / artifact.path), tokenizer=str(self.path / artifact.tokenizer))


def recipe(**sections) -> Recipe:
    return Recipe.model_validate(
        {"name": "test", "model": {"base": "base"}, "data": {"train": [{"source": "rows.jsonl"}]}, **sections})


def save_adapter(
    base: Path, folder: Path, *, seed: int = 0, size: float = 0.05, targets="all-linear", **config
) -> Path:
    """A LoRA of rank 4 on ``base`` with random B (standard deviation ``size``), in PEFT layout."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets,
                                                "task_type": "CAUSAL_LM", **config}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=size)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def save_rows(folder: Path, tokenizer, *, num: int = 6, split: str = "held_out", words: int = 20) -> Path:
    """Token files of ``num`` chats of random words with the assistant's turn trained, and an empty other split."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for row in range(num):
        question, answer = (" ".join(generator.choice(["12", "cat", "the", "ü", "a-b", "sees"], words)) for _ in "qa")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        after = tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
        examples.append(Example(
            tokens_T=np.array([*before, *after], np.int32),
            loss_mask_T=np.array([0] * len(before) + [1] * len(after), np.uint8), origin=f"rows.jsonl:{row + 1}"))
    write_examples(folder, split, examples)
    write_examples(folder, "train" if split == "held_out" else "held_out", [])
    return folder


def save_token_rows(folder: Path, rows) -> Path:
    """Token files whose training rows are the token ids ``rows``, all trained."""
    folder.mkdir(parents=True, exist_ok=True)
    write_examples(folder, "train", [
        Example(tokens_T=np.array(row, np.int32), loss_mask_T=np.ones(len(row), np.uint8), origin=f"rows:{number}")
        for number, row in enumerate(rows, 1)])
    write_examples(folder, "held_out", [])
    return folder
