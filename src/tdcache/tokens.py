"""The real tokens of a batch, and what ``positions=`` means among them.

Padding may be on the left or right, tokens may be cached already, several sequences may be packed into one row. Edits,
captures, statistics, harvests and scores all use the object that is made here, so that position -1 is the last real
token in each of them.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import SelectionError

__all__ = ["Positions", "Tokens", "check_positions"]

Positions = int | slice | Sequence[int] | Tensor | None
"""Numbers of real tokens from either side, the same for all rows or a row of them for each; a mask; None for all."""

_MOST_ROWS = 5


def check_positions(positions: Any) -> slice | tuple[int, ...] | Tensor | None:
    """``positions`` in normal form: numbers become a tuple.

    Raises:
        SelectionError: not positions.
    """
    if positions is None or (isinstance(positions, Tensor) and positions.dim() == 2 and _is_index(positions)):
        return positions
    if isinstance(positions, slice):
        bounds = (positions.start, positions.stop, positions.step)
        if all(each is None or _is_number(each) for each in bounds) and (positions.step or 1) > 0:
            return positions
    elif isinstance(positions, Tensor):
        if positions.dim() <= 1 and positions.numel() and _is_index(positions) and positions.dtype != torch.bool:
            return tuple(positions.reshape(-1).tolist())
    elif _is_number(positions):
        return (operator.index(positions),)
    elif isinstance(positions, Sequence) and positions and all(map(_is_number, positions)):
        return tuple(map(operator.index, positions))
    raise SelectionError(
        "positions is a number, several, a slice with a positive step, an integer tensor (batch, k), or a bool mask "
        f"(batch, seq), got {positions!r}",
        selector=positions,
    )


def _is_number(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool | Tensor)


def _is_index(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex())


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """Which columns of an input are tokens, and the number of each token in its sequence.

    Args:
        real: bool ``(batch, seq)``: the columns that are no padding.
        before: ``(batch,)``: how many real tokens of each row are cached, that is, come before the first column; None
            if that is unknown, so that positions can be counted from the end alone.
        sequence: ``(batch, seq)``: the number of the packed sequence that a column belongs to; None for one per row.
        more: whether later forwards can add tokens to these, as with a cache; then a number that a row does not have
            yet selects nothing, instead of being an error.

    Example:
        >>> tokens = Tokens.of_mask(torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]))
        >>> tokens.select(-1).int()
        tensor([[0, 0, 0, 1],
                [0, 1, 0, 0]], dtype=torch.int32)
        >>> tokens.columns([0, -1])
        tensor([[1, 3],
                [0, 1]])
    """

    real: Tensor
    before: Tensor | None
    sequence: Tensor | None = None
    more: bool = False

    @classmethod
    def of_mask(cls, real: Tensor, *, before: Tensor | None = None, position_ids: Tensor | None = None) -> Tokens:
        """From a mask ``(batch, seq)``, where nonzero is a token.

        Args:
            real: the mask.
            before: how many tokens of each row are cached; none by default.
            position_ids: ``(batch, seq)`` or ``(1, seq)``; a packed sequence begins at a real token whose id is 0, or
                less than that of the real token right before it.
        """
        real = real != 0
        before = torch.zeros(len(real), dtype=torch.long, device=real.device) if before is None else before
        return cls(real, before, None if position_ids is None else _packed(real, position_ids))

    @classmethod
    def columns_of(cls, batch: int, seq: int, *, device: torch.device | None = None) -> Tokens:
        """Every column is a token, and the first one has number 0: positions as in plain indexing."""
        return cls.of_mask(torch.ones(batch, seq, dtype=torch.bool, device=device))

    @property
    def place(self) -> Tensor:
        """The number of each real token in its sequence, cached ones counted; ``(batch, seq)``, -1 for padding.

        Raises:
            SelectionError: how many are cached is unknown.
        """
        if self.before is None:
            raise SelectionError(
                "positions from the beginning need the number of cached tokens, which neither a mask over all of them "
                "nor a cache with a length tells; pass the whole attention mask, or count from the end (-1)"
            )
        return torch.where(self.real, self._within() + self._first(self.before), -1)

    @property
    def lengths(self) -> Tensor:
        """How many real tokens each row feeds, ``(batch,)``."""
        return self.real.sum(1)

    def select(self, positions: Positions) -> Tensor:
        """The columns that ``positions`` mean, as bools ``(batch, seq)``.

        A position that is cached is no column of this forward and selects nothing. Slices take what there is; a number
        that a row does not have is an error, unless ``more`` can follow. A bool mask is taken as it is, but for
        padding.

        Raises:
            SelectionError: not positions; a row with too few tokens; or a tensor that does not fit.
        """
        asked = check_positions(positions)
        if asked is None:
            return self.real
        if isinstance(asked, slice):
            return self._slice(asked)
        if isinstance(asked, tuple):
            asked = torch.tensor(asked, device=self.real.device).expand(len(self.real), -1)
        elif asked.dtype == torch.bool:
            if asked.shape != self.real.shape:
                raise self._misfit(asked, f"a bool mask has {tuple(self.real.shape)}")
            return self.real & asked.to(self.real.device)
        elif len(asked) != len(self.real):
            raise self._misfit(asked, f"an integer tensor has ({len(self.real)}, k)")
        return self._hits(asked.to(self.real.device)).any(1)

    def columns(self, positions: int | Sequence[int] | Tensor) -> Tensor:
        """The column of each position, ``(batch, k)``, in the order asked for.

        Raises:
            SelectionError: a slice or a mask; a row in which a position is not fed, or means several columns.
        """
        asked = check_positions(positions)
        if isinstance(asked, tuple):
            asked = torch.tensor(asked).expand(len(self.real), -1)
        if not isinstance(asked, Tensor) or asked.dtype == torch.bool:
            raise SelectionError(
                f"one column per position needs numbers, got {positions!r}; for the columns of a slice or mask use "
                "select()",
                selector=positions,
            )
        if len(asked) != len(self.real):
            raise self._misfit(asked, f"an integer tensor has ({len(self.real)}, k)")
        hits = self._hits(asked.to(self.real.device))
        wrong = (hits.sum(-1) != 1).any(1)
        if bool(wrong.any()):
            raise SelectionError(
                f"positions {_spelled(asked)} are not one column each in {_rows(wrong)}: a token is cached, or several "
                "sequences are packed into the row",
                selector=positions,
            )
        return hits.int().argmax(-1)

    def _hits(self, asked: Tensor) -> Tensor:
        """For each row and each of the ``(batch, k)`` numbers the columns it means, as bools ``(batch, k, seq)``."""
        after = self._after()
        from_end = after[:, None] == -1 - asked[..., None]
        hits = from_end
        if bool((asked >= 0).any()):
            hits = torch.where((asked >= 0)[..., None], self.place[:, None] == asked[..., None], from_end)
        self._refuse_missing(asked)
        return hits & self.real[:, None]

    def _refuse_missing(self, asked: Tensor) -> None:
        """Raise if a row, or any of its packed sequences, has no such token, neither fed nor cached."""
        needed = torch.where(asked >= 0, asked + 1, -asked).amax(1)
        short = self._shortest()
        missing = short < needed
        if not self.more and bool(missing.any()):
            counts = short[missing][:_MOST_ROWS].tolist()
            raise SelectionError(
                f"positions {_spelled(asked)} need {int(needed[missing].max())} real tokens, but {_rows(missing)} "
                f"(counted from 0) have {counts!r}; a slice takes what there is",
                selector=asked,
            )

    def _slice(self, asked: slice) -> Tensor:
        bounds = (asked.start, asked.stop)
        from_start = asked.step not in (None, 1) or any(each is not None and each > 0 for each in bounds)
        after = self._after()
        found = self.real
        place = self.place if from_start or asked.stop == 0 else None
        total = None if place is None else place + after + 1  # the tokens of the sequence that a column belongs to
        begin: Any = 0
        if asked.start is not None and asked.start < 0:
            found = found & (after < -asked.start)
            begin = 0 if total is None else (total + asked.start).clamp(min=0)
        elif asked.start:
            found, begin = found & (place >= asked.start), asked.start
        if asked.stop is not None:
            found = found & (after >= -asked.stop if asked.stop < 0 else place < asked.stop)
        return found if asked.step in (None, 1) else found & ((place - begin) % asked.step == 0)

    def _within(self) -> Tensor:
        """The number of each column among the fed real tokens of its sequence."""
        count = self.real.long().cumsum(1) - 1
        if self.sequence is None:
            return count
        starts = torch.where(self.real, count, count.shape[1])
        least = torch.full_like(count, count.shape[1]).scatter_reduce(1, self.sequence, starts, "amin")
        return count - least.gather(1, self.sequence)

    def _after(self) -> Tensor:
        """How many real tokens of its sequence come after each column."""
        return self._sizes() - 1 - self._within()

    def _sizes(self) -> Tensor:
        """How many fed real tokens the sequence of each column has, ``(batch, seq)`` or ``(batch, 1)``."""
        if self.sequence is None:
            return self.real.sum(1, keepdim=True)
        counts = torch.zeros_like(self.sequence).scatter_add(1, self.sequence, self.real.long())
        return counts.gather(1, self.sequence)

    def _first(self, before: Tensor) -> Tensor:
        """What the places of each column's sequence begin with: the cached tokens continue in the first alone."""
        first = before.to(self.real.device)[:, None]
        return first if self.sequence is None else torch.where(self.sequence == 0, first, 0)

    def _shortest(self) -> Tensor:
        """The tokens of each row's shortest sequence, cached ones included; the most there can be if unknown."""
        most = torch.iinfo(torch.long).max
        if self.before is None:
            return torch.full_like(self.lengths, most)
        sizes = torch.where(self.real, self._sizes() + self._first(self.before), most)
        return torch.where(self.real.any(1), sizes.amin(1), self.before.to(self.real.device))

    def _misfit(self, asked: Tensor, wanted: str) -> SelectionError:
        return SelectionError(
            f"positions of shape {tuple(asked.shape)} do not fit tokens of shape {tuple(self.real.shape)}: {wanted}",
            selector=asked,
        )


def _packed(real: Tensor, position_ids: Tensor) -> Tensor | None:
    """The number of the packed sequence that each column belongs to; None if no row has a second one."""
    ids = position_ids.to(real.device).expand(real.shape)
    columns = torch.arange(real.shape[1], device=real.device)
    latest = torch.where(real, columns, -1).cummax(1).values  # the last real column up to here
    previous = torch.nn.functional.pad(latest[:, :-1], (1, 0), value=-1)
    earlier = ids.gather(1, previous.clamp(min=0))
    # After padding a lower id is no proof: generate() goes on from the id of right padding.
    falls = (ids < earlier) & (previous == columns - 1)
    begins = real & (previous >= 0) & (falls | (ids == 0))
    return begins.long().cumsum(1) if bool(begins.any()) else None


def _rows(which: Tensor) -> str:
    rows = which.nonzero().reshape(-1).tolist()
    shown = ", ".join(map(str, rows[:_MOST_ROWS]))
    return f"rows {shown}" + (f" and {len(rows) - _MOST_ROWS} more" if len(rows) > _MOST_ROWS else "")


def _spelled(asked: Tensor) -> str:
    same = bool((asked == asked[:1]).all())
    return repr(asked[0].tolist() if same else asked.tolist())
