"""Whether what the model gives now belongs to the store: the same rows again, in the same shapes.

The spec names the model, the data and the options, but not everything that a forward depends on. So a store that is
there is asked: its first rows are computed again and compared. And every batch is compared with the shapes and dtypes
that the spec promises before it can reach a file, because a unit of another shape would make the store unreadable.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tdcache.errors import CaptureError, SpecError
from tdcache.harvesting.capture import BatchCapture, Losses
from tdcache.harvesting.row_rule import RowRule
from tdcache.harvesting.sizes import dtype_name
from tdcache.harvesting.source import Source
from tdcache.store.shard import Shard
from tdcache.store.writer import StoreWriter, site_column

__all__ = ["check_like", "refuse_overflow", "run_again"]

# Another machine, thread count or kernel rounds otherwise, and errors of one layer grow in the next; another
# computation moves values by about their own size.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_COARSE = 0.15
_SMALL = 0.01  # of a site's largest value: features below it are held against this, as they share its rounding


def run_again(capture: BatchCapture, source: Source, rule: RowRule, shard: Shard, writer: StoreWriter) -> None:
    """Compute the first rows of the store's first shard once more and compare.

    Raises:
        SpecError: they differ by more than rounding; the message names the site and how far.
    """
    batch = source.first()
    rows = rule(batch, first=0)
    rows = rows.first(min(len(rows), shard.rows))
    if not len(rows):
        return
    with capture.open() as hooked:
        values = capture.run(hooked, batch, rows)
        capture.losses()
    for path, now in values.items():
        there = shard.column(site_column(path))[: len(rows)]
        if now.shape != there.shape or now.dtype != there.dtype:
            check_like(values, writer.spec["sites"], 0)
        apart = _distance(now, there)
        if apart > _TOLERANCE.get(now.dtype, _COARSE):
            raise SpecError(
                f"{writer.folder} holds other values than this computation gives: at {path!r} the first batch's rows "
                f"differ by {apart:.2g} of a feature's largest; something that the spec does not know has changed (an "
                "object that forward= uses, the model's code, another library version). Harvest into a new folder, or "
                "accept what is there with recheck=False",
                path=writer.folder,
                fields=("values",),
            )


def _distance(now: Tensor, there: Tensor) -> float:
    """The largest difference, as a part of its feature's largest value; 0 where both have the same NaNs and infinities.

    By features, because one of thousands that is a thousand times as large, as many models have, would hide the others.
    """
    if not now.numel():
        return 0.0
    one, other = (each.double().reshape(len(each), -1) for each in (now, there))
    finite = torch.isfinite(one) & torch.isfinite(other)
    if not torch.equal(torch.where(finite, 0.0, one).nan_to_num(5.0), torch.where(finite, 0.0, other).nan_to_num(5.0)):
        return float("inf")
    apart, size = (torch.where(finite, each, 0.0).abs().amax(0) for each in (one - other, other))
    floor = max(_SMALL * float(size.max()), torch.finfo(torch.float32).tiny)
    return float((apart / size.clamp(min=floor)).max())


def check_like(values: Mapping[str, Tensor], sites: Mapping[str, Mapping[str, Any]], batch: int) -> None:
    """Refuse rows that are not as the spec says, before they reach a file.

    Raises:
        CaptureError: it names the site, what was promised and what came.
    """
    for path, value in values.items():
        shape, dtype = tuple(sites[path]["shape"]), sites[path]["dtype"]
        if tuple(value.shape[1:]) == shape and dtype_name(value.dtype) == dtype:
            continue
        raise CaptureError(
            f"{path!r} gives rows of another kind in batch {batch} than in the first:\n"
            f"  first: shape {shape}, {dtype}\n"
            f"  now:   shape {tuple(value.shape[1:])}, {dtype_name(value.dtype)}\n"
            "rows of one store are alike: pad or resize the inputs to one size, or pick= another value; what was "
            "stored before stays readable",
            paths=(path,),
        )


def refuse_overflow(lost: Losses, dtype: torch.dtype | None, batch: int) -> None:
    """Refuse values that the stored dtype cannot hold.

    Raises:
        CaptureError: there are some; it names the first site that has them.
    """
    for path, count in lost.overflow.items():
        raise CaptureError(
            f"{count} values at {path!r} in batch {batch} cannot be held by {dtype}; store torch.bfloat16 or "
            "torch.float32, or give overflow='count' to have them stored as they come out",
            paths=(path,),
        )
