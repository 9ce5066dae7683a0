"""The taps that take gradients, by tensor hooks that they register during the forward.

torch's full backward hooks would be simpler, but they break before an in-place activation, cost about ten times as
much, and go on firing after they are removed. Gradients reach the channel during the backward, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tdcache.cache.channel import Channel
from tdcache.cache.taps import OutputTap, Tap, part_key
from tdcache.hooks.gradient_hooks import overwritten_input
from tdcache.hooks.gradients import handed_on, takes_names
from tdcache.hooks.loans import OpenCalls, lend
from tdcache.hooks.port import InputPort, OutputPort, Steps
from tdcache.hooks.values import is_entries, leaves
from tdcache.introspect import add_tensor_hook_eagerly, keep_out_of_graphs
from tdcache.types import CacheKey

if TYPE_CHECKING:
    from tdcache.cache.recorder import Recorder

__all__ = ["GradientTap", "InputGradientTap", "OutputAndGradientTap", "PlainGradientTap"]


class GradientTap(Tap):
    """Takes the gradient of a module's output, by a tensor hook registered in the forward."""

    __slots__ = ("_port",)

    def __init__(self, port: OutputPort, channel: Channel, recorder: Recorder, order: int) -> None:
        super().__init__(port.path, channel, recorder, order)
        self._port = port

    @property
    def port(self) -> OutputPort:
        """The output whose gradient is taken."""
        return self._port

    def on_call(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Register a tensor hook on the output if it requires grad; returns an alias if the output is the input."""
        if self.recorder.skips(self.path):
            return None
        if self.port.pick == "all":
            return self._watch_parts(module, args, output, self.port.parts(module, args, output))
        picked = self.port.read(module, args, output)
        if isinstance(picked, Tensor):
            return self._watch(module, args, output, picked, self.path)
        return self._watch_parts(module, args, output, leaves(picked))

    def _watch_parts(self, module: nn.Module, args: Any, output: Any, parts: Iterable[tuple[Steps, Tensor]]) -> Any:
        self.channel.has_parts = True
        result = output
        for steps, tensor in parts:
            if result is not output and self.port.pick == "all":  # one that is there twice was exchanged with the first
                tensor = dict(leaves(result))[steps]  # noqa: PLW2901
            changed = self._watch(module, args, result, tensor, part_key(self.path, steps))
            result = result if changed is None else changed
        return None if result is output else result

    def _watch(self, module: nn.Module, args: Any, output: Any, tensor: Tensor, key: CacheKey) -> Any:
        if tensor.requires_grad and torch.is_grad_enabled():
            return self.port.watch(module, args, output, tensor, self.taker(key))
        self.recorder.graphless.add(self.path)
        return None

    def taker(self, key: CacheKey) -> Callable[[Tensor], None]:
        """The tensor hook that takes the gradient of the call that is under way."""
        return partial(self.on_grad, key, self.channel.number, self.recorder.next_serial())

    def on_grad(self, key: CacheKey, number: int, serial: int, grad: Tensor) -> None:
        """Take the gradient of one call."""
        self.recorder.take_gradient(self.channel, key, self.path, grad, number, serial)


class PlainGradientTap(GradientTap):
    """Takes the gradient of an output that is a plain tensor, unmodified: the fast path."""

    __slots__ = ("forward", "number", "takes_names")

    def __init__(self, path: str, channel: Channel, recorder: Recorder, order: int) -> None:
        self.path = path
        self.channel = channel
        self.recorder = recorder
        self.order = order
        self.number = -1
        """The latest forward in which the module was called."""
        self.forward: Any = None
        """The module's forward at the time ``takes_names`` was determined."""
        self.takes_names = True

    @property
    def port(self) -> OutputPort:
        """The output port, made only when the fast path does not apply."""
        return OutputPort(self.path)

    def on_plain(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Register a tensor hook on the output, in the first call of a forward."""
        number = self.channel.number
        is_first, self.number = self.number != number, number
        plain = is_first and type(output) is Tensor and not self.recorder.is_foreign
        if plain and self.watch_plain(module, args, output):
            return None
        return self.on_call(module, args, output)

    def watch_plain(self, module: nn.Module, args: Any, output: Tensor) -> bool:
        """Register a tensor hook on ``output``, unless it is a view or not the module's own; returns whether it did."""
        if output.is_leaf or output._base is not None:
            return False
        forward = getattr(module.forward, "__func__", None)
        if forward is None or forward is not self.forward:
            self.forward, self.takes_names = forward, takes_names(module)
        given = args[0] if len(args) == 1 else None
        if (type(given) is not Tensor or given is output or self.takes_names) and handed_on(module, output, args):
            return False
        add_tensor_hook_eagerly(output, partial(self.on_first, self.channel.number))
        return True

    def on_first(self, number: int, grad: Tensor) -> None:
        """Take the gradient of the first call in a forward."""
        channel, path = self.channel, self.path
        if path in channel.values or not (number == channel.accepting or self.recorder.accepts(channel, number)):
            self.on_grad(path, number, 0, grad)
            return
        if grad._version:
            channel.versions[path] = grad._version
        channel.values[path] = grad


class OutputAndGradientTap(OutputTap):
    """Takes the output and its gradient, both unmodified, in one hook: the fast path for the usual pair."""

    __slots__ = ("gradient",)

    def __init__(self, path: str, channel: Channel, recorder: Recorder, order: int, gradient_channel: Channel) -> None:
        self.path = path
        self.channel = channel
        self.recorder = recorder
        self.order = order
        self.values = channel.values
        self.gradient = PlainGradientTap(path, gradient_channel, recorder, order)

    @property
    def use(self) -> str:
        """Gradients are followed, since both values are taken."""
        return "watch"

    def on_both(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Keep the output, and watch its gradient."""
        values = self.values
        path = self.path
        plain = type(output) is Tensor and output.requires_grad and path not in values and not output._version
        if plain and self.gradient.watch_plain(module, args, output):
            values[path] = output
            return None
        self.on_output(module, args, output)
        return self.gradient.on_call(module, args, output)


class InputGradientTap(Tap):
    """Takes the gradient of a module's input: its own share of it, since the module is called with an alias."""

    __slots__ = ("calls", "port")

    def __init__(self, port: InputPort, channel: Channel, recorder: Recorder, order: int) -> None:
        super().__init__(port.path, channel, recorder, order)
        self.port = port
        self.calls = OpenCalls()

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Replace the input by an alias if it requires grad."""
        if self.recorder.skips(self.path) or not torch.is_grad_enabled():
            self.calls.begin(module)
            self._note_graphless()
            return None
        port = self.port
        if port.pick == "all":
            return self._watch_parts(module, args, kwargs, list(port.parts(module, args, kwargs)))
        tensor = port.differentiable(module, args, kwargs)
        if is_entries(tensor):
            return self._watch_parts(module, args, kwargs, list(leaves(tensor)))
        if tensor is None:
            self.calls.begin(module)
            self._note_graphless()
            return None
        changed, alias, loan = port.watch(module, args, kwargs, tensor, self._taker(self.path), tap=self)
        self.calls.begin(module, (alias,), loan)
        return changed

    def _note_graphless(self) -> None:
        if not self.recorder.skips(self.path):
            self.recorder.graphless.add(self.path)

    def _watch_parts(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], parts: list[tuple[Steps, Tensor]]
    ) -> Any:
        self.channel.has_parts = True
        wanted = iter([*parts, ((), None)])
        steps, part = next(wanted)
        aliases: list[Tensor | None] = []
        for _, tensor in leaves((args, kwargs)):
            aliases.append(None)
            if tensor is part:  # the parts are in the order of the leaves
                if tensor.requires_grad:
                    aliases[-1] = self.port.alias(module, tensor, self._taker(part_key(self.path, steps)), tap=self)
                steps, part = next(wanted)
        args, kwargs, loan = lend(args, kwargs, iter(aliases))
        self.calls.begin(module, [alias for alias in aliases if alias is not None], loan)
        return args, kwargs

    def _taker(self, key: CacheKey) -> _InputTaker:
        return _InputTaker(self, key, self.channel.number, self.recorder.next_serial())

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Close the call: the module has run."""
        if self.calls.end(output):
            raise overwritten_input(self.path)

    def forget(self) -> None:
        """Drop calls that an exception left open."""
        self.calls.forget()


class _InputTaker:
    """The tensor hook for one input of one call."""

    __slots__ = ("key", "number", "serial", "tap")

    def __init__(self, tap: InputGradientTap, key: CacheKey, number: int, serial: int) -> None:
        self.tap = tap
        self.key = key
        self.number = number
        self.serial = serial

    def __call__(self, grad: Tensor) -> None:
        tap = self.tap
        tap.recorder.take_gradient(tap.channel, self.key, tap.path, grad, self.number, self.serial)


keep_out_of_graphs(
    GradientTap.on_call,
    PlainGradientTap.on_plain,
    OutputAndGradientTap.on_both,
    InputGradientTap.on_input,
    InputGradientTap.on_output,
)
