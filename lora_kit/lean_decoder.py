"""One token at a time through a decoder of the Llama layout, with as few operations as it takes.

transformers' own forward spends much of a token's time on a CPU between the products: a Python frame and a dozen small
operations for each module. Here a norm is one call, and keys and values are written into arrays whose room is taken
once. One row in 16 bits is multiplied as a vector: torch's matrix product, made for many rows, takes up to twice as
long on a CPU. The weights are the model's own; none is copied.

A model is served when its modules are the known ones and a pass on numbers agrees with the model's own: what a family
does otherwise (soft caps, other norms, biases that are not there) shows in that comparison, not in a list of names.

Shape suffixes: B rows, C width, H heads, G key heads, T tokens so far, D head size, V vocabulary. Reads and writes
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention, silu

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Largest difference of a logit from the model's own, as a share of their spread, by arithmetic: bf16 rounds after each
of some 300 operations, and differently where these are joined."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    norm1_C: torch.Tensor
    norm2_C: torch.Tensor
    eps: float
    linears: dict[str, torch.nn.Linear]
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None


class LeanDecoder:
    """Decodes with the weights of ``model`` (of transformers, in eval mode, without an adapter); see :func:`make`."""

    def __init__(self, model: Any, layers: list[_Layer]) -> None:
        config = model.config.get_text_config()
        self.model, self.layers = model, layers
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.size = layers[0].linears["o_proj"].in_features // self.heads
        self.head = model.get_output_embeddings()
        self.embed = model.get_input_embeddings()
        self.rotary, self.norm = model.model.rotary_emb, model.model.norm
        self.keys_values: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.length = 0

    def start(self, cache: Any, room: int) -> None:
        """Take over what ``cache`` (of transformers, one row or more) holds, with room for ``room`` tokens in all."""
        self.keys_values, self.length = [], int(cache.get_seq_length())
        for layer in cache.layers:
            held = []
            for each in (layer.keys, layer.values):
                whole = each.new_empty(each.shape[0], self.groups, room, self.size)
                whole[:, :, :self.length] = each
                held.append(whole)
            self.keys_values.append((held[0], held[1]))
        positions = torch.arange(room, device=self.embed.weight.device)[None]
        cos_1TD, sin_1TD = self.rotary(self.embed.weight[:1, None], positions)
        self._cos_TD, sin_TD = cos_1TD[0], sin_1TD[0].clone()
        # rotate_half puts minus the upper half first: the sign goes into the sine once.
        sin_TD[:, :self.size // 2].neg_()
        self._sin_TD = sin_TD

    def step(self, tokens_B: torch.Tensor) -> torch.Tensor:
        """Logits (B, V) after ``tokens_B``, each row's next token."""
        at, rows = self.length, len(tokens_B)
        x_BC = self.embed(tokens_B)
        cos_D, sin_D = self._cos_TD[at], self._sin_TD[at]
        as_vector = rows == 1 and x_BC.device.type == "cpu" and x_BC.element_size() == 2
        product = _times_vector if as_vector else _times_matrix
        for layer, (keys, values) in zip(self.layers, self.keys_values, strict=True):
            w = layer.linears
            h_BC = rms_norm(x_BC, layer.norm1_C.shape, layer.norm1_C, layer.eps)
            q_BHD = product(h_BC, w["q_proj"]).view(rows, self.heads, self.size)
            k_BGD = product(h_BC, w["k_proj"]).view(rows, self.groups, self.size)
            if layer.q_norm_D is not None:
                q_BHD = rms_norm(q_BHD, (self.size,), layer.q_norm_D, layer.eps)
                k_BGD = rms_norm(k_BGD, (self.size,), layer.k_norm_D, layer.eps)
            qk_BND = torch.cat([q_BHD, k_BGD], 1)
            qk_BND = torch.addcmul(qk_BND * cos_D, qk_BND.roll(self.size // 2, -1), sin_D)
            keys[:, :, at] = qk_BND[:, self.heads:]
            values[:, :, at] = product(h_BC, w["v_proj"]).view(rows, self.groups, self.size)
            out = scaled_dot_product_attention(
                qk_BND[:, :self.heads, None], keys[:, :, :at + 1], values[:, :, :at + 1],
                enable_gqa=self.heads != self.groups)
            x_BC = x_BC + product(out.reshape(rows, -1), w["o_proj"])
            h_BC = rms_norm(x_BC, layer.norm2_C.shape, layer.norm2_C, layer.eps)
            x_BC = x_BC + product(silu(product(h_BC, w["gate_proj"])).mul_(product(h_BC, w["up_proj"])), w["down_proj"])
        self.length = at + 1
        return product(self.norm(x_BC), self.head)


def _times_matrix(x_BC: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    return linear(x_BC, layer.weight, layer.bias)


def _times_vector(x_1C: torch.Tensor, layer: torch.nn.Linear) -> torch.Tensor:
    out = torch.mv(layer.weight, x_1C[0])
    return (out if layer.bias is None else out + layer.bias)[None]


def make(model: Any) -> LeanDecoder | None:
    """A decoder for ``model``; None where its modules are others, or it does not agree with the model's own forward."""
    try:
        layers = [_layer(layer) for layer in model.model.layers]
        if None in layers or not layers or type(model.get_output_embeddings()) is not torch.nn.Linear:
            return None
        decoder = LeanDecoder(model, layers)
        return decoder if _agrees(model, decoder) else None
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def _layer(layer: Any) -> _Layer | None:
    attention, mlp = layer.self_attn, layer.mlp
    linears = {name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    linears |= {name: getattr(mlp, name) for name in ("gate_proj", "up_proj", "down_proj")}
    if any(type(each) is not torch.nn.Linear for each in linears.values()):
        return None
    return _Layer(
        norm1_C=layer.input_layernorm.weight, norm2_C=layer.post_attention_layernorm.weight,
        eps=layer.input_layernorm.variance_epsilon, linears=linears,
        q_norm_D=getattr(getattr(attention, "q_norm", None), "weight", None),
        k_norm_D=getattr(getattr(attention, "k_norm", None), "weight", None),
    )


def _agrees(model: Any, decoder: LeanDecoder) -> bool:
    """Whether three tokens through the decoder, after a prompt through the model, give the model's own logits."""
    import inspect

    vocabulary = decoder.head.weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens_1T = torch.randint(0, vocabulary, (1, 12), generator=generator).to(decoder.embed.weight.device)
    key = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with torch.inference_mode():
        wanted_TV = model(input_ids=tokens_1T, use_cache=False).logits[0, 9:].float()
        out = model(input_ids=tokens_1T[:, :9], use_cache=True, logits_to_keep=1)
        decoder.start(getattr(out, key), 12)
        ours_TV = torch.cat([decoder.step(tokens_1T[:, place]) for place in range(9, 12)]).float()
    if not torch.isfinite(ours_TV).all() or ours_TV.shape != wanted_TV.shape:
        return False
    spread = (wanted_TV - wanted_TV.mean(-1, keepdim=True)).abs().max()
    return bool((ours_TV - wanted_TV).abs().max() <= _TOLERANCE.get(decoder.embed.weight.dtype, 0.0) * spread)
