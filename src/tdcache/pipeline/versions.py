"""Whether a value came back from a hook as it went in: the same memory in the same shape, and nothing written to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdcache import inplace
from tdcache.inplace import NO_COUNTER

__all__ = ["untouched", "version_of"]


def version_of(x: Any) -> int:
    """:func:`tdcache.inplace.version_of`, but none while a graph is traced, where nothing may branch on it."""
    return NO_COUNTER if torch.compiler.is_compiling() else inplace.version_of(x)


def untouched(before: Tensor, after: Any, version: int) -> bool:
    """Whether ``after`` is ``before``, or a view of all of it, and neither was written to since ``version``.

    In doubt (tensors without a version counter) the answer is no.
    """
    if version == NO_COUNTER or version_of(before) != version:
        return False
    if after is before:
        return True
    # A gradient hook on a tensor that a module passes on is set on a view of it.
    if not isinstance(after, Tensor) or after._base is None:
        return False
    base = before if before._base is None else before._base
    places = [(each.shape, each.stride(), each.storage_offset(), each.dtype) for each in (before, after)]
    return after._base is base and places[0] == places[1] and after.requires_grad == before.requires_grad
