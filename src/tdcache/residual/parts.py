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

    Where they are the parts of one value, ``sum(parts.values())`` is that value. Copies and selections know whose
    parts they are; results of arithmetic and views do not, and are handed on with ``cache=`` or ``names=``.

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
    def made(
        cls,
        values: Mapping[str, Tensor],
        table: Names,
        prefix: str,
        *,
        of: str | None = None,
        normed: bool = False,
        at: Tensor | None = None,
    ) -> Parts:
        """Parts of the stream ``prefix`` of the model of ``table``, with what else is known of them."""
        parts = cls(dict(values))
        parts.table, parts.prefix, parts.of, parts.normed, parts.at = table, prefix, of, normed, at
        return parts

    def select(self, *keys: Any, **kwargs: Any) -> Any:
        """Some parts, which no longer sum to the whole."""
        return self._carried(super().select(*keys, **kwargs), self.at, None)

    def exclude(self, *keys: Any, **kwargs: Any) -> Any:
        """All parts but some."""
        return self._carried(super().exclude(*keys, **kwargs), self.at, None)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        """A copy of the parts."""
        return self._carried(super().clone(*args, **kwargs), self.at, self.of)

    def detach(self) -> Any:
        """The parts without graph."""
        return self._carried(super().detach(), None if self.at is None else self.at.detach(), self.of)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The parts on another device or in another dtype."""
        return self._carried(
            super().to(*args, **kwargs), None if self.at is None else self.at.to(*args, **kwargs), self.of
        )

    def _carried(self, found: Any, at: Tensor | None, of: str | None) -> Any:
        if isinstance(found, Parts):
            found.table, found.prefix, found.of, found.normed, found.at = self.table, self.prefix, of, self.normed, at
        return found

    def total(self) -> Tensor:
        """The sum of all parts."""
        return sum(tensors(self).values(), torch.zeros(()))

    def stacked(self) -> tuple[Tensor, list[str]]:
        """All parts as one tensor with a leading axis, and their names.

        Raises:
            ResidualError: there are none.
        """
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
