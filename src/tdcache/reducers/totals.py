"""Running sums that stay accurate over very many terms, with or without double precision.

In float32 a sum of 10^8 equal terms stops growing after 2^24 of them; MPS and some XPUs have no float64.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Total", "accumulation_dtype"]


def accumulation_dtype(value: Tensor) -> torch.dtype:
    """The dtype for sums: float64 (complex128), or float32 (complex64) on a device without it."""
    if _has_double(value.device.type):
        return torch.complex128 if value.is_complex() else torch.float64
    return torch.complex64 if value.is_complex() else torch.float32


@lru_cache
def _has_double(device: str) -> bool:
    try:
        return torch.zeros(1, dtype=torch.float64, device=device).add(1).dtype == torch.float64
    except (RuntimeError, TypeError):  # MPS raises a TypeError, an XPU without fp64 a RuntimeError
        return False


class Total:
    """A running sum. In single precision, the rounding errors of all additions are summed separately.

    Source: Knuth, "The Art of Computer Programming", volume 2 (1969), section 4.2.2, theorem B: ``two_sum``.

    Args:
        first: the first term, in :func:`accumulation_dtype`.
    """

    def __init__(self, first: Tensor) -> None:
        self._sum = first
        self._error: Tensor | None = None

    def add(self, term: Tensor) -> None:
        """Add a term of the same shape and dtype."""
        total = self._sum + term
        if total.dtype in (torch.float32, torch.complex64):
            back = total - self._sum
            error = (self._sum - (total - back)) + (term - back)
            error = torch.where(total.isfinite(), error, 0)  # for an infinite sum it would be inf - inf
            self._error = error if self._error is None else self._error + error
        self._sum = total

    def join(self, other: Total) -> None:
        """Add the terms of another total."""
        self.add(other._sum)
        if other._error is not None:
            self.add(other._error)

    def value(self) -> Tensor:
        """The sum so far."""
        return self._sum if self._error is None else self._sum + self._error
