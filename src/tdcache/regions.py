"""The part of an activation that an intervention acts on: rows of the batch, positions, units or heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import EditError

__all__ = ["Along", "Heads", "Region", "as_index"]

Along = int | slice | Sequence[int] | Tensor | None
Heads = tuple[int, Along]
"""Into how many heads an axis falls, and which of them are meant."""


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
    """A part of a tensor such as ``(batch, seq, features)``; None selects all along that axis.

    Args:
        positions: along ``position_dim``: an int, a slice, a sequence of ints; or, with one choice per row, an integer
            tensor ``(batch, k)`` or a bool mask ``(batch, seq)``.
        units: along ``unit_dim``: an int, a slice, or a sequence of ints.
        heads: ``(n_heads, which)``, in place of ``units``: ``unit_dim`` holds that many heads side by side.
        rows: of the batch: an int, a slice, a sequence of ints, or a bool mask ``(batch,)``.
        position_dim: the axis of positions. Rows are axis 0, or axis 1 where positions are axis 0.
        unit_dim: the axis of units, counted from the end; a convolution's channels are at ``-3``.
        head_dim: the axis of heads, where they have one of their own; ``heads`` may then be ``(None, which)``.
    """

    positions: Any = None
    units: Any = None
    heads: Any = None
    rows: Any = None
    position_dim: int = 1
    unit_dim: int = -1
    head_dim: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", as_index(self.positions, "positions"))
        object.__setattr__(self, "units", as_index(self.units, "units"))
        object.__setattr__(self, "rows", as_index(self.rows, "rows"))
        if self.unit_dim >= 0:
            raise EditError(f"unit_dim counts from the end and is negative, got {self.unit_dim}")
        if isinstance(self.rows, Tensor) and self.rows.ndim > 1:
            raise EditError(f"rows has one axis, got a tensor of shape {tuple(self.rows.shape)}")
        if self.heads is not None:
            self._check_heads()

    def _check_heads(self) -> None:
        own_axis = self.head_dim is not None
        if self.units is not None and not own_axis:
            raise EditError("heads= and units= choose along the same axis; give one of them")
        pair = self.heads if isinstance(self.heads, tuple | list) else ()
        counted = len(pair) == 2 and ((type(pair[0]) is int and pair[0] > 0) or (own_axis and pair[0] is None))
        if not counted or pair[1] is None:
            raise EditError(f"heads is (n_heads, which), such as (12, [3, 7]), got {self.heads!r}")
        object.__setattr__(self, "heads", (pair[0], as_index(pair[1], "which heads")))

    @property
    def whole(self) -> bool:
        """Whether the region is the whole tensor."""
        return self.positions is None and self.units is None and self.heads is None and self.rows is None

    @property
    def joins_rows(self) -> bool:
        """Whether the part has one axis for rows and positions together: of a mask with a choice per row."""
        return isinstance(self.positions, Tensor) and self.positions.ndim == 2 and self.positions.dtype == torch.bool

    def row_axis(self, tensor: Tensor) -> int:
        """The axis of the batch in a value."""
        return 1 if tensor.ndim > 1 and self.position_dim % tensor.ndim == 0 else 0

    def part_row_axis(self, tensor: Tensor) -> int:
        """The axis of the batch in the part of a value."""
        per_row = isinstance(self.positions, Tensor) and self.positions.ndim == 2
        return 0 if per_row else self.row_axis(tensor)

    def take(self, tensor: Tensor, path: str) -> Tensor:
        """The part of ``tensor``.

        Axes are kept, except that a bool mask per row joins batch and positions; with a choice per row the part is
        ``(batch, k, ...)``, wherever ``position_dim`` is.

        Raises:
            EditError: the tensor has no such part.
        """
        part = tensor
        for enter in self._stages():
            view, index = enter(part, path)
            part = view[index]
        return part

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
        _write(tensor, part, self._stages(), path)

    def _stages(self) -> list[_Stage]:
        """What is chosen, one axis after another."""
        chosen = (
            (self.rows, self._rows_in),
            (self.positions, self._positions_in),
            (self.units, self._units_in),
            (self.heads, self._heads_in),
        )
        return [enter for given, enter in chosen if given is not None]

    def _rows_in(self, tensor: Tensor, path: str) -> tuple[Tensor, Any]:
        return tensor, _along(tensor, self.row_axis(tensor), self.rows, path, "rows")

    def _positions_in(self, tensor: Tensor, path: str) -> tuple[Tensor, Any]:
        index = self.positions
        if not (isinstance(index, Tensor) and index.ndim == 2):
            return tensor, _along(tensor, self.position_dim, index, path, "positions")
        view = tensor if self.position_dim == 1 or tensor.ndim < 2 else tensor.movedim(self.position_dim, 1)
        if tensor.ndim > 1 and self.rows is not None and len(index) != len(view):
            index = index[_as_slice(self.rows)]
        if tensor.ndim < 2 or len(index) != len(view):
            raise EditError(
                f"positions of shape {tuple(self.positions.shape)} choose per row of (batch, seq, ...), but the value "
                f"at {path!r} has shape {tuple(tensor.shape)}"
            )
        index = index.to(tensor.device)
        if index.dtype == torch.bool:
            return view, index
        return view, (torch.arange(len(index), device=index.device)[:, None], index)

    def _units_in(self, tensor: Tensor, path: str) -> tuple[Tensor, Any]:
        return tensor, self._last_axes(tensor, self.units, path, "units")

    def _heads_in(self, tensor: Tensor, path: str) -> tuple[Tensor, Any]:
        count, which = self.heads
        if self.head_dim is not None:
            there = tensor.shape[self.head_dim] if -tensor.ndim <= self.head_dim < tensor.ndim else 0
            if count not in (None, there):
                raise EditError(
                    f"heads=({count}, ...) is not the number of heads at {path!r}, whose value has {there}: shape "
                    f"{tuple(tensor.shape)}"
                )
            return tensor, _along(tensor, self.head_dim, which, path, "heads")
        size = tensor.shape[self.unit_dim] if -self.unit_dim <= tensor.ndim else 0
        if size % count or not size:
            raise EditError(
                f"heads=({count}, ...) does not divide the {size} units at {path!r}, whose value has shape "
                f"{tuple(tensor.shape)}"
            )
        units = torch.arange(size, device=tensor.device).reshape(count, -1)
        chosen = units[_along(units, 0, which, path, "heads")].reshape(-1)
        return tensor, self._last_axes(tensor, chosen, path, "heads")

    def _last_axes(self, tensor: Tensor, index: Any, path: str, what: str) -> tuple[Any, ...]:
        return (..., *_along(tensor, self.unit_dim, index, path, what)[self.unit_dim % tensor.ndim :])


_Stage = Callable[[Tensor, str], tuple[Tensor, Any]]


def _write(tensor: Tensor, part: Tensor, stages: Sequence[_Stage], path: str) -> None:
    if not stages:
        tensor.copy_(part)
        return
    view, index = stages[0](tensor, path)
    if len(stages) > 1:
        inner = view[index].clone()
        _write(inner, part, stages[1:], path)
        part = inner
    view[index] = part


def _as_slice(index: Any) -> Any:
    return slice(index, index + 1 or None) if isinstance(index, int) else index


def _along(tensor: Tensor, dim: int, index: Any, path: str, what: str) -> tuple[Any, ...]:
    """The full index for ``index`` along ``dim``, which keeps every axis."""
    if not -tensor.ndim <= dim < tensor.ndim:
        raise EditError(
            f"the value at {path!r} has shape {tuple(tensor.shape)} and no axis {dim} for {what}={_spell(index)}"
        )
    at, size, used = dim % tensor.ndim, tensor.shape[dim], _as_slice(index)
    if isinstance(index, int):
        outside = not -size <= index < size
    elif isinstance(index, slice):
        outside = not range(*index.indices(size))
    elif index.dtype == torch.bool:
        outside = index.shape != (size,)
    else:
        # On an accelerator, and in a compiled graph, which cannot look at values, indexing itself raises.
        outside = index.device.type == "cpu" and index.numel() > 0 and not torch.compiler.is_compiling()
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
