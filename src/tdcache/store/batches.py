"""Epochs over a store: every row exactly once, disjoint over ranks, in an order that a number pins down."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol, Self

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import ContextError, SpecError
from tdcache.store.reader import StoreReader
from tdcache.store.rows import pick_rows
from tdcache.store.spans import Span

__all__ = ["Batches", "EpochOrder", "Shuffle", "generator_of"]

Shuffle = Literal[False, "block", "rows"]

# Reading single rows off a cold disk is some forty times slower than reading half a mebibyte at a time. Of the widest
# site, so that the memory of two pools has a bound however narrow the others are. Neighbours resemble each other: with
# fewer blocks in a pool, or with more rows in a block, what is trained follows the pools (benchmarks/rows_shuffle.py).
_BLOCK_BYTES, _BLOCK_ROWS = 1 << 19, 1024
_BLOCKS_PER_POOL = 64
_READERS = 8  # threads: some reads that wait keep a disk busy


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochOrder:
    """Which rows follow which, and whose they are; the arguments of :meth:`ActivationDataset.batches`.

    Raises:
        ValueError: there is no such order.
    """

    size: int
    shuffle: Shuffle = False
    seed: int = 0
    rank: int = 0
    world: int = 1
    block: int | None = None
    pool: int | None = None

    def __post_init__(self) -> None:
        size, rank, world = self.size, self.rank, self.world
        if size < 1 or not 0 <= rank < world:
            raise ValueError(f"batches needs size >= 1 and 0 <= rank < world, got {size=}, {rank=}, {world=}")
        if self.shuffle not in (False, "block", "rows"):
            raise ValueError(f"shuffle is False, 'block' or 'rows', got {self.shuffle!r}")

    def within(self, number: int, count: int) -> Self:
        """The order of one of ``count`` processes that have this one's rows between them."""
        return replace(self, rank=self.rank * count + number, world=self.world * count)


class _Stream(Protocol):
    """One rank's rows of one epoch, in their order."""

    @property
    def rows(self) -> int:
        """How many there are."""

    def take(self, begin: int, end: int, into: Mapping[str, Tensor], readers: Executor) -> None:
        """Fill memory with the rows at places ``begin`` to ``end`` of the order."""


@dataclass(frozen=True, slots=True)
class _SingleRows:
    dataset: StoreReader
    numbers: Tensor

    @property
    def rows(self) -> int:
        return self.numbers.numel()

    def take(self, begin: int, end: int, into: Mapping[str, Tensor], readers: Executor) -> None:
        rows = self.dataset.rows(self.numbers[begin:end], tuple(into))
        for key, target in into.items():
            target.copy_(rows.get(key))


@dataclass(frozen=True, slots=True)
class _Pool:
    """Some blocks, read or being read."""

    number: int
    memory: dict[str, Tensor]
    reads: Sequence[Future[None]]
    order: Tensor | None

    def take(self, begin: int, end: int, into: Mapping[str, Tensor], at: int) -> None:
        """Copy the rows at these places of the pool's order to ``into``, from row ``at`` on."""
        for key, column in self.memory.items():
            target = into[key][at : at + end - begin]
            if self.order is None:
                target.copy_(column[begin:end])
            else:
                pick_rows(column, self.order[begin:end], out=target)


@dataclass(slots=True)
class _Pools:
    """Blocks in an order, a pool of some at a time: while one is handed out, row by row, the next is read.

    The memory of a pool is used for the one after the next: fresh memory costs more than the reading.
    """

    dataset: StoreReader
    blocks: Tensor
    """First row, and the one after the last, of each: ``(blocks, 2)``; a billion rows are too many for a list."""
    per_pool: int
    seed: tuple[int, ...] | None
    """Of the mixing; None leaves rows as they lie."""
    starts: list[int] = field(init=False)
    _pool: _Pool | None = None
    _next: _Pool | None = None

    def __post_init__(self) -> None:
        sizes = (self.blocks[:, 1] - self.blocks[:, 0]).split(self.per_pool)
        self.starts = list(itertools.accumulate((int(each.sum()) for each in sizes), initial=0))

    @property
    def rows(self) -> int:
        return self.starts[-1]

    def take(self, begin: int, end: int, into: Mapping[str, Tensor], readers: Executor) -> None:
        for number in range(bisect_right(self.starts, begin) - 1, bisect_left(self.starts, end)):
            low, high = self.starts[number : number + 2]
            pool, first = self._turn_to(number, readers), max(begin, low)
            pool.take(first - low, min(end, high) - low, into, first - begin)

    def _turn_to(self, number: int, readers: Executor) -> _Pool:
        if self._pool is None or self._pool.number != number:
            is_due = self._next is not None and self._next.number == number
            due = self._next if is_due and self._next is not None else self._read(number, self._memory(), readers)
            for read in due.reads:
                read.result()
            spare = self._memory() if self._pool is None else self._pool.memory
            has_more = number + 2 < len(self.starts)
            self._pool, self._next = due, self._read(number + 1, spare, readers) if has_more else None
        return self._pool

    def _read(self, number: int, memory: dict[str, Tensor], readers: Executor) -> _Pool:
        members = self._members(number)
        order = None
        if self.seed is not None:
            order = torch.randperm(_rows_in(members), generator=generator_of(*self.seed, number))
        return _Pool(number, memory, self.dataset.read(members, memory, readers=readers), order)

    def _members(self, number: int) -> Sequence[Span]:
        return [(begin, end) for begin, end in self.blocks[number * self.per_pool :][: self.per_pool].tolist()]

    def _memory(self) -> dict[str, Tensor]:
        return self.dataset.empty(max(map(int.__sub__, self.starts[1:], self.starts)))


def _rows_in(spans: Sequence[Span]) -> int:
    return sum(end - begin for begin, end in spans)


