"""All rows of a store in random order, also where memory holds only some of them.

Rows are dealt to bins on the disk at random, and each bin is mixed in memory; this gives every order with the same
probability (Sanders, "Random permutations on distributed, external and hierarchical memory", 1998). A bin that is too
large for memory is dealt again, so that the number of open files has a bound: 128 bins are a pass over the rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import DamagedError
from tdcache.store.checksums import crc32
from tdcache.store.files import Files
from tdcache.store.reader import StoreReader
from tdcache.store.regular import open_regular, read_into
from tdcache.store.rows import pick_rows
from tdcache.store.shard_file import bytes_of

__all__ = ["shuffled_rows"]

_MOST_BINS = 128  # open files
_FEWEST = 8  # rows that are read at a time, however wide they are


def shuffled_rows(source: StoreReader, *, seed: int, scratch: Path, memory: int) -> Iterator[TensorDict]:
    """Every row once, in an order that ``seed`` pins down, some at a time.

    Args:
        source: the rows.
        seed: of the order.
        scratch: an empty folder for the bins.
        memory: bytes of the rows that are mixed at a time, about.
    """
    width = source.row_bytes
    at_a_time = max(_FEWEST, memory // max(1, 2 * width))
    parts = (
        _packed(source.span(begin, min(begin + at_a_time, len(source)))) for begin in range(0, len(source), at_a_time)
    )
    shuffle = _Shuffle(scratch, torch.Generator().manual_seed(seed), at_a_time, width)
    for records in shuffle.mixed(parts, len(source)):
        yield _unpacked(records, source)


def _packed(rows: TensorDict) -> Tensor:
    """Each row as its bytes, ``(rows, row_bytes)``."""
    columns: list[Tensor] = list(rows.to_dict().values())
    flat = [column.reshape(-1).view(torch.uint8) for column in columns]
    return torch.cat([each.reshape(len(rows), each.numel() // len(rows)) for each in flat], dim=1)


def _unpacked(records: Tensor, source: StoreReader) -> TensorDict:
    found, begin = {}, 0
    for key in source.columns:
        dtype, shape = source.describe(key)
        end = begin + math.prod(shape) * dtype.itemsize
        own = records[:, begin:end].clone(memory_format=torch.contiguous_format)  # aligned, also of a single row
        found[key] = own.reshape(-1).view(dtype).reshape(len(records), *shape)
        begin = end
    return TensorDict(found, batch_size=[len(records)])


@dataclass(slots=True)
class _Bin:
    """A file of rows in no order."""

    path: Path
    width: int
    rows: int = 0
    crc: int = 0
    descriptor: int = -1

    def append(self, records: Tensor, files: Files) -> None:
        data = bytes_of(records)
        files.write(self.descriptor, data, self.rows * self.width)
        self.rows, self.crc = self.rows + len(records), crc32(data, self.crc)

    def parts(self, at_a_time: int) -> Iterator[Tensor]:
        """Its rows, so many at a time; the file is removed after the last."""
        found = 0
        with open_regular(self.path) as (descriptor, _):
            for begin in range(0, self.rows, at_a_time):
                records = torch.empty(min(at_a_time, self.rows - begin), self.width, dtype=torch.uint8)
                data = bytes_of(records)
                read_into(descriptor, data, begin * self.width, self.path)
                found = crc32(data, found)
                yield records
        if found != self.crc:
            raise DamagedError(f"{self.path} was changed while its rows were mixed; run it again", path=self.path)
        self.path.unlink()


@dataclass(slots=True)
class _Shuffle:
    scratch: Path
    generator: torch.Generator
    at_a_time: int
    """Rows that are read at a time; twice as many are mixed at the most."""
    width: int
    files: Files = field(default_factory=Files)
    _made: int = 0

    def mixed(self, parts: Iterator[Tensor], rows: int) -> Iterator[Tensor]:
        """The rows of ``parts``, mixed."""
        if rows <= 2 * self.at_a_time:
            together = torch.cat(list(parts))
            yield pick_rows(together, torch.randperm(len(together), generator=self.generator))
            return
        for each in self._dealt(parts, min(_MOST_BINS, -(-rows // self.at_a_time))):
            if each.rows:
                yield from self.mixed(each.parts(self.at_a_time), each.rows)

    def _dealt(self, parts: Iterator[Tensor], count: int) -> Sequence[_Bin]:
        with ExitStack() as opened:
            bins = [self._new(opened) for _ in range(count)]
            for records in parts:
                chosen, order = torch.randint(count, (len(records),), generator=self.generator).sort()
                ordered = pick_rows(records, order)
                sizes = torch.bincount(chosen, minlength=count).tolist()
                for each, own in zip(bins, ordered.split(sizes), strict=True):
                    if len(own):
                        each.append(own, self.files)
        return bins

    def _new(self, opened: ExitStack) -> _Bin:
        made = _Bin(self.scratch / f"{self._made}.rows", self.width)
        self._made += 1
        made.descriptor = self.files.create(made.path)
        opened.callback(self.files.close, made.descriptor)
        return made
