"""A growing tensor of rows that is not copied to become longer.

Doubling a buffer by copying would need three times the memory of the rows at its peak.
"""

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

    On the CPU it is a private mapping, which the kernel extends by moving page tables (``mremap``) and whose pages take
    memory only once they are written, so that room for twice the rows costs nothing. Otherwise (on an accelerator, on
    an operating system without ``mremap``, or if a view of the rows is still in use) growing copies.

    Args:
        like: example rows; all rows have their dtype, device, and shape after the first dimension.
        room: the number of rows to allocate at once.
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
        """Growing rows that start with ``rows``."""
        growing = cls(rows, rows.shape[0])
        growing.append(rows)
        return growing

    def __reduce__(self) -> tuple[Callable[[Tensor], GrowingRows], tuple[Tensor]]:
        return GrowingRows.holding, (self.tensor(),)

    def append(self, rows: Tensor) -> None:
        """Copy rows to the end, after enlarging the buffer if necessary."""
        end = self.rows + rows.shape[0]
        if end > self._room:
            self._make_room(max(end, 2 * self._room))
        self._whole()[self.rows : end].copy_(rows)
        self.rows = end

    def tensor(self) -> Tensor:
        """The rows so far, ``(rows, *shape)``, without a copy; the storage holds only them."""
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
        # frombuffer keeps the mapping alive but does not lock its buffer; the memoryview does, so that the mapping
        # cannot be moved while a tensor uses it.
        seen = memoryview(cast(mmap.mmap, self._memory))
        flat = torch.frombuffer(seen, dtype=torch.uint8, count=rows * self._row_bytes)
        return flat.view(self.dtype).view(rows, *self.shape)

    @torch.inference_mode(mode=False)
    def _make_room(self, room: int) -> None:
        if self._memory is not None:
            self._tensor = None  # a mapping with views cannot be moved
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
