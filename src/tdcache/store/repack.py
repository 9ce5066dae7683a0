"""Stores made from stores: shuffled once and for all, with fewer sites or another dtype, or joined.

As with a harvest, what is there already is not written again: one that was interrupted is run again and continues.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import CaptureError, SpecError, StoreError
from tdcache.store.atomic import draft_folder
from tdcache.store.dtypes import count_lost, dtype_name
from tdcache.store.files import as_store_error
from tdcache.store.layout import StorePaths
from tdcache.store.reader import StoreReader
from tdcache.store.rows import joined
from tdcache.store.shard_header import site_column
from tdcache.store.shuffle import shuffled_rows
from tdcache.store.spec import differing, has_spec
from tdcache.store.writer import StoreWriter

__all__ = ["merge", "repack"]

_SAME_TO_MERGE = ("sites", "rows", "direction", "tokens", "model", "forward", "pick", "columns", "tokenizer")


def repack(
    dataset: StoreReader,
    path: str | os.PathLike[str] | None = None,
    *,
    shuffle: bool = False,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 1 << 26,
) -> Path:
    """Write the rows of a store to a new one; every row keeps its ``seq``, ``pos`` and ``tok``.

    What is read is compared with its checksums. A shuffle writes the rows to scratch files first, in the new store's
    folder; it holds some eight shards in memory. Every order is equally likely; ``seed`` pins it down.

    Args:
        dataset: the store; a complete one.
        path: the new store's folder; by default a name beside the store's own. One that the same call has begun is
            continued, and a finished one is left as it is.
        shuffle: mix the rows.
        seed: of the shuffle.
        keys: the sites that are kept; all by default.
        dtype: of the new store's floating values.
        shard_bytes: how big a shard should be, about.

    Returns:
        The new store's folder.

    Raises:
        StoreError: the store is unfinished, or something else is at ``path``.
        DamagedError: a byte of the store is not the one that was written.
        CaptureError: finite values that ``dtype`` cannot hold.
    """
    source = (dataset if keys is None else dataset.select(*keys)).checking()
    target = _target(path or _beside(source, "shuffled" if shuffle else "repacked"), source)
    described = {key: source.describe(key) for key in source.keys}
    sites = {key: {"dtype": _cast_name(own, dtype), "shape": list(shape)} for key, (own, shape) in described.items()}
    made = {"from": source.id, "rows": len(source), "shuffle": seed if shuffle else None, "shard_bytes": shard_bytes}
    made |= {"view": source.view} if source.view else {}
    spec = {**source.spec, "sites": sites, "repacked": made}
    if dtype is not None:
        spec["dtype"] = dtype_name(dtype)
    per_shard = max(1, shard_bytes // max(1, source.row_bytes))
    with as_store_error(target), StoreWriter(target, spec) as writer, ExitStack() as stack:
        if -(-max(len(source), 1) // per_shard) == len(writer.committed()):
            return target
        if shuffle:
            writer.layout.prepare(writer.files)
            scratch = stack.enter_context(draft_folder(writer.layout.scratch, "bins"))
            stream = shuffled_rows(source, seed=seed, scratch=scratch, memory=2 * shard_bytes)
        else:
            stream = _in_order(source, per_shard)
        _write(writer, _cut(stream, per_shard), source, dtype)
    return target


def merge(*stores: StoreReader, path: str | os.PathLike[str] | None = None) -> Path:
    """Write the rows of several stores of the same model and sites to a new one, in order.

    What is read is compared with its checksums. The samples of each store are numbered on from those of the one before.

    Args:
        *stores: in the order of their rows.
        path: the new store's folder; by default a name beside the first store's own. One that the same call has begun
            is continued, and a finished one is left as it is.

    Returns:
        The new store's folder.

    Raises:
        SpecError: their models, sites, shapes, dtypes or rows differ; the fields are named.
        StoreError: a store is unfinished, its rows are chosen or scaled ones, or something else is at ``path``.
        DamagedError: a byte of a store is not the one that was written.
    """
    first = stores[0]
    for store in stores:
        if store.view:
            raise StoreError(
                f"a choice of the rows of {store.path}, or scaled ones, cannot be merged; repack() them first, and "
                "merge what that gives",
                path=store.path,
            )
    for other in stores[1:]:
        pairs = {name: (first.spec.get(name), other.spec.get(name)) for name in _SAME_TO_MERGE}
        fields = [each for name, pair in pairs.items() for each in differing(*pair, name)]
        if fields or first.columns != other.columns:
            raise SpecError(
                f"{other.path} cannot follow {first.path}: they differ in {', '.join(fields) or 'their keys'}",
                path=other.path,
                fields=fields,
            )
    target = _target(path or _beside(first, "merged"), *stores)
    spec = {**first.spec, "merged": [[store.id, len(store)] for store in stores]}
    spec["sites"] = {key: first.spec["sites"][key] for key in first.keys}
    units = sum(len(store.shards) for store in stores)
    with StoreWriter(target, spec) as writer:
        unit, samples, done = 0, 0, writer.committed()
        for store in stores:
            row, checked = 0, store.checking()
            for shard in checked.shards:
                if unit not in done:
                    columns = _columns(checked.span(row, row + shard.rows), checked)
                    columns["seq"] = [columns["seq"][0] + samples]
                    numbers = (shard.row.first + samples, shard.row.last + samples)
                    end = unit == units - 1  # by number: a store may be merged with itself
                    lost: dict[str, Any] = {"overflow": shard.info.overflow, "underflow": shard.info.underflow}
                    writer.write(unit, columns, samples=numbers, end=end, **lost)
                unit, row = unit + 1, row + shard.rows
            samples += store.sequences
    return target


def _columns(rows: TensorDict, source: StoreReader, dtype: torch.dtype | None = None) -> dict[str, list[Tensor]]:
    columns = {site_column(key): [_cast(rows[key], dtype, key)] for key in source.keys}
    return columns | {source.in_shard(key): [rows[key]] for key in source.row_keys}


def _beside(store: StoreReader, word: str) -> Path:
    """Return a path beside the store: ``runs/a.acts`` becomes ``runs/a-word.acts``.

    Raises:
        StoreError: the store is not on a disk.
    """
    if not isinstance(store.path, Path):
        raise StoreError(f"{store.path} is not on this machine; say where the new store is to be, with path=")
    return store.path.with_name(f"{store.path.stem}-{word}{store.path.suffix}")


def _target(path: str | os.PathLike[str], *stores: StoreReader) -> Path:
    """A path for a new store: free, or that of a store, whose spec is compared when it is written to."""
    for store in stores:
        if not store.complete:
            raise StoreError(f"{store.path} is unfinished; run its harvest to the end first", path=store.path)
    layout = StorePaths(path)
    own = {each.name for each in (layout.shards, layout.scratch)}  # of one that was killed before it had a spec
    is_store = has_spec(layout.folder)
    is_empty = not os.path.lexists(layout.folder) or (
        layout.folder.is_dir() and {each.name for each in layout.folder.iterdir()} <= own
    )
    if not is_store and not is_empty:
        raise StoreError(
            f"{layout.folder} is there already; write to another folder, or remove it first", path=layout.folder
        )
    return layout.folder


def _cast_name(own: torch.dtype, wanted: torch.dtype | None) -> str:
    return dtype_name(wanted if wanted is not None and own.is_floating_point else own)


def _in_order(dataset: StoreReader, per_shard: int) -> Iterator[TensorDict]:
    for begin in range(0, len(dataset), per_shard):
        yield dataset.span(begin, min(begin + per_shard, len(dataset)))


def _write(writer: StoreWriter, parts: Iterator[TensorDict], source: StoreReader, dtype: torch.dtype | None) -> None:
    """Write each part as a shard; of no rows one, so that the store has an end."""
    total, done, there = len(source), 0, writer.committed()
    for unit, part in enumerate(parts if total else [source.span(0, 0)]):
        done += len(part)
        if unit not in there:
            seq, end = part["seq"], done == total
            # Samples at the end of which no row was kept are samples still.
            samples = (int(seq.min()) if total else 0, source.sequences if end else int(seq.max()) + 1)
            writer.write(unit, _columns(part, source, dtype), samples=samples, end=end)


def _cut(stream: Iterator[TensorDict], size: int) -> Iterator[TensorDict]:
    """The same rows in parts of ``size``; the last one may be smaller."""
    held: list[TensorDict] = []
    missing = size
    for rows in stream:
        begin = 0
        while len(rows) - begin >= missing:
            yield joined([*held, rows[begin : begin + missing]])
            begin, missing, held = begin + missing, size, []
        if begin < len(rows):
            held.append(rows[begin:])
            missing -= len(rows) - begin
    if held:
        yield joined(held)


def _cast(values: Tensor, dtype: torch.dtype | None, key: str) -> Tensor:
    if dtype is None or not values.is_floating_point():
        return values
    lost = count_lost(values.float() if values.element_size() == 1 else values, dtype)
    if lost is not None and int(lost[0]):
        raise CaptureError(
            f"{int(lost[0])} values at {key!r} cannot be held by {dtype}; torch.float32 and bfloat16 can",
            paths=(key,),
        )
    return values.to(dtype)
