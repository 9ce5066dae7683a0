"""The options of a caching context as frozen data, and the taps that they attach to the selected sites.

A factory is picklable and reusable because everything here is data: whatever depends on one model or one run belongs to
the :class:`~tdcache.cache.recorder.Recorder` that this file makes for each entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from tensordict import TensorDictBase
from torch import nn

from tdcache.cache.call_taps import CallCapture
from tdcache.cache.channel import Channel
from tdcache.cache.gradient_taps import GradientTap, InputGradientTap, OutputAndGradientTap, PlainGradientTap
from tdcache.cache.keep import Keep
from tdcache.cache.part import PartFilter
from tdcache.cache.positions import PositionFilter
from tdcache.cache.recorder import Recorder
from tdcache.cache.stacking import GrowingStackBy, StackBy
from tdcache.cache.taps import CallbackTap, OutputTap, StopTap, ValueTap
from tdcache.cache.target import Target
from tdcache.current_call import CurrentCall, InSteps
from tdcache.errors import CaptureError, DirectionError
from tdcache.function_calls.places import CallPlace, calls_fit_graph
from tdcache.hooks.attach import (
    TransientGradInputHook,
    TransientGradOutputHook,
    attach,
    attach_gradient,
    attach_outputs,
    attach_ports,
)
from tdcache.hooks.directions import direction_row
from tdcache.hooks.factory import check_callback
from tdcache.hooks.port import InputPort, OutputPort
from tdcache.hooks.registrations import MultiHookHandle, Order
from tdcache.introspect import may_be_compiled
from tdcache.reducers import Last, Reducer
from tdcache.regions import Region
from tdcache.selection import Selection, Site
from tdcache.steps import Steps, check_steps
from tdcache.tokens import Positions, check_positions
from tdcache.types import Check, HookDirection, Pick, Removable

__all__ = ["Capture"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """The options of :class:`tdcache.ActivationCaching` that decide what is kept of a site.

    Raises:
        CaptureError: ``stack_by`` with several values per site.
        DirectionError: unknown direction, or a gradient with ``stop_early``.
        HookSignatureError: the callback lacks a parameter.
    """

    directions: tuple[HookDirection, ...]
    nested: bool
    callback: Callable[..., Any] | None
    pick: Pick
    keep: Keep
    reducer: Reducer
    batch_dims: int
    stack_by: str | Sequence[str] | None
    stop_early: bool
    prepend: bool
    check: Check
    region: Region
    """Rows, units and heads."""
    positions: Positions = None
    mask_key: Any = "auto"
    position_dim: int = 1
    steps: Steps = None
    keeps_all: bool = field(init=False)
    """Whether all positions, rows, units and heads are kept."""
    order: int = field(init=False)
    """The position of the taps among the hooks of a site."""
    _plain: bool = field(init=False)
    """Whether only the latest values are kept, unmodified."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keeps_all", self.positions is None and self.region.whole)
        object.__setattr__(self, "order", Order.FIRST if self.prepend else Order.CAPTURE)
        object.__setattr__(self, "_plain", self._is_plain())
        check_positions(self.positions)
        check_steps(self.steps)
        if self.stack_by is not None and self.pick == "all":
            raise CaptureError(
                f"stack_by={self.stack_by!r} stacks one value per site, and pick='all' keeps several; leave one out"
            )
        for direction in self.directions:
            row = direction_row(direction)
            check_callback(self.callback, (*row.params, "key", "direction"))
            if self.stop_early and row.gradient:
                raise DirectionError(
                    f"stop_early ends the forward, so no backward can bring {direction!r}; leave one of them out"
                )

    @property
    def needs_places(self) -> bool:
        """Whether the places must be known before the model runs: where gradients are watched on the way in."""
        with_callback = self.callback is not None and any(direction_row(each).gradient for each in self.directions)
        return "grad_in" in self.directions or with_callback

    def _is_plain(self) -> bool:
        asked = (self.callback, self.positions, self.steps)
        asks_more = any(each is not None for each in asked) or self.stop_early or not self.region.whole
        named = self.pick != "all" and not callable(self.pick)
        return self.keep == Keep() and isinstance(self.reducer, Last) and named and not asks_more

    def fits_graph_at(self, *, calls_only: bool) -> bool:
        """Whether the capture fits into a compiled graph: of outputs; at calls also of arguments, and with ``pick``."""
        if calls_only:
            return self._plain and self.directions in (("fwd",), ("fwd_pre",))
        return self._plain and self.directions == ("fwd",) and self.pick is None

    def recorder(
        self,
        model: nn.Module,
        cache: TensorDictBase,
        selection: Selection,
        places: Sequence[CallPlace],
        position_dims: Mapping[str, int],
        regions: Mapping[str, Region],
    ) -> Recorder:
        """The state of one open context: a channel per direction, each with its own node of the cache.

        ``position_dims`` and ``regions``: by path, the axis of positions where it is not ``position_dim``, and the part
        that is kept where its axes are not those of ``region``.

        Raises:
            CacheWriteError: the cache is locked and lacks entries.
            CaptureError: ``stack_by`` names no group of the pattern.
        """
        keep = self.keep if cache.device is None or self.keep.device else replace(self.keep, device=cache.device)
        stack_by: StackBy | None = None
        if self.stack_by is not None and places:
            stack_by = GrowingStackBy(self.stack_by, selection, [place.site for place in places])
        elif self.stack_by is not None:
            stack_by = StackBy(self.stack_by, selection)
        has_parts = self.pick == "all" or bool(places)
        by_value = self.check == "values"
        part = None if self.keeps_all and not regions else self._part(model, position_dims, regions)
        channels = []
        for direction in self.directions:
            target = Target(cache, direction if self.nested else None, self.batch_dims)
            if self.nested:
                target.ensure()
            if target.in_place and not has_parts:
                target.check(selection.paths if stack_by is None else tuple(stack_by.members))
            options = (stack_by, has_parts, part, self.steps is not None, by_value)
            channels.append(Channel(direction, selection.paths, keep, target, self.reducer, *options))
        fits = self.fits_graph_at(calls_only=bool(places) and not len(selection))
        return Recorder(channels, fits_graph=fits and channels[0].takes_aliases)

    def _part(
        self, model: nn.Module, position_dims: Mapping[str, int], regions: Mapping[str, Region]
    ) -> PartFilter | None:
        parts = (self.region, *regions.values())
        if self.positions is None and all(each.rows is None for each in parts):
            return None if all(each.whole for each in parts) else PartFilter(self.region, regions=regions)
        call = CurrentCall(model, InSteps(None, mask_key=None if self.positions is None else self.mask_key))
        call.wants_tokens = True
        positions = None
        if self.positions is not None:
            positions = PositionFilter(self.positions, call, self.position_dim, position_dims)
        return PartFilter(self.region, call, positions, regions)

    def place_calls(
        self, root: nn.Module, places: Sequence[CallPlace], recorder: Recorder, handle: MultiHookHandle
    ) -> None:
        """Attach taps to calls in the forwards of modules below ``root``; ``handle`` owns the registrations."""
        in_graph = recorder.fits_graph and may_be_compiled(root) and calls_fit_graph(places)
        live = self.keep.hold == "live"
        calls = CallCapture(recorder, self.callback, self.order, self.pick, live=live, in_graph=in_graph)
        calls.attach(root, places, handle, nested=self.nested, stop_early=self.stop_early)

    def place(self, selection: Selection, recorder: Recorder, handle: MultiHookHandle) -> None:
        """Attach the taps to the sites; ``handle`` owns the registrations."""
        channels = list(recorder.channels)
        if len(channels) > 1 and self._takes_pairs(channels):
            output, gradient = channels.pop(0), channels.pop(0)
            order = self.order
            pairs = [
                (module, OutputAndGradientTap(path, output, recorder, order, gradient).on_both)
                for path, module in zip(selection.paths, selection.modules, strict=True)
            ]
            attach_outputs(pairs, handle, order)
        for channel in channels:
            self._place_one(selection, channel, recorder, handle)
        if self.stop_early:
            self._place_stops(selection, recorder, handle)

    def _takes_pairs(self, channels: list[Channel]) -> bool:
        """Whether one tap per site can take both the output and its gradient, unmodified."""
        plain = [channel.direction for channel in channels[:2] if channel.takes_aliases]
        return plain == ["fwd", "bwd"] and not (self.callback or self.pick or self.prepend)

    def _place_one(self, selection: Selection, channel: Channel, recorder: Recorder, handle: MultiHookHandle) -> None:
        if self.callback is not None:
            for site in selection:
                handle.add(self._attach_callback(site, channel, recorder, self.callback))
        elif channel.direction == "grad_in":
            for site in selection:
                tap = InputGradientTap(InputPort(site.path, self.pick), channel, recorder, self.order)
                handle.add(_Forgotten(tap))
                handle.add(attach(site.module, tap.on_input, "fwd_pre_kwargs", order=self.order))
                handle.add(attach(site.module, tap.on_output, "fwd", order=self.order))
        elif channel.direction.startswith("fwd_pre"):
            taps = (ValueTap(InputPort(path, self.pick), channel, recorder, self.order) for path in selection.paths)
            pairs = ((site.module, tap) for site, tap in zip(selection, taps, strict=True))
            attach_ports(pairs, InputPort.direction, handle, self.order)
        else:
            attach_outputs(self._output_hooks(selection, channel, recorder), handle, self.order)

    def _output_hooks(
        self, selection: Selection, channel: Channel, recorder: Recorder
    ) -> list[tuple[nn.Module, Callable[..., Any]]]:
        as_it_is, order = self.pick is None and channel.takes_aliases, self.order
        places = zip(selection.paths, selection.modules, strict=True)
        if as_it_is and not channel.is_gradient:
            return [(module, OutputTap(path, channel, recorder, order).on_output) for path, module in places]
        if as_it_is and not self.prepend:
            return [(module, PlainGradientTap(path, channel, recorder, order).on_plain) for path, module in places]
        kind: Any = GradientTap if channel.is_gradient else ValueTap
        port = partial(OutputPort, pick=self.pick)
        return [(module, kind(port(path), channel, recorder, order).on_call) for path, module in places]

    def _attach_callback(
        self, site: Site, channel: Channel, recorder: Recorder, callback: Callable[..., Any]
    ) -> Removable:
        path, row = site.path, direction_row(channel.direction)
        key = (channel.direction, path) if self.nested else path
        tap = CallbackTap(path, channel, recorder, self.order, key=key, row=row, callback=callback)
        if not row.gradient:
            return attach(site.module, tap.on_call, channel.direction, order=self.order, path=path)
        kind = TransientGradOutputHook if row.name == "bwd_pre" else TransientGradInputHook
        return attach_gradient(site.module, kind(tap.on_gradient, self.order, path, tap.for_call))

    def _place_stops(self, selection: Selection, recorder: Recorder, handle: MultiHookHandle) -> None:
        recorder.stop_after = frozenset(selection.paths)
        before: bool = all(direction.startswith("fwd_pre") for direction in self.directions)
        for path, module, *_ in selection:
            stop = StopTap(path, recorder, Order.STOP)
            handle.add(attach(module, stop.on_call, "fwd_pre" if before else "fwd", order=Order.STOP))


class _Forgotten:
    """Clears the calls that an exception left open in a tap, when the tap's hooks are removed."""

    __slots__ = ("tap",)

    def __init__(self, tap: InputGradientTap) -> None:
        self.tap = tap

    def remove(self) -> None:
        """Clear the tap's open calls."""
        self.tap.forget()
