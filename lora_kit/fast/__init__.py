"""The fast path: parts of a model that are replaced by ones which train it in less time and memory.

A model is prepared by giving some of its modules another class (:func:`use_fast`); loop, adapter and
state stay what they are, and :func:`stop_fast` takes it back. Each part has a name that
``train.fast`` lists, serves the modules that it fits, leaves the others as they are and says why:

* ``linear``: a linear layer and its LoRA as one node of autograd, and layers of one input as one product;
* ``mlp``: a gated MLP as one node;
* ``norm``: RMSNorm as one node;
* ``attention``: attention of packed rows on a CPU as one node, its backward pass as matrix products, where that
  is the faster way;
* ``kernels``: what these do element by element, and rotary positions, compiled for the CPU;
* ``loss``: head and cross-entropy in slices;
* ``prefix``: tokens that all rows of a pass begin with, such as a system prompt, are computed once
  (``packing.packed_batch_of`` makes such batches when it is asked to).

Modules are recognised by what they do and not by the model's name: an activation or a norm is compared
with the formula, on numbers, before it is replaced. Reads and writes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from lora_kit.fast import attention, compiled, head, linear, mlp, norm, rotary, siblings
from lora_kit.packing import PER_DOCUMENT


@dataclass(frozen=True)
class Part:
    """What became of one part: how many modules it serves, and how many were left, by reason."""

    num_modules: int = 0
    left: dict[str, int] = field(default_factory=dict)


MEASURED_SLOWER = "torch's own kernels are faster here, as measured"


def use_fast(net, parts: Sequence[str], lengths: Sequence[int] = (), faster: bool | None = None) -> dict[str, Part]:
    """Prepare ``net`` (peft's model around one of transformers, not wrapped) with ``parts``; what each did.

    ``attention`` wants packing to be in use already (:func:`lora_kit.packing.use_packing`). It is used where it
    is faster than torch's own kernels on rows of ``lengths`` tokens, which is measured unless ``faster`` says what was
    measured before; without lengths it is used.
    """
    prepare = {"linear": _linear, "mlp": _mlp, "norm": _norm, "loss": _loss, "prefix": _prefix,
               "kernels": _kernels, "attention": partial(_attention, lengths=tuple(lengths), faster=faster)}
    plain = net.get_base_model()
    return {name: prepare[name](plain) for name in parts}


def stop_fast(net) -> None:
    """Undo :func:`use_fast`; nothing happens to a model that is not prepared."""
    compiled.stop()
    plain = net.get_base_model()
    for module in plain.modules():
        original = getattr(type(module), "original_class", None)
        if original is not None:
            if isinstance(module, linear.LoraLinear):
                linear.part(module)
            module.__class__ = original
    for module in plain.modules():
        if hasattr(module, "base_layer"):
            linear.part(module)
    if plain.config.get_text_config()._attn_implementation == attention.NAME:
        plain.set_attn_implementation(PER_DOCUMENT)


def _replace(module, mixin: type) -> None:
    original = type(module)
    module.__class__ = type(original.__name__, (mixin, original), {
        "original_class": original, "__module__": original.__module__, "__doc__": mixin.__doc__})


def _served(modules, mixin: type, why_not) -> Part:
    served, left = 0, Counter()
    for module in modules:
        reason = why_not(module)
        if reason is None:
            _replace(module, mixin)
            served += 1
        else:
            left[reason] += 1
    return Part(served, dict(left))


def _linear(plain) -> Part:
    from peft.tuners.lora.layer import LoraLayer

    modules = [module for module in plain.modules() if isinstance(module, LoraLayer)]
    part = _served(modules, linear.LoraLinear, linear.why_not)
    siblings.use(plain)
    return part


def _mlp(plain) -> Part:
    return _served([module for module in plain.modules() if mlp.is_candidate(module)], mlp.GatedMLP, mlp.prepare)


def _norm(plain) -> Part:
    return _served([module for module in plain.modules() if norm.is_candidate(module)], norm.RMSNorm, norm.prepare)


def _attention(plain, lengths: tuple[int, ...], faster: bool | None) -> Part:
    config = plain.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", 1)
    if config._attn_implementation != PER_DOCUMENT:
        return Part(0, {"rows are not packed for sdpa": layers})
    if next(plain.parameters()).device.type != "cpu":
        return Part(0, {"the device has kernels of its own": layers})
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    dtype = plain.get_input_embeddings().weight.dtype
    groups = getattr(config, "num_key_value_heads", None) or heads
    if lengths and not (attention.is_faster(heads, groups, size, dtype, lengths) if faster is None else faster):
        return Part(0, {MEASURED_SLOWER: layers})
    from transformers import AttentionInterface

    AttentionInterface.register(attention.NAME, attention.attend)
    plain.set_attn_implementation(attention.NAME)
    return Part(layers)


def _loss(plain) -> Part:
    reason = head.why_not(plain)
    if reason:
        return Part(0, {reason: 1})
    _replace(plain.get_output_embeddings(), head.LossHead)
    return Part(1)


def _kernels(plain) -> Part:
    if next(plain.parameters()).device.type != "cpu":
        return Part(0, {"the device has kernels of its own": compiled.num_kernels()})
    reason = compiled.use()
    if reason:
        return Part(0, {reason: compiled.num_kernels()})
    rotary.use(plain)
    return Part(compiled.num_kernels())


def _prefix(plain) -> Part:
    config = plain.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", 1)
    if config._attn_implementation not in (PER_DOCUMENT, attention.NAME):
        return Part(0, {"rows are not packed for sdpa": layers})
    if any(getattr(module, "p", 0.0) for module in plain.modules() if "Dropout" in type(module).__name__):
        return Part(0, {"dropout would be drawn once for all rows": layers})
    return Part(layers)
