"""The open file of a shard: its bytes as rows, and its blocks beside their checksums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import DamagedError
from tdcache.store.checksums import BLOCK, block_count, crc32, expected_sum
from tdcache.store.header import Header
from tdcache.store.readable import ReadableFile
from tdcache.store.remote import Place
from tdcache.store.shard_header import ShardInfo, rows_of

__all__ = ["ShardFile", "bytes_of"]


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor; of one that is not contiguous, those of a copy that is."""
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard's file while it is open; it is closed by whoever opened it."""

    path: Place
    file: ReadableFile
    header: Header
    info: ShardInfo

    def width(self, name: str) -> int:
        """Bytes of one row of a column."""
        return self.header.tensors[name].nbytes // max(1, rows_of(name, self.info.rows))

    def read(self, name: str, first: int, data: memoryview) -> None:
        """Fill ``data`` with a column's rows from row ``first`` on.

        Raises:
            DamagedError: the file ends before the rows do.
        """
        begin = self.header.tensors[name].begin + first * self.width(name)
        self.file.read_into(data, self.header.data_start + begin)

    def pick(self, name: str, numbers: Tensor) -> Tensor:
        """Some rows of a column, each read on its own."""
        entry, width = self.header.tensors[name], self.width(name)
        found = torch.empty((numbers.numel(), *entry.shape[1:]), dtype=entry.dtype)
        data = bytes_of(found)
        for place, number in enumerate(numbers.tolist()):
            self.read(name, number, data[place * width : (place + 1) * width])
        return found

    def column(self, name: str, mapped: Tensor | None) -> Tensor:
        """A column, ``(rows, *features)``: a view of the mapped file, or read where it has no map."""
        entry = self.header.tensors[name]
        if mapped is None:
            found = torch.empty(entry.shape, dtype=entry.dtype)
            self.read(name, 0, bytes_of(found))
            return found
        begin = self.header.data_start + entry.begin
        return mapped[begin : begin + entry.nbytes].view(entry.dtype).view(entry.shape)

    def blocks(self, name: str) -> int:
        """How many checksums a column has."""
        return block_count(self.header.tensors[name].nbytes)

    def check(self, name: str, block: int, data: memoryview | None = None) -> None:
        """Compare one block with its checksum.

        Args:
            name: of the column.
            block: its number.
            data: its bytes, where they were read already.

        Raises:
            DamagedError: it names the shard, the column and the block.
        """
        entry = self.header.tensors[name]
        begin = entry.begin + block * BLOCK
        length = min(BLOCK, entry.end - begin)
        if data is None:
            data = memoryview(bytearray(length))
            self.file.read_into(data, self.header.data_start + begin)
        found, expected = f"{crc32(data):08x}", expected_sum(self.info.sums[name], block)
        if found != expected:
            raise DamagedError(
                f"{self.path}: block {block} of column {name!r} has crc32 {found}, not {expected}: "
                f"bytes {begin} to {begin + length} of the data were changed after they were written; "
                "delete the shard and run the harvest again to have it made anew",
                path=self.path,
            )
