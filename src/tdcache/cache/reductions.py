"""The reducers of one direction: one per key, made when the key's first value arrives.

A reducer sees values and nothing else. This file decides in which order it gets them (gradients arrive in reverse) and
watches the aliases that it keeps for in-place writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tdcache.cache.arrivals import Arrivals, update
from tdcache.hooks.values import check_dense
from tdcache.inplace import InplaceWatch
from tdcache.reducers import Reducer
from tdcache.types import CacheKey

__all__ = ["Carried", "Reductions"]

Carried = tuple[dict[CacheKey, Reducer], dict[CacheKey, list[tuple[Any, Tensor | None]]]]
"""State that outlives a context: the reducers of one direction, and the gradients in the order of their calls."""


class Reductions:
    """The reducers of one direction, by key.

    Args:
        reducer: reduces the values of one key.
        watch: watches the aliases that the reducers keep.
    """

    __slots__ = ("_arrivals", "_by_key", "_reducer", "_watch", "dirty")

    def __init__(self, reducer: Reducer, watch: InplaceWatch) -> None:
        self._reducer = reducer
        self._watch = watch
        self._by_key: dict[CacheKey, Reducer] = {}
        self._arrivals = Arrivals(reducer)
        """Gradients waiting to be put in the order of their calls."""
        self.dirty = False
        """Whether values have arrived since they were last reduced."""

    @property
    def keeps_aliases(self) -> bool:
        """Whether the reducer may keep a value itself rather than something computed from it."""
        return self._reducer.aliases

    def wants(self, key: CacheKey, serial: int | None) -> bool:
        """Whether one more value of ``key`` would change anything; ``serial`` is that of its call, for gradients."""
        if self._waits(serial):
            return True
        reducer = self._by_key.get(key)
        return reducer is None or not reducer.full

    def add(
        self, key: CacheKey, path: str, value: Any, mask: Tensor | None, *, serial: int | None, is_alias: bool
    ) -> None:
        """Add a value; ``mask`` selects the rows of it that count."""
        check_dense(value, path)
        self.dirty = True
        if serial is not None and self._waits(serial):
            self._arrivals.add(key, path, serial, value, mask, is_alias=is_alias)
            return
        reducer = self._by_key.get(key)
        if reducer is None:
            reducer = self._by_key[key] = self._reducer.fresh()
        if is_alias and reducer.aliases:
            self._watch.add(path, value)
        update(reducer, value, mask)

    def _waits(self, serial: int | None) -> bool:
        """Whether a value is put in order before it is reduced."""
        return serial is not None and self._reducer.ordered

    def check(self) -> None:
        """Raise if a gradient that waits was overwritten.

        Raises:
            InplaceModificationError: it names every path concerned.
        """
        self._arrivals.check()

    def end_backward(self) -> None:
        """A backward has ended: copy the waiting values that a later backward could accumulate into."""
        self._arrivals.own()

    def computed(self) -> dict[CacheKey, Any]:
        """The reduced values so far, by key."""
        return {**{key: reducer.compute() for key, reducer in self._by_key.items()}, **self._arrivals.reduced()}

    def own(self, copied: Callable[[Tensor], Tensor]) -> None:
        """Replace the aliases that reducers keep by ``copied`` of each."""
        if self._reducer.aliases and self._by_key:
            for reducer in self._by_key.values():
                reducer.own(copied)
            self.dirty = True

    def carry(self) -> Carried:
        """The state of the reducers, for :meth:`resume` when a context whose cache is not cleared is entered again."""
        return dict(self._by_key), self._arrivals.carry()

    def resume(self, carried: Carried) -> None:
        """Continue from the state of an earlier entry."""
        reducers, arrivals = carried
        self._by_key.update(reducers)
        self._arrivals.resume(arrivals)
        self.dirty = bool(reducers)

    def clear(self) -> None:
        """Drop the reducers of all keys."""
        self._by_key.clear()
        self._arrivals.clear()
        self.dirty = False
