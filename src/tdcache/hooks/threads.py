"""Hooks and threads: a context acts only in the forwards of the thread that opened it.

Hooks belong to the modules, which several threads may run at once. If each of them has a context open on one model, the
hooks of one would see, and change, the values of the other. So every thread that opens a context on a model is excluded
by a fence from the hooks of other threads there. Threads that open no context (the replicas of ``DataParallel``, a
pool) are not excluded: they work for their caller. While a single thread opens contexts there is no fence, and no cost.
"""

from __future__ import annotations

import threading
from threading import get_ident
from typing import Any

from tdcache.hooks.transient import Transient

__all__ = ["Fence", "Fenced", "current_fence", "fencing"]


class Fence:
    """The threads in which the hooks of one context do not act."""

    __slots__ = ("others",)

    def __init__(self, others: set[int]) -> None:
        self.others = others


class Fenced(Transient):
    """A hook behind a fence."""

    __slots__ = ("fence", "hook", "order")

    def __init__(self, hook: Any, order: int, fence: Fence) -> None:
        self.hook = hook
        self.order = order
        self.fence = fence

    def __call__(self, *args: Any) -> Any:
        """Call the hook, unless the fence excludes this thread."""
        return None if get_ident() in self.fence.others else self.hook(*args)


_local = threading.local()


def current_fence() -> Fence | None:
    """The fence of the context that this thread is installing, or None."""
    return getattr(_local, "fence", None)


class fencing:  # noqa: N801  (used as a function)
    """Put every hook that is registered in the block behind ``fence``."""

    __slots__ = ("_before", "_fence")

    def __init__(self, fence: Fence | None) -> None:
        self._fence = fence

    def __enter__(self) -> None:
        self._before = current_fence()
        _local.fence = self._fence

    def __exit__(self, *_: object) -> None:
        _local.fence = self._before
