"""Who else could still write to what is kept: the optimiser, the next backward, or the user with a tensor in hand.

Inside a block the version counter tells (:mod:`tdcache.inplace`). After it nobody asks any more, so what shares its
memory with something that can be written to is copied when the context is left, and gradients when their backward is
over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from tdcache.introspect import storage_users
from tdcache.reducers import Reducer
from tdcache.types import CacheKey

__all__ = ["own_state", "owned", "shared_keys", "storage_of", "storages_of"]


def owned(value: Any) -> Any:
    """The value itself if nothing else can write to its memory, else a copy."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if storage_users((value,))[0] > 1 else value


def own_state(reducer: Reducer) -> None:
    """Have a reducer that keeps values whole own copies, so that it can go on after others wrote to theirs."""
    state = vars(reducer)
    for name, kept in state.items() if reducer.aliases else ():
        state[name] = [_copied(value) for value in kept] if isinstance(kept, list) else _copied(kept)


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def shared_keys(values: Mapping[CacheKey, Any]) -> list[CacheKey]:
    """The keys of the tensors whose memory others have."""
    users = storage_users(values.values())
    if not any(map((1).__lt__, users)):
        return []
    return [key for key, count in zip(values, users, strict=True) if count > 1]


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
