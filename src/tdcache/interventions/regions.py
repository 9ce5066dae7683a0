"""Which part of an activation an intervention means: positions of a sequence, units of a feature axis."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import EditError

__all__ = ["Region", "as_index"]

Along = int | slice | Sequence[int] | Tensor | None


def as_index(along: Along, what: str) -> Any:
    """An index along one axis in its checked form: an int, a slice, an index tensor, or None for all of it.

    Raises:
        EditError: not an index.
    """
    if along is None or isinstance(along, slice) or (isinstance(along, int) and not isinstance(along, bool)):
        return along
    if isinstance(along, Tensor) and (along.dtype == torch.bool or not along.is_floating_point()):
        return along
    listed: Any = along
    if isinstance(listed, list | tuple | range) and listed and all(type(at) is int for at in listed):
        return torch.tensor(list(listed))
    raise EditError(f"{what} is an int, a slice, a sequence of ints or an index tensor, got {along!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Part of a tensor such as ``(batch, seq, features)``; None means all along that axis.

    Args:
        positions: along ``position_dim``: an int, a slice, a sequence of ints; or, with one choice per row, an integer
            tensor ``(batch, k)`` or a bool mask ``(batch, seq)``.
        units: along ``unit_dim``: an int, a slice, or a sequence of ints.
        position_dim: the axis of positions.
        unit_dim: the axis of units, counted from the end; a convolution's channels are at ``-3``.
    """

    positions: Any = None
    units: Any = None
    position_dim: int = 1
    unit_dim: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", as_index(self.positions, "positions"))
        object.__setattr__(self, "units", as_index(self.units, "units"))
        if self.unit_dim >= 0:
            raise EditError(f"unit_dim counts from the end and is negative, got {self.unit_dim}")

    @property
    def whole(self) -> bool:
        """Whether it is all of the tensor."""
        return self.positions is None and self.units is None

    def take(self, tensor: Tensor, path: str) -> Tensor:
        """The part of ``tensor``; axes are kept, except that a bool mask joins batch and positions.

        Raises:
            EditError: the tensor has no such part.
        """
        part = tensor
        if self.positions is not None:
            part = part[self._positions_in(tensor, path)]
        return part if self.units is None else part[self._units_in(tensor, path)]

    def put(self, tensor: Tensor, part: Tensor, path: str) -> Tensor:
        """A copy of ``tensor`` with ``part`` in the region's place.

        Raises:
            EditError: the tensor has no such part.
        """
        new = tensor.clone()
        self.write(new, part, path)
        return new

    def write(self, tensor: Tensor, part: Tensor, path: str) -> None:
        """Write ``part`` into the region of ``tensor``, in place.

        Raises:
            EditError: the tensor has no such part.
        """
        if self.whole:
            tensor.copy_(part)
        elif self.units is None:
            tensor[self._positions_in(tensor, path)] = part
        elif self.positions is None:
            tensor[self._units_in(tensor, path)] = part
        else:
            positions = self._positions_in(tensor, path)
            inner = tensor[positions].clone()
            inner[self._units_in(tensor, path)] = part
            tensor[positions] = inner

    def _positions_in(self, tensor: Tensor, path: str) -> Any:
        index = self.positions
        if isinstance(index, Tensor) and index.ndim == 2:
            if self.position_dim != 1 or tensor.ndim < 2 or index.shape[0] != tensor.shape[0]:
                raise EditError(
                    f"positions of shape {tuple(index.shape)} choose per row of (batch, seq, ...), "
                    f"but the value at {path!r} "
                    f"has shape {tuple(tensor.shape)}"
                )
            index = index.to(tensor.device)
            if index.dtype == torch.bool:
                return index
            return torch.arange(len(index), device=index.device)[:, None], index
        return _along(tensor, self.position_dim, index, path, "positions")

    def _units_in(self, tensor: Tensor, path: str) -> Any:
        return (..., *_along(tensor, self.unit_dim, self.units, path, "units")[self.unit_dim % tensor.ndim :])


def _along(tensor: Tensor, dim: int, index: Any, path: str, what: str) -> tuple[Any, ...]:
    """The full index for ``index`` along ``dim``, which keeps every axis."""
    if not -tensor.ndim <= dim < tensor.ndim:
        raise EditError(
            f"the value at {path!r} has shape {tuple(tensor.shape)} and no axis {dim} for {what}={_spell(index)}"
        )
    at, size, used = dim % tensor.ndim, tensor.shape[dim], index
    if isinstance(index, int):
        outside = not -size <= index < size
        used = slice(index, index + 1 or None)
    elif isinstance(index, slice):
        outside = not range(*index.indices(size))
    else:
        outside = index.device.type == "cpu" and index.dtype != torch.bool and index.numel() > 0
        outside = outside and not bool((-size <= index.min()) & (index.max() < size))
    if outside:
        hint = "; in generate(), steps='prefill' leaves the steps of one token out" if what == "positions" else ""
        raise EditError(
            f"{what}={_spell(index)} means nothing at {path!r}, whose value has {size} along axis {at}: shape "
            f"{tuple(tensor.shape)}{hint}"
        )
    return (*(slice(None),) * at, used, *(slice(None),) * (tensor.ndim - at - 1))


def _spell(index: Any) -> str:
    return repr(index.tolist() if isinstance(index, Tensor) else index)
