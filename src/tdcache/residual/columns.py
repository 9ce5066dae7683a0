"""Which positions of kept values are wanted: plain columns, or real tokens where a mask says which these are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tdcache.errors import ResidualError
from tdcache.tokens import Positions, Tokens, check_positions

__all__ = ["Columns"]


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """Positions as a caching context counts them; see ``docs/positions.md``.

    Args:
        positions: a number (its axis is taken off), several, a slice, or a tensor; None for all.
        mask: the attention mask ``(batch, position)``, so that positions count real tokens; None counts columns.
    """

    positions: Positions = None
    mask: Tensor | None = None

    def of(self, value: Tensor, name: str, *, axis: int = -2) -> Tensor:
        """The part of ``value`` at these positions of ``axis``, which follows the axis of rows.

        Raises:
            ResidualError: the value has no axis of positions, or another number of them than the mask.
            SelectionError: not positions, or a row that does not have them.
        """
        asked = check_positions(self.positions)
        if asked is None:
            return value
        if value.ndim + axis != 1:
            raise ResidualError(
                f"positions= selects columns of values (batch, position, ...); {name!r} is {tuple(value.shape)}",
                names=[name],
            )
        if isinstance(asked, slice) and self.mask is None:
            return value[:, asked]
        columns = self._columns(value, name).to(value.device)
        index = columns.view(*columns.shape, *(1,) * (value.ndim - 2)).expand(*columns.shape, *value.shape[2:])
        found = value.gather(1, index)
        return found.squeeze(1) if isinstance(self.positions, int) else found

    def _columns(self, value: Tensor, name: str) -> Tensor:
        """The columns that are meant in each row, ``(batch, k)``."""
        tokens = Tokens.columns_of(*value.shape[:2])
        if self.mask is not None:
            if self.mask.shape != value.shape[:2]:
                raise ResidualError(
                    f"the mask is {tuple(self.mask.shape)} and {name!r} is {tuple(value.shape)}; it has a number for "
                    "each row and position",
                    names=[name],
                )
            tokens = Tokens.of_mask(self.mask)
        positions = self.positions
        if not (isinstance(positions, slice) or (isinstance(positions, Tensor) and positions.dtype == torch.bool)):
            return tokens.columns(positions)  # type: ignore[arg-type]
        chosen = tokens.select(positions)
        counts = chosen.sum(1)
        if bool((counts != counts[:1]).any()):
            raise ResidualError(
                f"positions={positions!r} mean {counts.tolist()} columns of the rows; ask for the same number in each"
            )
        return chosen.nonzero()[:, 1].view(len(chosen), -1)
