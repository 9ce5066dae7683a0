"""One direction of an open caching context: the values of the running forward, and their way into the cache.

A hook writes into a plain dict, and one public ``TensorDict.update`` per forward (or backward) delivers: five times
cheaper than a TensorDict write per hook. The dict holds the tensors themselves; what makes that safe is the version
counter, noted beside each and compared when the values are delivered, read, and released. Anything but the first
plain tensor of a site (a second call, a tuple, a slice) takes the slow path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, cast

from tensordict import TensorDictBase
from torch import Tensor

from tdcache.cache.keep import Keep, Transfers, shares_memory
from tdcache.cache.stacking import StackBy
from tdcache.cache.target import EntryTarget
from tdcache.errors import InplaceModificationError, listed
from tdcache.hooks.directions import direction_row
from tdcache.reducers import Last, Reducer
from tdcache.types import CacheKey, HookDirection

__all__ = ["Channel"]

_version = attrgetter("_version")
_requires_grad = attrgetter("requires_grad")


@dataclass(slots=True)
class _Alias:
    """A tensor that a reducer keeps and that shares memory with one the model still holds."""

    path: str
    tensor: Tensor
    version: int


@dataclass(slots=True)
class Channel:
    """The state of one direction."""

    direction: HookDirection
    paths: tuple[str, ...]
    keep: Keep
    target: EntryTarget
    reducer: Reducer
    stack_by: StackBy | None
    has_parts: bool = False
    """Whether a site may have any number of entries (``pick="all"``)."""
    transfers: Transfers = field(default_factory=Transfers)
    values: dict[CacheKey, Any] = field(default_factory=dict)
    """The latest forward's aliases, by key. Between forwards every key is there, so that a hook that fires outside a
    forward of the root takes the slow path."""
    versions: dict[CacheKey, int] = field(default_factory=dict)
    """The versions of ``values`` when they were taken, where they were not 0."""
    copies: dict[CacheKey, Any] = field(default_factory=dict)
    """The latest forward's values that share no memory with the model."""
    number: int = 0
    """Of a gradient channel: the forward whose gradients are current."""
    accepting: int = -1
    """Of a gradient channel: ``number`` while a backward is under way whose end will deliver, else -1."""
    reducers: dict[CacheKey, Reducer] = field(default_factory=dict)
    fired: set[str] = field(default_factory=set)
    """The paths that saw a value since the context was entered."""
    is_gradient: bool = field(init=False)
    """Whether values arrive in the backward."""
    latest_only: bool = field(init=False)
    """Whether each forward replaces the entries of the one before."""
    _aliases: list[_Alias] = field(default_factory=list)
    _pending: dict[CacheKey, list[tuple[int, Tensor]]] = field(default_factory=dict)
    _dirty: bool = False

    def __post_init__(self) -> None:
        self.is_gradient = direction_row(self.direction).gradient
        self.latest_only = isinstance(self.reducer, Last)

    @property
    def top_keys(self) -> tuple[str, ...]:
        """The top-level keys of the cache that entries of this direction go to."""
        if self.target.node is not None:
            return (self.target.node,)
        return self.paths if self.stack_by is None else tuple(self.stack_by.members)

    @property
    def takes_aliases(self) -> bool:
        """Whether a hook may write the tensor itself into ``values``."""
        return self.latest_only and self.keep.plain and not self.target.in_place

    def begin(self) -> None:
        """A forward begins: what the one before left is no longer current."""
        self.values.clear()
        self.versions.clear()
        self.copies.clear()
        if self.latest_only:
            self._aliases.clear()
        if self.is_gradient and self.latest_only:
            self.number += 1
            self.target.reset()

    def deliver(self, *, backward: bool = False) -> None:
        """A forward (or a backward) is over: check the aliases, detach them, and write the entries to the cache."""
        if self.is_gradient != backward:
            return
        if len(self.fired) < len(self.paths):
            self.fired.update(key if isinstance(key, str) else key[0] for key in (*self.values, *self.copies))
        self.accepting = -1
        self.check()
        if not self.latest_only:
            return
        values = self.values
        if self.keep.hold != "live":
            needing = list(map(_requires_grad, values.values()))
            if all(needing):
                values.update(zip(values, map(Tensor.detach, values.values()), strict=True))
            elif any(needing):
                values.update({key: value.detach() for key, value in values.items() if value.requires_grad})
        if self.copies or self.stack_by is not None or self.has_parts or len(values) != len(self.paths):
            self._deliver_slowly()
        else:
            self.target.write(values, complete=True)

    def _deliver_slowly(self) -> None:
        self.transfers.wait()
        entries = {key: value for key, value in {**self.values, **self.copies}.items() if value is not _ABSENT}
        self.target.write(self._stacked(entries), complete=False)
        if not self.is_gradient:
            self.idle()

    def _stacked(self, entries: dict[CacheKey, Any]) -> Mapping[CacheKey, Any]:
        if self.stack_by is None or (self.is_gradient and not self.stack_by.complete(entries)):
            return entries  # of a gradient, more may come with another backward
        return self.stack_by(entries)

    def idle(self) -> None:
        """Give every key a value, so that hooks take the slow path until the next forward begins."""
        for path in self.paths:
            if path not in self.values:
                self.values[path] = _ABSENT

    def check(self) -> None:
        """Raise if an alias that is kept was overwritten since.

        Raises:
            InplaceModificationError: it names every path concerned.
        """
        if any(map(_version, self.values.values())):
            taken = self.versions
            changed = [str(key) for key, value in self.values.items() if value._version != taken.get(key, 0)]
            if changed:
                raise _overwritten(changed)
        changed = [alias.path for alias in self._aliases if alias.tensor._version != alias.version]
        if changed:
            raise _overwritten(list(dict.fromkeys(changed)))

    def take(self, key: CacheKey, path: str, tensor: Any, *, serial: int | None = None) -> None:
        """Keep a value on the slow path.

        Args:
            key: where.
            path: the site.
            tensor: what the hook saw (a TensorDict where a callback returned one).
            serial: the number of the call, for values that do not arrive in order.
        """
        kept, is_alias = self._keep(tensor, path)
        self.fired.add(path)
        if not self.latest_only:
            self._reduce(key, path, kept, is_alias, serial)
        elif is_alias:
            self.copies.pop(key, None)
            self.values[key] = kept
            self.versions[key] = kept._version
        else:
            self.values.pop(key, None)
            self.versions.pop(key, None)
            self.copies[key] = kept

    def write_now(self, key: CacheKey, path: str, tensor: Any) -> None:
        """Keep a value that was seen outside a forward of the root, and write it at once."""
        self.fired.add(path)
        kept, is_alias = self._keep(tensor, path)
        self.transfers.wait()
        if is_alias:
            self._aliases.append(_Alias(path, kept, kept._version))
        self.target.put(key, kept)

    def _keep(self, value: Any, path: str) -> tuple[Any, bool]:
        if isinstance(value, TensorDictBase):
            return value.apply(lambda leaf: self._keep_leaf(leaf, path)), False
        kept = self.keep(value, self.transfers)
        return kept, not value.is_inference() and shares_memory(kept, value)

    def _keep_leaf(self, leaf: Tensor, path: str) -> Tensor:
        kept, is_alias = self._keep(leaf, path)
        if is_alias:
            self._aliases.append(_Alias(path, kept, kept._version))
        return cast(Tensor, kept)

    def _reduce(self, key: CacheKey, path: str, kept: Any, is_alias: bool, serial: int | None) -> None:
        self._dirty = True
        if is_alias and self.reducer.aliases:
            self._aliases.append(_Alias(path, kept, kept._version))
        if serial is not None and self.reducer.ordered:
            self._pending.setdefault(key, []).append((serial, kept))
            return
        if not self.reducer.aliases:
            self.transfers.wait()
        self._reducer_at(key).update(kept)

    def _reducer_at(self, key: CacheKey) -> Reducer:
        reducer = self.reducers.get(key)
        if reducer is None:
            reducer = self.reducers[key] = self.reducer.fresh()
        return reducer

    def compute(self) -> None:
        """Write what the reducers hold to the cache."""
        if self.latest_only or not self._dirty:
            return
        self.transfers.wait()
        for key, arrivals in self._pending.items():
            for _, value in sorted(arrivals, key=lambda arrival: arrival[0]):
                self._reducer_at(key).update(value)
        self._pending.clear()
        entries: dict[CacheKey, Any] = {key: reducer.compute() for key, reducer in self.reducers.items()}
        self.target.write(self._stacked(entries), complete=False)
        self._dirty = False

    def forget(self) -> None:
        """Drop every value and every entry that was written."""
        self.release()
        self.target.reset()
        if not self.is_gradient:
            self.idle()

    def release(self) -> None:
        """Let go of everything but what is in the cache; gradients still on their way are no longer wanted."""
        for held in (self.values, self.versions, self.copies, self.reducers, self._aliases, self._pending):
            held.clear()
        self.number += 1
        self.accepting = -1
        self._dirty = False


class _Absent:
    """Stands for a site without a value; answers to what is asked of the tensors beside it."""

    _version = 0
    requires_grad = False


_ABSENT = _Absent()


def _overwritten(paths: Sequence[str]) -> InplaceModificationError:
    return InplaceModificationError(
        f"the value kept at {listed(paths, 20)} was overwritten by a later in-place operation "
        "(such as ReLU(inplace=True)), so it is no longer the activation; keep a copy with hold='snapshot'",
        paths=paths,
    )
