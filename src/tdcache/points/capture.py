"""Keeping what passes some hook points: the taps of one capture, and the state they share."""

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
from tdcache.errors import CaptureError
from tdcache.hooks import MultiHookHandle, Order, OutputPort, attach_outputs, bracket
from tdcache.hooks.values import first_tensor
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
"""What TransformerLens appends to a name for the gradient there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureOptions:
    """What is kept of a value; the options are those of ``run_with_cache``."""

    incl_bwd: bool
    device: torch.device | str | None
    remove_batch_dim: bool
    pos_slice: PositionSlice | None
    hold: Hold
    reducer: Reducer

    @property
    def keep(self) -> Keep:
        """How a value is held once it has its shape."""
        return Keep(hold=self.hold, device=None if self.device is None else torch.device(self.device))

    @property
    def shapes(self) -> bool:
        """Whether something is cut off."""
        return self.remove_batch_dim or self.pos_slice is not None

    def shaped(self, value: Any, name: str, pos_dim: int | None) -> Tensor:
        """The part of a value that is kept: the first tensor in it, its positions sliced, its batch axis taken off.

        Raises:
            CaptureError: no tensor, positions that are not there, or a batch that is not of size 1.
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


class _MappingTarget:
    """Entries into a plain dict, for those who hand one in."""

    node = None
    in_place = False

    def __init__(self, cache: MutableMapping[str, Any]) -> None:
        self.cache: MutableMapping[Any, Any] = cache
        self._written: dict[CacheKey, None] = {}

    def write(self, entries: Mapping[CacheKey, Any], *, complete: bool) -> None:
        """Make ``entries`` the direction's entries."""
        for key in self._written.keys() - entries.keys():
            self.cache.pop(key, None)
        self.cache.update(entries)
        self._written = dict.fromkeys(entries)

    def put(self, key: CacheKey, value: Any) -> None:
        """Write one entry at once, beside those that are there."""
        self.cache[key] = value
        self._written[key] = None

    def reset(self) -> None:
        """Drop every entry that was written here."""
        for key in self._written:
            self.cache.pop(key, None)
        self._written.clear()

    def ensure(self) -> None:
        """Do nothing: a plain dict has no node of a direction."""


class PointCapture:
    """One cache over some hook points; entries are the points' names, and for gradients these with ``"_grad"``.

    Args:
        points: the points, by the name of their entry.
        options: what is kept.
        cache: where it goes.
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
        """Whether the latest value of each point is kept, and nothing is done to it but, perhaps, a copy made."""
        values = self.channels[0]
        return (
            self.options.device is None
            and not self.options.shapes
            and values.latest_only
            and not values.target.in_place
        )

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Have taps on the points, and the ends of forwards of ``model`` noted, for the length of a block."""
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
        """Pairs of a name and a hook, to be added to the points by hand."""
        channel = self.channels[1 if gradient else 0]
        suffix = GRADIENT if gradient else ""
        return [(name, SavingHook(name + suffix, self, channel)) for name in self.points]

    def bracketed(self, model: nn.Module) -> Removable:
        """Tell the capture when forwards of ``model`` begin and end, until each handle from here is removed."""
        if not self._brackets:
            bracket(model, self.recorder.begin, self.recorder.end, self._bracket)
        self._brackets += 1
        return _BracketHandle(self)

    def unbracket(self) -> None:
        """One of the handles was removed."""
        self._brackets -= 1
        if not self._brackets:
            self._bracket.remove()


class _BracketHandle:
    """Keeps a capture's bracket in place until it is removed."""

    __slots__ = ("capture",)

    def __init__(self, capture: PointCapture) -> None:
        self.capture = capture

    def remove(self) -> None:
        """Let go; called once."""
        self.capture.unbracket()


class PointTap(Tap):
    """Takes the value at a point as its hooks see it: converted, sliced, without its batch axis."""

    __slots__ = ("options", "point")

    def __init__(
        self, path: str, channel: Channel, recorder: Recorder, point: HookPoint, options: CaptureOptions
    ) -> None:
        super().__init__(path, channel, recorder, Order.CAPTURE)
        self.point = point
        self.options = options

    def on_call(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the value, converted and in the shape that the options ask for."""
        kept = self.options.shaped(converted(self.point, output), self.path, self.point.pos_dim)
        self.recorder.take(self.channel, self.path, self.path, kept)


class PointGradientTap(GradientTap):
    """Takes the value by another tap, and the gradient as hooks see it: scaled, converted, sliced.

    A point passes on the tensor it is given, of which a tensor hook would see the gradients of all other uses too; so
    the hook is set on an alias.
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
        """Keep the value, and hand on an alias whose gradient is this point's own."""
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
    """A value in the layout that hooks see."""
    return value if point.hook_conversion is None else point.hook_conversion.convert(value)


class SavingPointHook(PointHook):
    """A :class:`SavingHook` at a point, as torch calls it: at once, where a value is only copied or kept as it is."""

    __slots__ = ("copies", "name", "values")

    def __init__(self, point: HookPoint, hook: SavingHook, *args: Any, **options: Any) -> None:
        super().__init__(point, hook, *args, **options)
        self.name = hook.name
        self.copies = hook.capture.options.hold == "snapshot"
        self.values = hook.channel.values if hook.is_plain and not self.aliases else None

    def on_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Keep the value; a second one of a forward, and one outside of a forward, find their place taken."""
        values, name = self.values, self.name
        if values is None or type(output) is not Tensor or name in values or self.point.hook_conversion is not None:
            return super().on_output(module, args, output)
        kept = output
        if self.copies:
            kept = (output.detach() if output.requires_grad else output).clone()
        if kept.is_inference() or kept._version:  # those who read ``values`` ask for a counter, and expect 0
            return super().on_output(module, args, output)
        values[name] = kept
        return None


class SavingHook:
    """Keeps what a point shows it: a hook for ``hook(tensor, hook=point)``, to be added by hand.

    Within ``hooks()``, ``run_with_hooks`` and ``add_hook`` of a root, each forward replaces the entries of the one
    before, and a point that fires twice in one of them is told of. Added to a point directly, each call replaces.
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
        """Whether a value is kept as it is, or as a copy, without anything else being done to it."""
        return not self.channel.is_gradient and self.capture.is_plain

    def __call__(self, tensor: Any, hook: Any) -> None:
        """Keep the value that the hook point sees."""
        self.capture.recorder.take(self.channel, self.name, self.name, self._shaped(tensor, hook))

    def for_call(self) -> Callable[..., None]:
        """What keeps the gradient of the call that is under way."""
        return partial(self._keep_gradient, self.channel.number, self.capture.recorder.next_serial())

    def _keep_gradient(self, number: int, serial: int, tensor: Any, hook: Any) -> None:
        kept = self._shaped(tensor, hook)
        self.capture.recorder.take_gradient(self.channel, self.name, self.name, kept, number, serial)

    def _shaped(self, tensor: Any, hook: Any) -> Tensor:
        return self.capture.options.shaped(tensor, self.name, hook.pos_dim)
