"""A counter of the bytes that torch's tensors hold, operation by operation."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations inside it make for as long as something holds them.

    ``live`` is what they hold now and ``peak`` the most at the end of an operation; what an operation allocates
    within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((arguments, options))
                 if isinstance(leaf, torch.Tensor)}
        out = function(*arguments, **(options or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._seen:
                self._seen.add(key)
                self.live += size
                weakref.finalize(storage, self._gone, key, size)
        self.peak = max(self.peak, self.live)
        return out

    def _gone(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size
