"""One shard: a safetensors file with the same rows of every site, written all or not at all, checked block by block."""

from __future__ import annotations

import json
import os
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import DamagedError, StoreError
from tdcache.store.files import Files, unnamed
from tdcache.store.header import Header, TensorEntry, header_length, pack_header, parse_header

__all__ = ["BLOCK", "Shard", "ShardInfo", "bytes_of", "read_into", "read_shard", "write_shard"]

BLOCK = 1 << 20
"""Bytes per checksum."""

_ALIGN = 4096
# No symbolic link is followed, and a pipe in the place of a file does not make us wait.
_READ_ONLY = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_NO_SUM = "00000000"
_INFO, _SUM = "tdcache", "tdcache.header_crc32"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What a shard says of itself: nothing that depends on who wrote it, or when."""

    spec: str
    """The id of the spec it belongs to."""
    unit: int
    first: int
    """The number of its first sample."""
    last: int
    """The number behind its last sample."""
    rows: int
    end: bool
    """Whether the data ended with this unit."""
    overflow: dict[str, int] = field(default_factory=dict)
    """Values per column that the stored dtype cannot hold."""
    sums: dict[str, str] = field(default_factory=dict)
    """The crc32 of every :data:`BLOCK` of each column, eight hexadecimal digits each."""


class _BlockSums:
    """Running crc32 of each block of a stream of bytes."""

    def __init__(self) -> None:
        self.done: list[int] = []
        self._sum = 0
        self._room = BLOCK

    def update(self, data: memoryview) -> None:
        while data.nbytes:
            part, data = data[: self._room], data[self._room :]
            self._sum = zlib.crc32(part, self._sum)
            self._room -= part.nbytes
            if self._room == 0:
                self._close()

    def _close(self) -> None:
        self.done.append(self._sum)
        self._sum, self._room = 0, BLOCK

    def digits(self) -> str:
        if self._room < BLOCK:
            self._close()
        return "".join(f"{each:08x}" for each in self.done)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a CPU tensor; of one that is not contiguous, those of a copy that is."""
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def read_into(descriptor: int, data: memoryview, offset: int, name: Path) -> None:
    """Fill ``data`` from ``offset`` of a file.

    Raises:
        DamagedError: the file ends early.
    """
    while data.nbytes:
        count = os.preadv(descriptor, [data], offset)
        if count == 0:
            raise DamagedError(f"{name}: the file ends at byte {offset}; it is truncated", path=name)
        data, offset = data[count:], offset + count


