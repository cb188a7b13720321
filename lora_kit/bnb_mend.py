"""Keep bitsandbytes' 4-bit weights as they were loaded.

On CPUs with AVX512-BF16 the first forward pass in eval mode repacks every ``Linear4bit`` in
place, for a quicker kernel. What then trains on, saves, merges or dequantizes those weights
reads garbage without a word (measured with bitsandbytes 0.50.2: 60 of 210 LoRA tensors get a
gradient; a saved and reloaded model is off by a KL divergence of 14 and more). The mend is to
say "no" to the repacking on every module, after loading and before the first forward pass.

It goes when upstream bitsandbytes issue #2078 is closed for save, merge and backward (it
covers ``.to()`` only) and the oldest version that lora-kit allows has it.
Reads and writes nothing.
"""

from __future__ import annotations

from lora_kit.errors import RefusedError

_SWITCH = "support_avx512bf16_for_cpu"


def keep_4bit_weights_intact(model) -> int:
    """Stop every 4-bit module of ``model`` from repacking its weights; returns how many there are.

    To be called right after loading: a model without such modules is left as it is.

    Raises:
        RefusedError: a module was repacked already; its weights cannot be trusted any more.
    """
    num_modules = 0
    for name, module in model.named_modules():
        if _SWITCH not in vars(module):
            continue
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise RefusedError(name, "its 4-bit weights were repacked by a forward pass and are no longer what was "
                               "loaded", "load the model again")
        setattr(module, _SWITCH, False)
        num_modules += 1
    return num_modules
