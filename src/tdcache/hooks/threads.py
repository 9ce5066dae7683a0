"""Hooks and threads: a context acts only in the forwards of the thread that opened it.

Hooks sit on the modules, which several threads may run at once. If two threads had a context open on one model, the
hooks of each would see, and change, the values of the other. So a thread that opens a context on a model is fenced off
from the hooks that other threads have there. Threads that open none (the replicas of ``DataParallel``, a pool) are not:
they work for whoever called them. As long as only one thread opens contexts there is no fence, and no cost.

Another thread may start at any time, also while a context is half way through entering or exiting. So a fence exists
from the first hook to the last and records what was registered under it; the hooks are wrapped when the first thread is
fenced off.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from threading import RLock
from typing import Protocol
from weakref import ReferenceType, WeakSet, ref

from torch import nn

from tdcache.hooks.transient import Transient

__all__ = [
    "Fence",
    "Fenced",
    "Placed",
    "RunningThread",
    "active_fence",
    "fencing",
    "note_placed",
    "one_at_a_time",
    "this_thread",
]

one_at_a_time = RLock()
"""Held while the hooks of a module are changed: two threads may open contexts on one model."""


class RunningThread:
    """A thread that runs models; Python reuses the identifiers of threads that have ended, so they will not do."""

    __slots__ = ("__weakref__", "_latest", "models")

    def __init__(self) -> None:
        self.models: WeakSet[nn.Module] = WeakSet()
        """On which it opened contexts: it may be running them still."""
        self._latest: ReferenceType[nn.Module] | None = None

    def opens_on(self, model: nn.Module) -> bool:
        """The thread opens a context on ``model``; returns whether the one before was not on the same model."""
        if self._latest is not None and self._latest() is model:
            return False
        self._latest = ref(model)
        self.models.add(model)
        return True


class Placed(Protocol):
    """What was registered under a fence."""

    @property
    def is_there(self) -> bool:
        """Whether it has not been removed."""

    def put_behind(self, fence: Fence) -> None:
        """Make it ignore the threads that the fence excludes."""


_FEW = 32
"""How many registrations a fence keeps before it looks for removed ones."""


class Fence:
    """The threads in which the hooks of one context do not act, and what was registered under it."""

    __slots__ = ("_limit", "others", "placed")

    def __init__(self, others: Iterable[RunningThread] = ()) -> None:
        self.others = set(others)
        self.placed: list[Placed] = []
        self._limit = _FEW

    def note(self, placed: Placed) -> None:
        """Record a registration; if many were added since the last time, drop those that were removed."""
        self.placed.append(placed)
        if len(self.placed) > self._limit:
            self.placed = [each for each in self.placed if each.is_there]
            self._limit = _FEW + 2 * len(self.placed)

    def keep_out(self, thread: RunningThread) -> None:
        """Exclude a thread from what is registered now and later."""
        with one_at_a_time:
            self.others.add(thread)
            for placed in self.placed:
                placed.put_behind(self)


class Fenced(Transient):
    """A hook behind a fence."""

    __slots__ = ("fence", "hook", "order")

    def __init__(self, hook: object, order: int, fence: Fence) -> None:
        self.hook = hook
        self.order = order
        self.fence = fence

    def __call__(self, *args: object) -> object:
        """Call the hook, unless the thread is fenced off."""
        return None if _here.thread in self.fence.others else self.hook(*args)  # type: ignore[operator]


class _Here(threading.local):
    def __init__(self) -> None:
        self.thread = RunningThread()
        self.fence: Fence | None = None


_here = _Here()


def this_thread() -> RunningThread:
    """The calling thread; the object is dropped when the thread ends."""
    return _here.thread


def active_fence() -> Fence | None:
    """The fence under which this thread registers hooks, if it excludes some thread."""
    fence = _here.fence
    return fence if fence is not None and fence.others else None


def note_placed(placed: Placed) -> Fence | None:
    """Record a registration, so that threads that are fenced off later do not run it either.

    Returns:
        The active fence.
    """
    fence = _here.fence
    if fence is None:
        return None
    fence.note(placed)
    return fence if fence.others else None


class fencing:  # noqa: N801  (used as a function)
    """Register the hooks of the block under ``fence``."""

    __slots__ = ("_before", "_fence")

    def __init__(self, fence: Fence | None) -> None:
        self._fence = fence

    def __enter__(self) -> None:
        self._before = _here.fence
        _here.fence = self._fence

    def __exit__(self, *_: object) -> None:
        _here.fence = self._before
