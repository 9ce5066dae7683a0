"""What a shard says of itself, in the metadata of its safetensors header, under a checksum of the whole header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from tdcache.errors import DamagedError, StoreError
from tdcache.store.checksums import DIGITS, block_count, crc32
from tdcache.store.dtypes import DTYPES
from tdcache.store.header import Header, header_length, pack_header, parse_header
from tdcache.store.readable import ReadableFile
from tdcache.store.remote import Place

__all__ = [
    "Contract",
    "IndexRow",
    "ShardInfo",
    "own_column",
    "pack_shard_header",
    "read_shard_header",
    "rows_of",
    "site_column",
    "statistics_column",
    "with_sum",
]


_ALIGN = 4096
_NO_SUM = "00000000"
STATISTICS = "stat/"
_INFO, _SUM = "tdcache", "tdcache.header_crc32"


def site_column(path: str) -> str:
    """The name of a site's column in a shard."""
    return f"act/{path}"


def own_column(name: str) -> str:
    """The name in a shard of a column that the user has given."""
    return f"col/{name}"


def statistics_column(path: str) -> str:
    """The name of a site's statistics in a shard: ``(2, *features)``, not one per row."""
    return f"{STATISTICS}{path}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardInfo:
    """What a shard says of itself: nothing that depends on who wrote it, or when."""

    spec: str
    """The id of the spec it belongs to."""
    unit: int
    first: int
    """The number of its first sample."""
    last: int
    """The number after its last sample."""
    rows: int
    end: bool
    """Whether the data ended with this unit."""
    cut: bool = False
    """Whether a limit ended it, and more of the data would follow."""
    overflow: dict[str, int] = field(default_factory=dict)
    """Values per site that the stored dtype cannot hold."""
    underflow: dict[str, int] = field(default_factory=dict)
    """Values per site other than zero that are zero in the stored dtype."""
    sums: dict[str, str] = field(default_factory=dict)
    """The crc32 of every block of each column, eight hexadecimal digits each."""


class IndexRow(NamedTuple):
    """What the index repeats of a shard, so that a store can be opened without opening its shards."""

    unit: int
    rows: int
    first: int
    last: int
    end: bool
    tokens: bool
    """Whether it has the column ``"tok"``."""
    size: int
    """Bytes of the file."""
    crc: str
    """Of its header, and so of every checksum in it."""

    @classmethod
    def of(cls, header: Header, info: ShardInfo, size: int, crc: str) -> IndexRow:
        """From what :func:`read_shard_header` gave."""
        return cls(info.unit, info.rows, info.first, info.last, info.end, "tok" in header.tensors, size, crc)

    @classmethod
    def parsed(cls, values: object) -> IndexRow:
        """From a row of an index.

        Raises:
            ValueError: it is none.
        """
        kinds = (int, int, int, int, bool, bool, int, str)
        if not isinstance(values, list) or tuple(map(type, values)) != kinds:
            raise ValueError(f"{values} is no row of an index")
        if any(each < 0 for each in values if type(each) is int):
            raise ValueError(f"{values} holds a negative number")
        return cls(*values)


