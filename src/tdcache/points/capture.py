"""Captures at hook points: the taps of one capture, and their shared state.

They differ from those of module paths in that values are shown as the hooks of a point see them (converted, scaled,
sliced), and that gradients are entries of their own, with ``"_grad"`` appended to the name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdcache.cache import Channel, EntryTarget, GradientTap, Keep, OutputTap, Recorder, Target
from tdcache.cache.taps import Tap
from tdcache.cache.target import NothingApart
from tdcache.errors import CaptureError
from tdcache.hooks import MultiHookHandle, Order, OutputPort, attach_outputs, bracket
from tdcache.hooks.values import first_tensor
from tdcache.options import as_device
from tdcache.points.hook_point import HookPoint, PointHook
from tdcache.points.positions import PositionSlice
from tdcache.reducers import Reducer
from tdcache.types import CacheKey, Hold, HookDirection, Removable

__all__ = [
    "CaptureOptions",
    "PointCapture",
    "PointGradientTap",
    "PointTap",
    "SavingHook",
    "SavingPointHook",
    "converted",
]

GRADIENT = "_grad"
"""The suffix that TransformerLens uses for gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """The options of ``run_with_cache`` that decide what is kept of a value."""

    incl_bwd: bool
    device: torch.device | str | None
    remove_batch_dim: bool
    pos_slice: PositionSlice | None
    hold: Hold
    reducer: Reducer

    @property
    def keep(self) -> Keep:
        """How a value is held after slicing."""
        return Keep(hold=self.hold, device=None if self.device is None else as_device(self.device))

    @property
    def shapes(self) -> bool:
        """Whether only a part of each value is kept."""
        return self.remove_batch_dim or self.pos_slice is not None

    def shaped(self, value: Any, name: str, pos_dim: int | None) -> Tensor:
        """The kept part of a value: its first tensor, with positions sliced and the batch axis removed.

        Raises:
            CaptureError: there is no tensor, a position is out of range, or the batch size is not 1.
        """
        tensor = first_tensor(value)
        if tensor is None:
            raise CaptureError(
                f"the value at {name!r} is {type(value).__name__} and holds no tensor; leave the point out with "
                "names_filter=",
                paths=(name,),
            )
        if self.hold != "live" and tensor.requires_grad:
            tensor = tensor.detach()
        if self.pos_slice is not None:
            tensor = self.pos_slice(tensor, name.removesuffix(GRADIENT), pos_dim)
        if not self.remove_batch_dim or tensor.dim() == 0:
            return tensor
        if len(tensor) != 1:
            raise CaptureError(
                f"remove_batch_dim=True takes off a first axis of size 1, but {name!r} has shape "
                f"{tuple(tensor.shape)}; run one input at a time, leave the point out with "
                "names_filter=, or keep the axis",
                paths=(name,),
            )
        return tensor[0]


class _MappingTarget(NothingApart):
    """Writes entries into a plain dict that the user passed."""

    node = None
    in_place = False

    def __init__(self, cache: MutableMapping[str, Any]) -> None:
        self.cache: MutableMapping[Any, Any] = cache
        self._written: dict[CacheKey, None] = {}

    def write(self, entries: Mapping[CacheKey, Any], *, complete: bool) -> None:
        """Make ``entries`` the direction's entries."""
        self.cache.update(entries)
        if complete and len(self._written) == len(entries):  # as after most forwards
            return
        for key in self._written.keys() - entries.keys():
            self.cache.pop(key, None)
        self._written = dict.fromkeys(entries)

    def put(self, key: CacheKey, value: Any) -> None:
        """Write one entry at once, keeping the others."""
        self.cache[key] = value
        self._written[key] = None

    def reset(self) -> None:
        """Drop every entry that was written here."""
        for key in self._written:
            self.cache.pop(key, None)
        self._written.clear()

    def ensure(self) -> None:
        """Do nothing: a plain dict has no nodes for directions."""


