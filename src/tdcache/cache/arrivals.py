"""Gradients for reducers that depend on order: put into the order of their calls, whatever order they arrive in.

A backward brings the gradient of the last call first, and the backward of an early forward may come after that of a
late one. So gradients wait here, and every reading of the cache reduces them anew: otherwise when the cache is read
would decide the order.
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
    """What arrived at the sites of one direction, by key.

    Args:
        reducer: what is made of the values of one key.
    """

    __slots__ = ("_by_key", "_latest", "_reducer", "_watch")

    def __init__(self, reducer: Reducer) -> None:
        self._reducer = reducer
        self._by_key: dict[CacheKey, list[_Arrival]] = {}
        self._latest: list[_Arrival] = []
        """Those of the backward that is under way, which it may still accumulate into."""
        self._watch = InplaceWatch()

    def add(self, key: CacheKey, path: str, serial: int, value: Any, mask: Tensor | None, *, is_alias: bool) -> None:
        """Keep one value of the call ``serial``; ``mask`` says which of its rows count."""
        arrival = _Arrival(serial, value, mask)
        arrivals = self._by_key.setdefault(key, [])
        if arrivals and isinstance(self._reducer, First):  # which wants one only
            if serial >= arrivals[0].serial:
                return
            arrivals.clear()
        arrivals.append(arrival)
        self._latest.append(arrival)
        if is_alias:
            self._watch.add(path, value)

    def own(self) -> None:
        """A backward is over: what it accumulates into later must not reach the values that wait."""
        values: dict[int, Any] = {}
        for number, arrival in enumerate(self._latest):
            values[number], arrival.value = arrival.value, None
        own(values)
        for arrival, value in zip(self._latest, values.values(), strict=True):
            arrival.value = value
        self._latest.clear()
        self._watch.clear()

    def check(self) -> None:
        """Raise if a value was overwritten since.

        Raises:
            InplaceModificationError: it names every path concerned.
        """
        if self._watch.seen:
            self._watch.check()

    def reduced(self) -> dict[CacheKey, Any]:
        """What the reducer makes of the values so far."""
        return {key: self._reduced(arrivals) for key, arrivals in self._by_key.items()}

    def _reduced(self, arrivals: list[_Arrival]) -> Any:
        reducer = self._reducer.fresh()
        for arrival in sorted(arrivals, key=_serial):
            update(reducer, arrival.value, arrival.mask)
        return reducer.compute()

    def carry(self) -> dict[CacheKey, list[tuple[Any, Tensor | None]]]:
        """The values in order, to be resumed by the next entry of a context that is not cleared."""
        return {
            key: [(each.value, each.mask) for each in sorted(arrivals, key=_serial)]
            for key, arrivals in self._by_key.items()
        }

    def resume(self, carried: Mapping[CacheKey, list[tuple[Any, Tensor | None]]]) -> None:
        """Go on with values that come before all others."""
        for key, values in carried.items():
            self._by_key[key] = [_Arrival(0, value, mask) for value, mask in values]

    def clear(self) -> None:
        """Let go of everything."""
        self._by_key.clear()
        self._latest.clear()
        self._watch.clear()


def update(reducer: Reducer, value: Any, mask: Tensor | None) -> None:
    """Have a reducer take a value in, or those of its rows that the mask selects."""
    if mask is None:
        reducer.update(value)
    else:
        cast(RowReducer, reducer).update(value, mask)


def _serial(arrival: _Arrival) -> int:
    return arrival.serial
