"""Who else could still write to what is kept: the optimiser, the next backward, or the user with a tensor in hand.

Inside a block the version counter tells (:mod:`tdcache.inplace`). After it nobody asks any more, so what shares its
memory with something that can be written to is copied when the context is left, and gradients when their backward is
over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from sys import getrefcount
from typing import Any, TypeVar

from torch import Tensor, UntypedStorage, nn

from tdcache.inplace import storage_address
from tdcache.introspect import storage_users

__all__ = ["Outside", "held_tensors", "own", "shared_keys", "storages_of"]

Key = TypeVar("Key")
Outside = Callable[[], Collection[int]]


def own(values: dict[Key, Any], outside: Outside | None = None, *, holders: int = 1) -> list[Key]:
    """Replace in ``values`` by copies what others could write to.

    Args:
        values: tensors, and TensorDicts of them, by key.
        outside: see :func:`shared_keys`.
        holders: how many of us hold each tensor, this dict included.

    Returns:
        The keys that were replaced.
    """
    shared = shared_keys(values, outside, holders=holders)
    for key in shared:
        values[key] = values[key].clone()
    return shared


def shared_keys(values: Mapping[Key, Any], outside: Outside | None = None, *, holders: int = 1) -> list[Key]:
    """The keys of what others have the memory of; a TensorDict is taken for one of them.

    Args:
        values: tensors, and TensorDicts of them, by key.
        outside: gives the storages that can be written to. Where a graph is alive it has the memory of all that it
            saved, which nobody can write to; then only these count. None: whoever has the memory counts.
        holders: how many of us hold each tensor, this mapping included: somebody else may have the very tensor, and no
            other tensor of the same memory.
    """
    held = list(map(getrefcount, values.values()))
    users = storage_users(values.values())
    if max(held, default=0) < _HELD_ONCE + holders and max(users, default=0) < 2:
        return []
    written = outside() if outside is not None else None
    return [
        key
        for (key, value), references, count in zip(values.items(), held, users, strict=True)
        if references >= _HELD_ONCE + holders or (count > 1 and (written is None or storage_address(value) in written))
    ]


_HELD_ONCE = next(map(getrefcount, {0: object()}.values()))
"""What ``getrefcount`` says of a value that a mapping alone holds; it counts its own argument as well."""


def storages_of(model: nn.Module) -> frozenset[int]:
    """The storages of a model's parameters and buffers."""
    tensors = held_tensors(model)
    try:
        found = set(map(_address, map(_storage, tensors)))
    except (NotImplementedError, RuntimeError):  # some have no memory of their own
        found = set(map(storage_address, tensors))
    return frozenset(found - {0})


_storage = Tensor.untyped_storage
_address = UntypedStorage.data_ptr


def held_tensors(model: nn.Module) -> list[Tensor]:
    """The parameters and buffers of a model; one that several modules have is there several times."""
    held: list[Tensor | None] = []
    seen: dict[nn.Module, None] = {model: None}
    to_do = [model]
    while to_do:
        module = to_do.pop()
        held += module._parameters.values()  # noqa: SLF001  (parameters() would walk once more a module)
        held += module._buffers.values()  # noqa: SLF001
        for child in module._modules.values():
            if child is not None and child not in seen:
                seen[child] = None
                to_do.append(child)
    return [tensor for tensor in held if tensor is not None]
