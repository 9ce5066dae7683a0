"""The registry of contexts that are open in this process, and of the threads that opened contexts on each model.

Without it, the hooks of one thread's context would capture and change the forwards of another thread on the same model.
"""

from __future__ import annotations

from threading import RLock, get_ident
from typing import Protocol
from weakref import WeakKeyDictionary

from torch import nn

from tdcache.hooks.registrations import MultiHookHandle
from tdcache.hooks.threads import Fence

__all__ = ["Opened", "begin_opening", "closed", "open_contexts"]


class Opened(Protocol):
    """The part of an open context that the registry uses."""

    model: nn.Module
    thread: int
    fence: Fence
    is_child: bool

    @property
    def handle(self) -> MultiHookHandle:
        """The registrations of its hooks."""


open_contexts: set[Opened] = set()
_lock = RLock()
_openers: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
"""All threads that have opened contexts on a model: they may still be running it."""
_threads: set[int] = set()
"""Every thread that ever opened a context."""


def begin_opening(context: Opened) -> Fence | None:
    """A context is about to install its hooks; returns the fence to put them behind, or None.

    The hooks of other threads' contexts on the same model are put behind fences as well.
    """
    me = context.thread = get_ident()
    with _lock:
        _openers.setdefault(context.model, set()).add(me)
        open_contexts.add(context)
        _threads.add(me)
        if len(_threads) == 1:  # the usual case, whatever the number of models
            return None
        if all(threads <= {me} for threads in _openers.values()):
            return None
        related = [model for model in _openers if _overlap(model, context.model)]
        context.fence.others.update(thread for model in related for thread in _openers[model] if thread != me)
        for other in open_contexts:
            if other.thread != me and _overlap(other.model, context.model) and me not in other.fence.others:
                other.fence.others.add(me)
                other.handle.put_behind(other.fence)
        return context.fence if context.fence.others else None


def closed(context: Opened) -> None:
    """Forget a context that has exited."""
    with _lock:
        open_contexts.discard(context)


def _overlap(one: nn.Module, other: nn.Module) -> bool:
    return one is other or any(each is other for each in one.modules()) or any(each is one for each in other.modules())
