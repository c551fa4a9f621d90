"""Counting the bytes of live tensors."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Counts the bytes of the tensor storages made within the block: a CPU allocator keeps no such statistics.

    Those that autograd makes are counted too, the temporaries within one kernel are not. Under `FakeTensorMode`, which
    must be entered first, nothing is computed and the counts are the same.

    Args:
        known: Tensors that are not to be counted, though operations return them: weights, say.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live: dict[int, int] = {_address(tensor.untyped_storage()): 0 for tensor in known}
        self.now = 0
        """Bytes that live."""
        self.peak = 0
        """The most that lived at once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        address = _address(storage)
        if address in self.live:
            return
        self.live[address] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.now -= self.live.pop(address, 0)


def _address(storage: torch.UntypedStorage) -> int:
    """The address of the storage object, not of its data: fake storages have no data."""
    return storage._cdata  # pyright: ignore[reportPrivateUsage]