@dataclass(frozen=True, slots=True)
class Contract:
    """What every shard of a store has to be: of this spec, with these columns."""

    spec: str
    columns: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """Dtype and feature shape by name, ``"tok"`` included, which a shard may lack."""
    statistics: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    """The same for the statistics of floating sites, which a shard of an earlier version lacks."""

    @classmethod
    def of(cls, spec_id: str, spec: Mapping[str, Any]) -> Contract:
        """From a spec that was read by :func:`tdcache.store.spec.read_spec`."""
        sites = spec["sites"].items()
        columns = {site_column(path): (DTYPES[site["dtype"]], tuple(site["shape"])) for path, site in sites}
        for name, column in spec.get("columns", {}).items():
            columns[own_column(name)] = DTYPES[column["dtype"]], tuple(column["shape"])
        own = {"seq": (torch.int64, ()), "pos": (torch.int32, ()), "tok": (torch.int32, ())}
        statistics = {
            statistics_column(path): (torch.float64, tuple(site["shape"]))
            for path, site in sites
            if DTYPES[site["dtype"]].is_floating_point
        }
        return cls(spec_id, {**columns, **own}, statistics)

    @property
    def sites(self) -> tuple[str, ...]:
        """The paths of the sites."""
        return tuple(name.removeprefix("act/") for name in self.columns if name.startswith("act/"))

    def check(self, path: Place, info: ShardInfo, header: Header) -> None:
        """Refuse a shard that is another store's, or whose columns are not those of the spec.

        Raises:
            StoreError: it belongs to another spec.
            DamagedError: a site is missing or has another shape or dtype.
        """
        if info.spec != self.spec:
            raise StoreError(
                f"{path} belongs to spec {info.spec[:12]}, this store has spec {self.spec[:12]}", path=path
            )
        found = {name: (each.dtype, each.shape[1:]) for name, each in header.tensors.items()}
        known = {**self.columns, **self.statistics}
        wanted = {name: each for name, each in known.items() if name in found or not self._may_lack(name)}
        if found != wanted:
            wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
            raise DamagedError(
                f"{path}: column {wrong[0]!r} is {found.get(wrong[0])}, the spec has {wanted.get(wrong[0])}",
                path=path,
            )

    def _may_lack(self, name: str) -> bool:
        return name == "tok" or name in self.statistics


def rows_of(name: str, rows: int) -> int:
    """The length of a column of a shard with so many rows."""
    return 2 if name.startswith(STATISTICS) else rows


def pack_shard_header(shapes: Mapping[str, Any], info: ShardInfo, sums: Mapping[str, str]) -> bytes:
    """The bytes of a shard's header; their number does not depend on the sums.

    Args:
        shapes: dtype and shape of each column, in the order of their bytes.
        info: without sums.
        sums: of each column.
    """
    described = {**asdict(info), "sums": dict(sorted(sums.items()))}
    metadata = {_INFO: json.dumps(described, separators=(",", ":"), sort_keys=True), _SUM: _NO_SUM}
    raw = pack_header(shapes, metadata, align=_ALIGN)
    return with_sum(raw, f"{crc32(raw):08x}")


def with_sum(raw: bytes, digits: str) -> bytes:
    """The header with this checksum in place of the one that is there."""
    mark = f'"{_SUM}":"'.encode()
    at = raw.find(mark) + len(mark)
    return raw[:at] + digits.encode() + raw[at + len(_NO_SUM) :]


def read_shard_header(file: ReadableFile, path: Place) -> tuple[Header, ShardInfo, str]:
    """Header, info and the header's own checksum of an open file.

    Raises:
        DamagedError: the file is truncated, forged or damaged in its header, or no shard.
    """
    raw = bytearray(min(_ALIGN, file.size))
    file.read_into(memoryview(raw), 0)
    length = header_length(bytes(raw), file.size, path) + 8
    if length > len(raw):
        raw = bytearray(length)
        file.read_into(memoryview(raw), 0)
    return _parsed(bytes(raw[:length]), file.size, path)


def _parsed(raw: bytes, size: int, path: Place) -> tuple[Header, ShardInfo, str]:
    header = parse_header(raw, size, path)
    expected = header.metadata.get(_SUM)
    if expected is None or _INFO not in header.metadata:
        raise DamagedError(f"{path} is a safetensors file, but no shard of a store", path=path)
    found = f"{crc32(with_sum(raw, _NO_SUM)):08x}"
    if found != expected:
        raise DamagedError(f"{path}: the header has crc32 {found}, not {expected}: it was changed", path=path)
    return header, _read_info(header, path), found


def _read_info(header: Header, path: Place) -> ShardInfo:
    try:
        info = ShardInfo(**json.loads(header.metadata[_INFO]))
        sound = (
            all(type(each) is int and each >= 0 for each in (info.unit, info.first, info.rows))
            and type(info.last) is int
            and info.last >= info.first
            and info.end in (False, True)
            and info.cut in (False, True)
            and all(
                entry.shape[:1] == (rows_of(name, info.rows),)
                and len(info.sums[name]) == DIGITS * block_count(entry.nbytes)
                for name, entry in header.tensors.items()
            )
        )
    except (TypeError, ValueError, KeyError, RecursionError):
        sound = False
    if not sound:
        raise DamagedError(f"{path}: what the shard says of itself does not fit what is in it", path=path)
    return info
