"""Part ``loss``: the head and its cross-entropy in slices, with the gradient made in the forward pass.

Logits of all trained tokens are the largest arrays of a step: tokens times vocabulary, in fp32,
several times over. Here a slice of them is made, gives its loss and the gradient of the hidden states,
and is gone. The loss leaves through the model's own output, in place of the logits.

Shape suffixes: K positions, C width, V vocabulary, S positions of a slice. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.function import once_differentiable

from lora_kit.fast import compiled, cuda
from lora_kit.fast.linear import has_hooks
from lora_kit.tokens import IGNORED

_SLICE = 256
"""Positions of a slice: enough for the product to run at full speed."""
_HELD_BYTES = 2**26
"""Logits that are held at once where the vocabulary is taken in blocks."""
_BLOCK = 4096
"""Tokens of a block of the vocabulary."""


class LossHead:
    """Mixed into the class of a model's output layer: gives the summed loss while targets are set."""

    def forward(self, hidden):
        targets = self.__dict__.get("_targets")
        if targets is None:
            return super().forward(hidden)
        targets_K = targets.reshape(-1)
        hidden_KC = hidden.reshape(-1, hidden.shape[-1])
        kept = (targets_K != IGNORED).nonzero().squeeze(1)
        if len(kept) < len(targets_K):
            hidden_KC, targets_K = hidden_KC[kept], targets_K[kept]
        hidden_KC = hidden_KC.to(self.weight.dtype)
        run = cuda.loss_kernel(hidden_KC) or _Node.apply
        loss = run(hidden_KC, self.weight.detach(), None if self.bias is None else self.bias.detach(), targets_K)
        return loss.float().view(1, 1, 1)


class _Node(torch.autograd.Function):

    @staticmethod
    def forward(ctx, hidden_KC, weight_VC, bias_V, targets_K):
        wants_gradient = ctx.needs_input_grad[0]
        gradient_KC = torch.empty_like(hidden_KC) if wants_gradient else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_KC.device)
        if compiled.serves(hidden_KC, weight_VC):
            with torch.autocast("cpu", enabled=False):
                loss = _in_blocks(hidden_KC, weight_VC, bias_V, targets_K, gradient_KC)
            ctx.save_for_backward(gradient_KC)
            return loss
        with torch.autocast(hidden_KC.device.type, enabled=False):
            for start in range(0, len(targets_K), _SLICE):
                rows = slice(start, start + _SLICE)
                targets_S1 = targets_K[rows, None]
                logits_SV = torch.nn.functional.linear(hidden_KC[rows], weight_VC, bias_V).float()
                log_S1 = torch.logsumexp(logits_SV, 1, keepdim=True)
                loss += (log_S1 - logits_SV.gather(1, targets_S1)).sum()
                if wants_gradient:
                    p_SV = logits_SV.sub_(log_S1).exp_()
                    p_SV.scatter_add_(1, targets_S1, p_SV.new_full(targets_S1.shape, -1.0))
                    gradient_KC[rows] = p_SV.to(weight_VC.dtype) @ weight_VC
        ctx.save_for_backward(gradient_KC)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        (gradient_KC,) = ctx.saved_tensors
        # In fp32: rounding the factor first would scale every gradient of the step.
        return (gradient_KC.float() * dloss).to(gradient_KC.dtype), None, None, None


def _in_blocks(hidden_KC, weight_VC, bias_V, targets_K, gradient_KC):
    """The summed loss; its gradient goes to ``gradient_KC`` unless that is None.

    Logits are made, and then turned into their own gradient, in blocks of the vocabulary that stay in the CPU's cache:
    the largest logit and the sum of exponentials of each row run along.
    """
    loss = torch.zeros(())
    step = max(_SLICE, _HELD_BYTES // (weight_VC.shape[0] * weight_VC.element_size()))
    for start in range(0, len(targets_K), step):
        hidden_SC, targets_S = hidden_KC[start:start + step].contiguous(), targets_K[start:start + step].contiguous()
        num, dtype = len(targets_S), hidden_SC.dtype
        largest_S = torch.full((num,), -torch.inf)
        sum_S, hit_S, blocks = torch.zeros(num), torch.zeros(num), []
        for first in range(0, weight_VC.shape[0], _BLOCK):
            rows = slice(first, first + _BLOCK)
            logits = torch.nn.functional.linear(hidden_SC, weight_VC[rows], None if bias_V is None else bias_V[rows])
            compiled.call("loss_of_block", dtype, logits, targets_S, first, largest_S, sum_S, hit_S, *logits.shape)
            blocks.append((first, rows, logits if gradient_KC is not None else None))
        log_S = largest_S + sum_S.log()
        loss += (log_S - hit_S).sum()
        if gradient_KC is None:
            continue
        gradient_SC = torch.zeros(hidden_SC.shape)
        for first, rows, logits in blocks:
            compiled.call("gradient_of_block", dtype, logits, targets_S, first, log_S, *logits.shape)
            gradient_SC += logits @ weight_VC[rows]
        gradient_KC[start:start + step] = gradient_SC
    return loss


def head_of(model) -> LossHead | None:
    """The output layer of ``model`` (perhaps wrapped) when it is prepared."""
    for wrapped in ("module",):
        model = getattr(model, wrapped, model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head if isinstance(head, LossHead) else None


@contextmanager
def targets_set(head: LossHead, targets: torch.Tensor) -> Iterator[None]:
    """Let ``head`` answer with the summed loss of ``targets`` (B, K), IGNORED where nothing is trained."""
    head.__dict__["_targets"] = targets
    try:
        yield
    finally:
        head.__dict__["_targets"] = None


def why_not(model) -> str | None:
    """None when :class:`LossHead` serves the output layer of ``model`` (of transformers, without a wrapper)."""
    head = model.get_output_embeddings()
    if type(head) is not torch.nn.Linear:
        return f"its output layer is a {type(head).__name__}"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return "its output layer is trained"
    if any(hasattr(parameter, "to_local") for parameter in head.parameters()):
        return "weights that are sharded"
    if has_hooks(head):
        return "hooks"
    seen = []
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    was_training = model.training
    try:
        with torch.no_grad():
            model.eval()
            tokens_BT = torch.arange(2, device=head.weight.device)[None]
            logits = model(input_ids=tokens_BT, use_cache=False).logits
    finally:
        handle.remove()
        model.train(was_training)
    if len(seen) != 1 or not torch.equal(seen[0], logits):
        return "its logits are changed after the output layer"
    return None
