"""Keeps the values of one run at some sites, to be pasted into another run.

A module may run several times per forward, so values are matched call by call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor

from tdcache.errors import EditError
from tdcache.introspect import in_backward

__all__ = ["Memory"]


class Memory:
    """Copies of the values at each site, call by call, which are returned in the same order.

    Args:
        what: the run that fills it, for messages.
    """

    def __init__(self, what: str = "source") -> None:
        self.what = what
        self.mode: Literal["idle", "record", "recall"] = "idle"
        self.values: dict[str, list[Tensor]] = {}
        self._calls: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.what!r}, {self.mode}, {len(self.values)} sites)"

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Clear the memory, and record values inside the block."""
        self.values = {}
        with self._in_mode("record"):
            yield

    @contextmanager
    def recalling(self) -> Iterator[None]:
        """Return recorded values inside the block, for each site from its first call on."""
        self._calls = {}
        with self._in_mode("recall"):
            yield

    @contextmanager
    def _in_mode(self, mode: Literal["record", "recall"]) -> Iterator[None]:
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def record(self, path: str, value: Tensor) -> None:
        """Keep a copy of a value while recording."""
        if self.mode == "record" and not in_backward():
            self.values.setdefault(path, []).append(value.clone())

    def recall(self, path: str) -> Tensor | None:
        """The value of this call, or None while not recalling.

        Raises:
            EditError: there is no value for this call, or it is the recomputation of a checkpoint.
        """
        if in_backward() and self.values:
            raise EditError(
                f"activation checkpointing runs {path!r} again in the backward, where the run that "
                "gives values cannot be "
                "told from the one that takes them; switch checkpointing off, or patch from a cache with source="
            )
        if self.mode != "recall":
            return None
        call = self._calls.get(path, 0)
        self._calls[path] = call + 1
        values = self.values.get(path, [])
        if call >= len(values):
            raise EditError(
                f"{path!r} runs {call + 1} times in this run, and ran {len(values)} times in the {self.what} run; "
                "select modules that run as often in both"
            )
        return values[call]
