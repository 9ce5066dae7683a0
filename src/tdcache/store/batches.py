"""Epochs over a store: every row exactly once, disjoint over ranks, in an order that a number pins down."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import SpecError
from tdcache.store.rows import joined, pick_rows

if TYPE_CHECKING:
    from tdcache.store.dataset import ActivationDataset

__all__ = ["Batches", "Shuffle"]

Shuffle = Literal[False, "block", "rows"]

# Reading single rows off a cold disk is some forty times slower than reading half a megabyte at a time.
_BLOCK_BYTES = 1 << 19
_BLOCKS_PER_POOL = 16


class _Stream(Protocol):
    """One rank's rows of one epoch, in their order."""

    @property
    def rows(self) -> int:
        """How many there are."""

    def take(self, begin: int, end: int) -> TensorDict:
        """The rows at places ``begin`` to ``end`` of the order."""


@dataclass(frozen=True, slots=True)
class _InOrder:
    dataset: ActivationDataset
    first: int
    rows: int

    def take(self, begin: int, end: int) -> TensorDict:
        return self.dataset.span(self.first + begin, self.first + end)


@dataclass(frozen=True, slots=True)
class _SingleRows:
    dataset: ActivationDataset
    numbers: Tensor

    @property
    def rows(self) -> int:
        return self.numbers.numel()

    def take(self, begin: int, end: int) -> TensorDict:
        return self.dataset.rows(self.numbers[begin:end])


@dataclass(slots=True)
class _Pools:
    """Blocks in random order; some at a time are read whole and their rows mixed."""

    dataset: ActivationDataset
    blocks: list[tuple[int, int]]
    per_pool: int
    seed: tuple[int, ...]
    starts: list[int] = field(init=False)
    _number: int = -2
    _pool: TensorDict | None = None

    def __post_init__(self) -> None:
        self.starts = [0]
        for at in range(0, len(self.blocks), self.per_pool):
            self.starts.append(self.starts[-1] + sum(end - begin for begin, end in self._members(at)))

    def _members(self, at: int) -> list[tuple[int, int]]:
        return self.blocks[at : at + self.per_pool]

    @property
    def rows(self) -> int:
        return self.starts[-1]

    def take(self, begin: int, end: int) -> TensorDict:
        parts = []
        for number, (low, high) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            if low < end and begin < high:
                parts.append(self._mixed(number)[max(begin - low, 0) : end - low])
        return parts[0] if len(parts) == 1 else joined(parts)

    def _mixed(self, number: int) -> TensorDict:
        if number != self._number or self._pool is None:
            self._pool = None  # freed before the next one is read
            blocks = self._members(number * self.per_pool)
            if self._number != number - 1:
                self.dataset.prefetch(blocks)
            self.dataset.prefetch(self._members((number + 1) * self.per_pool))
            order = torch.randperm(sum(end - begin for begin, end in blocks), generator=_generator(*self.seed, number))
            mixed = {key: pick_rows(self.dataset.blocks(key, blocks), order) for key in self.dataset.columns}
            self._pool, self._number = TensorDict(mixed, batch_size=[order.numel()]), number
        return self._pool


def _generator(*numbers: int) -> torch.Generator:
    """A generator for these numbers, unrelated to that for any others."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Batches:
    """An iterable over the rows of a store; each ``for`` is the rest of an epoch, each epoch has another order.

    Made by :meth:`ActivationDataset.batches`, which has the arguments. The order depends on the numbers given there
    alone, so that an interrupted epoch goes on where it was: ``batches.load_state_dict(state)``.
    """

    def __init__(
        self,
        dataset: ActivationDataset,
        size: int,
        *,
        shuffle: Shuffle = False,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        block: int | None = None,
        pool: int | None = None,
    ) -> None:
        if size < 1 or not 0 <= rank < world:
            raise ValueError(f"batches needs size >= 1 and 0 <= rank < world, got size={size}, {rank=}, {world=}")
        if shuffle not in (False, "block", "rows"):
            raise ValueError(f"shuffle is False, 'block' or 'rows', got {shuffle!r}")
        self.dataset = dataset
        self.size, self.shuffle, self.seed, self.rank, self.world = size, shuffle, seed, rank, world
        self.block = block or _default_block(dataset)
        self.pool = pool or _BLOCKS_PER_POOL * self.block
        self.epoch = 0
        """The number of the epoch that runs, or comes next."""
        self.position = 0
        """Rows of this epoch that were handed out."""

    def __repr__(self) -> str:
        return f"Batches({self.dataset!r}, {self.size}, shuffle={self.shuffle!r}, rank={self.rank}/{self.world})"

    def __len__(self) -> int:
        return math.ceil(self._stream().rows / self.size)

    def __iter__(self) -> Iterator[TensorDict]:
        stream = self._stream()
        while self.position < stream.rows:
            begin, self.position = self.position, min(self.position + self.size, stream.rows)
            yield stream.take(begin, self.position)
        self.epoch, self.position = self.epoch + 1, 0

    def _stream(self) -> _Stream:
        rows = len(self.dataset)
        if self.shuffle is False:
            first, last = (rows * share // self.world for share in (self.rank, self.rank + 1))
            return _InOrder(self.dataset, first, last - first)
        generator = _generator(self.seed, self.epoch)
        if self.shuffle == "rows":
            return _SingleRows(self.dataset, torch.randperm(rows, generator=generator)[self.rank :: self.world])
        blocks = self._blocks()
        order = torch.randperm(len(blocks), generator=generator)[self.rank :: self.world].tolist()
        chosen = [blocks[each] for each in order]
        return _Pools(self.dataset, chosen, max(1, self.pool // self.block), (self.seed, self.epoch, self.rank))

    def _blocks(self) -> list[tuple[int, int]]:
        """First row and the one behind the last of each block; none spans two shards."""
        found, start = [], 0
        for shard in self.dataset.shards:
            stop = start + shard.rows
            found += [(begin, min(begin + self.block, stop)) for begin in range(start, stop, self.block)]
            start = stop
        return found

    def _identity(self) -> dict[str, Any]:
        names = ("size", "shuffle", "seed", "rank", "world", "block", "pool")
        return {"store": self.dataset.id, "rows": len(self.dataset), **{name: getattr(self, name) for name in names}}

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


def _default_block(dataset: ActivationDataset) -> int:
    widths = [dataset.describe(key) for key in dataset.keys]
    narrowest = min(max(1, torch.Size(shape).numel() * dtype.itemsize) for dtype, shape in widths)
    return -(-_BLOCK_BYTES // narrowest)
