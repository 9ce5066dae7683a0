"""Sizes and counts as users write them: ``"20GB"``, whole numbers of any library, names of dtypes."""

from __future__ import annotations

import operator
from typing import Any

import torch

__all__ = ["as_bytes", "as_count", "dtype_name"]

_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """``"bfloat16"``; None where there is none."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def as_count(rows: Any) -> Any:
    """A whole number of any library as Python's own; anything else as it is, to be refused."""
    return operator.index(rows) if hasattr(rows, "__index__") else rows


def as_bytes(size: Any) -> int | None:
    """A number of bytes, also as ``"20GB"``.

    Raises:
        ValueError: something else.
    """
    size = as_count(size)
    if size is None or isinstance(size, int):
        return size
    size = str(size)
    digits = size.rstrip("BKMGTbkmgt ")
    unit = size[len(digits) :].strip().upper() or "B"
    try:
        return int(float(digits) * _SIZES[unit])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"max_bytes is a number, or one with B, KB, MB, GB or TB; got {size!r}") from None
