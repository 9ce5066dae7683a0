"""Reducers that keep statistics over rows: memory does not grow with the number of values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor

from tdcache.errors import CaptureError
from tdcache.reducers.base import Reducer

__all__ = ["Mean", "TopK", "Variance"]

Dims = int | tuple[int, ...]


def _accumulation_dtype(value: Tensor) -> torch.dtype:
    """Half precision accumulates in float32, everything else in float64 where the device has it."""
    if value.dtype in (torch.float16, torch.bfloat16) or value.device.type == "mps":
        return torch.float32
    return torch.complex128 if value.is_complex() else torch.float64


def _result_dtype(value: Tensor) -> torch.dtype:
    if value.dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return value.dtype if value.is_floating_point() or value.is_complex() else torch.get_default_dtype()


@dataclass(eq=True)
class _Moments(Reducer):
    """Count, mean and sum of squared deviations, updated batch-wise and merged exactly.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979), eq. 2.1: the moments of two sets give those of their union.
    """

    ordered: ClassVar[bool] = False
    dim: Dims = 0
    _count: int = field(default=0, init=False, repr=False, compare=False)
    _mean: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _squares: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _dtype: torch.dtype | None = field(default=None, init=False, repr=False, compare=False)
    _wants_squares: ClassVar[bool] = True

    @property
    def empty(self) -> bool:
        """Whether nothing was seen yet."""
        return self._mean is None

    def update(self, value: Tensor) -> None:
        """Take the value's rows in."""
        self._dtype = self._dtype or _result_dtype(value)
        dims = (self.dim,) if isinstance(self.dim, int) else self.dim
        wide = value.to(_accumulation_dtype(value))
        if wide.dim() == 0:
            wide = wide.unsqueeze(0)
        count = math.prod(wide.shape[dim] for dim in dims)
        if count == 0:
            return
        mean = wide.mean(dims)
        squares = (wide - wide.mean(dims, keepdim=True)).abs().square().sum(dims) if self._wants_squares else None
        self._join(count, mean, squares)

    def merge(self, other: _Moments) -> None:
        """Join the other's moments."""
        self.check_mergeable(other)
        if other._mean is not None:
            self._dtype = self._dtype or other._dtype
            self._join(other._count, other._mean, other._squares)

    def _join(self, count: int, mean: Tensor, squares: Tensor | None) -> None:
        if self._mean is None:
            self._count, self._mean, self._squares = count, mean, squares
            return
        if mean.shape != self._mean.shape:
            raise CaptureError(
                f"{self!r} saw values that reduce to {tuple(self._mean.shape)} and now to {tuple(mean.shape)}; "
                "let dim= cover every dimension that varies, e.g. dim=(0, 1) for (batch, seq, d)"
            )
        total = self._count + count
        delta = mean - self._mean
        if squares is not None and self._squares is not None:
            self._squares = self._squares + squares + delta.abs().square() * (self._count * count / total)
        self._mean = self._mean + delta * (count / total)
        self._count = total


@dataclass(eq=True)
class Mean(_Moments):
    """The mean over rows, all calls together: ``value.mean(dim)`` of the values concatenated along ``dim``.

    Accumulated in float64 (float32 for half-precision values, whose mean is then float32).

    Args:
        dim: the dimension, or dimensions, averaged over; ``(0, 1)`` gives one vector for ``(batch, seq, d)``.
    """

    _wants_squares: ClassVar[bool] = False

    def compute(self) -> Tensor:
        """The mean so far; the shape of a value without ``dim``."""
        if self._mean is None:
            raise self.nothing_seen()
        return self._mean.to(self._dtype)


@dataclass(eq=True)
class Variance(_Moments):
    """The variance over rows, all calls together, as ``torch.var(dim, correction=correction)`` of all rows.

    Args:
        dim: the dimension, or dimensions, that rows lie along.
        correction: subtracted from the number of rows in the divisor (1 is Bessel's).
    """

    correction: int = 1

    def compute(self) -> Tensor:
        """The variance so far; NaN where there are not more rows than ``correction``."""
        if self._squares is None or self._dtype is None:
            raise self.nothing_seen()
        divisor = self._count - self.correction
        variance = self._squares / divisor if divisor > 0 else torch.full_like(self._squares, math.nan)
        return variance.to(self._dtype.to_real())


@dataclass(eq=True)
class TopK(Reducer):
    """The ``k`` largest (or smallest) values over rows, per remaining position, with the numbers of their rows.

    For the top activating inputs of every neuron or latent. ``compute()`` gives a TensorDict with ``"values"`` and
    ``"indices"``, both ``(k, *rest)`` with the axis at ``dim``; row numbers count all rows that passed the site.

    Args:
        k: how many; fewer where fewer rows were seen.
        dim: the dimension that rows lie along.
        largest: the largest values, or else the smallest.
    """

    k: int
    dim: int = 0
    largest: bool = True
    rows: int = field(default=0, init=False, repr=False, compare=False)
    _values: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _indices: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k is at least 1, got {self.k}")

    @property
    def empty(self) -> bool:
        """Whether nothing was seen yet."""
        return self._values is None

    def update(self, value: Tensor) -> None:
        """Take the value's rows in."""
        value = value.unsqueeze(0) if value.dim() == 0 else value
        count = value.shape[self.dim]
        values, indices = value.topk(min(self.k, count), dim=self.dim, largest=self.largest)
        self._join(values, indices + self.rows)
        self.rows += count

    def merge(self, other: TopK) -> None:
        """Take in the other's candidates; its row numbers go on after the own ones."""
        self.check_mergeable(other)
        if other._values is not None and other._indices is not None:
            self._join(other._values, other._indices + self.rows)
        self.rows += other.rows

    def _join(self, values: Tensor, indices: Tensor) -> None:
        if self._values is not None and self._indices is not None:
            self._check_rest(self._values, values)
            values = torch.cat([self._values, values], dim=self.dim)
            indices = torch.cat([self._indices, indices], dim=self.dim)
            values, places = values.topk(min(self.k, values.shape[self.dim]), dim=self.dim, largest=self.largest)
            indices = indices.gather(self.dim, places)
        self._values, self._indices = values, indices

    def _check_rest(self, before: Tensor, now: Tensor) -> None:
        rests = []
        for each in (before, now):
            rest = list(each.shape)
            del rest[self.dim]
            rests.append(tuple(rest))
        if rests[0] != rests[1]:
            raise CaptureError(
                f"{self!r} saw rows of {rests[0]} and now of {rests[1]}; choose another dim, or bring the values to "
                "one shape with index= or callback="
            )

    def compute(self) -> TensorDict:
        """The values and their row numbers so far, best first."""
        if self._values is None or self._indices is None:
            raise self.nothing_seen()
        return TensorDict({"values": self._values, "indices": self._indices}, batch_size=[])
