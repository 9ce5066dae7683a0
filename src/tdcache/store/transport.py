"""Batches on their way from a worker of a ``DataLoader`` to the process that trains.

torch sends each tensor as a new piece of shared memory, whose descriptor the receiver has to ask the sender for: about
a millisecond per tensor, and fresh pages on both sides. Here a worker keeps a few pieces of anonymous memory and uses
them again; the receiver opens them by the worker's process id, copies, and marks them free.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import StoreError
from tdcache.store.shard_file import bytes_of

__all__ = ["SentBatch"]

_FLAG = 1  # byte at the beginning of a piece: 1 while a batch in it was not received
_TAKEN, _FREE = b"\1", b"\0"

Layout = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]


class SentBatch(dict[str, Tensor]):
    """A dict of contiguous CPU tensors by column that a worker yields; in another process it is a plain dict."""

    def __copy__(self) -> SentBatch:
        """For ``default_convert`` of torch's loader, which copies a mapping and puts converted items into the copy."""
        return SentBatch(self)

    def __reduce__(self) -> tuple[Any, ...]:
        plain = all(type(each) is Tensor and each.device.type == "cpu" for each in self.values())
        if not plain or not hasattr(os, "memfd_create"):
            return dict, (dict(self),)
        layout = tuple((key, each.dtype, tuple(each.shape)) for key, each in self.items())
        return _received, (_memory().put(self), layout)


@dataclass(slots=True)
class _BatchMemory:
    """The pieces of memory of one process; there are as many as batches were under way at a time."""

    process: int
    pieces: list[int] = field(default_factory=list)
    """Their descriptors; the system frees them when the process ends."""

    def put(self, batch: Mapping[str, Tensor]) -> str:
        """Write a batch to a free piece; gives its name for another process."""
        piece = next((each for each in self.pieces if os.pread(each, _FLAG, 0) == _FREE), None)
        if piece is None:
            piece = os.memfd_create("tdcache-batch", os.MFD_CLOEXEC)
            self.pieces.append(piece)
        offset = _FLAG
        for column in batch.values():
            data = bytes_of(column)
            while data.nbytes:
                written = os.pwrite(piece, data, offset)
                data, offset = data[written:], offset + written
        os.pwrite(piece, _TAKEN, 0)
        return f"/proc/{self.process}/fd/{piece}"


_own: list[_BatchMemory] = []


def _memory() -> _BatchMemory:
    """This process's; of a fork another one than its parent's."""
    if not _own or _own[0].process != os.getpid():
        _own[:] = [_BatchMemory(os.getpid())]
    return _own[0]


def _received(name: str, layout: Layout) -> dict[str, Tensor]:
    """Copy a batch out of the memory of the process that sent it, and let that have the memory back.

    Raises:
        StoreError: the process has ended.
    """
    found = {key: torch.empty(shape, dtype=dtype) for key, dtype, shape in layout}
    try:
        piece = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"a worker of the loader ended before its batch was received ({name}: {error})") from None
    try:
        offset = _FLAG
        for column in found.values():
            data = bytes_of(column)
            while data.nbytes:
                read = os.preadv(piece, [data], offset)
                data, offset = data[read:], offset + read
        os.pwrite(piece, _FREE, 0)
    finally:
        os.close(piece)
    return found
