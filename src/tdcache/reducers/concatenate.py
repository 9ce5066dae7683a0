"""The reducer that makes rows: values joined along one dimension, within a row budget and with bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from mmap import mmap

import torch
from torch import Tensor

from tdcache.errors import CaptureError
from tdcache.reducers.base import Reducer

__all__ = ["Concatenate"]

# A new block is this share of the rows that are there: few enough blocks, and little memory that is not used yet.
_GROWTH = 0.05
_LEAST_BYTES = 1 << 20


def _empty_rows(like: Tensor, rows: int) -> Tensor:
    size = rows * math.prod(like.shape[1:]) * like.element_size()
    if like.device.type != "cpu" or size < _LEAST_BYTES // 2:
        return like.new_empty((rows, *like.shape[1:]))
    # malloc holds on to tens of megabytes of freed blocks, which count while they are joined; a mapping is given back.
    return torch.frombuffer(mmap(-1, size), dtype=torch.uint8).view(like.dtype).view(rows, *like.shape[1:])


@dataclass(eq=True)
class Concatenate(Reducer):
    """Joins the values of all calls along ``dim``; every value is copied, so nothing pins a batch.

    Peak memory is the result plus one block of a twentieth of it (on an accelerator give ``max_rows``: growing there
    ends in one copy). ``compute()`` gives a tensor that is contiguous where ``dim`` is 0 and a view otherwise.

    Args:
        dim: the dimension that rows are counted along.
        max_rows: the most rows that are kept, exactly; what comes after is ignored. The result is then allocated at
            once and written in place, where the memory for it can be had.
        flatten: how many leading dimensions are merged into rows first; ``2`` makes ``(batch, seq, d)`` into
            ``(batch * seq, d)``, a negative number leaves that many trailing dimensions.
    """

    dim: int = 0
    max_rows: int | None = None
    flatten: int | None = None
    rows: int = field(default=0, init=False, repr=False, compare=False)
    _blocks: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    _used: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.max_rows is not None and self.max_rows < 0:
            raise ValueError(f"max_rows is a number of rows, got {self.max_rows}")

    @property
    def empty(self) -> bool:
        """Whether nothing was seen yet."""
        return not self._blocks

    @property
    def full(self) -> bool:
        """Whether the row budget is used up."""
        return self.max_rows is not None and self.rows >= self.max_rows

    def update(self, value: Tensor) -> None:
        """Copy the value's rows in, as many as the budget still allows."""
        self._append(self._as_rows(value))

    def merge(self, other: Concatenate) -> None:
        """Append the other's rows, within the own budget."""
        self.check_mergeable(other)
        if not other.empty:
            self._append(other.compute().movedim(other.dim, 0))

    def compute(self) -> Tensor:
        """All rows so far, ``(..., rows, ...)``."""
        if not self._blocks:
            raise self.nothing_seen()
        spare = self.max_rows is None and self._blocks[0].shape[0] > self.rows
        if spare or len(self._blocks) > 1:
            self._join()
        return self._blocks[0][: self.rows].movedim(0, self.dim)

    def _as_rows(self, value: Tensor) -> Tensor:
        if self.flatten is not None:
            last = self.flatten - 1 if self.flatten > 0 else value.dim() + self.flatten - 1
            value = value.flatten(0, last) if last > 0 else value
        if value.dim() == 0:
            value = value.unsqueeze(0)
        return value.movedim(self.dim, 0)

    def _append(self, rows: Tensor) -> None:
        if self._blocks and rows.shape[1:] != self._blocks[0].shape[1:]:
            raise CaptureError(
                f"values of different shape cannot be concatenated along dim {self.dim}: rows of "
                f"{tuple(self._blocks[0].shape[1:])} so far, now {tuple(rows.shape[1:])}; choose another dim, flatten= "
                "the varying dimensions into rows, or use Stack()"
            )
        if self._blocks and rows.dtype != self._blocks[0].dtype:
            raise CaptureError(
                f"values of different dtype cannot be concatenated: {self._blocks[0].dtype} so far, now {rows.dtype}; "
                "give one dtype= to the caching context"
            )
        if self.max_rows is not None:
            rows = rows[: self.max_rows - self.rows]
        if not self._blocks:
            self._blocks.append(self._block(rows, rows.shape[0]))
        while rows.shape[0] > 0:
            room = self._blocks[-1].shape[0] - self._used
            if room == 0:
                self._blocks.append(self._block(rows, max(rows.shape[0], int(self.rows * _GROWTH))))
                self._used, room = 0, self._blocks[-1].shape[0]
            part, rows = rows[:room], rows[room:]
            self._blocks[-1][self._used : self._used + part.shape[0]].copy_(part)
            self._used += part.shape[0]
            self.rows += part.shape[0]

    @torch.inference_mode(mode=False)  # a block made in inference mode could not be written outside of it
    def _block(self, like: Tensor, wanted: int) -> Tensor:
        row_bytes = max(1, math.prod(like.shape[1:]) * like.element_size())
        wanted = max(wanted, _LEAST_BYTES // row_bytes)
        if self.max_rows is not None:
            left = self.max_rows - self.rows
            try:
                return like.new_empty((left, *like.shape[1:]))
            except RuntimeError:  # the whole budget does not fit: grow towards it instead
                wanted = min(wanted, left)
        return _empty_rows(like, wanted)

    @torch.inference_mode(mode=False)
    def _join(self) -> None:
        joined = self._blocks[0].new_empty((self.rows, *self._blocks[0].shape[1:]))
        end = self.rows
        used = self._used
        while self._blocks:  # last first, so that freed memory is given back while the result fills
            block = self._blocks.pop()
            joined[end - used : end].copy_(block[:used])
            end -= used
            used = self._blocks[-1].shape[0] if self._blocks else 0
        self._blocks.append(joined)
        self._used = self.rows