class PointCapture:
    """One cache over some hook points; keys are the points' names, with ``"_grad"`` appended for gradients.

    Args:
        points: the points, by the name of their entry.
        options: what is kept of values.
        cache: the TensorDict or dict to write to.
    """

    def __init__(
        self, points: Mapping[str, HookPoint], options: CaptureOptions, cache: TensorDictBase | MutableMapping[str, Any]
    ) -> None:
        self.points = dict(points)
        self.options = options
        self.cache = cache
        values = self._channel("fwd", tuple(self.points))
        self.channels = [values]
        if options.incl_bwd:
            self.channels.append(self._channel("bwd", tuple(name + GRADIENT for name in self.points)))
        self.recorder = Recorder(self.channels)
        self._bracket = MultiHookHandle()
        self._brackets = 0

    def _channel(self, direction: HookDirection, names: tuple[str, ...]) -> Channel:
        return Channel(direction, names, self.options.keep, self._target(names), self.options.reducer, None)

    def _target(self, names: tuple[str, ...]) -> EntryTarget:
        if not isinstance(self.cache, TensorDictBase):
            return _MappingTarget(self.cache)
        target = Target(self.cache, None, 0)
        target.check(names)
        return target

    @property
    def is_plain(self) -> bool:
        """Whether the latest value of each point is kept, unmodified or as a plain copy."""
        values = self.channels[0]
        return (
            self.options.device is None
            and not self.options.shapes
            and values.latest_only
            and not values.target.in_place
        )

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Inside a block, capture at the points and follow the forwards of ``model``."""
        with MultiHookHandle() as handle:
            make = self._gradient_tap if self.options.incl_bwd else self._tap
            attach_outputs(((point, make(name, point)) for name, point in self.points.items()), handle, Order.CAPTURE)
            bracket(model, self.recorder.begin, self.recorder.end, handle)
            yield

    def _tap(self, name: str, point: HookPoint) -> Callable[..., Any]:
        channel = self.channels[0]
        if channel.takes_aliases and point.hook_conversion is None and not self.options.shapes:
            return OutputTap(name, channel, self.recorder, Order.CAPTURE).on_output
        return PointTap(name, channel, self.recorder, point, self.options).on_call

    def _gradient_tap(self, name: str, point: HookPoint) -> Callable[..., Any]:
        take = self._tap(name, point)
        return PointGradientTap(name + GRADIENT, self.channels[1], self.recorder, point, self.options, take).on_call

    def hooks(self, *, gradient: bool) -> list[tuple[str, Callable[..., Any]]]:
        """Pairs of a name and a hook, for the user to add to the points."""
        channel = self.channels[1 if gradient else 0]
        suffix = GRADIENT if gradient else ""
        return [(name, SavingHook(name + suffix, self, channel)) for name in self.points]

    def bracketed(self, model: nn.Module) -> Removable:
        """Tell the capture when forwards of ``model`` begin and end, until all handles returned here are removed."""
        if not self._brackets:
            bracket(model, self.recorder.begin, self.recorder.end, self._bracket)
        self._brackets += 1
        return _BracketHandle(self)

    def unbracket(self) -> None:
        """Remove the hooks on the model when the last handle is removed."""
        self._brackets -= 1
        if not self._brackets:
            self._bracket.remove()


class _BracketHandle:
    """Keeps a capture's bracket in place until it is removed."""

    __slots__ = ("capture",)

    def __init__(self, capture: PointCapture) -> None:
        self.capture = capture

    def remove(self) -> None:
        """Release the bracket; called once."""
        self.capture.unbracket()


