"""The dtypes that files may hold: a name from a file is looked up here, never among the attributes of torch."""

from __future__ import annotations

import torch

__all__ = ["DTYPES", "SAFETENSORS_DTYPES", "dtype_name"]

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
