"""The dtypes that files may hold: a name from a file is looked up here, never among the attributes of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "SAFETENSORS_DTYPES", "count_lost", "dtype_name", "for_numpy", "in_numpy"]

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names of the safetensors format."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype, ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


DTYPES = {dtype_name(each): each for each in (*SAFETENSORS_DTYPES.values(), torch.complex128)}
"""By the names of torch, without ``torch.``."""


def in_numpy(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or float32 where NumPy and Arrow have no such numbers: it holds all of theirs exactly."""
    return torch.float32 if dtype == torch.bfloat16 or (dtype.is_floating_point and dtype.itemsize == 1) else dtype


def for_numpy(tensor: Tensor) -> Any:
    """A CPU tensor as an array, in the dtype of :func:`in_numpy`."""
    return tensor.to(in_numpy(tensor.dtype)).numpy()


def count_lost(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """How many values a cast to ``dtype`` changes by more than rounding.

    Args:
        rows: floating values.
        dtype: a floating one.

    Returns:
        The values that it cannot hold (finite ones beyond its largest, and infinities where it has none), and those
        other than zero that become zero, as scalars on the device of ``rows``. None where the range of the dtype tells
        that there are none; numbers below the smallest normal one of both dtypes are not looked at.
    """
    own, wanted = torch.finfo(rows.dtype), torch.finfo(dtype)
    narrower, coarser = own.max > wanted.max, wanted.smallest_normal > own.smallest_normal
    if not (narrower or coarser) or rows.numel() == 0:
        return None
    cast = rows.to(dtype).to(rows.dtype)
    none = torch.zeros((), dtype=torch.int64, device=rows.device)
    under = rows.count_nonzero() - cast.count_nonzero() if coarser else none
    is_small = rows.device.type == "cpu" and bool(torch.linalg.vector_norm(rows, float("inf")) <= wanted.max)
    if not narrower or is_small:
        return none, under
    beyond = (rows.abs() > wanted.max) & (torch.isfinite(rows) | ~torch.isinf(cast))
    return beyond.sum(), under