def generator_of(*numbers: int) -> torch.Generator:
    """A generator for these numbers, unrelated to that for any others."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Batches:
    """An iterable over the rows of a store; each ``for`` is the rest of an epoch, each epoch has another order.

    Made by :meth:`ActivationDataset.batches`, which has the arguments. The order depends on the numbers given there
    alone, so that an interrupted epoch goes on where it was: ``batches.load_state_dict(state)``. An epoch keeps to the
    rows that were there when it began: what ``dataset.refresh()`` takes in is in the next one.

    Raises:
        ContextError: from an iterator, when another one over the same object went on in the meantime.
        DamagedError: from an iterator, when rows cannot be read; the same rows come next when they can.
    """

    def __init__(self, dataset: StoreReader, order: EpochOrder) -> None:
        self.dataset, self.order = dataset, order
        self.block = order.block or _default_block(dataset)
        """Rows that are read at a time."""
        self.pool = order.pool or _BLOCKS_PER_POOL * self.block
        """Rows that are mixed at a time."""
        self.epoch = 0
        """The number of the epoch that runs, or comes next."""
        self.position = 0
        """Rows of this epoch that were handed out."""
        self.empty: Callable[[int], dict[str, Tensor]] | None = None
        """Gives the memory for the rows of a batch; None for memory that is the batch's own."""
        self._began = dataset
        """The store as it was when the epoch began."""

    def __repr__(self) -> str:
        order = self.order
        return f"Batches({self.dataset!r}, {order.size}, shuffle={order.shuffle!r}, rank={order.rank}/{order.world})"

    def __len__(self) -> int:
        return math.ceil(self._stream().rows / self.order.size)

    def __iter__(self) -> Iterator[TensorDict]:
        stream = self._stream()
        if 0 < stream.rows <= self.position:  # a state from after the last batch: that epoch is over
            self.epoch, self.position = self.epoch + 1, 0
            stream = self._stream()
        with ThreadPoolExecutor(_READERS, thread_name_prefix="tdcache-reader") as readers:
            while self.position < stream.rows:
                here = self.epoch, min(self.position + self.order.size, stream.rows)
                count = here[1] - self.position
                rows = self._began.empty(count) if self.empty is None else self.empty(count)
                stream.take(self.position, here[1], rows, readers)
                self.position = here[1]  # only now: rows that could not be read were not handed out
                yield TensorDict(rows, batch_size=[count])
                del rows
                self._check_still_at(*here)
        self.epoch, self.position = self.epoch + 1, 0

    def _check_still_at(self, epoch: int, position: int) -> None:
        if (self.epoch, self.position) != (epoch, position):
            raise ContextError(
                f"this iterator left its batches at row {position} of epoch {epoch}, and they are at row "
                f"{self.position} of epoch {self.epoch}: another `for` over the same object went on, or a state was "
                "loaded; run one `for` at a time, and make a second `dataset.batches(...)` for another"
            )

    def _rows_of_epoch(self) -> StoreReader:
        if self.position == 0:
            self._began = copy.copy(self.dataset)
        return self._began

    def _stream(self) -> _Stream:
        dataset = self._rows_of_epoch()
        order, rows, per_pool = self.order, len(dataset), max(1, self.pool // self.block)
        if order.shuffle is False:
            first, last = (rows * share // order.world for share in (order.rank, order.rank + 1))
            begins = torch.arange(first, last, self.block)
            return _Pools(dataset, torch.stack([begins, (begins + self.block).clamp(max=last)], 1), per_pool, None)
        generator = generator_of(order.seed, self.epoch)
        if order.shuffle == "rows":
            return _SingleRows(dataset, torch.randperm(rows, generator=generator)[order.rank :: order.world])
        blocks = _blocks(dataset, self.block)
        own = torch.randperm(len(blocks), generator=generator)[order.rank :: order.world]
        return _Pools(dataset, blocks[own], per_pool, (order.seed, self.epoch, order.rank))

    def _identity(self) -> dict[str, Any]:
        dataset = self._rows_of_epoch()
        found = {"store": dataset.id, "rows": len(dataset)}
        found |= asdict(replace(self.order, block=self.block, pool=self.pool))
        return found | ({"view": dataset.view} if dataset.view else {})

    def state_dict(self) -> dict[str, Any]:
        """Where the iteration is: what was handed out is not handed out again after :meth:`load_state_dict`."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one was.

        Raises:
            SpecError: it went through another store, or in another order.
        """
        mine = self._identity()
        fields = [name for name in mine if state.get(name) != mine[name]]
        if fields:
            shown = ", ".join(f"{name} {state.get(name)!r} there, {mine[name]!r} here" for name in fields)
            raise SpecError(f"the state is of other batches: {shown}", path=self.dataset.path, fields=fields)
        self.epoch, self.position = int(state["epoch"]), int(state["position"])


def _blocks(dataset: StoreReader, size: int) -> Tensor:
    """First row, and the one after the last, of each block; none spans two shards."""
    rows = dataset.rows_by_shard()
    ends, counts = rows.cumsum(0), (rows + size - 1) // size
    shard = torch.repeat_interleave(torch.arange(len(rows)), counts)
    within = torch.arange(len(shard)) - (counts.cumsum(0) - counts)[shard]
    begins = (ends - rows)[shard] + within * size
    return torch.stack([begins, torch.minimum(begins + size, ends[shard])], 1)


def _default_block(dataset: StoreReader) -> int:
    widths = [dataset.describe(key) for key in dataset.keys]
    widest = max((torch.Size(shape).numel() * dtype.itemsize for dtype, shape in widths), default=1)
    return min(-(-_BLOCK_BYTES // max(1, widest)), _BLOCK_ROWS)