class PointTap(Tap):
    """Takes the value at a point as its hooks see it: converted, sliced, without the batch axis."""

    __slots__ = ("options", "point")

    def __init__(
        self, path: str, channel: Channel, recorder: Recorder, point: HookPoint, options: CaptureOptions
    ) -> None:
        super().__init__(path, channel, recorder, Order.CAPTURE)
        self.point = point
        self.options = options

    def on_call(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the value, converted and sliced according to the options."""
        kept = self.options.shaped(converted(self.point, output), self.path, self.point.pos_dim)
        self.recorder.take(self.channel, self.path, self.path, kept)


class PointGradientTap(GradientTap):
    """Takes the value through another tap, and the gradient as hooks see it: scaled, converted, sliced.

    A point returns its input, and a tensor hook on that would also see the gradients of all its other uses; so the hook
    is registered on an alias.
    """

    __slots__ = ("options", "plain", "point", "take_value")

    def __init__(
        self,
        path: str,
        channel: Channel,
        recorder: Recorder,
        point: HookPoint,
        options: CaptureOptions,
        take_value: Callable[..., None],
    ) -> None:
        super().__init__(OutputPort(path), channel, recorder, Order.CAPTURE)
        self.point = point
        self.options = options
        self.take_value = take_value
        self.plain = not options.shapes and point.hook_conversion is None and point.backward_scale == 1

    def on_call(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Keep the value, and return an alias whose gradient is that of this point alone."""
        self.take_value(module, args, output)
        tensor = first_tensor(output)
        if tensor is None or not tensor.requires_grad or not torch.is_grad_enabled():
            self.recorder.graphless.add(self.path)
            return None
        take = partial(self.on_point_grad, self.channel.number, self.recorder.next_serial())
        return self.port.watch(module, args, output, tensor, take)

    def on_point_grad(self, number: int, serial: int, grad: Tensor) -> None:
        """Keep the gradient of one call."""
        channel, path = self.channel, self.path
        if self.plain and number == channel.accepting and path not in channel.values:  # as the fast taps do
            channel.arrived[path] = serial
            channel.versions[path] = grad._version
            channel.values[path] = grad
            return
        scale = self.point.backward_scale
        seen = grad if scale == 1 else grad * scale
        kept = self.options.shaped(converted(self.point, seen), self.path, self.point.pos_dim)
        self.on_grad(self.path, number, serial, kept)


def converted(point: HookPoint, value: Any) -> Any:
    """A value in the layout of the point's hooks."""
    return value if point.hook_conversion is None else point.hook_conversion.convert(value)


class SavingPointHook(PointHook):
    """A :class:`SavingHook` at a point as a torch hook, with a fast path for values kept unmodified or copied."""

    __slots__ = ("copies", "name", "values")

    def __init__(self, point: HookPoint, hook: SavingHook, *args: Any, **options: Any) -> None:
        super().__init__(point, hook, *args, **options)
        self.name = hook.name
        self.copies = hook.capture.options.hold == "snapshot"
        self.values = hook.channel.values if hook.is_plain and not self.aliases else None

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Keep the value; a second call in a forward, or a call outside of one, takes the slow path."""
        values, name = self.values, self.name
        if values is None or type(output) is not Tensor or name in values or self.point.hook_conversion is not None:
            return super().on_output(module, args, output)
        kept = output
        if self.copies:
            kept = (output.detach() if output.requires_grad else output).clone()
        try:
            if not kept._version:  # those who read ``values`` expect 0
                values[name] = kept
                return None
        except RuntimeError:  # an inference tensor, which has no version counter
            pass
        return super().on_output(module, args, output)


class SavingHook:
    """A hook ``hook(tensor, hook=point)`` that keeps the value, for the user to add.

    Within ``hooks()``, ``run_with_hooks`` and ``add_hook`` of a root, each forward replaces the entries of the previous
    one, and a point that fires twice in a forward causes a warning. Added to a point directly, each call replaces.
    """

    __slots__ = ("capture", "channel", "name")

    observes = True
    order = Order.CAPTURE
    tap_class = SavingPointHook

    def __init__(self, name: str, capture: PointCapture, channel: Channel) -> None:
        self.name = name
        self.capture = capture
        self.channel = channel

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    @property
    def is_plain(self) -> bool:
        """Whether values are kept unmodified or as plain copies."""
        return not self.channel.is_gradient and self.capture.is_plain

    def __call__(self, tensor: Any, hook: Any) -> None:
        """Keep the value that the hook point sees."""
        self.capture.recorder.take(self.channel, self.name, self.name, self._shaped(tensor, hook))

    def for_call(self) -> Callable[..., None]:
        """The hook for the gradient of the current call."""
        return partial(self._keep_gradient, self.channel.number, self.capture.recorder.next_serial())

    def _keep_gradient(self, number: int, serial: int, tensor: Any, hook: Any) -> None:
        kept = self._shaped(tensor, hook)
        self.capture.recorder.take_gradient(self.channel, self.name, self.name, kept, number, serial)

    def _shaped(self, tensor: Any, hook: Any) -> Tensor:
        return self.capture.options.shaped(tensor, self.name, hook.pos_dim)
