"""Concatenates the values of all calls along one dimension, within a row budget and with bounded memory.

A list and one ``torch.cat`` at the end would need twice the memory of the result.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from tdcache.errors import CaptureError
from tdcache.reducers.growing import GrowingRows
from tdcache.reducers.rows import RowReducer

__all__ = ["Concatenate"]


@dataclass(eq=True)
class Concatenate(RowReducer):
    """Joins the values of all calls along ``dim``. Values are copied without their graph, so no batch is kept alive.

    Peak memory is the result and one value (on an accelerator, growing copies the result: give ``max_rows``).
    ``compute()`` returns the rows without a copy: contiguous if ``dim`` is 0, otherwise a view.

    Args:
        dim: the dimension that rows are counted along.
        max_rows: the exact maximum of rows to keep; further rows are ignored. Memory for them is allocated at once if
            possible.
        flatten: how many leading dimensions are merged into rows first; ``2`` makes ``(batch, seq, d)`` into
            ``(batch * seq, d)``, a negative number leaves that many trailing dimensions.
    """

    dim: int = 0
    max_rows: int | None = None
    flatten: int | None = None
    _kept: GrowingRows | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_rows is not None and self.max_rows < 0:
            raise ValueError(f"max_rows is a number of rows, got {self.max_rows}")

    @property
    def rows(self) -> int:
        """The number of kept rows."""
        return 0 if self._kept is None else self._kept.rows

    @property
    def empty(self) -> bool:
        """Whether there was no value yet."""
        return self._kept is None

    @property
    def full(self) -> bool:
        """Whether the row budget is used up, so that further values would be ignored."""
        return self.max_rows is not None and self.rows >= self.max_rows

    def update(self, value: Tensor, mask: Tensor | None = None) -> None:
        """Append the value's rows, or those that the mask selects, as far as the budget allows."""
        self._append(self._counted_rows(value, mask))

    def merge(self, other: Concatenate) -> None:
        """Append the rows of ``other``, within this reducer's budget."""
        self.check_mergeable(other)
        if not other.empty:
            self._append(other.compute().movedim(other.dim, 0))

    def compute(self) -> Tensor:
        """All rows so far, ``(..., rows, ...)``."""
        if self._kept is None:
            raise self.nothing_seen()
        return self._kept.tensor().movedim(0, self.dim)

    def _append(self, rows: Tensor) -> None:
        if self._kept is None:
            self._kept = self._make_room(rows)
        self._check_alike(rows, self._kept)
        self._kept.append(rows if self.max_rows is None else rows[: self.max_rows - self.rows])

    def _make_room(self, rows: Tensor) -> GrowingRows:
        if self.max_rows is not None:
            try:
                return GrowingRows(rows, self.max_rows)
            except (OSError, OverflowError, RuntimeError, ValueError):
                pass  # the whole budget does not fit: grow towards it instead
        return GrowingRows(rows, rows.shape[0])

    def _check_alike(self, rows: Tensor, kept: GrowingRows) -> None:
        if rows.shape[1:] != kept.shape:
            raise CaptureError(
                f"values of different shape cannot be concatenated along dim {self.dim}: rows of "
                f"{tuple(kept.shape)} so far, now {tuple(rows.shape[1:])}; choose another dim, flatten= "
                "the varying dimensions into rows, or use Stack()"
            )
        if rows.dtype != kept.dtype:
            raise CaptureError(
                f"values of different dtype cannot be concatenated: {kept.dtype} so far, now {rows.dtype}; "
                "give one dtype= to the caching context"
            )
