"""Items made on a thread of their own, some ahead of where they are used."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["made_ahead"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Made(Generic[T]):
    item: T


@dataclass(frozen=True, slots=True)
class _Ended:
    failure: BaseException | None = None


def made_ahead(make: Callable[[], Generator[T]], *, waiting: int, ready: deque[T]) -> Generator[T]:
    """The items of ``ready``, and then those of ``make()``, which is run and closed on a thread of its own.

    When this iterator is closed, the items that were made and not asked for are left in ``ready``, in their order; the
    thread has ended by then.

    Args:
        make: gives an iterator.
        waiting: how many items are held at most; 0 makes each when it is asked for, on the caller's thread.
        ready: items that an earlier iterator left.

    Raises:
        BaseException: what ``make`` raised, after the items that came before.
    """
    while ready:
        yield ready.popleft()
    if waiting < 1:
        with closing(make()) as items:
            yield from items
        return
    made: queue.Queue[_Made[T] | _Ended] = queue.Queue(maxsize=waiting)
    stop = threading.Event()
    thread = threading.Thread(target=_work, args=(make, made, stop), name="tdcache-forwards", daemon=True)
    thread.start()
    try:
        while isinstance(found := made.get(), _Made):
            yield found.item
    finally:
        stop.set()
        _keep_rest(thread, made, ready)
    if found.failure is not None:
        raise found.failure


def _work(make: Callable[[], Generator[T]], made: queue.Queue[_Made[T] | _Ended], stop: threading.Event) -> None:
    try:
        with closing(make()) as items:
            for item in items:
                made.put(_Made(item))
                if stop.is_set():
                    break
    except BaseException as failure:  # noqa: BLE001 - it is raised again on the caller's thread
        made.put(_Ended(failure))
    else:
        made.put(_Ended())


def _keep_rest(thread: threading.Thread, made: queue.Queue[_Made[T] | _Ended], ready: deque[T]) -> None:
    """Wait for the thread, and make room for what it still has to put."""
    while thread.is_alive() or not made.empty():
        try:
            found = made.get(timeout=0.01)
        except queue.Empty:
            continue
        if isinstance(found, _Made):
            ready.append(found.item)
    thread.join()
