"""Writing beside the forwards: one thread, a short queue, and failures that reach the caller."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

__all__ = ["WriterThread"]


class WriterThread:
    """Carries out calls in order on a thread of its own; at most ``waiting`` of them are held in memory.

    A call that raises stops the thread, and the error is raised where the next call is handed in, or when the block
    ends. If the block ends with an error of its own, what was handed in is still carried out, because it is whole, and
    that error is the one that is seen.
    """

    def __init__(self, *, waiting: int = 1) -> None:
        self._queue: queue.Queue[Callable[[], Any] | None] = queue.Queue(maxsize=waiting)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="tdcache-writer", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._failure is not None and error is None:
            raise self._failure
        if self._failure is not None and error is not self._failure and error is not None:
            error.add_note(f"while writing: {self._failure}")

    def submit(self, call: Callable[[], Any]) -> None:
        """Hand in a call; waits while the queue is full.

        Raises:
            BaseException: what an earlier call raised.
        """
        if self._failure is not None:
            raise self._failure
        self._queue.put(call)

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            if self._failure is not None:
                continue  # so that nobody waits for a place in the queue
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - it is raised again on the caller's thread
                self._failure = error
            del call
