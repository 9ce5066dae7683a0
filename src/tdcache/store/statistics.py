"""Mean and variance of a site's rows, taken while they are written and merged over shards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

__all__ = ["SiteStatistics"]

# Values: torch sums fewer than 32,768 on one thread, in an order that the shape pins down.
_CHUNK = (1 << 15) - 1


@dataclass(frozen=True, slots=True)
class SiteStatistics:
    """What is known of all rows of one site without reading them.

    A feature that was NaN or infinite in some row has a mean and a variance of NaN.
    """

    rows: int
    mean: Tensor = field(repr=False)
    """Of each feature, float64, in the shape of a row."""
    squares: Tensor = field(repr=False)
    """Of each feature, the sum of the squared differences from the mean, float64."""
    overflow: int = 0
    """Values that the stored dtype could not hold."""
    underflow: int = 0
    """Values other than zero that became zero in the stored dtype."""

    @property
    def variance(self) -> Tensor:
        """Of each feature over the rows, without Bessel's correction; NaN of no rows."""
        return self.squares / self.rows if self.rows else torch.full_like(self.squares, math.nan)

    @property
    def std(self) -> Tensor:
        """The square root of the variance."""
        return self.variance.sqrt()

    @property
    def norm_scale(self) -> float:
        """The factor after which the mean of a row's squared norm is its number of features."""
        squared = float((self.variance + self.mean.square()).sum())
        return math.sqrt(self.mean.numel() / squared) if squared > 0 else math.nan

    @classmethod
    def none(cls, shape: Sequence[int]) -> SiteStatistics:
        """The statistics of no rows, for sites of this shape."""
        zeros = torch.zeros(tuple(shape), dtype=torch.float64)
        return cls(0, zeros, zeros)

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> SiteStatistics:
        """Of floating rows, in pieces along the first dimension.

        The bits depend neither on the number of threads nor on where the pieces begin.
        """
        found = _measured(parts, torch.float64 if parts[0].dtype == torch.float64 else torch.float32)
        # The square of a large float32 is none.
        return found if bool(torch.isfinite(found.squares).all()) else _measured(parts, torch.float64)

    def merged(self, other: SiteStatistics) -> SiteStatistics:
        """Of the rows of both (Chan, Golub and LeVeque, "Updating formulae for computing sample variances", 1979)."""
        rows = self.rows + other.rows
        apart, part = other.mean - self.mean, other.rows / max(rows, 1)
        return SiteStatistics(
            rows,
            self.mean + apart * part,
            self.squares + other.squares + apart.square() * (self.rows * part),
            self.overflow + other.overflow,
            self.underflow + other.underflow,
        )

    def with_losses(self, overflow: int, underflow: int) -> SiteStatistics:
        """The same with counts of what the stored dtype could not hold."""
        return replace(self, overflow=overflow, underflow=underflow)

    def packed(self) -> Tensor:
        """Mean and squares, ``(2, *shape)`` of float64."""
        return torch.stack([self.mean, self.squares])

    @classmethod
    def unpacked(cls, rows: int, packed: Tensor) -> SiteStatistics:
        """The statistics that :meth:`packed` gave, of so many rows."""
        return cls(rows, packed[0], packed[1])


def _measured(parts: Sequence[Tensor], dtype: torch.dtype) -> SiteStatistics:
    """Sums of differences from a row near the mean, so that a large mean costs no digits of the variance."""
    shape = parts[0].shape[1:]
    size = max(1, _CHUNK // max(1, shape.numel()))
    near = torch.zeros(shape, dtype=dtype)
    sums, squares = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    rows = 0
    for chunk in _chunks(parts, size, dtype):
        if rows == 0:
            near = chunk.mean(0)
        sums += chunk.sub_(near).sum(0)
        squares += chunk.square_().sum(0)
        rows += len(chunk)
    if rows == 0:
        return SiteStatistics(0, sums, squares)
    return SiteStatistics(rows, near.double() + sums / rows, (squares - sums.square() / rows).clamp(min=0))


def _chunks(parts: Sequence[Tensor], size: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The same rows in memory that is used again, ``size`` at a time; each is valid until the next is asked for."""
    memory, filled = torch.empty((size, *parts[0].shape[1:]), dtype=dtype), 0
    for part in parts:
        begin = 0
        while begin < len(part):
            taken = min(size - filled, len(part) - begin)
            memory[filled : filled + taken].copy_(part[begin : begin + taken])
            begin, filled = begin + taken, filled + taken
            if filled == size:
                yield memory
                filled = 0
    if filled:
        yield memory[:filled]
