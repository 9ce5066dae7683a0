"""Selects positions of a value, counted over real tokens by the attention mask of the current call.

Counting columns instead would be silently wrong with left padding, where column -1 is the last token but column 0 is
padding, and in decode steps, where a forward sees one column of a longer sequence.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tdcache.current_call import CurrentCall
from tdcache.errors import CaptureError
from tdcache.function_calls.sites import at_call
from tdcache.reducers.base import Reducer
from tdcache.reducers.rows import RowReducer
from tdcache.regions import Region
from tdcache.tokens import Positions, Tokens, check_positions

__all__ = ["PositionFilter"]


class PositionFilter:
    """Picks positions of the values of one forward.

    Args:
        positions: see :class:`tdcache.ActivationCaching`.
        call: the forward under way, whose masks count.
        position_dim: the axis of positions in values; the batch is axis 0.
        dims: by path, the axis of positions at sites where it differs.
    """

    def __init__(self, positions: Positions, call: CurrentCall, position_dim: int, dims: Mapping[str, int]) -> None:
        self.positions = check_positions(positions)
        self.single = not isinstance(positions, Tensor) and hasattr(positions, "__index__")
        """Whether a single number was given, which removes its axis, as indexing does."""
        self.call = call
        self.position_dim = position_dim
        self.dims = dims

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.positions!r})"

    def of(self, path: str, value: Tensor, reducer: Reducer) -> tuple[Tensor, Tensor | None] | None:
        """The part of a value that is kept, and the mask of its rows for a reducer that accepts one.

        Returns:
            None if this forward feeds none of the positions, as in most decode steps.

        Raises:
            CaptureError: there is no call to take a mask from, or rows keep different numbers of positions.
            SelectionError: the mask does not fit, or a row lacks a position.
        """
        dim = self.dim_at(path, value)
        tokens, moved = self._tokens_of(path, value, dim)
        mask = tokens.select(self.positions)
        if not bool(mask.any()):
            return None
        if isinstance(reducer, RowReducer) and _rows_cover_positions(reducer):
            return value, mask if dim == 1 else _mask_in_place(mask, value, dim)
        if self._is_numbers() and bool((mask.sum(1) > 0).all()):
            columns = tokens.columns(self.positions)  # type: ignore[arg-type]
            kept = moved[torch.arange(len(moved), device=value.device)[:, None], columns.to(value.device)]
            return (kept[:, 0] if self.single else kept.movedim(1, dim)), None
        counts = mask.sum(1)
        if int(counts.min()) != int(counts.max()):
            raise CaptureError(
                f"positions={self.positions!r} keep {int(counts.min())} to {int(counts.max())} tokens of a row at "
                f"{path!r}, which make no tensor; gather rows with a reducer such as Concatenate(flatten=2) or "
                "Mean(flatten=2), or ask for positions that every row has",
                paths=(path,),
            )
        kept = moved[mask.to(value.device)].unflatten(0, (len(moved), -1))
        return kept.movedim(1, dim), None

    def dim_at(self, path: str, value: Tensor) -> int:
        """The axis of positions at one site; in attention calls it follows the axis of heads."""
        dim = self.dims.get(path, at_call(Region(position_dim=self.position_dim), path).position_dim)
        if not -value.dim() <= dim < value.dim():
            raise CaptureError(
                f"the value at {path!r} has shape {tuple(value.shape)} and no axis {dim} of positions; "
                "choose position_dim=, or other sites",
                paths=(path,),
            )
        return dim % value.dim()

    def _tokens_of(self, path: str, value: Tensor, dim: int) -> tuple[Tokens, Tensor]:
        sequences = self.call.sequences_now()
        if sequences is None:
            raise CaptureError(
                f"positions= counts the tokens of a call of the model, and {path!r} ran outside of one; call the model "
                "itself, or use index=, which is plain indexing",
                paths=(path,),
            )
        moved = value.movedim(dim, 1)
        batch, length = moved.shape[:2]
        return sequences.at(path, batch=batch, length=length, device=value.device), moved

    def _is_numbers(self) -> bool:
        return isinstance(self.positions, tuple) or (
            isinstance(self.positions, Tensor) and self.positions.dtype != torch.bool
        )


def _mask_in_place(mask: Tensor, value: Tensor, dim: int) -> Tensor:
    """The mask with singleton axes inserted, so that its position axis lines up with the value's."""
    shape = [1] * (dim + 1)
    shape[0], shape[dim] = mask.shape
    return mask.reshape(shape).expand(value.shape[: dim + 1])


def _rows_cover_positions(reducer: RowReducer) -> bool:
    """Whether every position of a value is a row of its own, so that a mask can drop some."""
    dims = (reducer.dim,) if isinstance(reducer.dim, int) else tuple(reducer.dim)
    return (reducer.flatten is not None and reducer.flatten != 1) or {0, 1} <= set(dims)
