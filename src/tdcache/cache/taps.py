"""The hooks of a caching context: small objects that take a value at one site and hand it to their channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.errors import CaptureError
from tdcache.hooks.directions import Direction
from tdcache.hooks.values import leaves, pick_tensor
from tdcache.types import CacheKey, Pick

if TYPE_CHECKING:
    from tdcache.cache.recorder import Recorder

__all__ = ["Arrival", "CallbackTap", "GradientTap", "OutputTap", "StopTap", "ValueTap"]


class OutputTap:
    """Takes the output of a module as it is: the fast path, at the cost of a hook that writes a dict.

    Registered as the bound method ``on_output``, which torch calls faster than an object with ``__call__``.
    """

    __slots__ = ("channel_values", "index", "order", "path", "recorder")

    def __init__(self, path: str, index: int, recorder: Recorder, order: int) -> None:
        self.path = path
        self.index = index
        self.recorder = recorder
        self.order = order
        self.channel_values = recorder.channels[index].values

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the output."""
        values = self.channel_values
        path = self.path
        try:
            if output._version or path in values:
                self.recorder.take(self.index, path, path, output)
                return
        except (AttributeError, RuntimeError):  # no tensor; an inference tensor, which has no version counter
            self.recorder.take(self.index, path, path, pick_tensor(output, None, path))
            return
        values[path] = output


class ValueTap:
    """Takes the picked tensor of an output or input."""

    __slots__ = ("index", "order", "path", "pick", "recorder")

    def __init__(self, path: str, index: int, recorder: Recorder, order: int, pick: Pick) -> None:
        self.path = path
        self.index = index
        self.recorder = recorder
        self.order = order
        self.pick = pick

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, pick={self.pick!r})"

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep what is picked of the output."""
        self.on_value(output)

    def on_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what is picked of the arguments: positional first, then keyword ones."""
        if self.pick is None or isinstance(self.pick, int) or callable(self.pick):
            self.on_value((*args, *kwargs.values()))
        else:
            self.on_value({**{str(at): value for at, value in enumerate(args)}, **kwargs})

    def on_grad_input(self, module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        """Keep what is picked of the gradients of the inputs, if there is any."""
        if self.pick is not None or any(grad is not None for grad in grad_input):
            self.on_value(grad_input)
        else:
            self.recorder.graphless.add(self.path)

    def on_value(self, value: Any) -> None:
        """Keep what is picked of a value."""
        if self.pick == "all":
            for steps, tensor in leaves(value):
                key = (self.path, *map(str, steps)) if steps else self.path
                self.recorder.take(self.index, key, self.path, tensor)
            return
        tensor = pick_tensor(value, self.pick, self.path)
        if not isinstance(tensor, Tensor | TensorDictBase):
            raise CaptureError(
                f"pick={self.pick!r} gives {type(tensor).__name__} at {self.path!r}; a cache holds tensors", paths=(self.path,)
            )
        self.recorder.take(self.index, self.path, self.path, tensor)


class CallbackTap:
    """Keeps what a user's callback returns, in any direction."""

    __slots__ = ("callback", "index", "key", "order", "path", "recorder", "row")

    def __init__(
        self,
        path: str,
        index: int,
        recorder: Recorder,
        order: int,
        *,
        key: CacheKey,
        row: Direction,
        callback: Callable[..., Any],
    ) -> None:
        self.path = path
        self.index = index
        self.recorder = recorder
        self.order = order
        self.key = key
        self.row = row
        self.callback = callback

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r}, {self.callback!r})"

    def on_call(self, *args: Any) -> None:
        """Ask the callback and keep its answer."""
        named = dict(zip(self.row.params, args, strict=True))
        kept = self.callback(**named, key=self.key, direction=self.row.name)
        if not isinstance(kept, Tensor | TensorDictBase):
            raise CaptureError(
                f"callback= returned {type(kept).__name__} at {self.path!r}; return the tensor (or TensorDict) to keep",
                paths=(self.path,),
            )
        self.recorder.take(self.index, self.path, self.path, kept)


class GradientTap:
    """Takes the gradient of a module's output, by a tensor hook that is set in the forward."""

    __slots__ = ("index", "order", "path", "pick", "recorder")

    def __init__(self, path: str, index: int, recorder: Recorder, order: int, pick: Pick) -> None:
        self.path = path
        self.index = index
        self.recorder = recorder
        self.order = order
        self.pick = pick

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path!r})"

    def on_output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Set a tensor hook on the output, if a gradient can come."""
        if isinstance(output, Tensor) and self.pick is None:
            self._watch(self.path, output)
        elif self.pick == "all":
            for steps, tensor in leaves(output):
                self._watch((self.path, *map(str, steps)) if steps else self.path, tensor)
        else:
            self._watch(self.path, pick_tensor(output, self.pick, self.path))

    def _watch(self, key: CacheKey, tensor: Tensor) -> None:
        if tensor.requires_grad:
            tensor.register_hook(Arrival(self, key, self.recorder.next_serial(self.index)))
        elif not torch.compiler.is_compiling():
            self.recorder.graphless.add(self.path)


class Arrival:
    """A tensor hook: hands the gradient of one call to the recorder, as long as its context is open."""

    __slots__ = ("key", "serial", "tap")

    def __init__(self, tap: GradientTap, key: CacheKey, serial: int) -> None:
        self.tap = tap
        self.key = key
        self.serial = serial

    def __call__(self, grad: Tensor) -> None:
        tap = self.tap
        tap.recorder.take_gradient(tap.index, self.key, tap.path, grad, self.serial)


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