def write_shard(
    target: Path, columns: Mapping[str, Sequence[Tensor]], *, info: ShardInfo, scratch: Path, files: Files
) -> bool:
    """Write a shard and give it its name; whatever happens, nothing or all of it is there under that name.

    Data first, header last, fsync, link, fsync of the folder: the name appears only when every byte is durable, and a
    name that is taken is left alone.

    Args:
        target: the name.
        columns: the rows of each column, in pieces along the first dimension, on the CPU.
        info: what the shard says of itself; the sums are computed here.
        scratch: the folder for the file that has no name yet.
        files: how files are written.

    Returns:
        False where another writer had been faster.

    Raises:
        OSError: a file operation failed, for instance because the disk is full; nothing is there then.
        StoreError: the pieces do not fit together.
    """
    pieces = dict(sorted(columns.items(), key=lambda item: (-item[1][0].element_size(), item[0])))
    shapes = {name: _joined_shape(name, parts, info.rows) for name, parts in pieces.items()}
    sizes = {name: sum(part.nbytes for part in parts) for name, parts in pieces.items()}
    sums = {name: _NO_SUM * -(-size // BLOCK) for name, size in sizes.items()}
    start = len(_pack(shapes, info, sums))
    temporary = unnamed(scratch, target.stem)
    descriptor = files.create(temporary)
    try:
        try:
            files.reserve(descriptor, start + sum(sizes.values()))
            with ThreadPoolExecutor(max_workers=1) as beside:  # sums are taken while the disk is busy
                taken = beside.submit(_sums, pieces)
                offset = start
                for data in (bytes_of(part) for parts in pieces.values() for part in parts):
                    files.write(descriptor, data, offset)
                    offset += data.nbytes
                sums = taken.result()
            files.write(descriptor, memoryview(_pack(shapes, info, sums)), 0)
            files.sync(descriptor)
        finally:
            files.close(descriptor)
        return _commit(temporary, target, files)
    finally:
        files.remove(temporary)


def _sums(columns: Mapping[str, Sequence[Tensor]]) -> dict[str, str]:
    """The checksums of each column, whose pieces follow one another."""
    found = {}
    for name, parts in columns.items():
        running = _BlockSums()
        for part in parts:
            running.update(bytes_of(part))
        found[name] = running.digits()
    return found


def _commit(temporary: Path, target: Path, files: Files) -> bool:
    try:
        files.link(temporary, target)
    except FileExistsError:
        return False
    files.sync_folder(target.parent)
    return True


def _joined_shape(name: str, parts: Sequence[Tensor], rows: int) -> tuple[torch.dtype, tuple[int, ...]]:
    first = parts[0]
    for part in parts:
        if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
            raise StoreError(
                f"column {name!r} changes from rows of {tuple(first.shape[1:])}, {first.dtype} to "
                f"{tuple(part.shape[1:])}, {part.dtype} within a shard"
            )
    found = sum(part.shape[0] for part in parts)
    if found != rows:
        raise StoreError(f"column {name!r} has {found} rows where the shard has {rows}")
    return first.dtype, (rows, *first.shape[1:])


def _pack(shapes: Mapping[str, Any], info: ShardInfo, sums: Mapping[str, str]) -> bytes:
    described = {**asdict(info), "sums": dict(sorted(sums.items()))}
    metadata = {_INFO: json.dumps(described, separators=(",", ":"), sort_keys=True), _SUM: _NO_SUM}
    raw = pack_header(shapes, metadata, align=_ALIGN)
    return _with_sum(raw, f"{zlib.crc32(raw):08x}")


def _with_sum(raw: bytes, digits: str) -> bytes:
    """The header with its own checksum in place of the one that is there."""
    mark = f'"{_SUM}":"'.encode()
    at = raw.find(mark) + len(mark)
    return raw[:at] + digits.encode() + raw[at + len(_NO_SUM) :]


@dataclass(slots=True)
class Shard:
    """An open shard. Nothing is read before it is asked for, and nothing is ever written.

    Columns are views of a private map of the file: whoever writes to them changes this process's copy of a page only.
    """

    path: Path
    info: ShardInfo
    header: Header
    size: int
    _map: Tensor | None = field(default=None, repr=False)

    def __getstate__(self) -> tuple[Any, ...]:
        return (self.path, self.info, self.header, self.size)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.path, self.info, self.header, self.size = state
        self._map = None

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self.info.rows

    def column(self, name: str) -> Tensor:
        """All rows of one column, ``(rows, *features)``; pages are read when they are used.

        Raises:
            DamagedError: the file is gone or shorter than it was.
        """
        entry = self.header.tensors[name]
        if self._map is None:
            self._map = self._mapped()
        begin = self.header.data_start + entry.begin
        return self._map[begin : begin + entry.nbytes].view(entry.dtype).view(entry.shape)

    def _mapped(self) -> Tensor:
        try:
            os.close(_open(self.path))
            return torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)
        except RuntimeError as error:
            if isinstance(error, StoreError):
                raise
            raise DamagedError(f"{self.path} cannot be mapped, it may be truncated: {error}", path=self.path) from None

    def read(self, targets: Mapping[str, Tensor], rows: tuple[int, int]) -> None:
        """Read rows from the first number to before the second of some columns, without mapping the file.

        Args:
            targets: where they go, by column.
            rows: which.

        Raises:
            DamagedError: the file is gone, or ends before the rows do.
        """
        descriptor = _open(self.path)
        try:
            for name, target in targets.items():
                entry = self.header.tensors[name]
                width = entry.nbytes // max(1, self.rows)
                offset = self.header.data_start + entry.begin + rows[0] * width
                read_into(descriptor, bytes_of(target), offset, self.path)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Let go of the map; columns that were handed out stay valid."""
        self._map = None

    def verify(self) -> None:
        """Read every byte and compare the checksums.

        Raises:
            DamagedError: it names the shard, the column and the block.
        """
        with self.path.open("rb", buffering=0) as file:
            fresh = _read_header(file.fileno(), os.fstat(file.fileno()).st_size, self.path)
            if fresh != self.header:
                raise DamagedError(f"{self.path}: the header is not the one that was opened", path=self.path)
            for name, entry in self.header.tensors.items():
                _verify_column(file.fileno(), self, name, entry)


def _verify_column(descriptor: int, shard: Shard, name: str, entry: TensorEntry) -> None:
    for block, expected in enumerate(_blocks(shard.info.sums[name])):
        begin = entry.begin + block * BLOCK
        length = min(BLOCK, entry.end - begin)
        data = os.pread(descriptor, length, shard.header.data_start + begin)
        found = f"{zlib.crc32(data):08x}"
        if len(data) != length or found != expected:
            raise DamagedError(
                f"{shard.path}: block {block} of column {name!r} has crc32 {found}, not {expected}: "
                f"bytes {begin} to {begin + length} of the data were changed after they were written; "
                "delete the shard and run the harvest again to have it made anew",
                path=shard.path,
            )


def _blocks(digits: str) -> Iterator[str]:
    return (digits[at : at + 8] for at in range(0, len(digits), 8))


def read_shard(path: Path, *, spec: str | None = None) -> Shard:
    """Open a shard: header and size are checked, the data is not read.

    Args:
        path: the file; a symbolic link is refused.
        spec: the id of the spec it must belong to.

    Raises:
        DamagedError: the file is truncated, forged or damaged in its header, or no shard.
        StoreError: it belongs to another spec.
    """
    descriptor = _open(path)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DamagedError(f"{path} is no regular file", path=path)
        header = _read_header(descriptor, status.st_size, path)
    finally:
        os.close(descriptor)
    info = _read_info(header, path)
    if spec is not None and info.spec != spec:
        raise StoreError(f"{path} belongs to spec {info.spec[:12]}, this store has spec {spec[:12]}", path=path)
    return Shard(path, info, header, status.st_size)


def _open(path: Path) -> int:
    try:
        return os.open(path, _READ_ONLY)
    except FileNotFoundError:
        raise DamagedError(f"{path}: the shard is missing", path=path) from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be opened as a shard: {error.strerror}", path=path) from None


def _read_header(descriptor: int, size: int, path: Path) -> Header:
    raw = os.pread(descriptor, _ALIGN, 0)
    length = header_length(raw, size, path) + 8
    raw = raw[:length] if length <= len(raw) else os.pread(descriptor, length, 0)
    header = parse_header(raw, size, path)
    expected = header.metadata.get(_SUM)
    if expected is None or _INFO not in header.metadata:
        raise DamagedError(f"{path} is a safetensors file, but no shard of a store", path=path)
    found = f"{zlib.crc32(_with_sum(raw, _NO_SUM)):08x}"
    if found != expected:
        raise DamagedError(f"{path}: the header has crc32 {found}, not {expected}: it was changed", path=path)
    return header


def _read_info(header: Header, path: Path) -> ShardInfo:
    try:
        info = ShardInfo(**json.loads(header.metadata[_INFO]))
        sound = (
            all(type(each) is int and each >= 0 for each in (info.unit, info.first, info.rows))
            and type(info.last) is int
            and info.last >= info.first
            and all(
                entry.shape[:1] == (info.rows,) and len(info.sums[name]) == 8 * -(-entry.nbytes // BLOCK)
                for name, entry in header.tensors.items()
            )
        )
    except (TypeError, ValueError, KeyError, RecursionError):
        sound = False
    if not sound:
        raise DamagedError(f"{path}: what the shard says of itself does not fit what is in it", path=path)
    return info
