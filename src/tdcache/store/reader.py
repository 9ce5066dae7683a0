"""The rows of a store by number, whichever shards they are in: what epochs, copies and exports are made from."""

from __future__ import annotations

import copy
import itertools
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, Self

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import SpecError, listed
from tdcache.paths import near_misses
from tdcache.store.layout import StorePaths
from tdcache.store.rows import ROW_COLUMNS, by_shard, put_rows, row_numbers
from tdcache.store.shard import Shard, ShardCache
from tdcache.store.shard_header import Contract, site_column
from tdcache.store.spans import Span, read_spans
from tdcache.store.spec import read_spec, spec_id

__all__ = ["StoreReader"]


class StoreReader:
    """Rows of a store, in the order of the samples, as copies on the CPU. It never writes.

    Args:
        folder: of the store.
        keys: the sites to read; all by default.
        check: whether each block is compared with its checksum when it is read for the first time.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, keys: Sequence[str] | None = None, check: bool = False
    ) -> None:
        self._layout, self._name = StorePaths(folder), os.fspath(folder)
        self.spec: dict[str, Any] = read_spec(self._layout.folder)
        """What is stored, of which model, and how."""
        self.id = spec_id(self.spec)
        """The id of the spec."""
        self._contract = Contract.of(self.id, self.spec)
        self._cache = ShardCache(check=check)
        self._all_keys = tuple(self.spec["sites"])
        self.keys: tuple[str, ...] = self._all_keys if keys is None else tuple(self._known(key) for key in keys)
        """The sites, by path."""
        self._load({})

    def _load(self, known: Mapping[int, Shard]) -> None:
        by_unit = self._layout.open_shards(self._contract, self._cache, known)
        self._by_unit = by_unit
        self._shards = tuple(by_unit.values())
        rows = [shard.row for shard in self._shards]
        self._starts = list(itertools.accumulate((row.rows for row in rows), initial=0))
        self._start_tensor = torch.tensor(self._starts)
        with_tokens = bool(rows) and all(row.tokens for row in rows)
        self.row_keys: tuple[str, ...] = ROW_COLUMNS if with_tokens else ROW_COLUMNS[:2]
        """What each row knows of itself: ``"seq"``, ``"pos"`` and perhaps ``"tok"``."""
        self.sequences: int = max((row.last for row in rows), default=0)
        """The number after that of the last sample."""

    def refresh(self) -> Self:
        """Take in the shards that were written since; gives the reader itself.

        Raises:
            SpecError: another store has taken the place of this one.
        """
        if spec_id(read_spec(self.path)) != self.id:
            raise SpecError(
                f"{self.path} holds another store than the one that was opened; open it again", path=self.path
            )
        self._load(self._by_unit)
        return self

    def checking(self) -> Self:
        """The same rows, each block compared with its checksum when it is read for the first time."""
        found = copy.copy(self)
        cache = ShardCache(check=True)
        shards = tuple(Shard(each.path, each.row, each.contract, cache) for each in self._shards)
        vars(found).update(_cache=cache, _shards=shards, _by_unit=dict(zip(self._by_unit, shards, strict=True)))
        return found

    def select(self, *keys: str) -> Self:
        """The same rows, read for some of the sites only."""
        found = copy.copy(self)
        found.keys = tuple(self._known(key) for key in keys)
        return found

    @property
    def path(self) -> Path:
        """The absolute path of the folder of the store."""
        return self._layout.folder

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards, in the order of their rows."""
        return self._shards

    @property
    def complete(self) -> bool:
        """Whether the harvest came to its end."""
        units = list(self._by_unit)
        return bool(units) and units[-1] == len(units) - 1 and self._shards[-1].row.end

    @property
    def nbytes(self) -> int:
        """Bytes of all columns that are read."""
        return len(self) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in map(self.describe, self.columns))

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def columns(self) -> tuple[str, ...]:
        """Everything a row has: the sites, and what it knows of itself."""
        return (*self.keys, *self.row_keys)

    def rows(self, index: Any, keys: Sequence[str] | None = None) -> TensorDict:
        """The rows that ``index`` means, with batch size the shape of the index.

        Args:
            index: an integer, a slice, ``...``, or integers or booleans in a list, an array or a tensor.
            keys: the columns, ``"seq"``, ``"pos"`` and ``"tok"`` included; all by default.

        Raises:
            IndexError: out of range, or no such index.
        """
        numbers = row_numbers(index, len(self))
        if isinstance(index, slice) and index.step in (None, 1):
            begin = int(numbers[0]) if numbers.numel() else 0
            return self.span(begin, begin + numbers.numel(), keys)
        found = self._gather(numbers.reshape(-1), self.columns if keys is None else keys)
        shaped = {key: each.reshape((*numbers.shape, *each.shape[1:])) for key, each in found.items()}
        return TensorDict(shaped, batch_size=numbers.shape)

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
        """Read several spans of rows, one after the other, into memory; see :func:`tdcache.store.spans.read_spans`."""
        targets = {self._in_shard(key): column for key, column in into.items()}
        return read_spans(targets, self._shards, self._starts, spans, readers=readers)

    def _gather(self, numbers: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        """Each of ``numbers``, one shard after the other."""
        found, names = self.empty(numbers.numel(), keys), [self._in_shard(key) for key in keys]
        for shard, rows, places in by_shard(numbers, self._start_tensor):
            for key, part in zip(keys, self._shards[shard].gather(names, rows), strict=True):
                put_rows(found[key], places, part)
        return found

    def _in_shard(self, key: str) -> str:
        return key if key in self.row_keys else site_column(key)

    def describe(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and feature shape of a column."""
        return self._contract.columns[key if key in ROW_COLUMNS else site_column(self._known(key))]

    def _known(self, key: str) -> str:
        if key not in self._all_keys:
            near = near_misses(key, self._all_keys)
            hint = f"did you mean {listed(near)}?" if near else f"there are {listed(self._all_keys)}"
            raise KeyError(f"the store {str(self.path)!r} has no site {key!r}; {hint}")
        return key

    def sequence(self, number: int) -> TensorDict:
        """The rows of one sample, in the order of ``"pos"``; none where all were dropped.

        Raises:
            IndexError: no such sample.
        """
        if not 0 <= number < self.sequences:
            raise IndexError(f"sample {number} is out of range; there are {self.sequences}")
        found, places = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int32)]
        for shard, start in zip(self._shards, self._starts, strict=False):
            if shard.row.first <= number < shard.row.last:
                own = self.span(start, start + shard.rows, ("seq", "pos"))
                rows = (own["seq"] == number).nonzero().squeeze(1)
                found.append(rows + start)
                places.append(own["pos"][rows])
        return self.rows(torch.cat(found)[torch.cat(places).argsort(stable=True)])
