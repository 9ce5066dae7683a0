"""What stands among the values of a channel where there is no tensor that a hook saw.

Each answers to what is asked of the tensors beside it, so that these can be asked all at once.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["ABSENT", "CopyInGraph"]


class CopyInGraph:
    """A copy that a compiled graph made of a value."""

    _version = 0
    requires_grad = False

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Absent:
    """Stands for a site without a value."""

    _version = 0
    requires_grad = False
    is_leaf = False


ABSENT = _Absent()
