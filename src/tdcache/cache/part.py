"""Selects the rows, units, heads and positions of a value that are kept (``rows=``, ``units=`` and so on).

``index=`` is plain indexing and needs no file of its own. These options have a meaning (real tokens, attention heads),
so they know about axes and masks, and refuse a value that they do not fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from tdcache.cache.positions import PositionFilter
from tdcache.current_call import CurrentCall
from tdcache.errors import CaptureError
from tdcache.function_calls.sites import at_call
from tdcache.hooks.values import check_dense
from tdcache.inplace import shares_memory
from tdcache.reducers.base import Reducer
from tdcache.reducers.rows import RowReducer
from tdcache.regions import Region

__all__ = ["PartFilter"]


@dataclass(frozen=True, slots=True)
class PartFilter:
    """Takes the selected part of each value.

    Args:
        region: rows, units and heads, without positions.
        call: the forward under way, if rows or positions are chosen: a value must have its rows.
        positions: which positions are kept; None for all columns.
        regions: by path, the region of sites whose axes differ.
    """

    region: Region
    call: CurrentCall | None = None
    positions: PositionFilter | None = None
    regions: Mapping[str, Region] = field(default_factory=dict)

    def of(self, path: str, value: Tensor, reducer: Reducer) -> tuple[Tensor, Tensor | None] | None:
        """The part that is kept, and the mask of its rows for a reducer that accepts one.

        A single number for rows or units removes its axis, as indexing does; reducers over rows keep the axis of rows.

        Returns:
            None if this forward feeds none of the positions.

        Raises:
            CaptureError: there is no call to take a mask from, or rows keep different numbers of positions.
            EditError: the value has no such rows, units or heads.
            SelectionError: the value does not have the rows of the call, the mask does not fit, or a row lacks a
                position.
        """
        region = self.regions.get(path) or at_call(self.region, path)
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"rows=, positions=, units= and heads= choose from a tensor, and at {path!r} there is a "
                f"{type(value).__name__}; name one of its tensors by pick=",
                paths=(path,),
            )
        check_dense(value, path)
        sequences = None if self.call is None else self.call.sequences_now()
        if value.ndim and sequences is not None:
            sequences.check_rows(path, value, region.row_axis(value))
        if region.whole and self.positions is not None:
            return self.positions.of(path, value, reducer)
        kept, mask = replace(region, rows=None).take(value, path), None
        unit_axis = region.unit_dim % kept.ndim if kept.ndim else 0
        row_axis, taken_off = region.row_axis(kept), None
        if self.positions is not None:
            found = self.positions.of(path, kept, reducer)
            if found is None:
                return None
            if found[0].ndim < kept.ndim:
                taken_off = self.positions.dim_at(path, kept)
            kept, mask = found
        if taken_off is not None:
            unit_axis, row_axis = (axis - (axis > taken_off) for axis in (unit_axis, row_axis))
        if region.rows is not None:
            rows = Region(rows=region.rows, position_dim=0 if row_axis else 1)
            kept = rows.take(kept, path)
            mask = mask if mask is None else rows.take(mask, path)
        axes = [unit_axis] if isinstance(region.units, int) else []
        if isinstance(region.rows, int) and not isinstance(reducer, RowReducer):
            axes.append(row_axis)
        kept = kept.squeeze(tuple(axes)) if axes else kept
        return (kept.clone() if shares_memory(kept, value) else kept), mask

    def forget(self) -> None:
        """Drop the current call."""
        if self.call is not None:
            self.call.forget()
