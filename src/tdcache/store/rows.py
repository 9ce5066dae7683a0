"""Any index becomes row numbers, and row numbers become rows, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

__all__ = ["ROW_COLUMNS", "by_shard", "joined", "pick_rows", "put_rows", "row_numbers"]

ROW_COLUMNS = ("seq", "pos", "tok")
"""What a row knows of itself: its sample, its position in it and, where there is one, its token."""


def row_numbers(index: Any, rows: int) -> Tensor:
    """The row numbers that an index means, as int64 of the index's own shape.

    Args:
        index: an integer, a slice, a range, ``...``, integers or booleans in a list, an array or a tensor.
        rows: how many rows there are.

    Raises:
        IndexError: out of range, or no such index.
    """
    if index is Ellipsis:
        index = slice(None)
    if isinstance(index, slice):
        start, stop, step = index.indices(rows)
        return torch.arange(rows)[start:stop:step] if step > 0 else torch.tensor(range(start, stop, step))
    numbers = _as_tensor(index)
    if numbers.numel() == 0 and numbers.dtype == torch.get_default_dtype():  # an empty list
        return numbers.long()
    if numbers.dtype == torch.bool:
        if numbers.shape != (rows,):
            raise IndexError(f"a mask has one boolean per row, ({rows},); got {tuple(numbers.shape)}")
        return numbers.nonzero().squeeze(1)
    if numbers.is_floating_point() or numbers.is_complex():
        raise IndexError(f"an index holds integers or booleans, got {numbers.dtype}")
    numbers = numbers.long().cpu()
    if numbers.numel() and not (-rows <= int(numbers.min()) and int(numbers.max()) < rows):
        wrong = int(numbers.max()) if int(numbers.max()) >= rows else int(numbers.min())
        raise IndexError(f"row {wrong} is out of range; there are {rows} rows")
    return torch.where(numbers < 0, numbers + rows, numbers)


def _as_tensor(index: Any) -> Tensor:
    try:
        return torch.as_tensor(index.copy() if hasattr(index, "__array__") and not isinstance(index, Tensor) else index)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise IndexError(
            f"an index is an integer, a slice, ..., or integers or booleans in a list, an array or a tensor; got "
            f"{index!r}; ask one column by its name, and its rows after it: ds['layers.0'][:10]"
        ) from None


def by_shard(numbers: Tensor, starts: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Row numbers, shard by shard, in the order in which the rows lie on the disk.

    Args:
        numbers: ``(n,)``.
        starts: the number of the first row of each shard, and after the last the number of rows: ``(shards + 1,)``.

    Yields:
        A shard's number, the rows' numbers within it, ascending, and their places in ``numbers``.
    """
    ordered, places = numbers.sort()
    shards, counts = (torch.searchsorted(starts, ordered, right=True) - 1).unique_consecutive(return_counts=True)
    end = 0
    for shard, count in zip(shards.tolist(), counts.tolist(), strict=True):
        begin, end = end, end + count
        yield shard, ordered[begin:end] - starts[shard], places[begin:end]


def put_rows(target: Tensor, places: Tensor, rows: Tensor) -> None:
    """``target[places] = rows``, for dtypes with few kernels as well."""
    _bytes(target).index_copy_(0, places, _bytes(rows))


def pick_rows(rows: Tensor, numbers: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``rows[numbers]``, at several times the speed, in memory of its own or in ``out``."""
    chosen = torch.index_select(_bytes(rows), 0, numbers, out=None if out is None else _bytes(out))
    return chosen.view(rows.dtype) if chosen.dtype != rows.dtype else chosen


def joined(parts: Sequence[TensorDict]) -> TensorDict:
    """Return the rows of all parts, one part after the other."""
    together: Any = torch.cat(list(parts))
    return together  # type: ignore[no-any-return]


def _bytes(rows: Tensor) -> Tensor:
    """The same rows as numbers that every indexing kernel knows; the float8 dtypes have few kernels."""
    return rows.view(torch.uint8) if rows.is_floating_point() and rows.element_size() == 1 else rows
