"""Options of a harvest as JSON values and as numbers, the same in every process."""

from __future__ import annotations

import hashlib
import operator
from functools import partial
from types import CodeType, FunctionType
from typing import Any

import torch

__all__ = ["as_bytes", "as_count", "dtype_name", "spelled"]

_SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """``"bfloat16"``; None where there is none."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def spelled(value: Any) -> Any:
    """An option as JSON; of a function its name and a hash of its code, because its address changes from run to run."""
    if isinstance(value, slice):
        return ":".join("" if each is None else str(each) for each in (value.start, value.stop, value.step))
    if isinstance(value, tuple | list):
        return [spelled(each) for each in value]
    if isinstance(value, partial):
        return [spelled(value.func), [repr(each) for each in value.args], repr(sorted(value.keywords.items()))]
    if isinstance(value, FunctionType):
        return f"{value.__qualname__} {_code_hash(value.__code__)}"
    return getattr(value, "__qualname__", value if isinstance(value, str | int | None) else type(value).__qualname__)


def _code_hash(code: CodeType) -> str:
    constants = [_code_hash(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return hashlib.sha256(repr((code.co_code, code.co_names, constants)).encode()).hexdigest()[:12]


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
