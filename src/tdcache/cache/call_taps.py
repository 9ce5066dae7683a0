"""Taps of a caching context at function calls inside a forward.

Which calls a forward makes is known only while it runs, so these taps are made when a call is first seen, whereas those
of modules are attached when the context is entered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tdcache.cache.channel import Channel
from tdcache.cache.gradient_taps import GradientTap
from tdcache.cache.recorder import Recorder
from tdcache.cache.taps import CallbackTap, OutputTap, StopTap, ValueTap
from tdcache.errors import CaptureError
from tdcache.function_calls.places import CallPlace, CallTaps
from tdcache.hooks.directions import direction_row
from tdcache.hooks.port import OutputPort, Port
from tdcache.hooks.registrations import MultiHookHandle, Order
from tdcache.selection import Site
from tdcache.types import Pick

__all__ = ["CallCapture"]


@dataclass(frozen=True, slots=True)
class CallCapture:
    """Attaches the taps of a capture to function calls.

    Args:
        recorder: receives their values.
        callback: the user's callback, or None.
        order: their position among the handlers of a call.
        pick: which tensor of a value to take.
        live: whether values are kept with their graph.
        in_graph: whether a compiled graph may be made of the taps.
    """

    recorder: Recorder
    callback: Callable[..., Any] | None
    order: int
    pick: Pick
    live: bool
    in_graph: bool = False

    def attach(
        self,
        root: nn.Module,
        places: Sequence[CallPlace],
        handle: MultiHookHandle,
        *,
        nested: bool,
        stop_early: bool,
    ) -> None:
        """Attach the taps at ``places``; ``handle`` owns the registrations."""
        for channel in self.recorder.channels:
            taps = CallTaps(
                places,
                _MakeTap(self, channel, nested),
                channel.direction,
                self.pick,
                use="watch" if channel.is_gradient or self.live else "read",
                order=self.order,
                as_user=self.callback is not None,
            )
            taps.attach(root, handle, made=self.in_graph)
            self.recorder.calls.append(taps)
        if stop_early:
            self._attach_stops(root, places, handle)

    def _attach_stops(self, root: nn.Module, places: Sequence[CallPlace], handle: MultiHookHandle) -> None:
        for place in places:
            if place.pattern.labels is None:
                raise CaptureError(
                    f"stop_early=True ends the forward after the last site, and which calls {place.selector!r} means "
                    "is not known before the forward has run; spell the names out, as in '::softmax' or '::(q|k)', or "
                    "leave stop_early= out"
                )
        paths = frozenset(f"{place.site.path}::{label}" for place in places for label in place.pattern.labels or ())
        self.recorder.stop_after |= paths
        before = all(channel.direction.startswith("fwd_pre") for channel in self.recorder.channels)
        direction = self.recorder.channels[0].direction if before else "fwd"
        CallTaps(places, self._stop_at, direction, order=Order.STOP).attach(root, handle)

    def _stop_at(self, site: Site, port: Port) -> StopTap:
        return StopTap(site.path, self.recorder, Order.STOP)


@dataclass(frozen=True, slots=True)
class _MakeTap:
    """Makes the tap of one channel at one call."""

    capture: CallCapture
    channel: Channel
    nested: bool

    def __call__(self, site: Site, port: Port) -> ValueTap | CallbackTap | GradientTap | OutputTap:
        self.channel.admit(site)
        capture, channel, path = self.capture, self.channel, site.path
        if capture.callback is not None:
            row = direction_row(channel.direction)
            key = (channel.direction, path) if self.nested else path
            return CallbackTap(
                path, channel, capture.recorder, capture.order, key=key, row=row, callback=capture.callback
            )
        if capture.pick is None and channel.takes_aliases and not channel.is_gradient and isinstance(port, OutputPort):
            return OutputTap(path, channel, capture.recorder, capture.order)
        if channel.is_gradient and isinstance(port, OutputPort):
            return GradientTap(port, channel, capture.recorder, capture.order)
        return ValueTap(port, channel, capture.recorder, capture.order)
