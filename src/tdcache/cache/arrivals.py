"""Puts gradients into the order of their calls, for reducers whose result depends on the order of values.

A backward yields the gradient of the last call first, and the backward of an early forward may run after that of a
later one. So gradients wait here and are reduced anew each time the cache is read; otherwise the result would depend
on when the user reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor

from tdcache.cache.ownership import own
from tdcache.inplace import InplaceWatch
from tdcache.reducers import First, Reducer, RowReducer
from tdcache.types import CacheKey

__all__ = ["Arrivals", "update"]


class _Arrival:
    __slots__ = ("mask", "serial", "value")

    def __init__(self, serial: int, value: Any, mask: Tensor | None) -> None:
        self.serial = serial
        self.value = value
        self.mask = mask


class Arrivals:
    """The gradients that have arrived at the sites of one direction, by key.

    Args:
        reducer: reduces the values of one key.
    """

    __slots__ = ("_by_key", "_latest", "_reducer", "_watch")

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._by_key: dict[CacheKey, list[_Arrival]] = {}
        self._latest: list[_Arrival] = []
        """Gradients of the backward that is still running, which may accumulate into them."""
        self._watch = InplaceWatch()

    def add(self, key: CacheKey, path: str, serial: int, value: Any, mask: Tensor | None, *, is_alias: bool) -> None:
        """Keep one value of the call ``serial``; ``mask`` says which of its rows count."""
        arrival = _Arrival(serial, value, mask)
        arrivals = self._by_key.setdefault(key, [])
        if arrivals and isinstance(self._reducer, First):  # First keeps a single value
            if serial >= arrivals[0].serial:
                return
            arrivals.clear()
        arrivals.append(arrival)
        self._latest.append(arrival)
        if is_alias:
            self._watch.add(path, value)

    def own(self) -> None:
        """A backward has ended: copy the waiting values that a later backward could accumulate into."""
        values: dict[int, Any] = {}
        for number, arrival in enumerate(self._latest):
            values[number], arrival.value = arrival.value, None
        own(values)
        for arrival, value in zip(self._latest, values.values(), strict=True):
            arrival.value = value
        self._latest.clear()
        self._watch.clear()

    def check(self) -> None:
        """Raise if a waiting value has been overwritten.

        Raises:
            InplaceModificationError: it names every path concerned.
        """
        if self._watch.seen:
            self._watch.check()

    def reduced(self) -> dict[CacheKey, Any]:
        """The reduced values so far, by key."""
        return {key: self._reduced(arrivals) for key, arrivals in self._by_key.items()}

    def _reduced(self, arrivals: list[_Arrival]) -> Any:
        reducer = self._reducer.fresh()
        for arrival in sorted(arrivals, key=_serial):
            update(reducer, arrival.value, arrival.mask)
        return reducer.compute()

    def carry(self) -> dict[CacheKey, list[tuple[Any, Tensor | None]]]:
        """The values in order, for :meth:`resume` when a context that is not cleared is entered again."""
        return {
            key: [(each.value, each.mask) for each in sorted(arrivals, key=_serial)]
            for key, arrivals in self._by_key.items()
        }

    def resume(self, carried: Mapping[CacheKey, list[tuple[Any, Tensor | None]]]) -> None:
        """Put the values of an earlier entry before all others."""
        for key, values in carried.items():
            self._by_key[key] = [_Arrival(0, value, mask) for value, mask in values]

    def clear(self) -> None:
        """Drop all values at every site."""
        self._by_key.clear()
        self._latest.clear()
        self._watch.clear()


def update(reducer: Reducer, value: Any, mask: Tensor | None) -> None:
    """Update a reducer with a value, or with the rows of it that the mask selects."""
    if mask is None:
        reducer.update(value)
    else:
        cast(RowReducer, reducer).update(value, mask)


def _serial(arrival: _Arrival) -> int:
    return arrival.serial
