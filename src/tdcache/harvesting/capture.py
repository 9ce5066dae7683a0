"""From a forward to rows: one taker at every site copies what is kept, in the hook itself."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdcache.caching import ActivationCaching
from tdcache.errors import CaptureError, RepeatedCallWarning, SelectionError, listed
from tdcache.function_calls.places import port_of
from tdcache.function_calls.sites import has_heads_first
from tdcache.harvesting.calling import Inputs, as_evaluated, call_model, model_device, to_device
from tdcache.harvesting.options import HarvestOptions
from tdcache.harvesting.row_rule import BatchRows, row_dims
from tdcache.harvesting.sharding import whole_tensor
from tdcache.modules import HookedModule
from tdcache.options import as_device
from tdcache.place_modules import sites_of
from tdcache.store.dtypes import DTYPES, count_lost
from tdcache.types import Pick

__all__ = [
    "BatchCapture",
    "Look",
    "Losses",
    "RowTaker",
    "STORED_DTYPES",
    "as_dtype",
]

STORED_DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")

Described = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a value."""


@dataclass(slots=True)
class RowTaker:
    """The callback of a harvest: the kept rows of one value, copied, cast, counted.

    A copy made in the hook cannot be changed by an in-place operation that comes later, and pins nothing.
    """

    dtype: torch.dtype | None = None
    pick: Pick = None
    rows: BatchRows | None = None
    """The rows of the running batch; None takes whole values."""
    seen: dict[str, Described] | None = None
    """Where given, dtype and shape of each value are noted, and one that does not fit the rows is taken whole."""
    calls: dict[str, int] = field(default_factory=dict)
    """How often each site was called in the running forward."""
    lost: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Values per site that the dtype cannot hold, and that became zero, since they were last asked for."""

    def __call__(self, *, module: nn.Module, key: Any, **seen: Any) -> Tensor:
        """Take the rows of one value."""
        path = key if isinstance(key, str) else key[-1]
        self.calls[path] = self.calls.get(path, 0) + 1
        port = port_of(path, "fwd" if "output" in seen else "fwd_pre", self.pick, module)
        tensor = port.read(module, seen["args"], seen["output"] if "output" in seen else seen["kwargs"])
        if not isinstance(tensor, Tensor):
            raise CaptureError(
                f"pick={self.pick!r} gives {type(tensor).__name__}, no tensor, at {path!r}", paths=(path,)
            )
        tensor = whole_tensor(tensor.detach(), module, path)
        if self.rows is not None and len(self.rows.grid) > 1 and has_heads_first(path) and tensor.dim() > 3:
            tensor = tensor.transpose(1, 2)  # a row per token, with the heads among its features
        if tensor.layout != torch.strided:
            raise CaptureError(f"{path!r} gives a tensor of layout {tensor.layout}, which has no rows", paths=(path,))
        rows = self.rows
        if self.seen is not None:
            self.seen[path] = tensor.dtype, tuple(tensor.shape)
            rows = rows if rows is not None and row_dims(tensor.shape, rows.grid) is not None else None
        return self._cast(tensor if rows is None else _chosen(tensor, rows, path), path, tensor)

    def _cast(self, rows: Tensor, path: str, of: Tensor) -> Tensor:
        if self.dtype is None or self.dtype == rows.dtype:
            return rows.clone() if rows.untyped_storage().data_ptr() == of.untyped_storage().data_ptr() else rows
        if not rows.is_floating_point():
            raise CaptureError(
                f"{path!r} has values of {rows.dtype}, which dtype={self.dtype} would change; leave dtype out, or "
                "select it in a harvest of its own",
                paths=(path,),
            )
        found = count_lost(rows, self.dtype)
        if found is not None:
            before = self.lost.get(path)
            self.lost[path] = found if before is None else (before[0] + found[0], before[1] + found[1])
        return rows.to(self.dtype)


def _chosen(tensor: Tensor, rows: BatchRows, path: str) -> Tensor:
    depth = row_dims(tensor.shape, rows.grid)
    if depth is None:
        what = "(batch, tokens)" if len(rows.grid) > 1 else "(batch,)"
        raise CaptureError(
            f"{path!r} has values of shape {tuple(tensor.shape)}, which do not begin with {what} = {rows.grid}, so "
            "that its rows cannot stand beside the others'; select it in a harvest of its own, pick= another value, or "
            "give rows='samples' for one row per sample",
            paths=(path,),
        )
    flat = tensor.flatten(0, depth - 1)
    return flat if rows.chosen is None else flat.index_select(0, rows.chosen.to(flat.device))


class Losses(NamedTuple):
    """What a cast has changed by more than rounding, by path; sites where it has changed nothing are left out."""

    overflow: Mapping[str, int] = {}
    """Values that the dtype cannot hold: finite ones, and infinities where it has none."""
    underflow: Mapping[str, int] = {}
    """Values other than zero that became zero."""

    def __bool__(self) -> bool:
        return bool(self.overflow or self.underflow)


@dataclass(frozen=True, slots=True)
class Look:
    """What a first forward gave."""

    values: Mapping[str, Tensor]
    """The rows of each site, or the whole value where it has no such rows."""
    lost: Losses
    """Values among them that the dtype cannot hold."""
    described: Mapping[str, Described]
    """Dtype and shape of each value before rows were taken."""
    seconds: float
    """How long it took."""


class BatchCapture:
    """A model with takers at its sites, called batch by batch without gradients, in eval mode.

    Args:
        model: every module's own training flag is put back.
        options: which sites, and what is taken there.

    Raises:
        SelectionError: no model, nothing selected, or an option that means nothing.
    """

    def __init__(self, model: nn.Module, options: HarvestOptions) -> None:
        if not isinstance(model, nn.Module):
            raise SelectionError(
                f"the model comes first, then data and path: got a {type(model).__name__} as the model"
            )
        self.model = model
        self.taker = RowTaker(as_dtype(options.dtype), options.pick)
        self.device = model_device(model) if options.device is None else as_device(options.device)
        self._forward = options.forward
        self._factory = ActivationCaching(
            options.select,
            callback=self.taker,
            directions=["fwd_pre_kwargs" if options.direction == "fwd_pre" else options.direction],
            match=options.match,
            device=options.held_on,
            stop_early=options.stop_early and options.forward is None,
            names=options.names,
        )
        self._inputs = Inputs.of(model, options.in_keys)
        self.paths = sites_of(model, options.select, options.names, match=options.match).paths
        """The paths of the selected sites, in the order of the model."""

    @contextmanager
    def open(self) -> Iterator[HookedModule]:
        """Put the takers in place, and the model in eval mode, for a block."""
        with as_evaluated(self.model), torch.no_grad(), self._factory.prepare(self.model) as hooked:
            yield hooked

    def look(self, batch: Any, rows: BatchRows) -> Look:
        """One forward of which it is not known yet whether its values have these rows; those that do not are whole.

        Raises:
            CaptureError: a site saw no value, or several.
        """
        seen: dict[str, Described] = {}
        self.taker.seen = seen
        try:
            with self.open() as hooked, warnings.catch_warnings():
                warnings.simplefilter("ignore", RepeatedCallWarning)  # an error here
                start = time.perf_counter()
                values = self.run(hooked, batch, rows)
                seconds = time.perf_counter() - start
        finally:
            self.taker.seen = None
        return Look(values, self.losses(), {path: seen[path] for path in self.paths}, seconds)

    def run(self, hooked: HookedModule, batch: Any, rows: BatchRows | None) -> Mapping[str, Tensor]:
        """One forward; the kept rows of every site (or whole values), copied to the CPU, valid for good.

        Raises:
            CaptureError: a site saw no value, or several.
        """
        self.taker.rows = rows
        self.taker.calls.clear()
        if self._forward is not None:
            self._forward(hooked, to_device(batch, self.device))
        else:
            call_model(hooked, to_device(batch, self.device), self._inputs)
        found: dict[str, Any] = dict(hooked.cache.items())
        missing = [path for path in self.paths if path not in found]
        if missing:
            raise CaptureError(
                f"{listed(missing)} saw no value in this forward, so rows would be missing; leave it out of select=",
                paths=missing,
            )
        again = {path: count for path, count in self.taker.calls.items() if count > 1}
        if again:
            raise CaptureError(
                f"{listed(list(again))} ran {max(again.values())} times in one forward (as layers that share weights "
                "do), and a row holds one value; select the modules around it, which run once",
                paths=tuple(again),
            )
        return found

    def losses(self) -> Losses:
        """What the dtype could not hold, since the last call."""
        counts = {path: (int(over), int(under)) for path, (over, under) in self.taker.lost.items()}
        self.taker.lost.clear()
        over, under = ({path: count[which] for path, count in counts.items() if count[which]} for which in (0, 1))
        return Losses(over, under)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype of stored values, also by its name.

    Raises:
        SelectionError: not one that floating values can be stored in.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype is None:
        return None
    if name not in STORED_DTYPES:
        raise SelectionError(f"dtype is one of {listed(STORED_DTYPES)}, or None for the model's; got {dtype!r}")
    return DTYPES[name]
