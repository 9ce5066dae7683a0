"""The base of reducers over rows: which dimensions of a value are rows, and which rows a mask selects.

Handled once here, so that a mean, a variance and a top-k over one mask count the same tokens.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from tdcache.errors import CaptureError
from tdcache.reducers.base import Reducer

__all__ = ["Dims", "RowReducer"]

Dims = int | tuple[int, ...]


class RowReducer(Reducer):
    """A reducer that splits values into rows, and counts all of them or those that a mask selects.

    Subclasses are dataclasses with the fields ``dim`` and ``flatten``: first ``flatten`` leading dimensions are merged,
    then rows are taken along ``dim``.
    """

    dim: Dims
    flatten: int | None

    @abstractmethod
    def update(self, value: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of a value; its graph is not kept.

        Args:
            value: rows along ``dim``; a scalar is one row.
            mask: a boolean mask of the rows that count, with the shape of the leading dimensions of ``value``, such as
                ``(batch, seq)`` for the tokens of ``(batch, seq, d)``. Rows must lie along each of these dimensions.

        Raises:
            CaptureError: the mask does not fit the value, or the rows do not fit earlier ones.
        """

    def _rows_of(self, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The rows ``(rows, *rest)``, without a copy if possible, and the mask ``(rows,)``."""
        value = value.detach() if value.requires_grad else value
        value = value.unsqueeze(0) if value.dim() == 0 else value
        merged = self._merged(value)
        if mask is not None:
            mask = self._checked(mask, value)
            mask = mask.reshape(mask.shape + (1,) * (merged - mask.dim()))
            mask = mask.expand(value.shape[: mask.dim()]).flatten(0, merged - 1)
        if merged > 1:
            value = value.flatten(0, merged - 1)
        dims = tuple(range(value.dim())[dim] for dim in self._dims)
        return _to_front(value, dims), None if mask is None else self._mask_of_rows(mask, value, dims)

    def _counted_rows(self, value: Tensor, mask: Tensor | None) -> Tensor:
        """The rows that the mask selects, ``(rows, *rest)``."""
        rows, mask = self._rows_of(value, mask)
        return rows if mask is None else rows[mask]

    @property
    def _dims(self) -> tuple[int, ...]:
        return (self.dim,) if isinstance(self.dim, int) else self.dim

    def _merged(self, value: Tensor) -> int:
        """The number of leading dimensions to merge."""
        if self.flatten is None:
            return 1
        return max(1, self.flatten if self.flatten > 0 else value.dim() + self.flatten)

    def _checked(self, mask: Tensor, value: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            raise CaptureError(
                f"{self!r} takes a boolean mask, got {mask.dtype}; write mask.bool() if 1 means that the row counts"
            )
        if mask.shape != value.shape[: mask.dim()]:
            raise CaptureError(
                f"{self!r} got a mask of {tuple(mask.shape)} for a value of {tuple(value.shape)}; the mask has the "
                f"shape of the value's leading dimensions, {tuple(value.shape[: mask.dim()])}"
            )
        return mask.to(value.device)

    def _mask_of_rows(self, mask: Tensor, value: Tensor, dims: tuple[int, ...]) -> Tensor:
        """The mask expanded to all dimensions along which rows lie, in the order of the rows."""
        if not set(range(mask.dim())) <= set(dims):
            raise CaptureError(
                f"{self!r} got a mask over {mask.dim()} leading dimensions of {tuple(value.shape)}, but rows lie along "
                f"{', '.join(map(str, dims))}; make rows of all that it covers with flatten={mask.dim()}"
            )
        spread = mask.reshape(mask.shape + (1,) * (value.dim() - mask.dim()))
        spread = spread.expand([length if dim in dims else 1 for dim, length in enumerate(value.shape)])
        return _to_front(spread, dims).flatten()


def _to_front(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The dimensions ``dims`` merged into one, before the others."""
    if dims == (0,):
        return value
    return value.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1)
