"""How far a loop is: a bar where ``tqdm`` is installed, a line now and then where it is not."""

from __future__ import annotations

import importlib
import sys
import time
from types import TracebackType
from typing import Any, Self

__all__ = ["Progress"]

_SECONDS = 5.0


class Progress:
    """Counts rows and says how many per second, and how long it still takes. A context manager.

    Args:
        shown: say anything at all.
        total: rows in all, where that is known.
    """

    def __init__(self, *, shown: bool, total: int | None = None) -> None:
        self.rows = 0
        self._total = total
        self._start = self._said = time.monotonic()
        self._shown = shown
        self._bar: Any = _bar(total) if shown else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._shown:
            self._say()

    def expect(self, total: int | None) -> None:
        """Say how many rows there will be, once that is known."""
        self._total = total
        if self._bar is not None:
            self._bar.total = total
            self._bar.refresh()

    def add(self, rows: int) -> None:
        """Count some more rows."""
        self.rows += rows
        if self._bar is not None:
            self._bar.update(rows)
        elif self._shown and time.monotonic() - self._said > _SECONDS:
            self._said = time.monotonic()
            self._say()

    def _say(self) -> None:
        rate = self.rows / max(time.monotonic() - self._start, 1e-9)
        left = "" if self._total is None or not rate else f", {max(self._total - self.rows, 0) / rate:,.0f} s left"
        print(f"{self.rows:,} rows, {rate:,.0f} rows/s{left}", file=sys.stderr)


def _bar(total: int | None) -> Any:
    try:
        tqdm: Any = importlib.import_module("tqdm.auto")  # a widget in a notebook, text elsewhere
    except ImportError:
        return None
    return tqdm.tqdm(total=total, unit="row", unit_scale=True)
