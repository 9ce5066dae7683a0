"""One direction of an open caching context: holds the values of the running forward and delivers them to the cache.

A hook writes into a plain dict, and one ``TensorDict.update`` per forward (or backward) delivers all values, which is
five times cheaper than a TensorDict write per hook. The dict holds the tensors themselves. That is safe because each
tensor's version counter is recorded and compared when the values are delivered, read and released. Anything but the
first plain tensor of a site (a second call, a tuple, a slice) takes the slow path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, cast

from tensordict import TensorDictBase
from torch import Tensor

from tdcache.cache.keep import Keep, Transfers, detach_all
from tdcache.cache.ownership import Outside, own, shared_keys
from tdcache.cache.part import PartFilter
from tdcache.cache.reductions import Reductions
from tdcache.cache.stacking import GrowingStackBy, StackBy
from tdcache.cache.stand_ins import ABSENT, CopyInGraph
from tdcache.cache.target import EntryTarget, path_of
from tdcache.errors import CaptureError
from tdcache.hooks.directions import DIRECTIONS
from tdcache.inplace import InplaceWatch, overwritten, shares_memory
from tdcache.reducers import Last, Reducer
from tdcache.selection import Site
from tdcache.transforms import escaped, in_transform, is_wrapped, transform_under_way, unwrapped
from tdcache.types import CacheKey, HookDirection

__all__ = ["Channel"]

_version = attrgetter("_version")
_requires_grad = attrgetter("requires_grad")


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
    """Whether a site may have any number of entries (``pick="all"``), or sites are discovered as they fire."""
    part: PartFilter | None = None
    """Which rows, positions, units and heads of each value are kept; None for all."""
    gated: bool = False
    """Whether some forwards are left out (``steps=``)."""
    by_value: bool = False
    """Whether what is kept of the forward is compared by checksums as well (``check="values"``)."""
    transfers: Transfers = field(default_factory=Transfers)
    values: dict[CacheKey, Any] = field(default_factory=dict)
    """Aliases from the latest forward, by key. Between forwards every key is present, so that a hook that fires outside
    a forward of the root takes the slow path."""
    versions: dict[CacheKey, int] = field(default_factory=dict)
    """The version counters of ``values`` when they were taken, if not 0."""
    copies: dict[CacheKey, Any] = field(default_factory=dict)
    """Values of the latest forward that share no memory with the model."""
    has_copies: bool = False
    """Whether ``values`` may hold copies made by a compiled graph."""
    waiting: dict[CacheKey, Any] = field(default_factory=dict)
    """With ``stack_by``: values of modules that ran outside a forward of the root, until all of them are present."""
    arrived: dict[CacheKey, int] = field(default_factory=dict)
    """Gradient channels only: the serial number of the call that the kept gradient belongs to, if not 0."""
    number: int = 0
    """Gradient channels only: the forward whose gradients are current."""
    accepting: int = -1
    """Gradient channels only: ``number`` during a backward that will deliver when it ends, otherwise -1."""
    reductions: Reductions | None = field(init=False)
    """The state of the reducers; None if each forward replaces the entries of the previous one."""
    fired: set[str] = field(default_factory=set)
    """The paths that have seen a value since the context was entered, if not ``all_fired``."""
    all_fired: bool = False
    """Whether every path has."""
    is_gradient: bool = field(init=False)
    """Whether values arrive in the backward."""
    latest_only: bool = field(init=False)
    """Whether each forward replaces the entries of the previous one."""
    takes_aliases: bool = field(init=False)
    """Whether a hook may write the tensor itself into ``values``."""
    _checks_values: bool = field(init=False)
    _watch: InplaceWatch = field(init=False)
    """The aliases that reducers and parts of the cache keep."""
    _idle: bool = False
    """Whether some of ``values`` are placeholders for sites without a value."""

    def __post_init__(self) -> None:
        self.is_gradient = DIRECTIONS[self.direction].gradient
        self.latest_only = isinstance(self.reducer, Last)
        self._checks_values = self.by_value and not self.is_gradient  # gradients that others can write to are copied
        plain = self.keep.plain and self.part is None and not (self.target.in_place or self.gated)
        self.takes_aliases = self.latest_only and plain and not self._checks_values
        self._watch = InplaceWatch(by_value=self.by_value)
        self.reductions = None if self.latest_only else Reductions(self.reducer, self._watch)

    @property
    def top_keys(self) -> tuple[str, ...]:
        """The top-level keys of the cache that this direction writes."""
        if self.target.node is not None:
            return (self.target.node,)
        return self.entry_keys

    @property
    def entry_keys(self) -> tuple[str, ...]:
        """The keys of the entries in their node of the cache."""
        return self.paths if self.stack_by is None else tuple(self.stack_by.members)

    def admit(self, site: Site) -> None:
        """Add a site that was discovered during the forward."""
        if site.path not in self.paths:
            self.paths = (*self.paths, site.path)
            if isinstance(self.stack_by, GrowingStackBy):
                self.stack_by.add(site)

    def begin(self, alone: bool = True) -> None:
        """A forward begins: the values of the previous one are no longer current.

        Args:
            alone: whether no other thread is running a forward; if one is, hooks must keep taking the slow path.
        """
        if self.target.apart and not self.is_gradient:
            self.check()
            self.target.own_apart(copies=self.keep.hold != "live")
        if alone or self.is_gradient:
            self.values.clear()
            self._idle = False
        else:
            self.mark_absent()
        if self.versions:
            self.versions.clear()
        if self.copies:
            self.copies.clear()
        if not self.latest_only:
            return
        if self._watch.seen:
            self._watch.clear()
        if self.is_gradient:
            self.arrived.clear()
            self.number += 1
            self.target.reset()

    def has(self, key: CacheKey) -> bool:
        """Whether the running forward has produced a value for this key."""
        return key in self.copies or self.values.get(key, ABSENT) is not ABSENT

    def deliver(self) -> None:
        """A forward (or backward) has ended: check the aliases, detach them, and write the entries to the cache."""
        complete = len(self.values) == len(self.paths) and not self.has_parts
        if complete and not self._idle:
            self.all_fired = True
        elif not self.all_fired:
            self.fired.update([path_of(key) for key in (*self.values, *self.copies) if self.has(key)])
        self.accepting = -1
        if self.has_copies:
            self._unwrap_copies()
        self.check()
        if self.reductions is not None:
            self.reductions.end_backward()
            return
        values = self.values
        if self.is_gradient or transform_under_way() is not None or True in map(_requires_grad, values.values()):
            self._settle_aliases()
        if self.copies or self.stack_by is not None or not complete or len(values) != len(self.paths):
            self._deliver_slowly()
        else:
            self.target.write(values, complete=True)

    def _settle_aliases(self) -> None:
        """Detach values from graphs and ``torch.func`` transforms, and from what a backward may still write to."""
        values = self.values
        if transform_under_way() is not None or (self.is_gradient and in_transform()):
            self._unwrap()
        if self.is_gradient:
            for key in own(values):
                self.versions.pop(key, None)
        if self.keep.hold != "live" and True in map(_requires_grad, values.values()):
            for key in detach_all(values):  # parameters and inputs, which others write to
                self.copies[key] = values[key].clone()
                self._vacate(key)

    def _unwrap_copies(self) -> None:
        self.has_copies = False
        for key, value in list(self.values.items()):
            if isinstance(value, CopyInGraph):
                del self.values[key]
                self.copies[key] = value.tensor

    def _unwrap(self) -> None:
        for key, value in list(self.values.items()):
            if value is not ABSENT:
                self.copies[key] = unwrapped(value)
                self._vacate(key)

    def _vacate(self, key: CacheKey) -> None:
        """Keep no alias at ``key``; during a forward a placeholder stays, for hooks that run in other threads."""
        self.versions.pop(key, None)
        if self.is_gradient:
            self.values.pop(key, None)
        elif key in self.values:
            self.values[key] = ABSENT
            self._idle = True

    def _deliver_slowly(self) -> None:
        self.transfers.wait()
        entries = {**self.values, **self.copies}
        if self._idle:
            entries = {key: value for key, value in entries.items() if value is not ABSENT}
        self.target.write(self._stacked(entries), complete=False)
        if not self.is_gradient:
            # A graph is made for an empty one; a callback's TensorDicts, which fit no graph, are settled at the end.
            self.copies = {key: value for key, value in self.copies.items() if isinstance(value, TensorDictBase)}
            self.idle()

    def _stacked(self, entries: dict[CacheKey, Any]) -> Mapping[CacheKey, Any]:
        if self.stack_by is None or (self.is_gradient and not self.stack_by.complete(entries)):
            return entries  # another backward may bring the missing gradients
        return self.stack_by(entries)

    def idle(self) -> None:
        """Fill every key, so that hooks take the slow path until the next forward begins."""
        absent = [path for path in self.paths if path not in self.values] if self.values else self.paths
        if absent:
            self.values.update(dict.fromkeys(absent, ABSENT))
            self._idle = True

    def mark_absent(self) -> None:
        """Make every hook of the forward take the slow path, including those in other threads."""
        if not self.is_gradient:
            self.values.update(dict.fromkeys((*self.values, *self.paths), ABSENT))
            self._idle = True

    def check(self) -> None:
        """Raise if a kept alias has been overwritten.

        Raises:
            InplaceModificationError: it names every path concerned.
        """
        if any(map(_version, self.values.values())):
            taken = self.versions
            changed = [str(key) for key, value in self.values.items() if value._version != taken.get(key, 0)]
            if changed:
                raise overwritten(changed)
        if self._watch.seen:
            self._watch.check()
        if self.reductions is not None:
            self.reductions.check()

    def take(self, key: CacheKey, path: str, tensor: Any, *, serial: int | None = None) -> None:
        """Keep a value on the slow path.

        Args:
            key: the entry's key.
            path: the site.
            tensor: the value that the hook saw (a TensorDict if a callback returned one).
            serial: the number of the call, for values that do not arrive in order.
        """
        self.fired.add(path)
        mask: Tensor | None = None
        if self.part is not None:
            part = self.part.of(path, tensor, self.reducer)
            if part is None:
                return
            tensor, mask = part
        if self.reductions is not None:
            if self.reductions.wants(key, serial):
                kept, is_alias = self._keep(tensor, path)
                if not self.reductions.keeps_aliases:
                    self.transfers.wait()
                self.reductions.add(key, path, kept, mask, serial=serial, is_alias=is_alias)
            return
        kept, is_alias = self._keep(tensor, path)
        if is_alias:
            self.copies.pop(key, None)
            self.values[key] = kept
            self.versions[key] = kept._version
            if self._checks_values:
                self._watch.add(path, kept)
        else:
            self._vacate(key)
            self.copies[key] = kept

    def write_now(self, key: CacheKey, path: str, tensor: Any) -> None:
        """Keep a value that was seen outside a forward of the root, and write it at once.

        With ``stack_by`` it waits for the values that it is stacked with.
        """
        if self.stack_by is not None:
            self.fired.add(path)
            part = (tensor, None) if self.part is None else self.part.of(path, tensor, self.reducer)
            if part is not None:
                kept, is_alias = self._keep(part[0], path)
                self.transfers.wait()
                self.waiting[key] = kept.clone() if is_alias else kept
            if self.stack_by.complete(self.waiting):
                self.target.write(self.stack_by(self.waiting), complete=False)
                self.waiting.clear()
            return
        self.take(key, path, tensor)
        if not self.has(key):  # none of the positions was fed
            return
        self.transfers.wait()
        kept = self.copies.get(key)
        self.target.set_apart(key)
        self.target.put(key, self.values[key] if kept is None else kept)
        if kept is not None:
            self.idle()

    def _keep(self, value: Any, path: str) -> tuple[Any, bool]:
        if in_transform() and isinstance(value, Tensor):
            return self.keep(unwrapped(value), self.transfers), False
        if isinstance(value, TensorDictBase):
            return value.apply(lambda leaf: self._keep_leaf(leaf, path)), False
        try:
            kept = self.keep(value, self.transfers)
        except IndexError as error:
            raise CaptureError(
                f"index={self.keep.index!r} does not fit the value at {path!r}, of shape {tuple(value.shape)}: {error}",
                paths=(path,),
            ) from error
        return kept, not value.is_inference() and shares_memory(kept, value)

    def _keep_leaf(self, leaf: Tensor, path: str) -> Tensor:
        kept, is_alias = self._keep(leaf, path)
        if is_alias:
            self._watch.add(path, kept)
        return cast(Tensor, kept)

    def compute(self) -> None:
        """Write the reduced values to the cache."""
        if self.reductions is None or not self.reductions.dirty:
            return
        self.transfers.wait()
        self.check()
        self.target.write(self._stacked(self.reductions.computed()), complete=False)
        self.reductions.dirty = False

    def settle(self, outside: Outside | None) -> None:
        """The context exits: copy what others could still write to, so that kept values stay as they were seen.

        Args:
            outside: see :func:`tdcache.cache.ownership.shared_keys`.

        Raises:
            CaptureError: a value is only meaningful inside a ``torch.func`` transform that has ended.
        """
        values = self.values
        if self._idle:
            values = {key: value for key, value in values.items() if value is not ABSENT}
        holders = 2 if values is self.values else 3  # the dicts here, and the cache
        shared = shared_keys(values, outside, holders=holders)
        wrapped = [path_of(key) for key in shared if is_wrapped(values[key])] if shared else []
        if wrapped and not in_transform():
            raise escaped(wrapped)
        if self.keep.hold == "live" or self.target.in_place:
            return
        if self._watch.seen:
            self._settle_watched({id(each.tensor) for each in self._watch.seen})
        for key in shared if self.latest_only and self.stack_by is None else ():
            self.target.put(key, values[key].clone())

    def _settle_watched(self, watched: set[int]) -> None:
        """Copy the aliases held by reducers and by TensorDicts that a callback returned."""
        copied = partial(_copy_of, watched)
        if self.reductions is not None:
            self.reductions.own(copied)
        self.compute()
        for key, value in self.copies.items():
            if isinstance(value, TensorDictBase) and self.stack_by is None:
                self.target.put(key, value.apply(copied))

    def forget(self) -> None:
        """Drop every value and every entry that was written."""
        self.release()
        self.target.reset()
        if not self.is_gradient:
            self.idle()

    def release(self) -> None:
        """Drop all state except the cache itself; gradients that arrive later are ignored."""
        for held in (self.values, self.versions, self.copies, self.waiting, self.arrived):
            held.clear()
        self._watch.seen.clear()
        if self.reductions is not None:
            self.reductions.clear()
        if self.part is not None:
            self.part.forget()
        self.number += 1
        self.accepting = -1


def _copy_of(watched: set[int], tensor: Tensor) -> Tensor:
    return tensor.clone() if id(tensor) in watched else tensor
