"""Placeholders in a channel's dict, for keys that do not hold a tensor that a hook saw.

They have the few attributes that the channel reads of tensors, so that it can read all values in one loop without
checking types.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["ABSENT", "CopyInGraph"]


class CopyInGraph:
    """Wraps a copy that a compiled graph made of a value."""

    _version = 0
    requires_grad = False

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Absent:
    """Marks a site without a value."""

    _version = 0
    requires_grad = False
    is_leaf = True


ABSENT = _Absent()
