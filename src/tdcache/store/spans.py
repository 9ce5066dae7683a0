"""Rows that follow one another, read from the shards' files straight into memory of their own."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass

from torch import Tensor

from tdcache.store.shard import Shard

__all__ = ["Span", "read_spans"]

Span = tuple[int, int]
"""The numbers of a first row and of the one after the last."""


@dataclass(frozen=True, slots=True)
class _ShardRows:
    """The rows that one shard has of one span."""

    shard: Shard
    rows: Span
    targets: Mapping[str, Tensor]

    def __call__(self) -> None:
        self.shard.read(self.targets, self.rows)


def read_spans(
    columns: Mapping[str, Tensor],
    shards: Sequence[Shard],
    starts: Sequence[int],
    spans: Sequence[Span],
    *,
    readers: Executor | None = None,
) -> list[Future[None]]:
    """Read several spans of rows, one after the other.

    Args:
        columns: where they go, by the name of the column in a shard: ``(at least the rows of all spans, *features)``.
        shards: in the order of their rows.
        starts: the number of the first row of each shard, and after the last the number of rows.
        spans: which rows.
        readers: reads run there side by side; without, here and at once.

    Returns:
        What is under way; each raises ``DamagedError`` where a shard ends before its rows do.

    Raises:
        DamagedError: the same, where there are no ``readers``.
    """
    parts = _parts(columns, shards, starts, spans)
    if readers is not None:
        return [readers.submit(part) for part in parts]
    for part in parts:
        part()
    return []


def _parts(
    columns: Mapping[str, Tensor], shards: Sequence[Shard], starts: Sequence[int], spans: Sequence[Span]
) -> Iterator[_ShardRows]:
    place = 0
    for begin, end in spans:
        for number in range(bisect_right(starts, begin) - 1, bisect_left(starts, end)):
            shard, start = shards[number], starts[number]
            low, high = max(begin - start, 0), min(end - start, shard.rows)
            if low < high:
                at = place + start + low - begin
                into = {name: column[at : at + high - low] for name, column in columns.items()}
                yield _ShardRows(shard, (low, high), into)
        place += end - begin
