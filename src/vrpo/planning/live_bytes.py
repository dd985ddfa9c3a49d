"""Memory of tensors, where no device counts it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it and alive at one time; ``peak`` is the most there were.

    Every storage counts once, from the operation that made it until it is freed. On a CPU this is what torch's
    allocator hands out, but for buffers inside one operation, and unlike the process' resident memory it does not
    depend on what was freed before.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A view or an operation in place gives a storage that it was given.
        given = {storage._cdata for storage in storages((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        for storage in storages(output):
            key = storage._cdata
            if key not in given and key not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._free, key)
        return output

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return the storage of every tensor in a nested structure."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
