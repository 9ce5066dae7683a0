"""Rows that grow in place: one stretch of memory, never copied to become longer."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

__all__ = ["GrowingRows"]

_LEAST_BYTES = 1 << 20


class GrowingRows:
    """A tensor of rows that can be appended to, ``(rows, *shape)``.

    On the CPU it is a private mapping, which the kernel makes longer by moving page tables (``mremap``), and whose
    pages take memory only once they are written: room for twice the rows costs nothing. Elsewhere (an accelerator, an
    operating system without ``mremap``, rows that somebody still looks at) growing copies.

    Args:
        like: rows, whose shape after the first dimension, dtype and device are those of all rows.
        room: how many rows to make room for at once.
    """

    def __init__(self, like: Tensor, room: int) -> None:
        self.shape = like.shape[1:]
        self.dtype = like.dtype
        self.device = like.device
        self.rows = 0
        self._row_bytes = math.prod(self.shape) * like.element_size()
        self._memory: mmap.mmap | None = None
        self._tensor: Tensor | None = None
        self._room = 0
        self._make_room(max(room, _LEAST_BYTES // max(1, self._row_bytes)))

    @classmethod
    def holding(cls, rows: Tensor) -> GrowingRows:
        """Rows that begin with ``rows``."""
        growing = cls(rows, rows.shape[0])
        growing.append(rows)
        return growing

    def __reduce__(self) -> tuple[Callable[[Tensor], GrowingRows], tuple[Tensor]]:
        return GrowingRows.holding, (self.tensor(),)

    def append(self, rows: Tensor) -> None:
        """Copy rows to the end, in a larger buffer if there is no room left."""
        end = self.rows + rows.shape[0]
        if end > self._room:
            self._make_room(max(end, 2 * self._room))
        self._whole()[self.rows : end].copy_(rows)
        self.rows = end

    def tensor(self) -> Tensor:
        """The rows so far, ``(rows, *shape)``, without a copy; its storage holds them and no more."""
        if self._memory is None or not self.rows:
            whole = self._whole()
            return whole if self.rows == self._room else whole[: self.rows].clone()
        return self._mapped(self.rows)

    def _whole(self) -> Tensor:
        if self._tensor is None:
            self._tensor = self._mapped(self._room)
        return self._tensor

    @torch.inference_mode(mode=False)  # a tensor made in inference mode could not be written outside of it
    def _mapped(self, rows: int) -> Tensor:
        # frombuffer keeps the object alive, but its buffer not exported; the view does that, so that nothing is moved
        # away from under a tensor.
        seen = memoryview(cast(mmap.mmap, self._memory))
        flat = torch.frombuffer(seen, dtype=torch.uint8, count=rows * self._row_bytes)
        return flat.view(self.dtype).view(rows, *self.shape)

    @torch.inference_mode(mode=False)
    def _make_room(self, room: int) -> None:
        if self._memory is not None:
            self._tensor = None  # a mapping that is looked at cannot be moved
            try:
                self._memory.resize(room * self._row_bytes)
            except (BufferError, SystemError, OSError):
                pass
            else:
                self._room = room
                return
        before = None if self.rows == 0 else self.tensor()
        self._allocate(room)
        if before is not None:
            self._whole()[: self.rows].copy_(before)

    def _allocate(self, room: int) -> None:
        self._memory = self._tensor = None
        self._room = room
        if self.device.type == "cpu" and room * self._row_bytes >= _LEAST_BYTES // 2 and hasattr(mmap, "MAP_PRIVATE"):
            self._memory = mmap.mmap(-1, room * self._row_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._tensor = torch.empty((room, *self.shape), dtype=self.dtype, device=self.device)
