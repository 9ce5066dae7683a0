"""Slices the positions of cached activations (``pos_slice=``).

Which axis holds the positions depends on the point (queries have an axis of heads, residual streams do not), so plain
indexing of all entries with one index would slice heads in some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import CaptureError
from tdcache.inplace import shares_memory

__all__ = ["PositionSlice"]

# TransformerLens' names of activations with an axis of heads between positions and features.
_PER_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result")


@dataclass(frozen=True, slots=True, eq=False)
class PositionSlice:
    """A part of the position axis; the result is a copy, so that it does not keep the rest alive.

    The axis is the point's ``pos_dim`` if set, otherwise the second from last (for attention patterns, the queries), or
    the third from last for ``hook_q``, ``hook_k``, ``hook_v``, ``hook_z`` and ``hook_result`` where these have an axis
    of heads. The first axis is the batch and never sliced unless ``pos_dim`` names it; an activation without another
    axis is kept whole.
    """

    index: int | slice | Tensor
    given: Any

    @classmethod
    def of(cls, given: Any) -> PositionSlice | None:
        """From a number (its axis stays, with size 1), a slice or a tuple of its arguments, or several positions.

        Raises:
            ValueError: ``given`` is none of these.
        """
        if type(given).__name__ == "Slice" and hasattr(given, "mode"):  # TransformerLens' own object
            return None if given.mode == "identity" else cls(_plain(given.slice), given)
        if given is None or isinstance(given, cls):
            return given
        number = _as_number(given)
        return cls(torch.tensor([number]) if number is not None else _plain(given), given)

    def __call__(self, value: Tensor, name: str, pos_dim: int | None) -> Tensor:
        """The kept part of the activation ``name``."""
        per_head = name.endswith(_PER_HEAD) and value.dim() > 3  # projections in other models have the heads joined
        dim = pos_dim if pos_dim is not None else -3 if per_head else -2
        if pos_dim is None and value.dim() + dim < 1:
            return value
        index = self.index.to(value.device) if isinstance(self.index, Tensor) else self.index
        try:
            kept = value[(*[slice(None)] * (dim % value.dim()), index)]
        except (IndexError, ZeroDivisionError) as error:
            raise CaptureError(
                f"pos_slice={self.given!r} does not fit axis {dim} of {name!r}, shape {tuple(value.shape)}: {error}",
                paths=(name,),
            ) from None
        return kept.clone() if shares_memory(kept, value) else kept


def _as_number(given: Any) -> int | None:
    if isinstance(given, Tensor) and given.dim() == 0 and not given.is_floating_point() and given.dtype != torch.bool:
        return int(given)
    if isinstance(given, bool) or not isinstance(given, Integral):
        return None
    return int(given)


def _plain(given: Any) -> int | slice | Tensor:
    if isinstance(given, slice | Tensor) or _as_number(given) is not None:
        return given  # type: ignore[no-any-return]
    if isinstance(given, tuple) and 1 <= len(given) <= 3:
        return slice(*given)
    if (isinstance(given, Sequence) and not isinstance(given, str)) or hasattr(given, "__array__"):
        return torch.as_tensor(given)
    raise ValueError(f"pos_slice is a position, a slice, a tuple of its arguments, or several positions, got {given!r}")
