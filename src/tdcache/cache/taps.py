"""The hooks of a caching context: small objects that take a value at one site and hand it to their channel.

They are registered as bound methods, which torch calls faster than objects with ``__call__``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.errors import CaptureError
from tdcache.hooks.directions import Direction
from tdcache.hooks.gradients import handed_on, watch_tensor
from tdcache.hooks.values import leaves, pick_tensor
from tdcache.types import CacheKey, Pick

if TYPE_CHECKING:
    from tdcache.cache.channel import Channel
    from tdcache.cache.recorder import Recorder

__all__ = [
    "CallbackTap",
    "GradientTap",
    "OutputAndGradientTap",
    "OutputTap",
    "PlainGradientTap",
    "StopTap",
    "Tap",
    "ValueTap",
]


class Tap:
    """What all taps have: a site, the channel its values go to, and the recorder of the context."""

    __slots__ = ("channel", "order", "path", "recorder")

    def __init__(self, path: str, channel: Channel, recorder: Recorder, order: int) -> None:
        self.path = path
        self.channel = channel
        self.recorder = recorder
        self.order = order

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"


class OutputTap(Tap):
    """Takes the output of a module as it is: the fast path, at the cost of a hook that writes a dict."""

    __slots__ = ("values",)

    def __init__(self, path: str, channel: Channel, recorder: Recorder, order: int) -> None:
        self.path = path
        self.channel = channel
        self.recorder = recorder
        self.order = order
        self.values = channel.values

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the output."""
        values = self.values
        path = self.path
        try:
            if output._version or path in values:  # written in place before; a second call, or one outside a forward
                self.recorder.take(self.channel, path, path, output)
                return
        except (AttributeError, RuntimeError):  # no tensor; an inference tensor, which has no version counter
            self._take_part(module, output)
            return
        values[path] = output

    def _take_part(self, module: nn.Module, output: Any) -> None:
        path = self.path
        if type(output) is tuple and output and isinstance(output[0], Tensor):  # (hidden states, cache, ...)
            tensor = output[0]
            if path not in self.values and not tensor.is_inference() and not tensor._version:
                self.values[path] = tensor
                return
        else:
            tensor = _first_of(module, output, path)
        self.recorder.take(self.channel, path, path, tensor)


@torch.compiler.substitute_in_graph(OutputTap.on_output, skip_signature_check=True)
def _on_output_in_graph(self: OutputTap, module: nn.Module, args: Any, output: Any) -> None:
    """:meth:`OutputTap.on_output` in a compiled graph, where a version is not known when the graph is made."""
    tensor = output if isinstance(output, Tensor) else _first_of(module, output, self.path)
    if self.path in self.values:
        self.recorder.repeated.add(self.path)
    self.values[self.path] = tensor


def _first_of(module: nn.Module, value: Any, path: str, keys: str = "out_keys") -> Tensor:
    """The first tensor of a value; of the TensorDict that a TensorDict module passes on, the first it made itself."""
    if isinstance(value, TensorDictBase) and getattr(module, keys, None):
        value = value.get(getattr(module, keys)[0])
    return cast(Tensor, pick_tensor(value, None, path))


