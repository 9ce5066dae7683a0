"""Finds and copies kept values whose memory somebody else could still write to.

Such writers are the optimiser, a later backward, and the user, who has the model's input and output in hand. Inside the
block, version counters detect their writes (:mod:`tdcache.inplace`). After it nothing checks any more, so values that
share memory with something writable are copied when the context exits, and gradients when their backward has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from sys import getrefcount
from typing import Any, TypeVar

from torch import Tensor, UntypedStorage, nn

from tdcache.inplace import storage_address
from tdcache.introspect import ALONE, storage_users

__all__ = ["Outside", "held_tensors", "own", "shared_keys", "storages_of"]

Key = TypeVar("Key")
Outside = Callable[[], Collection[int]]


def own(values: dict[Key, Any]) -> list[Key]:
    """Replace, in ``values``, each tensor that others could write to by a copy.

    Args:
        values: tensors, and TensorDicts of them, by key; no other of this library's containers holds them.

    Returns:
        The keys that were replaced.
    """
    shared = shared_keys(values)
    for key in shared:
        values[key] = values[key].clone()
    return shared


def shared_keys(values: Mapping[Key, Any], outside: Outside | None = None, *, holders: int = 1) -> list[Key]:
    """The keys of values whose memory others can reach, or has no address; a TensorDict always counts as one.

    Args:
        values: tensors, and TensorDicts of them, by key.
        outside: returns the storages that can be written to. A live graph shares the memory of the tensors that it
            saved, although nobody writes to those; then only the storages returned here count. None: any other owner
            of the memory counts.
        holders: how many of this library's containers hold each tensor, including this mapping. Somebody else may hold
            the same tensor object rather than another tensor on the same memory.
    """
    held = list(map(getrefcount, values.values()))
    users = storage_users(values.values())
    if max(held, default=0) < _HELD_ONCE + holders and max(users, default=0) <= ALONE:
        return []
    written = outside() if outside is not None else None
    return [
        key
        for (key, value), references, count in zip(values.items(), held, users, strict=True)
        if references >= _HELD_ONCE + holders
        or (count > ALONE and (written is None or not (address := storage_address(value)) or address in written))
    ]


_HELD_ONCE = next(map(getrefcount, {0: object()}.values()))
"""What ``getrefcount`` returns for a value that only a mapping holds; it counts its own argument as well."""


def storages_of(model: nn.Module) -> frozenset[int]:
    """The storages of a model's parameters and buffers."""
    tensors = held_tensors(model)
    try:
        found = set(map(_address, map(_storage, tensors)))
    except (NotImplementedError, RuntimeError):  # some tensor types have no storage
        found = set(map(storage_address, tensors))
    return frozenset(found - {0})


_storage = Tensor.untyped_storage
_address = UntypedStorage.data_ptr


def held_tensors(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a model; one that is shared by several modules occurs several times."""
    held: list[Tensor | None] = []
    seen: dict[nn.Module, None] = {model: None}
    to_do = [model]
    while to_do:
        module = to_do.pop()
        held += module._parameters.values()  # noqa: SLF001  (parameters() would walk the model once per module)
        held += module._buffers.values()  # noqa: SLF001
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen[child] = None
                to_do.append(child)
    return [tensor for tensor in held if tensor is not None]
