"""Writes a forward's entries into a TensorDict of any kind: ordinary, locked, or memory-mapped.

The kinds differ in what a write may do (replace an entry, or copy into it) and in how an entry that is no longer
current is removed. Channels know nothing of this.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from tensordict import TensorDictBase

from tdcache.cache.named_cache import new_node
from tdcache.errors import CacheWriteError, CaptureError, UnfiredSiteWarning, listed, warn_user
from tdcache.types import CacheKey

__all__ = ["CLOSED", "EntryTarget", "NothingApart", "Target", "Written", "first_clash", "path_of"]


class Written(NamedTuple):
    """One entry of a cache, and who writes it."""

    writer: Any
    cache: Any
    node: str | None
    key: str


def first_clash(entries: Iterable[Written]) -> tuple[Written, Written] | None:
    """The first two entries that clash, or None: the same key in one cache, or a key that is the name of a node."""
    leaves: dict[tuple[Any, ...], Written] = {}
    nodes: dict[tuple[Any, ...], Written] = {}
    for entry in entries:
        at = id(entry.cache)
        if entry.node is None:
            other = leaves.get((at, entry.key), nodes.get((at, entry.key)))
            leaves.setdefault((at, entry.key), entry)
        else:
            other = leaves.get((at, entry.node, entry.key), leaves.get((at, entry.node)))
            leaves.setdefault((at, entry.node, entry.key), entry)
            nodes.setdefault((at, entry.node), entry)
        if other is not None:
            return other, entry
    return None


class EntryTarget(Protocol):
    """Where a channel writes its entries."""

    @property
    def cache(self) -> Any:
        """The cache that the user sees."""

    @property
    def node(self) -> str | None:
        """The direction's name, if the cache has one node per direction."""

    @property
    def apart(self) -> Collection[CacheKey]:
        """The keys whose entries outlast the next forward: they stay until their modules run again."""

    def own_apart(self, *, copies: bool) -> None:
        """A forward begins: replace the entries that are ``apart`` by copies, unless aliases are to be kept."""

    @property
    def in_place(self) -> bool:
        """Whether values are copied into existing tensors."""

    def write(self, entries: Mapping[CacheKey, Any], *, complete: bool) -> None:
        """Make ``entries`` the direction's entries."""

    def put(self, key: CacheKey, value: Any) -> None:
        """Write one entry at once, beside those that are there."""

    def reset(self) -> None:
        """Drop every entry that was written here."""

    def ensure(self) -> None:
        """Make the direction's node exist."""

    def set_apart(self, *keys: CacheKey) -> None:
        """Let these entries (without arguments, all) stay until their modules run again."""


class NothingApart:
    """Base of targets that keep no entry beyond the latest forward."""

    apart: frozenset[CacheKey] = frozenset()

    def set_apart(self, *keys: CacheKey) -> None:
        """Do nothing: the next forward replaces the entries."""

    def own_apart(self, *, copies: bool) -> None:
        """Do nothing: nothing stays."""


class _ClosedTarget(NothingApart):
    """Drops all entries: the target of a channel whose context has closed."""

    cache = None
    node = None
    in_place = True

    def write(self, entries: Mapping[CacheKey, Any], *, complete: bool) -> None:
        """Drop the entries, since the context has closed."""

    def put(self, key: CacheKey, value: Any) -> None:
        """Drop the entry, since the context has closed."""

    def reset(self) -> None:
        """Do nothing, since nothing was written."""

    def ensure(self) -> None:
        """Do nothing, since nothing will be written."""


CLOSED = _ClosedTarget()


