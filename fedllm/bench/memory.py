"""How much memory a call takes for tensors, beyond what was there before it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorPeak(TorchDispatchMode):
    """Within it, `peak` is the most bytes that tensors made since it was entered held at once.

    Counted tensor by tensor, since resident memory also holds what the allocator keeps for later. Scratch space within an operation
    (LAPACK's, say) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count((args, kwargs), new=False)
        made = func(*args, **(kwargs or {}))
        self._count(made, new=True)
        return made

    def _count(self, tensors: Any, new: bool) -> None:
        for each in tree_leaves(tensors):
            if not isinstance(each, torch.Tensor):
                continue
            storage = each.untyped_storage()  # the same object for every view, for as long as any of them lives
            key, size = id(storage), storage.nbytes() if new else 0
            if key not in self._seen:
                self._seen.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
