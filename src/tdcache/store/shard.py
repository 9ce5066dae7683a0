"""One shard of a store: opened when something is read from it, checked block by block, never written to."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from tdcache.errors import DamagedError
from tdcache.store.checksums import BLOCK
from tdcache.store.header import Header
from tdcache.store.readable import LocalFile, ReadableFile, RemoteFile
from tdcache.store.regular import open_regular
from tdcache.store.remote import Pages, Place, RemotePath
from tdcache.store.rows import pick_rows
from tdcache.store.shard_file import ShardFile, bytes_of
from tdcache.store.shard_header import (
    Contract,
    IndexRow,
    ShardInfo,
    read_shard_header,
    site_column,
    statistics_column,
)
from tdcache.store.statistics import SiteStatistics

__all__ = ["Shard", "ShardCache"]

_HEADERS, _MAPS = 4096, 64  # kept by a dataset
_FEW = 16  # rows of a shard that are sooner read one by one than through a map

_Kept = TypeVar("_Kept")


class ShardCache:
    """The headers and maps that a dataset keeps, so many at most, and the blocks that it has checked.

    Threads share it: single operations on an ``OrderedDict`` are atomic, and what two threads open twice is the same.

    Args:
        check: whether each block is compared with its checksum when it is read for the first time.
    """

    def __init__(self, *, check: bool = False) -> None:
        self.check = check
        self.headers: OrderedDict[Place, tuple[Hashable, Header, ShardInfo]] = OrderedDict()
        self.maps: OrderedDict[Place, Tensor] = OrderedDict()
        self.checked: dict[Place, dict[str, bytearray]] = {}
        self.pages = Pages()

    def __repr__(self) -> str:
        return f"ShardCache(check={self.check}, {len(self.headers)} headers, {len(self.maps)} maps)"

    def __reduce__(self) -> tuple[Any, ...]:
        return _empty_cache, (self.check,)  # another process opens and checks for itself

    def forget(self, path: Place) -> None:
        """Let go of what is known of a file."""
        self.headers.pop(path, None)
        self.maps.pop(path, None)
        self.checked.pop(path, None)


def _empty_cache(check: bool) -> ShardCache:
    return ShardCache(check=check)


def _keep(kept: OrderedDict[Place, _Kept], path: Place, value: _Kept, most: int) -> _Kept:
    kept[path] = value
    while len(kept) > most:
        with suppress(KeyError):  # another thread was faster
            kept.popitem(last=False)
    return value


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of a store.

    Its file is opened when something is read, each time: where another file has the name by then, it has to have the
    same header, and so the same checksums.
    """

    path: Place
    row: IndexRow
    """What the index says of it."""
    contract: Contract = field(repr=False)
    cache: ShardCache = field(repr=False, compare=False)

    @classmethod
    def opened(cls, path: Place, contract: Contract, cache: ShardCache) -> Shard:
        """A shard that no index knows.

        Raises:
            DamagedError: the file is truncated, forged or damaged in its header, or no shard.
            StoreError: it belongs to another spec.
        """
        with _open_shard(path, cache.pages) as file:
            header, info, crc = read_shard_header(file, path)
        contract.check(path, info, header)
        return cls(path, IndexRow.of(header, info, file.size, crc), contract, cache)

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.row.rows

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.row.size

    @property
    def info(self) -> ShardInfo:
        """What it says of itself."""
        with self._file() as file:
            return file.info

    @property
    def header(self) -> Header:
        """Where its columns are."""
        with self._file() as file:
            return file.header

    def column(self, name: str) -> Tensor:
        """All rows of one column, ``(rows, *features)``: a view of a private map, whose pages are read when used.

        Writing to it changes this process's copy of a page only. When the file is cut while a view is in use, the
        system kills the process at the first page that is gone (SIGBUS); :meth:`read` is safe from that.

        Raises:
            DamagedError: the file is gone or shorter than it was, or, with ``check``, a block is damaged.
        """
        with self._file() as file:
            self._check(file, name, range(file.blocks(name)))
            return file.column(name, self._map(file))

    def read(self, targets: Mapping[str, Tensor], rows: tuple[int, int]) -> None:
        """Read rows from the first number to before the second of some columns, without mapping the file.

        Args:
            targets: where they go, by column; contiguous.
            rows: which.

        Raises:
            DamagedError: the file is gone or ends before the rows do, or, with ``check``, a block is damaged.
        """
        with self._file() as file:
            for name, target in targets.items():
                data, width = bytes_of(target), file.width(name)
                file.read(name, rows[0], data)
                self._check(file, name, _blocks(rows[0] * width, rows[1] * width), data, rows[0] * width)

    def gather(self, columns: Sequence[str], numbers: Tensor) -> list[Tensor]:
        """Copies of some rows of some columns.

        Args:
            columns: their names.
            numbers: of the rows, ascending, ``(n,)``.

        Returns:
            ``(n, *features)`` of each column.

        Raises:
            DamagedError: the file is gone or shorter than it was, or, with ``check``, a block is damaged.
        """
        found = []
        with self._file() as file:
            for name in columns:
                if self.cache.check:
                    self._check(file, name, _blocks_of(numbers, file.width(name)))
                mapped = self._map(file) if numbers.numel() > _FEW else None
                picked = file.pick(name, numbers) if mapped is None else pick_rows(file.column(name, mapped), numbers)
                found.append(picked)
        return found

    def statistics(self) -> dict[str, SiteStatistics]:
        """Of each site with floating values; NaN where the shard is of an earlier version.

        Raises:
            DamagedError: the file is gone or shorter than it was.
        """
        found = {}
        with self._file() as file:
            for path in self.contract.sites:
                name, shape = statistics_column(path), self.contract.columns[site_column(path)][1]
                moments = torch.full((2, *shape), math.nan, dtype=torch.float64)
                if name in file.header.tensors:
                    file.read(name, 0, bytes_of(moments))
                own = SiteStatistics.unpacked(self.rows, moments)
                info = file.info
                found[path] = own.with_losses(info.overflow.get(path, 0), info.underflow.get(path, 0))
        return found

    def verify(self) -> None:
        """Read every byte and compare the checksums.

        Raises:
            DamagedError: it names the shard, the column and the block.
        """
        with self._file() as file:
            for name in file.header.tensors:
                for block in range(file.blocks(name)):
                    file.check(name, block)

    @contextmanager
    def _file(self) -> Iterator[ShardFile]:
        with _open_shard(self.path, self.cache.pages, self.size) as file:
            known = self.cache.headers.get(self.path)
            if known is None or known[0] != file.identity:
                self.cache.forget(self.path)
                header, info = self._read_header(file)
                known = _keep(self.cache.headers, self.path, (file.identity, header, info), _HEADERS)
            yield ShardFile(self.path, file, known[1], known[2])

    def _read_header(self, file: ReadableFile) -> tuple[Header, ShardInfo]:
        if file.size < self.size:
            raise DamagedError(f"{self.path}: the file ends at byte {file.size}; it is truncated", path=self.path)
        header, info, crc = read_shard_header(file, self.path)
        self.contract.check(self.path, info, header)
        found = IndexRow.of(header, info, file.size, crc)
        if found != self.row:
            raise DamagedError(
                f"{self.path} is not the shard that was known: it says {tuple(found)} of itself, the index says "
                f"{tuple(self.row)}. Where the folder was replaced or harvested anew, open it again; where it was not, "
                "delete its index.json",
                path=self.path,
            )
        return header, info

    def _map(self, file: ShardFile) -> Tensor | None:
        found = self.cache.maps.get(self.path)
        if found is None and (made := file.file.map()) is not None:
            return _keep(self.cache.maps, self.path, made, _MAPS)
        return found

    def _check(
        self, file: ShardFile, name: str, blocks: Iterable[int], data: memoryview | None = None, begin: int = 0
    ) -> None:
        """Compare blocks with their checksums, each when it is read for the first time.

        Args:
            file: of the shard.
            name: of the column.
            blocks: their numbers.
            data: what was read of the column; a block that is wholly in it is not read again.
            begin: where in the column ``data`` begins.
        """
        if not self.cache.check:
            return
        done = self.cache.checked.setdefault(self.path, {}).setdefault(name, bytearray(file.blocks(name)))
        for block in blocks:
            if not done[block]:
                low = block * BLOCK - begin
                high = min(low + BLOCK, file.header.tensors[name].nbytes - begin)
                is_here = data is not None and low >= 0 and high <= data.nbytes
                file.check(name, block, data[low:high] if data is not None and is_here else None)
                done[block] = 1


@contextmanager
def _open_shard(path: Place, pages: Pages, size: int | None = None) -> Iterator[ReadableFile]:
    try:
        if isinstance(path, RemotePath):
            yield RemoteFile(path, path.size() if size is None else size, pages)
            return
        with open_regular(path) as (descriptor, status):
            yield LocalFile(path, descriptor, status)
    except FileNotFoundError:
        raise DamagedError(f"{path}: the shard is missing", path=path) from None


def _blocks(begin: int, end: int) -> range:
    """The numbers of the blocks that hold these bytes of a column."""
    return range(begin // BLOCK, -(-end // BLOCK) if end > begin else begin // BLOCK)


def _blocks_of(numbers: Tensor, width: int) -> Iterator[int]:
    """The numbers of the blocks that hold these rows."""
    firsts = numbers * width // BLOCK
    lasts = (numbers * width + max(width - 1, 0)) // BLOCK
    return (
        block for low, high in torch.stack([firsts, lasts]).unique(dim=1).T.tolist() for block in range(low, high + 1)
    )
