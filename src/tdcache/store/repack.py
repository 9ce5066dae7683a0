"""Stores made from stores: shuffled once and for all, with fewer sites or another dtype, or joined."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import CaptureError, SpecError, StoreError
from tdcache.store.rows import joined
from tdcache.store.safetensors import read_tensors, write_tensors
from tdcache.store.spec import differing
from tdcache.store.writer import StoreWriter, site_column

if TYPE_CHECKING:
    from tdcache.store.dataset import ActivationDataset

__all__ = ["merge", "repack"]


def repack(
    dataset: ActivationDataset,
    path: str | os.PathLike[str] | None = None,
    *,
    shuffle: bool = False,
    seed: int = 0,
    keys: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 1 << 26,
) -> ActivationDataset:
    """Write the rows of a store to a new one; every row keeps its ``seq``, ``pos`` and ``tok``.

    A shuffle reads and writes everything twice, in order, and never holds more than a few shards: rows are dealt at
    random to bins on the disk, and each bin is mixed in memory. Every order is equally likely; ``seed`` pins it down.

    Args:
        dataset: the store; a complete one.
        path: the new store's folder, which must not be there; by default a name beside the store's own.
        shuffle: mix the rows.
        seed: of the shuffle.
        keys: the sites that are kept; all by default.
        dtype: of the new store's floating values.
        shard_bytes: how big a shard should be, about.

    Raises:
        StoreError: the store is unfinished, or ``path`` is there.
        CaptureError: finite values that ``dtype`` cannot hold.
    """
    source = dataset if keys is None else dataset.select(*keys)
    target = _fresh(path or _beside(source, "shuffled" if shuffle else "repacked"), source)
    sites = {
        key: {"dtype": _name(dtype, source.describe(key)[0]), "shape": list(source.describe(key)[1])}
        for key in source.keys
    }
    made = {"from": source.id, "rows": len(source), "shuffle": seed if shuffle else None, "shard_bytes": shard_bytes}
    spec = {**source.spec, "sites": sites, "repacked": made}
    if dtype is not None:
        spec["dtype"] = str(dtype).removeprefix("torch.")
    per_shard = max(1, shard_bytes * len(source) // max(1, source.nbytes))
    bins = target.with_name(f".{target.name}.bins")
    try:
        stream = _shuffled(source, seed, per_shard, bins) if shuffle else _in_order(source, per_shard)
        _write(target, spec, stream, source, per_shard=per_shard, dtype=dtype)
    finally:
        shutil.rmtree(bins, ignore_errors=True)
    return type(dataset).open(target)


def merge(*stores: ActivationDataset, path: str | os.PathLike[str] | None = None) -> ActivationDataset:
    """Write the rows of several stores of the same sites to a new one, in order.

    The samples of each store are numbered on from those of the one before.

    Args:
        *stores: in the order of their rows.
        path: the new store's folder, which must not be there; by default a name beside the first store's own.

    Raises:
        SpecError: their sites, shapes, dtypes or rows differ; the fields are named.
        StoreError: a store is unfinished, or ``path`` is there.
    """
    first = stores[0]
    for other in stores[1:]:
        wanted = ("sites", "rows", "direction", "tokens")
        fields = [each for name in wanted for each in differing(first.spec.get(name), other.spec.get(name), name)]
        if fields or first.keys != other.keys:
            raise SpecError(
                f"{other.path} cannot follow {first.path}: they differ in {', '.join(fields) or 'their keys'}",
                path=other.path,
                fields=fields,
            )
    target = _fresh(path or _beside(first, "merged"), *stores)
    spec = {**first.spec, "merged": [[store.id, len(store)] for store in stores]}
    spec["sites"] = {key: first.spec["sites"][key] for key in first.keys}
    units = sum(len(store.shards) for store in stores)
    with StoreWriter(target, spec) as writer:
        unit, offset = 0, 0
        for store in stores:
            for shard in store.shards:
                columns = {name: [shard.column(name)] for name in map(site_column, store.keys)}
                columns |= {name: [shard.column(name)] for name in store.row_keys}
                columns["seq"] = [columns["seq"][0] + offset]
                samples = (shard.info.first + offset, shard.info.last + offset)
                end = unit == units - 1  # by number: a store may be merged with itself
                writer.write(unit, columns, samples=samples, end=end, overflow=shard.info.overflow)
                unit += 1
            offset += store.sequences
    return type(first).open(target)


def _beside(store: ActivationDataset, word: str) -> Path:
    """``runs/a.acts`` becomes ``runs/a-word.acts``."""
    folder = store.path.absolute()
    return folder.with_name(f"{folder.stem}-{word}{folder.suffix}")


def _fresh(path: str | os.PathLike[str], *stores: ActivationDataset) -> Path:
    for store in stores:
        if not store.complete:
            raise StoreError(f"{store.path} is unfinished; run its harvest to the end first", path=store.path)
    target = Path(path)
    if target.exists() and any(target.iterdir()):
        raise StoreError(f"{target} is there already; write to another folder, or remove it first", path=target)
    return target


def _name(wanted: torch.dtype | None, own: torch.dtype) -> str:
    return str(wanted if wanted is not None and own.is_floating_point else own).removeprefix("torch.")


def _in_order(dataset: ActivationDataset, per_shard: int) -> Iterator[TensorDict]:
    for begin in range(0, len(dataset), per_shard):
        yield dataset.span(begin, min(begin + per_shard, len(dataset)))


def _shuffled(dataset: ActivationDataset, seed: int, per_shard: int, folder: Path) -> Iterator[TensorDict]:
    """Rows in random order: dealt to bins at random, each bin mixed when it is read again."""
    generator = torch.Generator().manual_seed(seed)
    count = math.ceil(len(dataset) / per_shard)
    shutil.rmtree(folder, ignore_errors=True)  # what one that was killed has left
    folder.mkdir(parents=True)
    for number, rows in enumerate(_in_order(dataset, per_shard)):
        bins = torch.randint(count, (len(rows),), generator=generator)
        for each in bins.unique().tolist():
            write_tensors(dict(rows[bins == each].items()), folder / f"{each}-{number}.safetensors")
    for each in range(count):
        files = sorted(folder.glob(f"{each}-*.safetensors"), key=lambda file: int(file.stem.partition("-")[2]))
        parts = [TensorDict.from_dict(read_tensors(file), auto_batch_size=False) for file in files]
        for part in parts:
            part.batch_size = part["seq"].shape
        if parts:
            rows = joined(parts)
            yield rows[torch.randperm(len(rows), generator=generator)]


def _write(
    target: Path,
    spec: dict[str, Any],
    stream: Iterator[TensorDict],
    source: ActivationDataset,
    *,
    per_shard: int,
    dtype: torch.dtype | None,
) -> None:
    """Write a stream of rows as shards; of no rows as one, so that the store has an end."""
    total, done = len(source), 0
    with StoreWriter(target, spec) as writer:
        for unit, part in enumerate(_cut(stream, per_shard) if total else [source.span(0, 0)]):
            done += len(part)
            columns = {site_column(key): [_cast(part[key], dtype, key)] for key in source.keys}
            columns |= {key: [part[key]] for key in source.row_keys}
            seq, end = part["seq"], done == total
            # Samples at the end of which no row was kept are samples still.
            samples = (int(seq.min()) if total else 0, source.sequences if end else int(seq.max()) + 1)
            writer.write(unit, columns, samples=samples, end=end)


def _cut(stream: Iterator[TensorDict], per_shard: int) -> Iterator[TensorDict]:
    """The same rows in parts of ``per_shard``; the last one may be smaller."""
    held: list[TensorDict] = []
    for rows in stream:
        held.append(rows)
        while sum(map(len, held)) >= per_shard:
            waiting = joined(held)
            yield waiting[:per_shard]
            held = [waiting[per_shard:]]
    if sum(map(len, held)):
        yield joined(held)


def _cast(values: Tensor, dtype: torch.dtype | None, key: str) -> Tensor:
    if dtype is None or not values.is_floating_point():
        return values
    cast = values.to(dtype)
    largest = torch.finfo(dtype).max
    plain = values.float() if values.element_size() == 1 else values
    lost = torch.isfinite(plain) & (~torch.isfinite(cast.float()) | (plain.abs() > largest))
    if bool(lost.any()):
        raise CaptureError(
            f"{int(lost.sum())} finite values at {key!r} cannot be held by {dtype}; torch.float32 and bfloat16 can",
            paths=(key,),
        )
    return cast
