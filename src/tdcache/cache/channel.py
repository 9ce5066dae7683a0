"""One direction of an open caching context: the values of the running forward, and their way into the cache.

A hook writes into a plain dict, and one public ``TensorDict.update`` per forward delivers: five times cheaper than a
TensorDict write per hook. The dict holds the tensors themselves; what makes that safe is the version counter. A tensor
fresh from an operation has version 0, so the hook looks at the counter once, and anything else (a second call, a
tensor that was written in place before, a value that is no tensor) takes the slow path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from tdcache.cache.keep import Keep, shares_memory
from tdcache.cache.target import StackBy, Target
from tdcache.errors import InplaceModificationError, listed
from tdcache.hooks.directions import direction_row
from tdcache.reducers import Last, Reducer
from tdcache.types import CacheKey

__all__ = ["Channel", "overwritten"]

_version = attrgetter("_version")
_requires_grad = attrgetter("requires_grad")


@dataclass(slots=True)
class _Alias:
    """A kept tensor that shares memory with one the model still holds."""

    path: str
    tensor: Tensor
    version: int


@dataclass(slots=True)
class Channel:
    """The state of one direction."""

    direction: str
    paths: tuple[str, ...]
    keep: Keep
    target: Target
    reducer: Reducer
    stack_by: StackBy | None
    values: dict[CacheKey, Any] = field(default_factory=dict)
    """The latest forward's aliases, by key. Written by the hooks; between forwards every key is there, so that a hook
    that fires outside a forward of the root takes the slow path."""
    versions: dict[CacheKey, int] = field(default_factory=dict)
    """Versions at capture, where they were not 0."""
    copies: dict[CacheKey, Any] = field(default_factory=dict)
    """The latest forward's values that share no memory with the model."""
    reducers: dict[CacheKey, Reducer] = field(default_factory=dict)
    fired: set[str] = field(default_factory=set)
    """The paths that saw a value since the context was entered."""
    _aliases: list[_Alias] = field(default_factory=list)
    _pending: dict[CacheKey, list[tuple[int, Tensor]]] = field(default_factory=dict)
    _dirty: bool = False
    _all_fired: bool = False

    @property
    def is_gradient(self) -> bool:
        """Whether values arrive in the backward."""
        return direction_row(self.direction).gradient

    @property
    def latest_only(self) -> bool:
        """Whether each forward replaces the entries of the one before."""
        return isinstance(self.reducer, Last)

    @property
    def takes_aliases(self) -> bool:
        """Whether a hook may write the tensor itself into ``values``."""
        return self.latest_only and self.keep.plain and not self.target.in_place

    def begin(self) -> None:
        """A forward begins: what the one before left is no longer current."""
        if self.is_gradient:
            if self.latest_only:
                self.target.reset()
            return
        self.values.clear()
        self.versions.clear()
        self.copies.clear()

    def deliver(self) -> None:
        """A forward is over: check the aliases, detach them, and write the entries to the cache."""
        if self.is_gradient:
            return
        if not self.latest_only:
            self.check()
            return
        values = self.values
        if any(map(_version, values.values())):
            self._check_values()
        if any(map(_requires_grad, values.values())) and self.keep.hold != "live":
            for key, value in values.items():
                if value.requires_grad:
                    values[key] = value.detach()
        if not self._all_fired:
            self._note_fired()
        if self.copies or self.stack_by is not None or len(values) != len(self.paths):
            self._deliver_slowly()
        else:
            self.target.write(values, complete=True)

    def _deliver_slowly(self) -> None:
        self.keep.transfers.wait()
        entries = {**self.values, **self.copies}
        if self.stack_by is not None:
            entries = self.stack_by(entries)
        self.target.write(entries, complete=False)
        self.idle()

    def idle(self) -> None:
        """Give every key a value, so that hooks take the slow path until the next forward begins."""
        for path in self.paths:
            if path not in self.values:
                self.values[path] = _ABSENT

    def _note_fired(self) -> None:
        self.fired.update(key if isinstance(key, str) else key[0] for source in (self.values, self.copies) for key in source)
        self._all_fired = len(self.fired) == len(self.paths)

    def _check_values(self) -> None:
        versions = self.versions
        changed = [str(key) for key, value in self.values.items() if value._version != versions.get(key, 0)]
        if changed:
            raise overwritten(changed)

    def check(self) -> None:
        """Raise if an alias that is kept was overwritten since.

        Raises:
            InplaceModificationError: it names every path concerned.
        """
        if any(map(_version, self.values.values())):
            self._check_values()
        changed = [alias.path for alias in self._aliases if alias.tensor._version != alias.version]
        if changed:
            raise overwritten(list(dict.fromkeys(changed)))

    def take(self, key: CacheKey, path: str, tensor: Any, *, serial: int | None = None) -> None:
        """Keep a value on the slow path, in a forward.

        Args:
            key: where.
            path: the site.
            tensor: what the hook saw (a TensorDict where a callback returned one).
            serial: the number of the call, for values that do not arrive in order.
        """
        kept = tensor.detach() if isinstance(tensor, TensorDictBase) else self.keep(tensor)
        is_alias = isinstance(tensor, Tensor) and not tensor.is_inference() and shares_memory(kept, tensor)
        if not self.latest_only:
            self.fired.add(path)
            self._reduce(key, path, kept, is_alias, serial)
        elif is_alias:
            self.copies.pop(key, None)
            self.values[key] = kept
            self._note_version(key, kept)
        else:
            self.values.pop(key, None)
            self.copies[key] = kept

    def _note_version(self, key: CacheKey, kept: Tensor) -> None:
        if kept._version:
            self.versions[key] = kept._version
        else:
            self.versions.pop(key, None)

    def _reduce(self, key: CacheKey, path: str, kept: Any, is_alias: bool, serial: int | None) -> None:
        self._dirty = True
        if is_alias and self.reducer.aliases:
            self._aliases.append(_Alias(path, kept, kept._version))
        if serial is not None and self.reducer.ordered:
            self._pending.setdefault(key, []).append((serial, kept))
            return
        if not self.reducer.aliases:
            self.keep.transfers.wait()
        self._reducer_at(key).update(kept)

    def _reducer_at(self, key: CacheKey) -> Reducer:
        reducer = self.reducers.get(key)
        if reducer is None:
            reducer = self.reducers[key] = self.reducer.fresh()
        return reducer

    def write_now(self, key: CacheKey, path: str, tensor: Any) -> None:
        """Keep a value that was seen outside a forward of the root, and write it at once."""
        self.fired.add(path)
        kept = self.put_now(key, tensor)
        if isinstance(tensor, Tensor) and not tensor.is_inference() and shares_memory(kept, tensor):
            self._aliases.append(_Alias(path, kept, kept._version))

    def put_now(self, key: CacheKey, tensor: Any) -> Any:
        """Write one value to the cache at once, and give back what was kept of it."""
        kept = tensor.detach() if isinstance(tensor, TensorDictBase) else self.keep(tensor)
        self.keep.transfers.wait()
        self.target.put(key, kept)
        return kept

    def compute(self) -> None:
        """Write what the reducers hold to the cache."""
        if self.latest_only or not self._dirty:
            return
        self.keep.transfers.wait()
        for key, arrivals in self._pending.items():
            for _, value in sorted(arrivals, key=lambda arrival: arrival[0]):
                self._reducer_at(key).update(value)
        self._pending.clear()
        entries: dict[CacheKey, Any] = {key: reducer.compute() for key, reducer in self.reducers.items()}
        if self.stack_by is not None:
            entries = self.stack_by(entries)
        self.target.write(entries, complete=False)
        self._dirty = False

    def forget(self) -> None:
        """Drop every value and every entry that was written."""
        self.release()
        self.target.reset()
        self.idle()

    def release(self) -> None:
        """Let go of everything but what is in the cache."""
        for held in (self.values, self.versions, self.copies, self.reducers, self._aliases, self._pending):
            held.clear()
        self._dirty = False


class _Absent:
    """Stands for a site without a value; answers to what is asked of the tensors beside it."""

    _version = 0
    requires_grad = False


_ABSENT = _Absent()


def overwritten(paths: Sequence[str]) -> InplaceModificationError:
    return InplaceModificationError(
        f"the value kept at {listed(paths, 20)} was overwritten by a later in-place operation (such as ReLU(inplace=True)), "
        "so it is no longer the activation; keep a copy with hold='snapshot'",
        paths=paths,
    )
