"""The taps of a caching context: small objects that take a value at one site and hand it to their channel.

Their bound methods are registered as hooks, which torch calls faster than objects with ``__call__``. Each common case
has its own tap that does no more than a hand-written hook; all other cases go through a port.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.cache.channel import Channel
from tdcache.cache.stand_ins import CopyInGraph
from tdcache.errors import CaptureError
from tdcache.hooks.directions import Direction
from tdcache.hooks.port import OutputPort, Port, Steps
from tdcache.hooks.transient import Transient
from tdcache.introspect import keep_frames_out_of_graphs, keep_out_of_graphs
from tdcache.types import CacheKey

if TYPE_CHECKING:
    from tdcache.cache.recorder import Recorder

__all__ = [
    "CallbackTap",
    "OutputTap",
    "StopTap",
    "Tap",
    "ValueTap",
    "part_key",
]


class Tap(Transient):
    """Base of the taps: a site, the channel that its values go to, and the recorder of the context."""

    __slots__ = ("channel", "order", "path", "recorder")

    def __init__(self, path: str, channel: Channel, recorder: Recorder, order: int) -> None:
        self.path = path
        self.channel = channel
        self.recorder = recorder
        self.order = order

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    @property
    def use(self) -> str:
        """How the tap uses values derived from an attention call: it reads them, or follows their gradients."""
        return "watch" if self.channel.is_gradient or self.channel.keep.hold == "live" else "read"


class OutputTap(Tap):
    """Takes the output of a module unmodified: the fast path, at the cost of a hook that writes to a dict."""

    __slots__ = ("values",)

    def __init__(self, path: str, channel: Channel, recorder: Recorder, order: int) -> None:
        self.path = path
        self.channel = channel
        self.recorder = recorder
        self.order = order
        self.values = channel.values

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the output of a module, whatever its type."""
        values = self.values
        path = self.path
        try:
            if isinstance(output, Tensor) and not output._version and path not in values:
                values[path] = output
                return
        except RuntimeError:  # an inference tensor, which has no version counter
            pass
        self._take_part(module, args, output)  # or written in place; a second call; a call outside a forward

    def _take_part(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self.path
        if type(output) is tuple and output and isinstance(output[0], Tensor):  # (hidden states, cache, ...)
            tensor = output[0]
            if path not in self.values and not tensor.is_inference() and not tensor._version:
                self.values[path] = tensor
                return
        else:
            tensor = OutputPort(path).read(module, args, output)
        self.recorder.take(self.channel, path, path, tensor)

    on_call = on_output  # as the taps at calls are asked


@torch.compiler.substitute_in_graph(OutputTap.on_output, skip_signature_check=True)
def _on_output_in_graph(self: OutputTap, module: nn.Module, args: Any, output: Any) -> None:
    """:meth:`OutputTap.on_output` in a compiled graph."""
    _keep_in_graph(self, output if isinstance(output, Tensor) else OutputPort(self.path).read(module, args, output))


def _keep_in_graph(tap: Tap, tensor: Tensor) -> None:
    """Keep a copy, since the graph may reuse the memory of the value."""
    values = tap.channel.values
    if tap.path in values:
        tap.recorder.repeated.add(tap.path)
    tap.channel.has_copies = True
    values[tap.path] = CopyInGraph(tensor.detach().clone())


class ValueTap(Tap):
    """Takes the value that a port reads: an output or an input."""

    __slots__ = ("port",)

    def __init__(self, port: Port, channel: Channel, recorder: Recorder, order: int) -> None:
        super().__init__(port.path, channel, recorder, order)
        self.port = port

    def on_call(self, module: nn.Module, args: Any, rest: Any) -> None:
        """Keep the picked part of the output, or of the arguments."""
        port, path = self.port, self.path
        if port.pick == "all":
            for steps, tensor in port.parts(module, args, rest):
                self.recorder.take(self.channel, part_key(path, steps), path, tensor)
        else:
            self.recorder.take(self.channel, path, path, port.read(module, args, rest))


@torch.compiler.substitute_in_graph(ValueTap.on_call, skip_signature_check=True)
def _on_value_in_graph(self: ValueTap, module: nn.Module, args: Any, rest: Any) -> None:
    """:meth:`ValueTap.on_call` in a compiled graph, or eagerly between two graphs."""
    if self.recorder.fits_graph:
        _keep_in_graph(self, self.port.read(module, args, rest))
    else:
        _take_eagerly(self, module, args, rest)


def _take_eagerly(tap: ValueTap, module: nn.Module, args: Any, rest: Any) -> None:
    tap.on_call(module, args, rest)


def part_key(path: str, steps: Steps) -> CacheKey:
    """The key of one part of a site's value (``pick="all"``)."""
    return (path, *map(str, steps)) if steps else path


class CallbackTap(Tap):
    """Keeps what a user's callback returns, in any direction."""

    __slots__ = ("callback", "key", "row")

    def __init__(
        self,
        path: str,
        channel: Channel,
        recorder: Recorder,
        order: int,
        *,
        key: CacheKey,
        row: Direction,
        callback: Callable[..., Any],
    ) -> None:
        super().__init__(path, channel, recorder, order)
        self.key = key
        self.row = row
        self.callback = callback

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {self.callback!r})"

    def on_call(self, *args: Any) -> None:
        """Call the callback with a value of the forward and keep its result."""
        if not self.recorder.skips(self.path):
            self.recorder.take(self.channel, self.path, self.path, self._answer(args))

    def for_call(self) -> Callable[..., None]:
        """The hook for the gradients of the current call."""
        number = None if self.recorder.skips(self.path) else self.channel.number
        return partial(self.on_gradient, number, self.recorder.next_serial())

    def on_gradient(self, number: int | None, serial: int, *args: Any) -> None:
        """Call the callback with the gradients of one call, if its forward (``number``) is current; keep its result."""
        channel, recorder = self.channel, self.recorder
        if number is not None and recorder.open and (number == channel.number or not channel.latest_only):
            recorder.take_gradient(channel, self.path, self.path, self._answer(args), number, serial)

    def _answer(self, args: tuple[Any, ...]) -> Any:
        named = dict(zip(self.row.params, args, strict=True))
        kept = self.callback(**named, key=self.key, direction=self.row.name)
        if not isinstance(kept, Tensor | TensorDictBase):
            raise CaptureError(
                f"callback= returned {type(kept).__name__} at {self.path!r}; a cache holds tensors (or TensorDicts of "
                "them)",
                paths=(self.path,),
            )
        return kept


class StopTap(Transient):
    """Ends the forward once every awaited site has fired."""

    __slots__ = ("order", "path", "recorder")

    def __init__(self, path: str, recorder: Recorder, order: int) -> None:
        self.path = path
        self.recorder = recorder
        self.order = order

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def on_call(self, *args: Any) -> None:
        """Mark this site as fired."""
        self.recorder.stop_when_done(self.path)


keep_frames_out_of_graphs(OutputTap.on_output, ValueTap.on_call)
keep_out_of_graphs(
    _take_eagerly,
    CallbackTap.on_call,
    StopTap.on_call,
)
