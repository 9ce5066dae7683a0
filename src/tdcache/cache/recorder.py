"""The state of one open caching context: when forwards begin and end, and what each site gave."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tdcache.cache.channel import Channel, overwritten
from tdcache.errors import CaptureError, RepeatedCallWarning, StopForward, UnfiredSiteWarning, listed
from tdcache.hooks.directions import direction_row
from tdcache.introspect import why_not_called
from tdcache.types import CacheKey

__all__ = ["Recorder", "in_backward"]


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread: a forward in there is a checkpoint's recomputation."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Recorder:
    """Takes values from the taps of one context and keeps the cache current.

    Its ``begin`` and ``end`` are hooks on the root of the model, so that ``hooked(td)``, ``hooked(x)`` and ``model(x)``
    all count as forwards.

    Args:
        channels: one per direction.
    """

    order = 1 << 10  # of the hooks on the root: behind every other hook of ours there

    def __init__(self, channels: Iterable[Channel]) -> None:
        self.channels = tuple(channels)
        self.open = True
        self.forwards = 0
        self.graphless: set[str] = set()
        self.stop_after: frozenset[str] = frozenset()
        self._depth = 0
        self._delivered = True
        self._warned: set[str] = set()
        self._to_stop: set[str] = set()
        self._serials = [0] * len(self.channels)
        self._starts = [0] * len(self.channels)
        self._latest: dict[tuple[int, CacheKey], int] = {}
        self._grads: dict[tuple[int, CacheKey], tuple[str, Tensor, int]] = {}
        for channel in self.channels:
            channel.idle()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(channel.direction for channel in self.channels)})"

    def begin(self, module: nn.Module, args: Any) -> None:
        """Pre-hook of the root: a forward begins."""
        if in_backward():
            return
        if self._depth and not _is_running(module):
            self._depth = 0  # the forward before was left by an exception that torch shows to no hook
        self._depth += 1
        if self._depth > 1:
            return
        self._delivered = False
        for index, channel in enumerate(self.channels):
            if channel.is_gradient:
                self._starts[index] = self._serials[index]
            channel.begin()
        if self.stop_after:
            self._to_stop = set(self.stop_after)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Hook of the root, also called when the forward raised: the forward is over."""
        if in_backward() or not self._depth:
            return
        self._depth -= 1
        if self._depth or torch.compiler.is_compiling():
            return
        try:
            self.deliver()
        except CaptureError:
            if output is not None:  # else an error is on its way already, and it is the one to see
                raise

    def deliver(self) -> None:
        """Write what the forward gave to the cache."""
        self._depth = 0
        self._delivered = True
        self.forwards += 1
        for channel in self.channels:
            channel.deliver()

    @property
    def running(self) -> bool:
        """Whether a forward of the root is under way."""
        return self._depth > 0

    def stop_when_done(self, path: str) -> None:
        """End the forward if ``path`` was the last site that was waited for.

        Raises:
            StopForward: it was.
        """
        self._to_stop.discard(path)
        if not self._to_stop and self.running:
            self.deliver()
            raise StopForward(path)

    def take(self, index: int, key: CacheKey, path: str, tensor: Any) -> None:
        """Keep a value; the slow path of every tap."""
        channel = self.channels[index]
        if channel.is_gradient:
            self.take_gradient(index, key, path, tensor, self.next_serial(index))
        elif not self.open or in_backward():
            return
        elif not channel.latest_only:
            channel.take(key, path, tensor)
        elif not self.running:
            channel.write_now(key, path, tensor)
        else:
            if key in channel.values or key in channel.copies:
                self._warn_of_second_call(path)
            channel.take(key, path, tensor)

    def next_serial(self, index: int) -> int:
        """The number of a call whose gradient is awaited; gradients arrive in another order."""
        self._serials[index] += 1
        return self._serials[index]

    def take_gradient(self, index: int, key: CacheKey, path: str, grad: Any, serial: int) -> None:
        """Keep a gradient when it arrives; of several calls of one module the latest counts."""
        channel = self.channels[index]
        if not self.open or serial <= self._starts[index] and channel.latest_only:
            return
        channel.fired.add(path)
        if not channel.latest_only:
            channel.take(key, path, grad, serial=serial)
            return
        at = (index, key)
        latest = self._latest.get(at, 0)
        if latest > serial:
            self._warn_of_second_call(path)
            return
        self._latest[at] = serial
        kept = channel.put_now(key, grad)
        if isinstance(kept, Tensor):
            self._grads[at] = (path, kept, kept._version)

    def refresh(self) -> None:
        """Bring the cache up to date: deliver, compute the reducers, check the aliases.

        Raises:
            InplaceModificationError: a kept alias was overwritten.
        """
        if not self._delivered and not self.running:
            self.deliver()
        for channel in self.channels:
            channel.compute()
        self.check()

    def check(self) -> None:
        """Raise if anything that is kept was overwritten since."""
        for channel in self.channels:
            channel.check()
        changed = [path for path, grad, version in self._grads.values() if grad._version != version]
        if changed:
            raise overwritten(changed)

    def forget(self) -> None:
        """Drop every value and every entry that was written."""
        self._grads.clear()
        self._latest.clear()
        for channel in self.channels:
            channel.forget()

    def close(self) -> None:
        """Take nothing any more and let go of everything but what is in the cache."""
        self.open = False
        self._grads.clear()
        for channel in self.channels:
            channel.release()

    def report_unfired(self, model: nn.Module) -> None:
        """Warn of the selected sites that saw nothing, by name, if a forward was completed."""
        for channel in self.channels if self.forwards else ():
            silent = [path for path in channel.paths if path not in channel.fired]
            if silent:
                warnings.warn(self._unfired_message(model, channel, silent), UnfiredSiteWarning, stacklevel=2)

    def _unfired_message(self, model: nn.Module, channel: Channel, silent: list[str]) -> str:
        what = f"{len(silent)} of {len(channel.paths)} selected sites saw no {channel.direction!r} value: {listed(silent, 20)}"
        graphless = [path for path in silent if path in self.graphless]
        if channel.is_gradient and graphless:
            noun = direction_row(channel.direction).noun.removeprefix("grad_")
            return f"{what}; the {noun} of {listed(graphless)} did not require grad (no_grad, frozen or integer-only input?)"
        if channel.is_gradient:
            return f"{what}; no gradient reached them: was backward() called inside the block?"
        reasons = dict.fromkeys(reason for path in silent if (reason := why_not_called(model, path)))
        return "; ".join([what, *reasons])

    def _warn_of_second_call(self, path: str) -> None:
        if path in self._warned:
            return
        self._warned.add(path)
        warnings.warn(
            f"{path!r} ran more than once in one forward and only the last value is kept; "
            "keep every call with reducer=Stack(), or the first with reducer=First()",
            RepeatedCallWarning,
            stacklevel=2,
        )


def _is_running(module: nn.Module) -> bool:
    """Whether an earlier call of ``module`` is under way up the stack; slow, and asked only in doubt."""
    frame, calls = sys._getframe(2), 0
    while frame is not None and calls < 2:  # the first is the call that begins now
        calls += frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals.get("self") is module
        frame = frame.f_back  # type: ignore[assignment]
    return calls == 2
