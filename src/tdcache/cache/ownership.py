"""Who else could still write to what is kept: the optimiser, the next backward, or the user with a tensor in hand.

Inside a block the version counter tells (:mod:`tdcache.inplace`). After it nobody asks any more, so what shares its
memory with something that can be written to is copied when the context is left, and gradients when their backward is
over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from tdcache.introspect import storage_users
from tdcache.types import CacheKey

__all__ = ["owned", "shared_keys", "storage_of", "storages_of"]


def owned(value: Any) -> Any:
    """The value itself if nothing else can write to its memory, else a copy."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if storage_users((value,))[0] > 1 else value


def shared_keys(values: Mapping[CacheKey, Any], outside: Collection[int] | None = None) -> list[CacheKey]:
    """The keys of the tensors whose memory others have.

    Args:
        values: tensors by key.
        outside: storages that can be written to. Where a graph is alive it has the memory of all that it saved, which
            nobody can write to; then only these count. None: whoever has the memory counts.
    """
    users = storage_users(values.values())
    if not any(map((1).__lt__, users)):
        return []
    shared = [key for key, count in zip(values, users, strict=True) if count > 1]
    if not shared or outside is None:
        return shared
    return [key for key in shared if storage_of(values[key]) in outside]


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's memory; 0 where it has none of its own (sparse, nested and wrapper tensors)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def storages_of(model: nn.Module) -> frozenset[int]:
    """The storages of a model's parameters and buffers."""
    found = {storage_of(tensor) for held in (model.parameters(), model.buffers()) for tensor in held}
    return frozenset(found - {0})
