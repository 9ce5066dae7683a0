"""The TensorDict of parts that every function here gives: it knows what they sum to, and whose names they have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdcache.errors import ResidualError
from tdcache.named_places import Names

__all__ = ["Parts", "tensors"]


class Parts(TensorDict):
    """Named values ``(..., unit)`` of one residual stream, each under one key, in the order they are written.

    Where they are the parts of one value, ``sum(parts.values())`` is that value. Results of operations on it (views,
    copies, arithmetic) are TensorDicts that no longer know ``table`` and ``of``; hand in ``cache=`` or ``names=`` with
    them.

    Example:
        >>> parts = Parts({"embed": torch.ones(2, 3), "blocks.0.attn.contribution": torch.ones(2, 3)})
        >>> parts.total().unique()
        tensor([2.])
    """

    table: Names | None = None
    """The names of the model whose stream this is."""
    prefix: str = ""
    """Which stream of the model."""
    of: str | None = None
    """The canonical name of the value that the parts sum to; None where they are no parts of one value."""
    normed: bool = False
    """Whether a norm has been applied, so that an unembedding can follow."""
    at: Tensor | None = None
    """The value of the stream at which a norm's scale is frozen."""

    @classmethod
    def made(cls, values: Mapping[str, Tensor], table: Names, prefix: str, **facts: Any) -> Parts:
        """Parts of the stream ``prefix`` of the model of ``table``, with what else is known of them."""
        parts = cls(dict(values))
        for name, fact in {"table": table, "prefix": prefix, **facts}.items():
            setattr(parts, name, fact)
        return parts

    def total(self) -> Tensor:
        """The sum of all parts."""
        return sum(tensors(self).values(), torch.zeros(()))

    def stacked(self) -> tuple[Tensor, list[str]]:
        """All parts as one tensor with a leading axis, and their names.

        Raises:
            ResidualError: there are none.
        """
        if not len(self.keys()):
            raise ResidualError("there are no parts to stack")
        found = tensors(self)
        return torch.stack(list(found.values())), list(found)


def tensors(stack: TensorDictBase) -> dict[str, Tensor]:
    """The entries by name.

    Raises:
        ResidualError: there is none, or one that is no tensor.
    """
    found: dict[Any, Any] = dict(stack.items())
    if not found or not all(isinstance(key, str) and isinstance(each, Tensor) for key, each in found.items()):
        raise ResidualError(f"parts are tensors by name, at least one; got {dict(found)!r:.200}")
    return found
