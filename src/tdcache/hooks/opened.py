"""The registry of contexts and runs that are open in this process, and of the threads that open them on each model.

Without it, the hooks of one thread's context would capture and change the forwards of another thread on the same model.
"""

from __future__ import annotations

from threading import RLock
from types import TracebackType
from typing import Protocol
from weakref import WeakSet

from torch import nn

from tdcache.hooks.threads import Fence, RunningThread, fencing, this_thread

__all__ = ["Opened", "OpenedHere", "begin_opening", "closed", "open_contexts", "overlap"]


class Opened(Protocol):
    """The part of an open context that the registry uses."""

    model: nn.Module
    fence: Fence | None
    thread: RunningThread | None


open_contexts: set[Opened] = set()
_lock = RLock()
_threads: WeakSet[RunningThread] = WeakSet()
"""Every thread that opened a context and has not ended."""


def begin_opening(context: Opened) -> None:
    """A context is about to install its hooks: fence it off from the other threads on its model, and them from it."""
    me = this_thread()
    with _lock:
        fence = Fence()
        context.thread, context.fence = me, fence
        open_contexts.add(context)
        if me.opens_on(context.model):
            _threads.add(me)
        if len(_threads) == 1:  # the usual case, whatever the number of models
            return
        fence.others.update(each for each in _threads if each is not me and _runs(each, context.model))
        for other in open_contexts:
            theirs = other.fence
            if other.thread is me or theirs is None or me in theirs.others or not overlap(other.model, context.model):
                continue
            theirs.keep_out(me)


def closed(context: Opened) -> None:
    """Forget a context that has exited."""
    with _lock:
        open_contexts.discard(context)
        context.thread = context.fence = None


def _runs(thread: RunningThread, model: nn.Module) -> bool:
    """Whether a thread opened a context on ``model``, on part of it or on what it is part of."""
    return any(overlap(each, model) for each in thread.models)


def overlap(one: nn.Module, other: nn.Module) -> bool:
    """Whether one module is the other, or part of it."""
    return one is other or any(each is other for each in one.modules()) or any(each is one for each in other.modules())


class OpenedHere:
    """Hooks on ``model`` for the length of a block, without a context, such as those of a run.

    They act in the same threads as those of a context: entering it gives the block to register them in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.fence: Fence | None = None
        self.thread: RunningThread | None = None

    def __enter__(self) -> fencing:
        begin_opening(self)
        return fencing(self.fence)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        closed(self)