class Target:
    """Writes one direction's entries into the cache itself, or into the node of that direction.

    Entries are written by reference into an ordinary TensorDict, and copied into the existing tensors of one that is
    locked or memory-mapped. Such an entry cannot be removed; if it is not current it is filled with NaN (integers with
    the lowest value, booleans with False).

    Args:
        cache: the TensorDict that the user sees.
        node: the direction's name, if the cache has one node per direction.
        batch_dims: how many leading dimensions all entries share, as batch size.
    """

    def __init__(self, cache: TensorDictBase, node: str | None, batch_dims: int) -> None:
        self.cache = cache
        self.node = node
        self.batch_dims = batch_dims
        self.in_place = cache.is_locked or cache.is_memmap()
        self.written: dict[CacheKey, None] = {}
        """The keys that were written here; after a complete write, ``_complete`` stands for all of them."""
        self._complete: tuple[CacheKey, ...] = ()
        self._preallocated: dict[CacheKey, None] = {}
        """The keys to be written, if the cache is written in place."""
        self.apart: set[CacheKey] = set()
        """The keys of modules that ran outside the model's forward; their entries stay until these modules run again.
        Always empty if the cache is written in place or its entries share a batch size."""
        self._aliases: set[CacheKey] = set()
        """Those of them whose entries are not copies yet: others may hold, and write to, the same memory."""
        self._void: set[CacheKey] = set()
        """Those keys whose tensors hold no current value."""
        self._warned: set[CacheKey] = set()

    def refuse_lock(self) -> None:
        """Refuse a cache that was locked after the context was entered.

        Its entries may be the model's own tensors, so values must not be copied into them.

        Raises:
            CacheWriteError: the cache is locked.
        """
        if self.cache.is_locked:
            raise CacheWriteError(
                "the cache was locked inside the block, and what is in it may be the model's own tensors: unlock it "
                "with cache.unlock_(), or hand in a preallocated cache that is locked before the block"
            )

    def check(self, keys: Sequence[CacheKey]) -> None:
        """Refuse a locked cache that lacks entries for ``keys``.

        Raises:
            CacheWriteError: it names the missing ones and the remedy.
        """
        if not self.in_place:
            return
        missing = [self._full(key) for key in keys if self.cache.get(self._full(key), None) is None]
        if missing:
            raise CacheWriteError(
                f"the cache is locked and has no preallocated entry for {listed(missing)}; allocate them before "
                "locking it, or call cache.unlock_()",
                paths=[str(key) for key in missing],
            )
        self._preallocated.update(dict.fromkeys(keys))

    def write(self, entries: Mapping[CacheKey, Any], *, complete: bool) -> None:
        """Make ``entries`` the direction's entries.

        Args:
            entries: key to tensor (or TensorDict).
            complete: whether every site is among them, so that no older entry can remain.
        """
        if self.apart:
            self.apart.difference_update(entries)
        if self.in_place:
            self._fill(entries)
            return
        if complete:
            self._complete = self._complete or tuple(entries)
        else:
            self._drop_all_but(entries)
        if self.batch_dims:
            self.refuse_lock()
            self._write_batched(entries)
            return
        node = self.cache if self.node is None else self._own_node()
        try:
            node.update(entries)
        except RuntimeError:
            self.refuse_lock()
            raise

    def _drop_all_but(self, entries: Mapping[CacheKey, Any]) -> None:
        self._begin_partial()
        for key in [key for key in self.written if key not in entries and key not in self.apart]:
            self._drop(key)
        self.written.update(dict.fromkeys(entries))

    def _begin_partial(self) -> None:
        """Before some entries are written, or dropped, and others stay: note each of a complete write by itself."""
        self.refuse_lock()
        self.written.update(dict.fromkeys(self._complete))
        self._complete = ()

    def _fill(self, entries: Mapping[CacheKey, Any]) -> None:
        for key, value in entries.items():
            self._copy_in(key, value)
        self._preallocated.update(dict.fromkeys(entries))
        silent = [key for key in self._preallocated if key not in entries and key not in self._void]
        self._make_void(silent)
        new = [key for key in silent if key not in self._warned]
        if new:
            self._warned.update(new)
            warn_user(
                f"the forward gave no value for {listed([self._full(key) for key in new])} of the locked cache, whose "
                "entries cannot be dropped: they are NaN now (integers the lowest value, booleans False)",
                UnfiredSiteWarning,
            )

    def _make_void(self, keys: Iterable[CacheKey]) -> None:
        for key in keys:
            there = self.cache.get(self._full(key))
            self.cache.set_(self._full(key), torch.full_like(there, _void_value(there.dtype)))
            self._void.add(key)

    def put(self, key: CacheKey, value: Any) -> None:
        """Write one entry at once, beside those that are there.

        Raises:
            CaptureError: with ``batch_dims``, the existing entries have another batch size.
        """
        if self.in_place:
            self._copy_in(key, value)
            return
        self._begin_partial()
        self.written[key] = None
        if self.batch_dims:
            node = self._own_node()
            there = {each: found for each in self.written if (found := node.get(each, None)) is not None}
            self._write_batched({**there, key: value})
        else:
            self._own_node()[key] = value

    def set_apart(self, *keys: CacheKey) -> None:
        """Let these entries (without arguments, all) stay until their modules run again.

        The forwards that follow are those of other modules, such as a decoder's after its encoder was called.
        """
        if not (self.in_place or self.batch_dims):
            new = set(keys or (*self._complete, *self.written))
            self.apart |= new
            self._aliases |= new

    def own_apart(self, *, copies: bool) -> None:
        """A forward begins, after which in-place writes to the entries that stay would not be noticed.

        Args:
            copies: whether to replace these entries by copies.
        """
        for key in self._aliases if copies else ():
            value = self._own_node().get(key, None)
            if value is not None:
                self.put(key, value.clone())
        self._aliases.clear()

    def reset(self) -> None:
        """Drop every entry that was written here."""
        self.apart.clear()
        self._aliases.clear()
        if self.in_place:
            self._make_void(key for key in self._preallocated if key not in self._void)
            return
        if not (self._complete or self.written):
            return
        node = None if self.node is None else self._own_node()
        if node is not None and not self.written and len(node.keys()) == len(self._complete):
            # All entries were written here, as after most forwards: a new node is cheaper than emptying this one.
            self.cache[self.node] = new_node(self.cache, self.cache.batch_size)
        else:
            for key in dict.fromkeys((*self._complete, *self.written)):
                self._drop(key)
        self.written.clear()
        self._complete = ()

    def ensure(self) -> None:
        """Make the direction's node exist, so that ``cache["bwd"]`` can be read before the first gradient."""
        if not self.in_place:
            self._own_node()

    def _own_node(self) -> TensorDictBase:
        if self.node is None:
            return self.cache
        try:
            return cast(TensorDictBase, self.cache[self.node])  # three times faster than get()
        except KeyError:
            self.cache[self.node] = new_node(self.cache)
            return cast(TensorDictBase, self.cache[self.node])

    def _drop(self, key: CacheKey) -> None:
        full = self._full(key)
        if self.cache.get(full, None) is not None:
            self.cache.del_(full)
        self.written.pop(key, None)
        # A site that had parts (pick="all") must not leave an empty node where the next value may be a leaf.
        while isinstance(key, tuple) and len(key) > 1:
            key = key[:-1]
            node = self.cache.get(self._full(key), None)
            if node is None or not node.is_empty():
                break
            self.cache.del_(self._full(key))

    def _full(self, key: CacheKey) -> CacheKey:
        if self.node is None:
            return key
        return (self.node, *key) if isinstance(key, tuple) else (self.node, key)

    def _copy_in(self, key: CacheKey, value: Any) -> None:
        there = self.cache.get(self._full(key), None)
        if there is None:
            self.check((key,))
        if there.shape != value.shape or there.dtype != value.dtype:
            raise CacheWriteError(
                f"the locked cache's entry {self._full(key)!r} does not fit its value:\n"
                f"  cache: shape {tuple(there.shape)}, {there.dtype}\n"
                f"  value: shape {tuple(value.shape)}, {value.dtype}\n"
                "allocate it in this shape and dtype, or use index= and dtype= to change what is kept",
                paths=[str(self._full(key))],
            )
        self.cache.set_(self._full(key), value)  # not there.copy_: a lazily stacked TensorDict builds it anew
        self._void.discard(key)

    def _write_batched(self, entries: Mapping[CacheKey, Any]) -> None:
        shapes = {key: tuple(value.shape[: self.batch_dims]) for key, value in entries.items()}
        if len(set(shapes.values())) > 1 or any(len(shape) < self.batch_dims for shape in shapes.values()):
            common = max(set(shapes.values()), key=list(shapes.values()).count)
            odd = [
                f"{key!r} {tuple(entries[key].shape)}"
                for key, shape in shapes.items()
                if shape != common or len(shape) < self.batch_dims
            ]
            raise CaptureError(
                f"batch_dims={self.batch_dims} needs the same leading dims at every site; most have {common}, but "
                f"{', '.join(odd[:5])}; select other sites, lower batch_dims, or bring them in line with callback=",
                paths=[str(key) for key, shape in shapes.items() if shape != common],
            )
        batch = torch.Size(next(iter(shapes.values()), ()))
        node = self._own_node()
        for td in {id(self.cache): self.cache, id(node): node}.values():
            if td.batch_size != batch:
                td.batch_size = torch.Size([])
        node.update(entries)
        node.batch_size = batch
        if node is not self.cache and all(
            tuple(value.shape[: self.batch_dims]) == batch for value in self.cache.values()
        ):
            self.cache.batch_size = batch


def path_of(key: CacheKey) -> str:
    """The path of the site whose entry has this key."""
    return key if isinstance(key, str) else key[0]


def _void_value(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return False
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min
