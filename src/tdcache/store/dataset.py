"""A store as a dataset: rows as TensorDicts by any index, single sites, sequences, batches, copies."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, overload

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import StoreError
from tdcache.store.batches import Batches, EpochOrder, Shuffle
from tdcache.store.choice import rows_where, split_rows
from tdcache.store.dtypes import in_numpy
from tdcache.store.export import export_rows
from tdcache.store.iterable import RowIterable
from tdcache.store.layout import StorePaths
from tdcache.store.reader import StoreReader
from tdcache.store.repack import merge, repack
from tdcache.store.rows import joined
from tdcache.store.scaling import Normalisation, Scaling
from tdcache.store.statistics import SiteStatistics
from tdcache.store.tokenizers import load_tokenizer
from tdcache.store.upload import StoreUpload
from tdcache.store.verify import find_damage

__all__ = ["ActivationDataset", "Column"]

_PART_BYTES = 1 << 20


class Column:
    """One column of a store, read when it is indexed: ``ds["layers.5.mlp"][:100]``."""

    def __init__(self, dataset: StoreReader, key: str) -> None:
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

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """All rows at once, for ``numpy.asarray``; NumPy has no bfloat16 and no float8, which become float32."""
        if copy is False:
            raise ValueError(
                f"column {self.key!r} is read from files, so NumPy's array is always a copy; leave out copy="
            )
        if in_numpy(self.dtype) == self.dtype:
            rows = self[...]
        else:  # converted while it is in the processor's cache
            rows = torch.empty(self.shape, dtype=in_numpy(self.dtype))
            part = max(1, _PART_BYTES * len(self) // max(1, self.nbytes))
            for begin in range(0, len(self), part):
                rows[begin : begin + part].copy_(self[begin : begin + part])
        array = rows.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole column, ``(rows, *features)``."""
        return torch.Size((len(self), *self._dataset.describe(self.key)[1]))

    @property
    def dtype(self) -> torch.dtype:
        """As it is stored."""
        return self._dataset.describe(self.key)[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.shape.numel() * self.dtype.itemsize


class ActivationDataset(StoreReader, torch.utils.data.Dataset[TensorDict]):
    """The rows of a store: a map-style dataset that never writes, and may be read while a harvest goes on.

    Rows are in the order of the samples. A row is a TensorDict with one entry per site (the dotted path is one key),
    ``"seq"`` (the number of its sample), ``"pos"`` (its place among the sample's own tokens) and, where the data had
    tokens, ``"tok"``. What is returned is a copy on the CPU.

    Example:
        >>> ActivationDataset.open("runs/a.acts")[:32]["layers.5.mlp"]  # doctest: +SKIP
    """

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        keys: Sequence[str] | None = None,
        check: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> Self:
        """Open a store.

        Only the index is read, and the size of every shard compared with it. A shard is opened when something is read
        from it, and has to be the one that the index names.

        Args:
            path: its folder, or a URL that fsspec knows (extra ``remote``): ``s3://``, ``gs://``, ``https://``. Then
                ranges are requested, small ones through 64 MiB of pages that are kept.
            keys: the sites to read; all by default.
            check: compare each mebibyte with its checksum when it is read for the first time.
            storage_options: for the file system of a URL: credentials, an endpoint.

        Raises:
            SpecError: there is no store.
            DamagedError: a shard's size, or the header of one that the index does not know, is not what was written;
                :meth:`verify` looks at everything.
        """
        return cls(path, keys=keys, check=check, storage_options=storage_options)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "unfinished"
        state = f"{' and '.join(self.view)} rows of {state}" if self.view else state
        size = f"{len(self.keys)} sites, {len(self):,} rows, {self.nbytes / 1e6:,.1f} MB"
        return f"<{state} {type(self).__name__} {self._name!r}: {size}>"

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

    def text(self, index: Any = ..., *, tokenizer: Any = None) -> list[str]:
        """The text of each row's token, one string per row.

        Args:
            index: which rows, one dimension of them.
            tokenizer: with ``decode``; by default the one of transformers (extra ``hf``) that ``harvest`` was told of.

        Raises:
            StoreError: the rows have no tokens, or it is not known what they mean.
        """
        if "tok" not in self.row_keys:
            raise StoreError(f"{self!r} has no token ids: its data had none", path=self.path)
        known = tokenizer or load_tokenizer(self.spec.get("tokenizer"), self.path)
        return [str(known.decode([token])) for token in self.rows(index, ["tok"])["tok"].reshape(-1).tolist()]

    def where(self, predicate: Callable[[TensorDict], Any], *, keys: Sequence[str] | None = None) -> Self:
        """The rows for which ``predicate`` gives True, in their order; nothing is copied.

        Args:
            predicate: called with a TensorDict of some rows at a time; gives one boolean for each, ``(n,)``.
            keys: the columns that it sees; by default what rows know of themselves (:attr:`row_keys`) and no sites,
                because those would have to be read.

        Raises:
            ValueError: the predicate gave something else.

        Example:
            >>> store.where(lambda rows: rows["pos"] == 0)  # doctest: +SKIP
        """
        return self.chosen(rows_where(self, predicate, self.row_keys if keys is None else keys))

    def split(self, *parts: float, seed: int = 0, by: str = "seq") -> tuple[Self, ...]:
        """Disjoint shares of the rows, whole samples each: ``train, validation = ds.split(0.9, 0.1)``.

        A sample's share is drawn by a hash of its number and ``seed``: the shares are about as large as asked for, and
        a sample stays in its share when more are harvested.

        Args:
            *parts: what they make up, 1 together.
            seed: of the draw.
            by: another column of whole numbers whose equal values stay together, as a document's id.

        Raises:
            ValueError: the parts do not add up to 1, or the column holds something else.
        """
        return tuple(self.chosen(numbers) for numbers in split_rows(self, parts, seed=seed, by=by))

    def normalised(self, by: Normalisation = "norm", *, statistics: Mapping[str, SiteStatistics] | None = None) -> Self:
        """The same rows, scaled when they are read, in float32 (float64 stays so).

        Args:
            by: ``"norm"`` multiplies a site's rows by one number, after which the mean of their squared norms is their
                number of features; ``"std"`` gives each feature mean 0 and variance 1.
            statistics: of the rows to normalise by; by default these rows' own :attr:`statistics`. Give validation
                rows those of the training rows.

        Raises:
            StoreError: a site's statistics are not finite.
        """
        known = self.statistics if statistics is None else statistics
        return self.scaled({key: Scaling.of(known[key], by, key) for key in self.keys if key in known})

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
            block: rows per block; by default enough for half a mebibyte of the widest site, and at most 1024.
            pool: rows that are mixed at a time; by default sixty-four blocks. A row is followed by one of its own block
                once in ``pool / block`` times, so a larger pool mixes better. Two pools are in memory, by default at
                most 64 MiB per site (more where a row is wider than half a mebibyte): one is handed out while the next
                is read.
        """
        order = EpochOrder(size=size, shuffle=shuffle, seed=seed, rank=rank, world=world, block=block, pool=pool)
        return Batches(self, order)

    def iterable(
        self,
        size: int,
        *,
        shuffle: Shuffle = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        block: int | None = None,
        pool: int | None = None,
    ) -> RowIterable:
        """The same for a stock loader: ``DataLoader(ds.iterable(1024), batch_size=None, num_workers=4)``.

        The arguments are those of :meth:`batches`; the workers of the loader share what its rank has. A batch is a dict
        of tensors, one per column.
        """
        order = EpochOrder(size=size, shuffle=shuffle, seed=seed, rank=rank, world=world, block=block, pool=pool)
        return RowIterable(self, order)

    def verify(self) -> None:
        """Read every byte of the store and compare the checksums.

        Raises:
            DamagedError: a byte was flipped or is missing; it names shard, column and block. Further damage is in its
                notes.
            SpecError: another store has taken the place of the one that was opened.
        """
        self.check_same()
        found = find_damage(self.path)
        if found:
            for further in found[1:]:
                found[0].add_note(str(further))
            raise found[0]

    def export(
        self, path: str | os.PathLike[str], kind: Literal["npz", "pt", "memmap", "hf", "arrow", "parquet"] | None = None
    ) -> Path:
        """Write the rows in another format; see :func:`tdcache.store.export.export_rows`."""
        return export_rows(self, path, kind)

    def repack(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Self:
        """Write the rows to another store, shuffled, fewer sites, another dtype; see :mod:`tdcache.store.repack`."""
        return type(self).open(repack(self, path, **options))

    def upload(self, url: str, *, storage_options: Mapping[str, Any] | None = None) -> Self:
        """Send a store to a URL that fsspec knows (extra ``remote``); gives the copy, opened.

        Shards that are there already are not sent again, so that an interrupted upload is run again and continues.
        ``harvest(..., upload=url)`` sends each shard when it is written.

        Args:
            url: of the copy, such as ``"s3://bucket/a.acts"``.
            storage_options: for its file system: credentials, an endpoint.

        Raises:
            SpecError: another store is there.
            StoreError: the copy cannot be written, or these rows are not a store on a disk.
        """
        if self.view or not isinstance(self.path, Path):
            raise StoreError(f"{self!r} is no store on a disk; repack() it to one, and upload that", path=self.path)
        upload = StoreUpload(StorePaths(self.path), url, storage_options)
        upload.send_missing(shard.row.unit for shard in self.shards)
        upload.finish()
        return type(self).open(url, storage_options=storage_options)

    def merge(self, *others: StoreReader, path: str | os.PathLike[str] | None = None) -> Self:
        """Write the rows of this store and of others to a new one, in order; see :mod:`tdcache.store.repack`."""
        return type(self).open(merge(self, *others, path=path))
