"""The model that is trained: the base in the arithmetic's type, with a new, prepared or earlier adapter on it.

Reads the base, the adapter to go on from and ``train/start/``; writes the latter once. (torch inside functions.)
"""

from __future__ import annotations

import math
from pathlib import Path

from lora_kit import adapter as adapters
from lora_kit import adapter_start, chat, model, tokens
from lora_kit.events import Note, tell
from lora_kit.processes import precision_of, shard_model
from lora_kit.recipe import Recipe
from lora_kit.rundir import Run


def model_with_adapter(recipe: Recipe, run: Run, accelerator, train_rows: tokens.ExampleFile):
    import torch

    settings, lora = recipe.train, recipe.lora
    base = run.resolved["base"]["artifact"]
    # Frozen weights are held in the arithmetic's own type; the adapter stays in fp32 either way.
    dtype = precision_of(accelerator)

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
        shard_model(net)
    return net


def count_parameters(net) -> tuple[int, int]:
    """(trainable, all) parameters; 4-bit weights are counted by what they stand for."""
    trainable = sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
    total = 0
    for parameter in net.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        total += math.prod(shape) if shape is not None else parameter.numel()
    return trainable, total
