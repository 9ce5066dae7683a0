"""The state of one open caching context: when forwards begin and end, and what each site produced.

Taps know their own site and nothing else. Whether a value belongs to the current forward, to another thread, to a
gradient of an older forward, or to a module that was called on its own is decided here.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from tdcache.cache.channel import Channel
from tdcache.cache.ownership import storages_of
from tdcache.cache.target import CLOSED
from tdcache.current_call import CurrentCall
from tdcache.errors import CaptureError, RepeatedCallWarning, StopForward, UnfiredSiteWarning, listed, warn_user
from tdcache.function_calls.places import CallTaps
from tdcache.hooks.directions import direction_row
from tdcache.hooks.transient import Transient
from tdcache.hooks.values import leaves
from tdcache.inplace import storage_address
from tdcache.introspect import (
    NO_TASK,
    backward_task,
    break_graph,
    calls_on_stack,
    in_backward,
    keep_frames_out_of_graphs,
    why_not_called,
)
from tdcache.named_places import Names
from tdcache.types import CacheKey

__all__ = ["Recorder"]

# Looked up once: it runs in every forward.
is_grad_enabled = torch.is_grad_enabled


class Recorder(Transient):
    """Takes values from the taps of one context and keeps the cache current.

    Its ``begin`` and ``end`` are hooks on the root of the model, so that ``hooked(td)``, ``hooked(x)`` and ``model(x)``
    all count as forwards. Forwards that run in other threads than the opener's are ignored.

    Args:
        channels: one per direction.
        fits_graph: whether its hooks may be traced into a compiled graph; otherwise they cause a graph break.
    """

    order = 1 << 10  # of the hooks on the root: after all other hooks of this library there

    # How every recorder begins; set on the class, since one is made whenever a context is entered.
    open = True
    collecting = False
    """Whether a backward is running at the end of which gradients are delivered."""
    forwards = 0
    gate: CurrentCall | None = None
    """Which forwards of ``generate()`` count (``steps=``); None for all."""
    left_out = 0
    """How many forwards ``steps=`` left out."""
    names: Names | None = None
    """The table of canonical names that sites are called by, where they are."""
    stop_after: frozenset[str] = frozenset()
    _depth = 0
    _delivered = True
    _serial = 0
    _graph = False
    """Whether the latest forward made a graph."""
    _outside: Sequence[int] = ()
    """If a graph was made: the storages of the model's inputs and outputs."""
    _written: Collection[int] | None = None
    _root: nn.Module | None = None

    def __init__(self, channels: Iterable[Channel], *, fits_graph: bool = False) -> None:
        self.channels = tuple(channels)
        self.forward_channels: list[Channel] = []
        self.gradient_channels: list[Channel] = []
        for channel in self.channels:
            (self.gradient_channels if channel.is_gradient else self.forward_channels).append(channel)
        self.fits_graph = fits_graph
        self.graphless: set[str] = set()
        self.repeated: set[str] = set()
        """Sites that ran twice in a compiled graph, which cannot warn itself."""
        self.calls: list[CallTaps] = []
        """The taps at function calls inside forwards."""
        self._thread = get_ident()
        self._elsewhere: dict[int, int] = {}
        """How many forwards run in each other thread; while there are any, every hook takes the slow path."""
        self._lock = RLock()
        """Held while values are delivered: another thread's forward may begin or end at the same time."""
        self._warned: set[str] = set()
        self._to_stop: set[str] = set()
        for channel in self.forward_channels:
            channel.idle()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(channel.direction for channel in self.channels)})"

    def begin(self, module: nn.Module, args: Any) -> None:
        """Pre-hook of the root: a forward begins."""
        if backward_task() != NO_TASK:
            return
        if get_ident() != self._thread:
            self._begin_elsewhere()
            return
        self._begin(module)

    def _begin(self, module: nn.Module) -> None:
        if self._depth and calls_on_stack(module) > 1:
            self._depth += 1
            return
        self._depth = 1  # also if an exception that torch shows to no hook ended the previous forward
        if module is not self._root and self._root is not None:  # an encoder, and then the model that decodes
            for channel in self.channels:
                channel.target.set_apart()
        self._root = module
        self._delivered = False
        if self.stop_after:
            self._to_stop = set(self.stop_after)
        alone = not self._elsewhere
        for channel in self.channels:
            channel.begin(alone)
        if alone and self._elsewhere:  # another thread's forward began at this very moment
            for channel in self.channels:
                channel.mark_absent()

    @property
    def is_foreign(self) -> bool:
        """Whether what a hook sees now belongs to a forward of another thread."""
        if self._elsewhere:
            return get_ident() in self._elsewhere
        return not self._depth and get_ident() != self._thread

    def skips(self, path: str) -> bool:
        """Whether to ignore what a hook sees now at ``path``: another thread's forward, or a step that is left out.

        Raises:
            ContextError: the step is not known at this point.
        """
        return self.is_foreign or (self.gate is not None and not self.gate.is_due(path))

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook of the root, also called when the forward raised: a forward ends."""
        if backward_task() != NO_TASK:
            return
        if get_ident() != self._thread:
            self._end_elsewhere()
            return
        if self._depth != 1:
            self._depth = max(0, self._depth - 1)
            return
        raised = output is None and sys.exc_info()[1] is not None  # torch calls this in its own except block then
        self._graph = is_grad_enabled()
        if self._graph:  # what the user holds of this forward, by storage, so that no tensor is kept alive
            handed = (*args, output) if type(output) is Tensor else [each for _, each in leaves((args, output))]
            self._outside = [storage_address(each) for each in handed if isinstance(each, Tensor)]
        try:
            self.forwards += not raised
            self.deliver()
        except CaptureError:
            if not raised:
                raise

    def _begin_elsewhere(self) -> None:
        thread = get_ident()
        with self._lock:
            self._elsewhere[thread] = self._elsewhere.get(thread, 0) + 1
            for channel in self.channels:
                channel.idle()

    def _end_elsewhere(self) -> None:
        with self._lock:
            left = self._elsewhere.pop(get_ident(), 0) - 1
            if left > 0:
                self._elsewhere[get_ident()] = left

    def deliver(self) -> None:
        """Write the values of the forward to the cache."""
        with self._lock:
            self._depth = 0
            self._delivered = True
            while self.repeated:  # by a compiled graph
                self.warn_of_second_call(self.repeated.pop())
            for channel in self.forward_channels:
                channel.deliver()

    @property
    def running(self) -> bool:
        """Whether a forward of the root is running."""
        return self._depth > 0

    def stop_when_done(self, path: str) -> None:
        """End the forward if ``path`` was the last site still awaited.

        Raises:
            StopForward: ``path`` was the last one.
        """
        if self.is_foreign:
            return
        self._to_stop.discard(path)
        if not self._to_stop and self.running:
            self.forwards += 1
            self._graph = False
            self.deliver()
            raise StopForward(path, source=self)

    def take(self, channel: Channel, key: CacheKey, path: str, tensor: Any) -> None:
        """Keep a value of the forward; the slow path of every tap."""
        if not self.open or in_backward() or self.skips(path):
            return
        if not channel.latest_only:
            channel.take(key, path, tensor)
        elif self.running:
            if channel.has(key):
                self.warn_of_second_call(path)
            channel.take(key, path, tensor)
        elif get_ident() == self._thread:
            channel.write_now(key, path, tensor)

    def take_gradient(self, channel: Channel, key: CacheKey, path: str, grad: Any, number: int, serial: int) -> None:
        """Keep a gradient when it arrives.

        Args:
            channel: the channel of its direction.
            key: its key in the channel.
            path: the site.
            grad: the gradient.
            number: the forward that it belongs to; gradients of an earlier forward than the latest are dropped.
            serial: the call that it belongs to; of several calls in one forward the latest wins.
        """
        if not self.open or (channel.latest_only and number != channel.number):
            return
        self._collect()
        if channel.latest_only:
            latest = channel.arrived.get(key, 0)
            if latest != serial and channel.has(key):
                self.warn_of_second_call(path)
                if latest > serial:
                    return
            channel.arrived[key] = serial
        channel.take(key, path, grad, serial=serial)

    def accepts(self, channel: Channel, number: int) -> bool:
        """Whether a gradient of forward ``number`` may be written into ``channel.values`` directly."""
        if not self.open or number != channel.number:
            return False
        self._collect()
        return channel.accepting == number

    def next_serial(self) -> int:
        """A new number for a call whose gradient is watched."""
        self._serial += 1
        return self._serial

    def _collect(self) -> None:
        """Schedule delivery of this backward's gradients for its end."""
        if not self.collecting:
            self.collecting = True
            for channel in self.gradient_channels:
                channel.accepting = channel.number if channel.takes_aliases else -1
            torch.autograd.Variable._execution_engine.queue_callback(self._deliver_gradients)

    def _deliver_gradients(self) -> None:
        with self._lock:  # a backward of another thread may end while the context is left
            self.collecting = False
            for channel in self.gradient_channels:
                channel.deliver()

    def refresh(self) -> None:
        """Bring the cache up to date: deliver, compute the reducers, check the aliases.

        Raises:
            InplaceModificationError: a kept alias was overwritten.
        """
        with self._lock:
            if not self._delivered and not (self.running and calls_on_stack(self._root)):
                self.forwards += not self.running  # a compiled forward, whose end cannot be seen from inside its graph
                self.deliver()
            if self.collecting and not in_backward():  # a backward that raised runs no end callback
                self._deliver_gradients()
            for channel in self.channels:
                if channel.reductions is not None:
                    channel.compute()
                channel.check()

    def forget(self) -> None:
        """Drop every value and every entry that was written."""
        for channel in self.channels:
            channel.forget()

    def settle(self, model: nn.Module) -> None:
        """The context exits: copy what others could still write to."""
        outside = partial(self._written_outside, model) if self._graph else None
        for channel in self.channels:
            channel.settle(outside)

    def _written_outside(self, model: nn.Module) -> Collection[int]:
        """The storages that somebody can write to: the model's, and those of its inputs and outputs."""
        if self._written is None:
            self._written = storages_of(model).union(self._outside)
        return self._written

    def close(self) -> None:
        """Stop recording and drop all state except the cache itself.

        Tensor hooks on a graph hold this object, and the cache may hold the graph. So this object must not refer to the
        cache any more, or the two would keep each other alive.
        """
        self.open = False
        for channel in self.channels:
            channel.release()
            channel.target, channel.part = CLOSED, None  # the part knows the model
        self.calls.clear()
        self._root = None

    @property
    def saw_nothing(self) -> bool:
        """Whether no forward was completed and no site fired, so that there is nothing to report about any site."""
        return not (self.forwards or self.left_out or any(each.all_fired or each.fired for each in self.channels))

    def report_unfired(self, model: nn.Module) -> None:
        """Warn of the selected sites that saw nothing, by name, if a forward was completed."""
        for channel in self.channels:
            if channel.waiting:
                warn_user(
                    f"{listed(list(map(str, channel.waiting)), 20)} ran outside a forward of the model, without the "
                    "others that stack_by= would stack them with, so nothing was kept of them; run the model, or leave "
                    "stack_by= out",
                    UnfiredSiteWarning,
                )
        if self.gate is not None and self.left_out and not self.forwards:
            warn_user(
                f"steps={self.gate.options.steps!r} left out every forward of the model, {self.left_out} in number, so "
                "nothing was kept; a forward without a cache is prefill",
                UnfiredSiteWarning,
            )
        for channel in self.channels if self.forwards else ():
            silent = () if channel.all_fired else [path for path in channel.paths if path not in channel.fired]
            if silent:
                warn_user(self._unfired_message(model, channel, silent), UnfiredSiteWarning)
        if self.calls and self.forwards:
            for sentence in dict.fromkeys(each for taps in self.calls for each in taps.unfired):
                warn_user(sentence, UnfiredSiteWarning)

    def _unfired_message(self, model: nn.Module, channel: Channel, silent: Sequence[str]) -> str:
        count = f"{len(silent)} of {len(channel.paths)} selected sites"
        what = f"{count} saw no {channel.direction!r} value: {listed(silent, 20)}"
        graphless = [path for path in silent if path in self.graphless]
        if channel.is_gradient and graphless:
            noun = direction_row(channel.direction).noun.removeprefix("grad_")
            why = "did not require grad (no_grad, frozen or integer-only input?)"
            return f"{what}; the {noun} of {listed(graphless)} {why}"
        if channel.is_gradient:
            return f"{what}; no gradient came, or they did not require grad: was backward() called inside the block?"
        paths = silent
        if self.names is not None:
            places = [self.names[path] for path in silent]
            what = f"{what}, which are {listed([place.where for place in places])}"
            paths = [place.path.partition("::")[0] for place in places]
        reasons = dict.fromkeys(reason for path in paths if (reason := why_not_called(model, path)))
        return "; ".join([what, *reasons])

    def warn_of_second_call(self, path: str) -> None:
        """Warn, once per site, that only one of several values is kept."""
        if path in self._warned:
            return
        self._warned.add(path)
        warn_user(
            f"{path!r} ran more than once in one forward and only the last value is kept; "
            "keep every call with reducer=Stack(), or the first with reducer=First()",
            RepeatedCallWarning,
        )


@torch.compiler.substitute_in_graph(Recorder.begin, skip_signature_check=True)
def _begin_in_graph(self: Recorder, module: nn.Module, args: Any) -> None:
    """:meth:`Recorder.begin` in a compiled graph, which no other thread and no backward runs."""
    if not self.fits_graph:
        break_graph()
    self._begin(module)


@torch.compiler.substitute_in_graph(Recorder.end, skip_signature_check=True)
def _end_in_graph(self: Recorder, module: nn.Module, args: Any, output: Any) -> None:
    """:meth:`Recorder.end` in a compiled graph, which cannot deliver: that is done when the cache is read."""
    if not self.fits_graph:
        break_graph()
    self._depth = max(0, self._depth - 1)


keep_frames_out_of_graphs(Recorder.begin, Recorder.end)