class ValueTap(Tap):
    """Takes the picked tensor of an output, an input or a gradient of the input."""

    __slots__ = ("pick",)

    def __init__(self, path: str, channel: Channel, recorder: Recorder, order: int, pick: Pick) -> None:
        super().__init__(path, channel, recorder, order)
        self.pick = pick

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep what is picked of the output."""
        self._on_value(module, output, "out_keys")

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what is picked of the arguments: positional ones by number, keyword ones by name."""
        if (isinstance(self.pick, str) and self.pick != "all") or isinstance(self.pick, tuple):
            self._on_value(module, {**dict(enumerate(args)), **kwargs}, "in_keys")
        else:
            inputs = (*args, *kwargs.values())
            self._on_value(module, inputs[0] if len(inputs) == 1 and self.pick is None else inputs, "in_keys")

    def on_grad_input(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        """Keep what is picked of the gradients of the inputs, if there is any."""
        if self.pick is not None or any(grad is not None for grad in grad_input):
            self._on_value(module, grad_input, "in_keys")
        else:
            self.recorder.graphless.add(self.path)

    def _on_value(self, module: nn.Module, value: Any, keys: str) -> None:
        if self.pick is None:
            self.recorder.take(self.channel, self.path, self.path, _first_of(module, value, self.path, keys))
        elif self.pick == "all":
            for steps, tensor in leaves(value):
                self.recorder.take(self.channel, _leaf_key(self.path, steps), self.path, tensor)
        else:
            picked = _tensor_only(pick_tensor(value, self.pick, self.path), self.path, f"pick={self.pick!r} gives")
            self.recorder.take(self.channel, self.path, self.path, picked)


def _leaf_key(path: str, steps: tuple[int | str, ...]) -> CacheKey:
    return (path, *map(str, steps)) if steps else path


def _tensor_only(kept: Any, path: str, what: str) -> Any:
    if not isinstance(kept, Tensor | TensorDictBase):
        raise CaptureError(
            f"{what} {type(kept).__name__} at {path!r}; a cache holds tensors (or TensorDicts of them)", paths=(path,)
        )
    return kept


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
        """Ask the callback and keep its answer."""
        if self.row.gradient and not self.recorder.open:
            return
        named = dict(zip(self.row.params, args, strict=True))
        kept = self.callback(**named, key=self.key, direction=self.row.name)
        self.recorder.take(self.channel, self.path, self.path, _tensor_only(kept, self.path, "callback= returned"))


class GradientTap(Tap):
    """Takes the gradient of a module's output, by a tensor hook that is set in the forward."""

    __slots__ = ("arrived", "calls", "pick")

    def __init__(self, path: str, channel: Channel, recorder: Recorder, order: int, pick: Pick) -> None:
        super().__init__(path, channel, recorder, order)
        self.pick = pick
        self.calls = 0
        self.arrived = 0
        """Which of the calls the kept gradient belongs to, where there are several in a forward."""

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Set a tensor hook on the output, if a gradient can come; returns an alias of an input that is handed on."""
        if self.pick == "all":
            result = output
            for steps, tensor in leaves(output):
                changed = self._watch(args, result, tensor, _leaf_key(self.path, steps))
                result = result if changed is None else changed
            return None if result is output else result
        if self.pick is None:
            picked = output if isinstance(output, Tensor) else _first_of(module, output, self.path)
        else:
            picked = pick_tensor(output, self.pick, self.path)
        return self._watch(args, output, picked, self.path)

    def _watch(self, args: Any, output: Any, tensor: Tensor, key: CacheKey) -> Any:
        if tensor.requires_grad:
            self.calls += 1
            on_grad = partial(self.on_grad, key, self.channel.number, self.calls)
            return watch_tensor(args, output, tensor, on_grad, self.path)
        if not torch.compiler.is_compiling():
            self.recorder.graphless.add(self.path)
        return None

    def on_grad(self, key: CacheKey, number: int, call: int, grad: Tensor) -> None:
        """Take the gradient of one call; of several calls in a forward the latest counts."""
        if self.recorder.take_gradient(
            self.channel, key, self.path, grad, number=number, serial=call, latest=self.arrived
        ):
            self.arrived = call


class PlainGradientTap(GradientTap):
    """Takes the gradient of an output that is a tensor, as it is: the fast path, by a hook on the node that made it.

    A tensor hook does the same at twice the cost.
    """

    __slots__ = ("number",)

    def __init__(self, path: str, channel: Channel, recorder: Recorder, order: int) -> None:
        super().__init__(path, channel, recorder, order, None)
        self.number = -1
        """The latest forward in which the module was called."""

    def on_plain(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Set a hook on the node, in the first call of a forward."""
        number = self.channel.number
        is_first, self.number = self.number != number, number
        if is_first and type(output) is Tensor and self.watch_node(args, output):
            return None
        return self.on_output(module, args, output)

    def watch_node(self, args: Any, output: Tensor) -> bool:
        """Set a hook on the node that made ``output``, if it was this module that made it; says whether it did."""
        node = output.grad_fn
        lone = len(args) == 1 and type(args[0]) is Tensor  # spares the call in the common case
        given = args[0] is output if lone else handed_on(output, args)
        if node is None or output._version or given:
            return False
        node.register_prehook(partial(self.on_grads, self.channel.number, output.output_nr))
        return True

    def on_grads(self, number: int, position: int, grads: tuple[Tensor | None, ...]) -> None:
        """Take the gradient of the first call in a forward."""
        channel, path = self.channel, self.path
        grad = grads[position]
        if number != channel.accepting or path in channel.values or grad is None:
            if grad is not None:
                self.on_grad(path, number, 0, grad)
            return
        self.arrived = 0
        channel.versions[path] = grad._version
        channel.values[path] = grad


@torch.compiler.substitute_in_graph(PlainGradientTap.on_plain, skip_signature_check=True)
def _on_plain_in_graph(self: PlainGradientTap, module: nn.Module, args: Any, output: Any) -> Any:
    """:meth:`PlainGradientTap.on_plain` in a compiled graph, which has no nodes yet when it is made."""
    return self.on_output(module, args, output)


class OutputAndGradientTap(OutputTap):
    """Takes the output and its gradient, both as they are, in one hook: the fast path for the usual pair."""

    __slots__ = ("gradient",)

    def __init__(self, path: str, channel: Channel, recorder: Recorder, order: int, gradient_channel: Channel) -> None:
        super().__init__(path, channel, recorder, order)
        self.gradient = PlainGradientTap(path, gradient_channel, recorder, order)

    def on_both(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Keep the output, and set a hook on the node that made it."""
        values = self.values
        path = self.path
        if type(output) is Tensor and path not in values and self.gradient.watch_node(args, output):
            values[path] = output
            return None
        self.gradient.arrived = 0
        self.on_output(module, args, output)
        return self.gradient.on_output(module, args, output)


@torch.compiler.substitute_in_graph(OutputAndGradientTap.on_both, skip_signature_check=True)
def _on_both_in_graph(self: OutputAndGradientTap, module: nn.Module, args: Any, output: Any) -> Any:
    """:meth:`OutputAndGradientTap.on_both` in a compiled graph, which has no nodes yet when it is made."""
    _on_output_in_graph(self, module, args, output)
    return self.gradient.on_output(module, args, output)


class StopTap:
    """Ends the forward once every site that was waited for has fired."""

    __slots__ = ("order", "path", "recorder")

    def __init__(self, path: str, recorder: Recorder, order: int) -> None:
        self.path = path
        self.recorder = recorder
        self.order = order

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def on_call(self, *args: Any) -> None:
        """Tick this site off."""
        self.recorder.stop_when_done(self.path)
