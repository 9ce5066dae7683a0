"""Which rows of a store: those that a predicate wants, or a share of the samples that a seed pins down."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDict
from torch import Tensor

if TYPE_CHECKING:
    from tdcache.store.reader import StoreReader

__all__ = ["rows_where", "split_rows"]

_AT_A_TIME = 1 << 16  # rows


def rows_where(dataset: StoreReader, predicate: Callable[[TensorDict], Any], keys: Sequence[str]) -> Tensor:
    """The numbers of the rows for which ``predicate`` gives True, ``(n,)``, ascending.

    Args:
        dataset: the rows.
        predicate: called with some rows at a time; gives one boolean for each.
        keys: the columns that it sees.

    Raises:
        ValueError: it gave something else.
    """
    found = [torch.empty(0, dtype=torch.int64)]
    for begin, rows in _scanned(dataset, keys):
        kept = torch.as_tensor(predicate(rows))
        if kept.dtype != torch.bool or kept.shape != (len(rows),):
            raise ValueError(
                f"the predicate gives one boolean per row, ({len(rows)},) of torch.bool; got {tuple(kept.shape)} of "
                f"{kept.dtype}"
            )
        found.append(kept.nonzero().squeeze(1) + begin)
    return torch.cat(found)


def split_rows(dataset: StoreReader, parts: Sequence[float], *, seed: int, by: str) -> list[Tensor]:
    """The numbers of the rows of each part; rows with the same value of ``by`` are in one part.

    A part is drawn for each value by a hash of it and the seed: it stays where it is when the store grows.

    Raises:
        ValueError: the parts are not positive numbers with the sum 1, or ``by`` holds no whole numbers.
    """
    if not parts or min(parts) <= 0 or abs(sum(parts) - 1) > 1e-9:
        raise ValueError(f"the parts of a split are positive and add up to 1, as in split(0.9, 0.1); got {parts}")
    dtype, shape = dataset.describe(by)
    if dtype.is_floating_point or dtype.is_complex or shape:
        raise ValueError(f"a split is by a column of whole numbers, one per row; {by!r} holds {dtype} of {shape}")
    ends = torch.tensor(list(itertools.accumulate(parts))[:-1], dtype=torch.float64)
    found: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int64)] for _ in parts]
    for begin, rows in _scanned(dataset, [by]):
        drawn = torch.searchsorted(ends, _uniform(rows[by].long(), seed), right=True)
        for number, own in enumerate(found):
            own.append((drawn == number).nonzero().squeeze(1) + begin)
    return [torch.cat(own) for own in found]


def _scanned(dataset: StoreReader, keys: Sequence[str]) -> Iterator[tuple[int, TensorDict]]:
    for begin in range(0, len(dataset), _AT_A_TIME):
        yield begin, dataset.span(begin, min(begin + _AT_A_TIME, len(dataset)), keys)


def _uniform(numbers: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for each, by the finaliser of SplitMix64; int64 wraps as its unsigned words do."""
    start = int.from_bytes(hashlib.sha256(repr(seed).encode()).digest()[:8], "little", signed=True)
    mixed = numbers * _signed(0x9E3779B97F4A7C15) + start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return _shifted(mixed ^ _shifted(mixed, 31), 11).double() / 2**53


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Zeros come in from the left, as for unsigned words."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
