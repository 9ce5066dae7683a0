"""An open file of a store, on a disk or elsewhere: what a reader needs of it, and nothing else."""

from __future__ import annotations

import mmap
import os
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from tdcache.errors import DamagedError
from tdcache.store.regular import read_into
from tdcache.store.remote import Pages, RemotePath

__all__ = ["LocalFile", "ReadableFile", "RemoteFile"]


class ReadableFile(Protocol):
    """Bytes by their place."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def identity(self) -> Hashable:
        """Another value where another file has the name now, as far as that is known."""

    def read_into(self, data: memoryview, offset: int) -> None:
        """Fill ``data`` with the bytes from ``offset`` on.

        Raises:
            DamagedError: the file ends early, or cannot be read.
        """

    def map(self) -> Tensor | None:
        """The whole file as bytes, in a private map; None where there are no maps."""


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on a disk; its descriptor is closed by whoever opened it."""

    path: Path
    descriptor: int
    status: os.stat_result

    @property
    def size(self) -> int:
        """Bytes, when it was opened."""
        return self.status.st_size

    @property
    def identity(self) -> Hashable:
        """Which file of which disk, and when it was written last."""
        return self.status.st_dev, self.status.st_ino, self.status.st_size, self.status.st_mtime_ns

    def read_into(self, data: memoryview, offset: int) -> None:
        """Fill ``data`` with the bytes from ``offset`` on; see :func:`tdcache.store.regular.read_into`."""
        read_into(self.descriptor, data, offset, self.path)

    def map(self) -> Tensor | None:
        """Whoever writes to it changes this process's copy of a page."""
        return torch.frombuffer(mmap.mmap(self.descriptor, self.size, access=mmap.ACCESS_COPY), dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that is read by ranges; nobody asks the server whether it is still the same one."""

    path: RemotePath
    size: int
    pages: Pages

    @property
    def identity(self) -> Hashable:
        """Its size: a server is not asked for more."""
        return self.size

    def read_into(self, data: memoryview, offset: int) -> None:
        """Fill ``data``: small parts from pages that are kept, large ones by a request of their own.

        Raises:
            DamagedError: the file is gone or ends early.
            StoreError: it cannot be read.
        """
        try:
            for part in self.pages.read(self.path, offset, data.nbytes, self.size):
                data[: part.nbytes] = part
                data, offset = data[part.nbytes :], offset + part.nbytes
        except FileNotFoundError:
            raise DamagedError(f"{self.path}: the shard is missing", path=self.path) from None
        if data.nbytes:
            raise DamagedError(f"{self.path}: the file ends at byte {offset}; it is truncated", path=self.path)

    def map(self) -> Tensor | None:
        """None: its rows are read."""
        return None
