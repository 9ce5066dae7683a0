"""Reading a store: rows as TensorDicts by any index, single sites, sequences, batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import listed
from tdcache.paths import near_misses
from tdcache.store.batches import Batches, Shuffle
from tdcache.store.layout import Layout
from tdcache.store.rows import gather_rows, joined, row_numbers
from tdcache.store.shard import Shard
from tdcache.store.spans import Span, read_spans
from tdcache.store.spec import read_spec, spec_id
from tdcache.store.verify import check_columns, find_damage
from tdcache.store.writer import ROW_COLUMNS, site_column

__all__ = ["ActivationDataset", "Column"]


class Column:
    """One column of a store, read when it is indexed: ``ds["layers.5.mlp"][:100]``."""

    def __init__(self, dataset: ActivationDataset, key: str) -> None:
        self._dataset = dataset
        self.key = key

    def __repr__(self) -> str:
        return f"Column({self.key!r}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Tensor:
        found: Tensor = self._dataset.rows(index, [self.key]).get(self.key)
        return found

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    @property
    def shape(self) -> torch.Size:
        """``(rows, *features)``."""
        return torch.Size((len(self), *self._dataset.describe(self.key)[1]))

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return self._dataset.describe(self.key)[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.shape.numel() * self.dtype.itemsize


class ActivationDataset(torch.utils.data.Dataset[TensorDict]):
    """The rows of a store: a map-style dataset that never writes, and may be read while a harvest goes on.

    Rows are in the order of the samples. A row is a TensorDict with one entry per site (the dotted path is one key),
    ``"seq"`` (the number of its sample), ``"pos"`` (its place among the sample's own tokens) and, where the data had
    tokens, ``"tok"``. What is returned is a copy on the CPU.

    Example:
        >>> ActivationDataset.open("runs/a.acts")[:32]["layers.5.mlp"]  # doctest: +SKIP
    """

    def __init__(self, folder: str | os.PathLike[str], *, keys: Sequence[str] | None = None) -> None:
        self._layout = Layout(folder)
        self.spec: dict[str, Any] = read_spec(self._layout.folder)
        """What is stored, of which model, and how."""
        self.id = spec_id(self.spec)
        """The id of the spec."""
        self._all_keys = tuple(self.spec["sites"])
        self.keys: tuple[str, ...] = self._all_keys if keys is None else tuple(self._known(key) for key in keys)
        """The sites, by path."""
        self._by_unit: dict[int, Shard] = {}
        self._load()

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, keys: Sequence[str] | None = None) -> Self:
        """Open a store.

        Args:
            path: its folder.
            keys: the sites to read; all by default.

        Raises:
            SpecError: there is no store.
            DamagedError: a shard's header or size is not what was written; :meth:`verify` also looks at the data.
        """
        return cls(path, keys=keys)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "unfinished"
        size = f"{len(self.keys)} sites, {len(self):,} rows, {self.nbytes / 1e6:,.1f} MB"
        return f"<{state} {type(self).__name__} {str(self.path)!r}: {size}>"

    def _load(self) -> None:
        self._by_unit = self._layout.open_shards(self.id, self._by_unit)
        self._shards = list(self._by_unit.values())
        for shard in self._shards:
            check_columns(shard, self.spec)
        starts = [0]
        for shard in self._shards:
            starts.append(starts[-1] + shard.rows)
        self._starts = torch.tensor(starts)
        with_tokens = bool(self._shards) and all("tok" in shard.header.tensors for shard in self._shards)
        self.row_keys: tuple[str, ...] = ROW_COLUMNS if with_tokens else ROW_COLUMNS[:2]
        """What each row knows of itself: ``"seq"``, ``"pos"`` and perhaps ``"tok"``."""

    def refresh(self) -> Self:
        """Take in the shards that were written since; gives the dataset itself."""
        self._load()
        return self

    @property
    def path(self) -> Path:
        """The folder."""
        return self._layout.folder

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards, in the order of their rows."""
        return tuple(self._shards)

    @property
    def complete(self) -> bool:
        """Whether the harvest came to its end."""
        units = list(self._by_unit)
        return bool(units) and units[-1] == len(units) - 1 and self._shards[-1].info.end

    @property
    def sequences(self) -> int:
        """The number behind that of the last sample."""
        return max((shard.info.last for shard in self._shards), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all columns that are read."""
        return sum(
            shard.header.tensors[name].nbytes
            for shard in self._shards
            for name in [*map(site_column, self.keys), *self.row_keys]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: str) -> Column: ...
    @overload
    def __getitem__(self, index: Any) -> TensorDict: ...
    def __getitem__(self, index: Any) -> Column | TensorDict:
        if isinstance(index, str):
            return Column(self, index if index in self.row_keys else self._known(index))
        return self.rows(index)

    def __getitems__(self, indices: list[int]) -> TensorDict:
        """The rows of a batch in one read; a stock ``DataLoader`` asks this."""
        return self.rows(indices)

    @staticmethod
    def collate(rows: TensorDict | list[TensorDict]) -> TensorDict:
        """For ``DataLoader(ds, collate_fn=ds.collate)``: hands the batch on as it was read."""
        return rows if isinstance(rows, TensorDict) else joined([row.unsqueeze(0) for row in rows])

    def rows(self, index: Any, keys: Sequence[str] | None = None) -> TensorDict:
        """The rows that ``index`` means, with batch size the shape of the index.

        Args:
            index: an integer, a slice, ``...``, or integers or booleans in a list, an array or a tensor.
            keys: the columns, ``"seq"``, ``"pos"`` and ``"tok"`` included; all by default.

        Raises:
            IndexError: out of range, or no such index.
        """
        names = list(self.columns if keys is None else keys)
        numbers = row_numbers(index, len(self))
        if isinstance(index, slice) and index.step in (None, 1):
            begin = int(numbers[0]) if numbers.numel() else 0
            return self.span(begin, begin + numbers.numel(), names)
        return TensorDict({key: self._gather(key, numbers) for key in names}, batch_size=numbers.shape)

    def span(self, begin: int, end: int, keys: Sequence[str] | None = None) -> TensorDict:
        """Rows ``begin`` to ``end``, read in one go per column and shard."""
        found = self.empty(end - begin, keys)
        self.read([(begin, end)], found)
        return TensorDict(found, batch_size=[end - begin])

    def empty(self, rows: int, keys: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Memory for so many rows of some columns, all by default; what is in it is undefined."""
        described = {key: self.describe(key) for key in (self.columns if keys is None else keys)}
        return {key: torch.empty((rows, *shape), dtype=dtype) for key, (dtype, shape) in described.items()}

    def read(
        self, spans: Sequence[Span], into: Mapping[str, Tensor], *, readers: Executor | None = None
    ) -> Sequence[Future[None]]:
        """Read several spans of rows, one behind the other, into memory; see :func:`tdcache.store.spans.read_spans`."""
        targets = {self._in_shard(key): column for key, column in into.items()}
        return read_spans(targets, self._shards, self._starts.tolist(), spans, readers=readers)

    @property
    def columns(self) -> tuple[str, ...]:
        """Everything a row has: the sites, and what it knows of itself."""
        return (*self.keys, *self.row_keys)

    def _gather(self, key: str, numbers: Tensor) -> Tensor:
        if not self._shards:
            return self._none(key).reshape((*numbers.shape, *self.describe(key)[1]))
        flat = gather_rows(self._columns(key), self._starts, numbers.reshape(-1))
        return flat.reshape((*numbers.shape, *flat.shape[1:]))

    def _columns(self, key: str) -> list[Tensor]:
        return [shard.column(self._in_shard(key)) for shard in self._shards]

    def _in_shard(self, key: str) -> str:
        return key if key in self.row_keys else site_column(key)

    def _none(self, key: str) -> Tensor:
        dtype, shape = self.describe(key)
        return torch.empty((0, *shape), dtype=dtype)

    def describe(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and feature shape of a column."""
        if key in ROW_COLUMNS:
            return (torch.int64 if key == "seq" else torch.int32), ()
        site = self.spec["sites"][self._known(key)]
        return getattr(torch, site["dtype"]), tuple(site["shape"])

    def _known(self, key: str) -> str:
        if key not in self._all_keys:
            near = near_misses(key, self._all_keys)
            hint = f"did you mean {listed(near)}?" if near else f"there are {listed(self._all_keys)}"
            raise KeyError(f"the store {str(self.path)!r} has no site {key!r}; {hint}")
        return key

    def select(self, *keys: str) -> ActivationDataset:
        """The same store, read for some of its sites only."""
        return type(self)(self.path, keys=keys)

    def sequence(self, number: int) -> TensorDict:
        """The rows of one sample, in the order of ``"pos"``; none where all were dropped.

        Raises:
            IndexError: no such sample.
        """
        if not 0 <= number < self.sequences:
            raise IndexError(f"sample {number} is out of range; there are {self.sequences}")
        found, places = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int32)]
        for shard, start in zip(self._shards, self._starts.tolist(), strict=False):
            if shard.info.first <= number < shard.info.last:
                rows = (shard.column("seq") == number).nonzero().squeeze(1)
                found.append(rows + start)
                places.append(shard.column("pos")[rows])
        return self.rows(torch.cat(found)[torch.cat(places).argsort(stable=True)])

    def batches(
        self,
        size: int,
        *,
        shuffle: Shuffle = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        block: int | None = None,
        pool: int | None = None,
    ) -> Batches:
        """Every row exactly once per epoch, in batches; disjoint over ranks, and resumable.

        Args:
            size: rows per batch; the last of an epoch may be smaller.
            shuffle: False (the order of the samples), ``"block"`` (blocks of neighbouring rows in random order, mixed
                in a pool: disks read whole blocks) or ``"rows"`` (every row on its own: for data that is in memory).
            seed: of the shuffle; each epoch has another order.
            rank: which share.
            world: how many shares.
            block: rows per block; by default enough for a mebibyte of the widest site.
            pool: rows that are mixed at a time; by default sixteen blocks. Two pools are in memory, by default at most
                32 MiB per site (more where a row is wider than a mebibyte): one is handed out while the next is read.
        """
        return Batches(self, size, shuffle=shuffle, seed=seed, rank=rank, world=world, block=block, pool=pool)

    def verify(self) -> None:
        """Read every byte of the store and compare the checksums.

        Raises:
            DamagedError: a byte was flipped or is missing; it names shard, column and block. Further damage is in its
                notes.
        """
        found = find_damage(self.path)
        if found:
            for further in found[1:]:
                found[0].add_note(str(further))
            raise found[0]

    def export(
        self, path: str | os.PathLike[str], kind: Literal["npz", "pt", "memmap", "hf", "arrow"] | None = None
    ) -> Path:
        """Write the rows in another format; see :func:`tdcache.store.export.export_rows`."""
        from tdcache.store.export import export_rows

        return export_rows(self, path, kind)

    def repack(self, path: str | os.PathLike[str] | None = None, **options: Any) -> ActivationDataset:
        """Write the rows to another store, shuffled, fewer sites, another dtype; see :mod:`tdcache.store.repack`."""
        from tdcache.store.repack import repack

        return repack(self, path, **options)

    def merge(self, *others: ActivationDataset, path: str | os.PathLike[str] | None = None) -> ActivationDataset:
        """Write the rows of this store and of others to a new one, in order; see :mod:`tdcache.store.repack`."""
        from tdcache.store.repack import merge

        return merge(self, *others, path=path)
