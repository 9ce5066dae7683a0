"""The rows of a store by number, whichever shards they are in: what epochs, copies and exports are made from."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any, Self

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import SpecError, listed
from tdcache.paths import near_misses
from tdcache.store.layout import StoreFiles
from tdcache.store.remote import Place, RemotePath, as_place
from tdcache.store.rows import ROW_COLUMNS, by_shard, put_rows, row_numbers
from tdcache.store.scaling import Scaling
from tdcache.store.shard import Shard, ShardCache
from tdcache.store.shard_header import Contract, own_column, site_column
from tdcache.store.spans import Span, read_spans
from tdcache.store.spec import read_spec, spec_id
from tdcache.store.statistics import SiteStatistics
from tdcache.store.summary import summarised

__all__ = ["StoreReader"]

_STATISTICS_BYTES = 1 << 26
_ASKED_EVERY = 10.0  # seconds


class StoreReader:
    """Rows of a store, in the order of the samples, as copies on the CPU. It never writes.

    Args:
        folder: of the store, or its URL.
        keys: the sites to read; all by default.
        check: whether each block is compared with its checksum when it is read for the first time.
        storage_options: for the file system of a URL.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keys: Sequence[str] | None = None,
        check: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._layout, self._name = StoreFiles(as_place(folder, storage_options)), os.fspath(folder)
        self.spec: dict[str, Any] = read_spec(self._layout.folder)
        """What is stored, of which model, and how."""
        self.id = spec_id(self.spec)
        """The id of the spec."""
        self._contract = Contract.of(self.id, self.spec)
        self._cache = ShardCache(check=check)
        self._all_keys = tuple(self.spec["sites"])
        self.keys: tuple[str, ...] = self._all_keys if keys is None else tuple(self._known(key) for key in keys)
        """The sites, by path."""
        self._own_keys = tuple(self.spec.get("columns", {}))
        self._chosen: Tensor | None = None
        """The numbers of the rows, of some of them only."""
        self._scalings: Mapping[str, Scaling] = {}
        self._asked_at = time.monotonic()
        self._load({})

    def _load(self, known: Mapping[int, Shard]) -> None:
        by_unit = self._layout.open_shards(self._contract, self._cache, known)
        self._by_unit = by_unit
        self._shards = tuple(by_unit.values())
        rows = [shard.row for shard in self._shards]
        self._starts = list(itertools.accumulate((row.rows for row in rows), initial=0))
        self._start_tensor = torch.tensor(self._starts)
        with_tokens = bool(rows) and all(row.tokens for row in rows)
        self.row_keys: tuple[str, ...] = (*(ROW_COLUMNS if with_tokens else ROW_COLUMNS[:2]), *self._own_keys)
        """What each row knows of itself: ``"seq"``, ``"pos"``, perhaps ``"tok"``, and the columns given to harvest."""
        self.sequences: int = max((row.last for row in rows), default=0)
        """The number after that of the last sample."""

    def refresh(self) -> Self:
        """Take in the shards that were written since; gives the reader itself.

        Raises:
            SpecError: another store has taken the place of this one, or these are chosen rows, whose numbers would
                change.
        """
        if self._chosen is not None:
            raise SpecError(
                "rows that were chosen stay the same: refresh the store itself and choose again", path=self.path
            )
        self.check_same()
        self._load(self._by_unit)
        return self

    def check_same(self) -> None:
        """Look whether the folder still holds the store that was opened.

        Raises:
            SpecError: it holds another one.
        """
        if spec_id(read_spec(self.path)) != self.id:
            raise SpecError(
                f"{self.path} holds another store than the one that was opened; open it again", path=self.path
            )

    def _ask_now_and_then(self) -> None:
        """A disk shows when a file was replaced, each time that it is opened; elsewhere asking costs a request."""
        now = time.monotonic()
        if isinstance(self.path, RemotePath) and now - self._asked_at > _ASKED_EVERY:
            self._asked_at = now
            self.check_same()

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
    def path(self) -> Place:
        """The absolute path of the folder of the store, or its URL."""
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
        return self._starts[-1] if self._chosen is None else self._chosen.numel()

    @property
    def view(self) -> dict[str, Any]:
        """What makes these rows others than those of the store, as JSON values; empty where nothing does."""
        found: dict[str, Any] = {}
        if self._chosen is not None:
            found["chosen"] = hashlib.sha256(self._chosen.numpy().tobytes()).hexdigest()[:16]
        if self._scalings:
            found["scaled"] = {key: each.digest() for key, each in self._scalings.items()}
        return found

    def rows_by_shard(self) -> Tensor:
        """How many of these rows each shard has, ``(shards,)``."""
        if self._chosen is None:
            return self._start_tensor.diff()
        shard = torch.searchsorted(self._start_tensor, self._chosen, right=True) - 1
        return torch.bincount(shard, minlength=len(self._shards))

    @property
    def statistics(self) -> dict[str, SiteStatistics]:
        """Mean, variance and losses of each floating site over these rows, as they are stored.

        Of a whole store they were taken while it was written. Of chosen rows they are taken now, from the rows.
        """
        if self._chosen is None:
            found = self._layout.read_statistics(self._contract, self._shards)
            found = summarised(self._contract, self._shards) if found is None else found
            return {key: found[key] for key in self.keys if self._is_floating(key)}
        plain, keys = copy.copy(self), [key for key in self.keys if self._is_floating(key)]
        vars(plain).update(_scalings={})
        at_a_time = max(1, _STATISTICS_BYTES // max(1, self.row_bytes))
        found = {key: SiteStatistics.none(plain.describe(key)[1]) for key in keys}
        for begin in range(0, len(plain), at_a_time):
            rows = plain.span(begin, min(begin + at_a_time, len(plain)), keys)
            found = {key: each.merged(SiteStatistics.of([rows[key]])) for key, each in found.items()}
        return found

    def _is_floating(self, key: str) -> bool:
        return self._contract.columns[site_column(key)][0].is_floating_point

    def chosen(self, numbers: Tensor) -> Self:
        """The rows with these numbers only, ``(n,)``, ascending."""
        found = copy.copy(self)
        vars(found).update(_chosen=numbers if self._chosen is None else self._chosen[numbers])
        return found

    def scaled(self, scalings: Mapping[str, Scaling]) -> Self:
        """The same rows, with the values of some sites scaled when they are read."""
        found = copy.copy(self)
        vars(found).update(_scalings=dict(scalings))
        return found

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
        index = slice(None) if index is Ellipsis else index
        numbers = row_numbers(index, len(self))
        if isinstance(index, slice) and index.step in (None, 1):
            begin = int(numbers[0]) if numbers.numel() else 0
            return self.span(begin, begin + numbers.numel(), keys)
        numbers = numbers if self._chosen is None else self._chosen[numbers]
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
        self._ask_now_and_then()
        if self._chosen is None and not self._scalings:
            targets = {self.in_shard(key): column for key, column in into.items()}
            return read_spans(targets, self._shards, self._starts, spans, readers=readers)
        ends = itertools.accumulate(end - begin for begin, end in spans)
        calls = [
            partial(self._fill, span, {key: column[end - (span[1] - span[0]) : end] for key, column in into.items()})
            for span, end in zip(spans, ends, strict=True)
        ]
        if readers is not None:
            return [readers.submit(call) for call in calls]
        for call in calls:
            call()
        return []

    def _fill(self, span: Span, into: Mapping[str, Tensor]) -> None:
        """Read one span of rows that are chosen or scaled."""
        numbers = torch.arange(*span) if self._chosen is None else self._chosen[slice(*span)]
        for key, column in self._gather(numbers, tuple(into)).items():
            into[key].copy_(column)

    def _gather(self, numbers: Tensor, keys: Sequence[str]) -> dict[str, Tensor]:
        """Each of ``numbers``, rows of the whole store, one shard after the other."""
        self._ask_now_and_then()
        names = [self.in_shard(key) for key in keys]
        stored = {key: self._contract.columns[name] for key, name in zip(keys, names, strict=True)}
        found = {key: torch.empty((numbers.numel(), *shape), dtype=dtype) for key, (dtype, shape) in stored.items()}
        for shard, rows, places in by_shard(numbers, self._start_tensor):
            for key, part in zip(keys, self._shards[shard].gather(names, rows), strict=True):
                put_rows(found[key], places, part)
        return {key: self._scalings[key](rows) if key in self._scalings else rows for key, rows in found.items()}

    def in_shard(self, key: str) -> str:
        """What a shard calls a column."""
        if key in self._own_keys:
            return own_column(key)
        return key if key in ROW_COLUMNS else site_column(self._known(key))

    def describe(self, key: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and feature shape of a column."""
        dtype, shape = self._contract.columns[self.in_shard(key)]
        return self._scalings[key].dtype(dtype) if key in self._scalings else dtype, shape

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
        ends = self.rows_by_shard().cumsum(0).tolist()
        for shard, start, end in zip(self._shards, [0, *ends], ends, strict=False):
            if shard.row.first <= number < shard.row.last:
                own = self.span(start, end, ("seq", "pos"))
                rows = (own["seq"] == number).nonzero().squeeze(1)
                found.append(rows + start)
                places.append(own["pos"][rows])
        return self.rows(torch.cat(found)[torch.cat(places).argsort(stable=True)])
