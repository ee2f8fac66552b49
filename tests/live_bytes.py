"""How many bytes calls on tensors take at once, found without memory: on "meta"."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts what is made within it and still there. `most`: the most at any time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        self._made = {place: one for place, one in self._made.items() if not one[0].expired()}
        found = func(*args, **(kwargs or {}))
        for one in tree_leaves(found):
            if isinstance(one, torch.Tensor) and _storage(one) not in given:
                self._made[_storage(one)] = StorageWeakRef(one.untyped_storage()), one.untyped_storage().nbytes()
        self.most = max(self.most, sum(nbytes for _, nbytes in self._made.values()))
        return found


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
