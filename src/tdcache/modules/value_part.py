"""The part of a value that a verb of a run acts on, and the forwards of ``generate()`` in which it acts.

Recipes have the same options; these follow the same rules, so that ``positions=-1`` means the last real token in a run
as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from torch import Tensor

from tdcache.current_call import CurrentCall
from tdcache.errors import CaptureError, EditError
from tdcache.hooks.values import check_dense, check_fits
from tdcache.regions import Along, Region
from tdcache.steps import Steps, check_steps
from tdcache.types import CacheKey

__all__ = ["ValuePart", "WhereOptions"]


class WhereOptions(TypedDict, total=False):
    """The fields of :class:`ValuePart` as keyword arguments."""

    positions: Along
    units: Along
    steps: Steps
    mask_key: CacheKey | None
    position_dim: int
    unit_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuePart:
    """The part that is read or replaced; see ``docs/positions.md`` for what positions and steps mean.

    A single number removes its axis from what is read, as indexing does; a value to set may have that axis or not.

    Args:
        positions: which real tokens of each row, along ``position_dim``: a number (0 the first, -1 the last), several,
            a slice; an integer tensor ``(batch, k)``, or a bool mask ``(batch, seq)`` of columns. All by default.
        units: which features, along ``unit_dim``. All by default.
        steps: in which forwards of ``generate()``: ``"prefill"``, ``"decode"``, or a predicate of a
            :class:`tdcache.Step`.
        mask_key: the argument of the call that marks padding; by default found by its name. None counts columns.
        position_dim: the axis of positions.
        unit_dim: the axis of units, counted from the end.

    Raises:
        EditError: the region is invalid.
        SelectionError: the steps are invalid.
    """

    positions: Along = None
    units: Along = None
    steps: Steps = None
    mask_key: CacheKey | None = "auto"
    position_dim: int = 1
    unit_dim: int = -1

    region: Region = field(init=False, repr=False, compare=False)
    """The part as a region. One object is reused, since a call caches the columns of a region by its identity."""

    def __post_init__(self) -> None:
        check_steps(self.steps)
        region = Region(
            positions=self.positions, units=self.units, position_dim=self.position_dim, unit_dim=self.unit_dim
        )
        object.__setattr__(self, "region", region)

    @property
    def calls(self) -> None:
        """None: a verb acts in every call of its module."""
        return None

    @property
    def whole(self) -> bool:
        """Whether the part is the whole value."""
        return self.positions is None and self.units is None

    @property
    def asks_for_call(self) -> bool:
        """Whether the arguments of the current forward are needed."""
        return self.positions is not None or self.steps is not None

    def take(self, path: str, value: Tensor, call: CurrentCall | None) -> Tensor | None:
        """The part of ``value``, or None if this forward feeds none of its positions.

        Raises:
            CaptureError: rows have different numbers of these positions, which make no tensor.
            EditError: the value has no such part.
        """
        region = self._region_at(path, value, call)
        if region is None:
            return None
        part = region.take(value, path)
        if region.joins_rows:
            counts = region.positions.sum(1)
            if int(counts.min()) != int(counts.max()):
                raise CaptureError(
                    f"positions={self.positions!r} mean {int(counts.min())} to {int(counts.max())} tokens of a row at "
                    f"{path!r}, which make no tensor; choose positions that every row has",
                    paths=(path,),
                )
            part = part.unflatten(0, (len(counts), -1))
        axes = self._single_axes(value, region)
        return part.squeeze(axes) if axes else part

    def put(self, path: str, value: Tensor, new: Any, call: CurrentCall | None) -> Tensor | None:
        """A copy of ``value`` with the part replaced by ``new``; None if this forward feeds none of its positions.

        Raises:
            EditError: the value has no such part, or ``new`` does not fit it.
        """
        region = self._region_at(path, value, call)
        if region is None:
            return None
        part = region.take(value, path)
        if not isinstance(new, Tensor):
            raise EditError(
                f"positions= and units= replace part of a tensor at {path!r} by a tensor, got {type(new).__name__}"
            )
        if region.joins_rows and new.ndim > part.ndim:
            new = new.flatten(0, 1)
        elif new.ndim < part.ndim:
            for axis in sorted(self._single_axes(value, region)):
                new = new.unsqueeze(axis) if axis <= new.ndim else new
        check_fits(new, part, path)
        return region.put(value, new, path)

    def _region_at(self, path: str, value: Tensor, call: CurrentCall | None) -> Region | None:
        check_dense(value, path)
        return self.region if call is None else call.region_at(path, value, self.region)

    def _single_axes(self, value: Tensor, region: Region) -> tuple[int, ...]:
        """The axes of the part along which a single number was chosen."""
        axes = []
        if _is_number(self.positions):
            axes.append(1 if isinstance(region.positions, Tensor) else self.position_dim % value.ndim)
        if _is_number(self.units):
            axes.append(self.unit_dim % value.ndim)
        return tuple(axes)


def _is_number(along: Any) -> bool:
    return isinstance(along, int)
