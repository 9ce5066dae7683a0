"""Batches on their way from a worker of a ``DataLoader`` to the process that trains, without a copy.

torch sends each tensor as a new piece of shared memory, whose descriptor the receiver has to ask the sender for: about
a millisecond per tensor, and fresh pages on both sides. Here a worker keeps pieces of anonymous memory, writes its rows
straight into them, and uses a piece again once the receiver has dropped the batch that lies in it. The receiver maps a
piece once. Small columns travel in the message, so that keeping labels does not keep rows.
"""

from __future__ import annotations

import itertools
import mmap
import os
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import StoreError
from tdcache.store.shard_file import bytes_of

__all__ = ["SentBatch", "empty_to_send"]

_HEAD = 64  # bytes before the values, the first of them 1 while a piece is in use; columns begin at multiples of it
_SMALL = 1 << 14  # bytes of a column that are sent in the message
_MOST = 16  # pieces that receivers may keep: each is a descriptor on both sides

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class SentBatch(dict[str, Tensor]):
    """A dict of CPU tensors by column that a worker yields; in another process it is a plain dict."""

    def __copy__(self) -> SentBatch:
        """For ``default_convert`` of torch's loader, which copies a mapping and puts converted items into the copy."""
        return SentBatch(self)

    def __reduce__(self) -> tuple[Any, ...]:
        plain = all(type(each) is Tensor and each.device.type == "cpu" for each in self.values())
        if not plain or not hasattr(os, "memfd_create"):
            return dict, (dict(self),)
        large = {key: each for key, each in self.items() if each.nbytes >= _SMALL}
        small = [
            (key, each.dtype, tuple(each.shape), bytes(bytes_of(each)))
            for key, each in self.items()
            if key not in large
        ]
        return _received, (tuple(self), small, _memory().sent(large) if large else None)


def empty_to_send(layout: Layout) -> dict[str, Tensor]:
    """Memory for the columns of a :class:`SentBatch`, which is sent without a copy; what is in it is undefined."""
    large = {key for key, (dtype, shape) in layout.items() if torch.Size(shape).numel() * dtype.itemsize >= _SMALL}
    large = large if hasattr(os, "memfd_create") else set()
    found = _memory().empty({key: layout[key] for key in layout if key in large}) if large else {}
    return {
        key: found[key] if key in found else torch.empty(shape, dtype=dtype) for key, (dtype, shape) in layout.items()
    }


class _SharedMemory:
    """Memory that two processes map."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.descriptor = os.memfd_create("tdcache-batch", os.MFD_CLOEXEC)
        os.ftruncate(self.descriptor, self.size)
        self.memory = mmap.mmap(self.descriptor, self.size)
        self.taken = 0
        """How often it was taken."""
        self.sent = False
        """Whether it is the receiver who lets go of it."""

    def take(self) -> Tensor:
        """All of its bytes, for as long as a tensor in them lives here or, once it was sent, there."""
        self.taken, self.sent, self.memory[0] = self.taken + 1, False, 1
        return _held(self.memory, self._dropped, self.taken)

    def _dropped(self, taken: int) -> None:
        if taken == self.taken and not self.sent:
            self.memory[0] = 0


@dataclass(slots=True)
class _MemoryPool:
    """The pieces of one process; there are as many as batches are under way, or kept by receivers, at a time."""

    process: tuple[int, str]
    """Its id, and a word, because ids are used again."""
    pieces: dict[int, _SharedMemory] = field(default_factory=dict)
    """By their addresses; the system frees them when the process ends."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """A worker gathers rows on one thread and sends batches on another."""

    def empty(self, layout: Layout) -> dict[str, Tensor]:
        """Columns, one after the other in one piece."""
        sizes = [torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values()]
        *begins, end = itertools.accumulate((-(-size // _HEAD) * _HEAD for size in sizes), initial=_HEAD)
        with self.lock:
            piece = next((each for each in self.pieces.values() if not each.memory[0] and each.size >= end), None)
            piece = piece or _SharedMemory(end)
            whole = piece.take()
            self.pieces[whole.data_ptr()] = piece
        parts = zip(layout.items(), begins, sizes, strict=True)
        return {key: _column(whole, begin, size, dtype, shape) for (key, (dtype, shape)), begin, size in parts}

    def sent(self, batch: Mapping[str, Tensor]) -> _Sent:
        """Where another process finds columns; they are copied to a piece if they do not lie in one yet."""
        (piece, *others) = {self.pieces.get(each.untyped_storage().data_ptr()) for each in batch.values()}
        if piece is None or others or piece.sent or not all(each.is_contiguous() for each in batch.values()):
            own = self.empty({key: (each.dtype, tuple(each.shape)) for key, each in batch.items()})
            batch = {key: own[key].copy_(each) for key, each in batch.items()}
            piece = self.pieces[next(iter(own.values())).untyped_storage().data_ptr()]
        piece.sent = True
        layout = {
            key: (int(each.storage_offset()) * each.itemsize, each.nbytes, each.dtype, tuple(each.shape))
            for key, each in batch.items()
        }
        return self.process, piece.descriptor, layout, len(self.pieces) > _MOST


_Sent = tuple[tuple[int, str], int, Mapping[str, tuple[int, int, torch.dtype, tuple[int, ...]]], bool]
_own: list[_MemoryPool] = []


def _memory() -> _MemoryPool:
    """This process's; of a fork another one than its parent's."""
    if not _own or _own[0].process[0] != os.getpid():
        _own[:] = [_MemoryPool((os.getpid(), secrets.token_hex(4)))]
    return _own[0]


_maps: dict[tuple[int, str], dict[int, mmap.mmap]] = {}
"""The pieces that were received, by process and descriptor."""


def _received(keys: Sequence[str], small: Sequence[tuple[Any, ...]], large: _Sent | None) -> dict[str, Tensor]:
    """The columns of a batch; large ones lie in memory of the process that sent them, until they are dropped.

    Raises:
        StoreError: that process has ended.
    """
    found = {key: _of_bytes(data, dtype, shape) for key, dtype, shape, data in small}
    if large is not None:
        process, descriptor, layout, is_copied = large
        memory = _map_of(process, descriptor)
        whole = _held(memory, _let_go, memory, os.getpid())
        for key, place in layout.items():
            column = _column(whole, *place)
            found[key] = column.clone() if is_copied else column
    return {key: found[key] for key in keys}


def _map_of(process: tuple[int, str], descriptor: int) -> mmap.mmap:
    if process not in _maps:
        for ended in [each for each in _maps if not Path(f"/proc/{each[0]}").exists()]:
            del _maps[ended]
    known = _maps.setdefault(process, {})
    if descriptor not in known:
        name = f"/proc/{process[0]}/fd/{descriptor}"
        try:
            opened = os.open(name, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise StoreError(f"a worker of the loader ended before its batch was received ({name}: {error})") from None
        try:
            known[descriptor] = mmap.mmap(opened, os.fstat(opened).st_size)
        finally:
            os.close(opened)
    return known[descriptor]


def _let_go(memory: mmap.mmap, process: int) -> None:
    if os.getpid() == process:  # a fork has copies of the tensors; the memory is not its own to give back
        memory[0] = 0


def _held(memory: mmap.mmap, dropped: Callable[..., None], *arguments: Any) -> Tensor:
    """Bytes, and what is called once no tensor lies in them."""
    view = memoryview(memory)
    weakref.finalize(view, dropped, *arguments).atexit = False
    return torch.frombuffer(view, dtype=torch.uint8)


def _column(whole: Tensor, begin: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return whole[begin : begin + size].view(dtype).reshape(shape)


def _of_bytes(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)
