"""Interprets attention masks of every form: which columns are tokens.

Libraries disagree on whether True means "look here" or "leave out", on whether a float is a flag or a summand, and on
the axes. A mask taken the wrong way round averages the padding and nothing else, so what a mask means is decided here
once, and a mask that can be read in two ways is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tdcache.errors import SelectionError

__all__ = ["attended_columns", "flags_of", "real_columns"]

# Summands at or below this leave a column out; -1e4 is what half precision uses.
_LEFT_OUT = -1e3


def real_columns(mask: Tensor, name: Any, *, marks_padding: bool = False) -> Tensor:
    """Which columns a mask ``(batch, columns)`` says are tokens, as bools.

    Bools and integers are flags: 1 is a token, or padding if ``marks_padding``. Floats are flags if they are 0 and 1,
    summands if they are 0 and very negative.

    Raises:
        SelectionError: the values are neither, or all zero floats, which can be both.
    """
    if not mask.is_floating_point():
        flags = flags_of(mask, name)
        return ~flags if marks_padding else flags
    adds = (mask == 0) | (mask <= _LEFT_OUT)
    if marks_padding and bool(adds.all()):
        return mask == 0  # torch adds a float key padding mask
    if not marks_padding and bool(((mask == 0) | (mask == 1)).all()) and bool((mask == 1).any()):
        return mask == 1
    if bool(adds.all()) and bool((mask != 0).any()):
        return mask == 0
    raise SelectionError(
        f"mask {name!r} holds floats of which it cannot be told whether 0 keeps a column or leaves it out "
        f"(from {float(mask.min()):g} to {float(mask.max()):g}); pass bools, or 0 and 1 as integers",
        selector=name,
    )


def flags_of(mask: Tensor, name: Any) -> Tensor:
    """A mask of bools, or of integers 0 and 1, as bools.

    Raises:
        SelectionError: another number, such as that of a packed sequence.
    """
    if mask.dtype == torch.bool:
        return mask
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise SelectionError(
            f"mask {name!r} holds integers other than 0 and 1 (from {int(mask.min())} to {int(mask.max())}); of packed "
            "rows, pass 0 and 1, and position_ids that begin again",
            selector=name,
        )
    return mask == 1


def attended_columns(mask: Tensor, name: Any, *, end: int) -> Tensor:
    """Which of the first ``end`` keys of a mask ``(batch, [heads,] queries, keys)`` are tokens, as bools.

    A key is a token if a query that is one looks at it. The last query is at key ``end - 1``. A row of padding is
    often opened to every key, those after it included, so that softmax has something to do: such rows do not count,
    unless all rows of the sample are equal.

    Raises:
        SelectionError: integers other than flags, floats that are no summands, or heads that see different keys.
    """
    if mask.is_floating_point():
        if not bool(((mask == 0) | (mask <= _LEFT_OUT)).all()):
            raise SelectionError(
                f"mask {name!r} of shape {tuple(mask.shape)} adds other values than 0 and very negative ones; give a "
                "(batch, seq) mask by mask_key=, or mask_key=None to count columns",
                selector=name,
            )
        sees = mask == 0
    else:
        sees = flags_of(mask, name)
    if sees.dim() == 4:
        if bool((sees != sees[:, :1]).any()):
            raise SelectionError(
                f"mask {name!r} of shape {tuple(mask.shape)} differs between heads; give a (batch, seq) mask by "
                "mask_key=, or mask_key=None to count columns",
                selector=name,
            )
        sees = sees[:, 0]
    sees = sees[..., :end]
    queries = sees.shape[1]
    at = torch.arange(end - queries, end, device=sees.device)
    open_rows = sees.all(-1) & (at < end - 1)
    looks = sees.any(-1)
    # Rows that look at nothing are padding and say nothing about the rest.
    first = sees.gather(1, looks.int().argmax(1)[:, None, None].expand(-1, 1, end))
    alike = ((sees == first).all(-1) | ~looks).all(1)
    counts = ~open_rows | alike[:, None]
    return (sees & counts[..., None]).any(1)
