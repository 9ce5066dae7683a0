"""What the reducers of one direction hold: one per key, made when its first value comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tdcache.cache.arrivals import Arrivals, update
from tdcache.inplace import InplaceWatch
from tdcache.reducers import Reducer
from tdcache.types import CacheKey

__all__ = ["Carried", "Reductions"]

Carried = tuple[dict[CacheKey, Reducer], dict[CacheKey, list[tuple[Any, Tensor | None]]]]
"""What the reducers of one direction held, and the gradients that were put in order, when a context was left."""


class Reductions:
    """The reducers of one direction, by key.

    Args:
        reducer: what is made of the values of one key.
        watch: told of the aliases that the reducers keep.
    """

    __slots__ = ("_arrivals", "_by_key", "_reducer", "_watch", "dirty")

    def __init__(self, reducer: Reducer, watch: InplaceWatch) -> None:
        self._reducer = reducer
        self._watch = watch
        self._by_key: dict[CacheKey, Reducer] = {}
        self._arrivals = Arrivals(reducer)
        """Gradients that are put in the order of their calls."""
        self.dirty = False
        """Whether values came since the last time they were reduced."""

    @property
    def keeps_aliases(self) -> bool:
        """Whether a value that is taken in may be kept as it is."""
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
        """Take a value in; ``mask`` says which of its rows count."""
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
        """A backward is over: what it accumulates into later must not reach the values that wait."""
        self._arrivals.own()

    def computed(self) -> dict[CacheKey, Any]:
        """What the reducers make of the values so far."""
        return {**{key: reducer.compute() for key, reducer in self._by_key.items()}, **self._arrivals.reduced()}

    def own(self, copied: Callable[[Tensor], Tensor]) -> None:
        """Have reducers that keep aliases exchange them for what ``copied`` makes of each."""
        if self._reducer.aliases and self._by_key:
            for reducer in self._by_key.values():
                reducer.own(copied)
            self.dirty = True

    def carry(self) -> Carried:
        """What they hold, for the next entry of a context whose cache is not cleared."""
        return dict(self._by_key), self._arrivals.carry()

    def resume(self, carried: Carried) -> None:
        """Go on where an earlier entry ended."""
        reducers, arrivals = carried
        self._by_key.update(reducers)
        self._arrivals.resume(arrivals)
        self.dirty = bool(reducers)

    def clear(self) -> None:
        """Let go of everything."""
        self._by_key.clear()
        self._arrivals.clear()
        self.dirty = False
