"""Reducers for statistics over rows, whose memory does not grow with the number of values.

Each is exact under any split of the data into updates and merges; sums of squares in float32, the usual shortcut, lose
all digits of the variance of activations with a large mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import CaptureError
from tdcache.reducers.rows import Dims, RowReducer
from tdcache.reducers.totals import Total, accumulation_dtype

__all__ = ["Mean", "TopK", "Variance"]

# How much of a value is converted to float64 at a time: on the CPU 2 MB, which fit its cache; elsewhere 128 MB, to
# bound the memory without launching many small kernels.
_ELEMENTS_ON_CPU, _ELEMENTS_ELSEWHERE = 1 << 18, 1 << 24


def _result_dtype(value: Tensor) -> torch.dtype:
    """The value's own dtype, but float32 (complex64) for half precision and the default dtype for integers."""
    if value.is_complex():
        return torch.complex64 if value.dtype.itemsize < 8 else value.dtype
    if value.is_floating_point():
        return torch.float32 if value.dtype.itemsize < 4 else value.dtype
    return torch.get_default_dtype()


@dataclass(eq=True)
class _Moments(RowReducer):
    """Count, sum and sum of squared deviations, updated batch-wise and merged exactly.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979), eq. 2.1: the moments of two sets give those of their union.
    """

    ordered: ClassVar[bool] = False
    dim: Dims = 0
    flatten: int | None = field(default=None, kw_only=True)
    _count: int = field(default=0, init=False, repr=False, compare=False)
    _total: Total | None = field(default=None, init=False, repr=False, compare=False)
    _squares: Total | None = field(default=None, init=False, repr=False, compare=False)
    _rest: torch.Size = field(default=torch.Size(), init=False, repr=False, compare=False)
    _dtype: torch.dtype | None = field(default=None, init=False, repr=False, compare=False)
    _wants_squares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dim == ():
            raise ValueError("dim=() names no dimension along which rows lie; give one, or several as (0, 1)")

    @property
    def empty(self) -> bool:
        """Whether there was no value yet; a value without rows counts."""
        return self._total is None

    def update(self, value: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of the value, or those that the mask selects."""
        self._dtype = self._dtype or _result_dtype(value)
        rows = self._counted_rows(value, mask)
        elements = _ELEMENTS_ON_CPU if rows.device.type == "cpu" else _ELEMENTS_ELSEWHERE
        for part in rows.split(max(1, elements // max(1, rows.shape[1:].numel()))):
            self._take(part.to(accumulation_dtype(part)))

    def _take(self, rows: Tensor) -> None:
        count, total, squares = rows.shape[0], rows.sum(0), None
        if self._wants_squares:
            deviations = rows - total / max(1, count)
            squared = deviations.abs().square() if deviations.is_complex() else deviations.mul_(deviations)
            squares = Total(squared.sum(0))
        self._join(count, Total(total), squares, total.shape)

    def merge(self, other: _Moments) -> None:
        """Add the moments of ``other``."""
        self.check_mergeable(other)
        if other._total is not None:
            self._dtype = self._dtype or other._dtype
            self._join(other._count, other._total, other._squares, other._rest)

    def _join(self, count: int, total: Total, squares: Total | None, rest: torch.Size) -> None:
        if self._total is None:
            self._count, self._total, self._squares, self._rest = count, total, squares, rest
            return
        if rest != self._rest:
            raise CaptureError(
                f"{self!r} saw values that reduce to {tuple(self._rest)} and now to {tuple(rest)}; "
                "let dim= cover every dimension that varies, e.g. dim=(0, 1) for (batch, seq, d)"
            )
        if squares is not None and self._squares is not None:
            self._squares.join(squares)
            if count and self._count:
                delta = total.value() / count - self._total.value() / self._count
                self._squares.add(delta.abs().square() * (self._count * count / (self._count + count)))
        self._total.join(total)
        self._count += count


@dataclass(eq=True)
class Mean(_Moments):
    """The mean over the rows of all calls: ``value.mean(dim)`` of the values concatenated along ``dim``.

    Sums are in float64 (on a device without it in float32 with compensated summation), so that a row still counts after
    10^8 others. The result has the dtype of the values, but float32 for half precision; without rows it is NaN.

    Args:
        dim: the dimension, or dimensions, averaged over; ``(0, 1)`` gives one vector for ``(batch, seq, d)``.
        flatten: how many leading dimensions are merged into one first; see :class:`Concatenate`.
    """

    _wants_squares: ClassVar[bool] = False

    def compute(self) -> Tensor:
        """The mean so far; the shape of a value without ``dim``."""
        if self._total is None:
            raise self.nothing_seen()
        total = self._total.value()
        mean = total / self._count if self._count else torch.full_like(total, math.nan)
        return mean.to(self._dtype)


@dataclass(eq=True)
class Variance(_Moments):
    """The variance over the rows of all calls: ``torch.var(dim, correction=correction)`` of all rows.

    Precision and dtype are those of :class:`Mean` (for complex values, the dtype of their parts).

    Args:
        dim: the dimension, or dimensions, that rows lie along.
        correction: subtracted from the number of rows in the divisor (1 is Bessel's correction).
        flatten: how many leading dimensions are merged into one first; see :class:`Concatenate`.
    """

    correction: int = 1

    def compute(self) -> Tensor:
        """The variance so far; NaN if there are not more rows than ``correction``."""
        if self._squares is None or self._dtype is None:
            raise self.nothing_seen()
        squares = self._squares.value()
        divisor = self._count - self.correction
        variance = squares / divisor if divisor > 0 else torch.full_like(squares, math.nan)
        return variance.to(self._dtype.to_real())


@dataclass(eq=True)
class TopK(RowReducer):
    """The ``k`` largest (or smallest) values over rows, for each remaining element, with the numbers of their rows.

    For the top activating inputs of every neuron or latent. ``compute()`` returns a TensorDict with ``"values"`` and
    ``"indices"``, both ``(k, *rest)`` with the axis at ``dim``. Row numbers count all rows at the site, including those
    that a mask left out: number ``n`` is row ``n`` of the flattened values concatenated along ``dim``.

    Args:
        k: the number of values to keep; fewer if there are fewer rows.
        dim: the dimension that rows lie along.
        largest: keep the largest values, or with False the smallest.
        flatten: how many leading dimensions are merged into one first; see :class:`Concatenate`.
    """

    k: int
    dim: int = 0
    largest: bool = True
    flatten: int | None = field(default=None, kw_only=True)
    rows: int = field(default=0, init=False, repr=False, compare=False)
    _values: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _indices: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is at least 1, got {self.k}")

    @property
    def empty(self) -> bool:
        """Whether there was no value yet."""
        return self._values is None

    def update(self, value: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of the value, or those that the mask selects."""
        rows, mask = self._rows_of(value, mask)
        candidates = rows if mask is None else rows[mask]
        values, numbers = candidates.topk(min(self.k, candidates.shape[0]), dim=0, largest=self.largest)
        if mask is not None:
            numbers = mask.nonzero().squeeze(1)[numbers]
        self._join(values, numbers + self.rows)
        self.rows += rows.shape[0]

    def merge(self, other: TopK) -> None:
        """Add the candidates of ``other``; its row numbers continue after this reducer's."""
        self.check_mergeable(other)
        if other._values is not None and other._indices is not None:
            self._join(other._values, other._indices + self.rows)
        self.rows += other.rows

    def _join(self, values: Tensor, numbers: Tensor) -> None:
        if self._values is not None and self._indices is not None:
            if values.shape[1:] != self._values.shape[1:]:
                raise CaptureError(
                    f"{self!r} saw rows of {tuple(self._values.shape[1:])} and now of {tuple(values.shape[1:])}; "
                    "choose another dim, or bring the values to one shape with index= or callback="
                )
            values, numbers = torch.cat([self._values, values]), torch.cat([self._indices, numbers])
            values, places = values.topk(min(self.k, values.shape[0]), dim=0, largest=self.largest)
            numbers = numbers.gather(0, places)
        self._values, self._indices = values, numbers

    def compute(self) -> TensorDict:
        """The values and their row numbers so far, best first."""
        if self._values is None or self._indices is None:
            raise self.nothing_seen()
        found = {"values": self._values, "indices": self._indices}
        return TensorDict({name: each.movedim(0, self.dim) for name, each in found.items()}, batch_size=[])
