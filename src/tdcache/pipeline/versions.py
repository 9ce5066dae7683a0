"""Whether a value came back from a hook as it went in: the same memory in the same shape, and nothing written to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["share_memory", "untouched", "version_of"]


def version_of(x: Any) -> int | None:
    """The version counter of a tensor; None where it has none (inference tensors) or cannot be asked (tracing)."""
    # Inside a graph that is being traced the counter is a symbol that nothing may branch on.
    if not isinstance(x, Tensor) or torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


def untouched(before: Tensor, after: Any, version: int | None) -> bool:
    """Whether ``after`` is ``before``, or a view of all of it, and neither was written to since ``version``.

    In doubt (tensors without a version counter) the answer is no.
    """
    if version is None or version_of(before) != version:
        return False
    if after is before:
        return True
    # A gradient hook on a tensor that a module passes on is set on a view of it.
    if not isinstance(after, Tensor) or after._base is None:
        return False
    base = before if before._base is None else before._base
    places = [(each.shape, each.stride(), each.storage_offset(), each.dtype) for each in (before, after)]
    return after._base is base and places[0] == places[1] and after.requires_grad == before.requires_grad


def share_memory(one: Tensor, other: Any) -> bool:
    """Whether two tensors lie in the same storage."""
    if not isinstance(other, Tensor) or one.is_sparse or other.is_sparse:
        return one is other
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
