"""Writing one shard: data first, header last, fsync, and only then its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tdcache.errors import StoreError
from tdcache.store.atomic import draft_file
from tdcache.store.checksums import DIGITS, BlockSums, block_count
from tdcache.store.files import Files
from tdcache.store.shard_file import bytes_of
from tdcache.store.shard_header import ShardInfo, pack_shard_header, rows_of

__all__ = ["write_shard"]


def write_shard(
    target: Path, columns: Mapping[str, Sequence[Tensor]], *, info: ShardInfo, scratch: Path, files: Files
) -> bool:
    """Write a shard and give it its name; whatever happens, nothing or all of it is there under that name.

    The name appears only when every byte is durable, and a name that is taken is left alone.

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
    shapes = {name: _joined_shape(name, parts, rows_of(name, info.rows)) for name, parts in pieces.items()}
    sizes = {name: sum(part.nbytes for part in parts) for name, parts in pieces.items()}
    no_sums = {name: "0" * DIGITS * block_count(size) for name, size in sizes.items()}
    start = len(pack_shard_header(shapes, info, no_sums))
    with draft_file(scratch, target.stem, files) as (descriptor, temporary):
        files.reserve(descriptor, start + sum(sizes.values()))
        with ThreadPoolExecutor(max_workers=1) as beside:  # sums are taken while the disk is busy
            taken = beside.submit(_sums, pieces)
            offset = start
            for data in (bytes_of(part) for parts in pieces.values() for part in parts):
                files.write(descriptor, data, offset)
                offset += data.nbytes
            sums = taken.result()
        files.write(descriptor, memoryview(pack_shard_header(shapes, info, sums)), 0)
        files.sync(descriptor)
        try:
            files.link(temporary, target)
        except FileExistsError:
            return False
        files.sync_folder(target.parent)
    return True


def _sums(columns: Mapping[str, Sequence[Tensor]]) -> dict[str, str]:
    """The checksums of each column, whose pieces follow one another."""
    found = {}
    for name, parts in columns.items():
        running = BlockSums()
        for part in parts:
            running.update(bytes_of(part))
        found[name] = running.digits()
    return found


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
