"""Rows that are normalised when they are read, by the statistics of their site."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tdcache.errors import StoreError
from tdcache.store.statistics import SiteStatistics

__all__ = ["Normalisation", "Scaling"]

Normalisation = Literal["std", "norm"]
"""``"std"``: mean 0 and variance 1 of each feature; ``"norm"``: a mean squared norm of the number of features."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """``(rows - shift) * factor``, in float32, or float64 where rows have that."""

    shift: Tensor
    factor: Tensor

    @classmethod
    def of(cls, statistics: SiteStatistics, by: Normalisation, path: str) -> Scaling:
        """The scaling of a site. A feature that never varies is shifted and not scaled.

        Raises:
            ValueError: no such normalisation.
            StoreError: the statistics are not finite; the message names the site.
        """
        if by not in ("std", "norm"):
            raise ValueError(f"rows are normalised by 'std' or by 'norm', got {by!r}")
        if by == "std":
            std = statistics.std
            shift, factor = statistics.mean, 1 / torch.where(std == 0, 1.0, std)
        else:
            shift, factor = torch.zeros(()), torch.tensor(statistics.norm_scale, dtype=torch.float64)
        if not bool(torch.isfinite(shift).all() and torch.isfinite(factor).all()):
            raise StoreError(
                f"site {path!r} has no finite statistics to normalise by: it has no rows, only zeros, NaN or infinite "
                "values, or was written by an earlier version (repack it); give statistics= of other rows"
            )
        return cls(shift, factor)

    def __call__(self, rows: Tensor) -> Tensor:
        """The scaled rows, as new memory."""
        dtype = self.dtype(rows.dtype)
        return (rows.to(dtype) - self.shift.to(dtype)) * self.factor.to(dtype)

    @staticmethod
    def dtype(stored: torch.dtype) -> torch.dtype:
        """What rows of a stored dtype become."""
        return torch.float64 if stored == torch.float64 else torch.float32

    def digest(self) -> str:
        """Short, and another for another scaling."""
        raw = b"".join(each.double().contiguous().numpy().tobytes() for each in (self.shift, self.factor))
        return hashlib.sha256(raw).hexdigest()[:16]
