"""The values of a table's places in one forward, copied as they pass, with where gradients of them begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tdcache.errors import TdcacheError
from tdcache.function_calls import CallSite, attach_attention, attach_call, is_call
from tdcache.hooks.attach import MultiHookHandle, Order, attach
from tdcache.hooks.port import port_at
from tdcache.named_places import NamedPlace
from tdcache.naming.trace import call_model
from tdcache.paths import resolve
from tdcache.types import HookDirection, Removable

__all__ = ["Reading", "Readings", "arranged", "read_places"]

_COMPUTED = ("scores", "pattern")


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What was seen at one place: a copy of the tensor, and where a gradient of it can be asked for."""

    data: Tensor
    edge: GradientEdge | None


@dataclass(slots=True, eq=False)
class Readings:
    """The values of one forward by name, why others are missing, and what the model returned."""

    values: dict[str, Reading] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    result: Any = None

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name].data

    def __contains__(self, name: str) -> bool:
        return name in self.values


@dataclass(slots=True, eq=False)
class _Take:
    """Takes the value at one place; called as hooks on modules, on calls and on attention places are."""

    name: str
    place: NamedPlace
    readings: Readings
    calls: int = 0
    order: ClassVar[int] = Order.CAPTURE

    def take(self, module: nn.Module, args: Any, rest: Any) -> None:
        """Copy what the place's side and pick mean, at the call that is meant."""
        at, self.calls = self.calls, self.calls + 1
        if self.place.call is not None and at != self.place.call:
            return
        tensor = port_at(self.place.path, self.place.side, self.place.pick).read(module, args, rest)
        edge = get_gradient_edge(tensor) if tensor.requires_grad else None
        self.readings.values[self.name] = Reading(arranged(tensor.detach().clone(), self.place), edge)

    def of_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Take what a function returned."""
        self.take(module, args, output)

    def before_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Take what a function is given."""
        self.take(module, args, kwargs)


def arranged(tensor: Tensor, place: NamedPlace) -> Tensor:
    """A tensor with the axes of its place: an axis that holds heads is split, then axes are put in order."""
    if place.heads is not None:
        tensor = tensor.unflatten(place.heads[1], (place.heads[0], -1))
    return tensor if place.order is None else tensor.permute(place.order)


def read_places(model: nn.Module, places: Mapping[str, NamedPlace], inputs: Any) -> Readings:
    """Run ``model`` and copy the value at every place; scores and patterns in a forward of their own.

    A place that cannot be read is in ``missing`` with the reason. Nothing is raised for it.
    """
    plain = {name: place for name, place in places.items() if not _is_computed(place)}
    computed = {name: place for name, place in places.items() if _is_computed(place)}
    readings = Readings()
    _read(model, plain, inputs, readings)
    result = readings.result
    try:
        _read(model, computed, inputs, readings)
    except (TdcacheError, RuntimeError, ValueError):
        for path in {place.path.partition("::")[0] for place in computed.values()}:
            own = {name: place for name, place in computed.items() if place.path.partition("::")[0] == path}
            try:
                _read(model, own, inputs, readings)
            except (TdcacheError, RuntimeError, ValueError) as error:
                readings.missing.update(dict.fromkeys(own, str(error)))
    readings.result = result
    for name in places:
        if name not in readings.values:
            readings.missing.setdefault(name, "nothing was seen at its place in a forward")
    return readings


def _is_computed(place: NamedPlace) -> bool:
    return is_call(place.path) and CallSite.parse(place.path).name in _COMPUTED


def _read(model: nn.Module, places: Mapping[str, NamedPlace], inputs: Any, readings: Readings) -> None:
    if not places and readings.result is not None:
        return
    with MultiHookHandle(list(_hooks(model, places, readings))), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        readings.result = call_model(model, inputs)


def _hooks(model: nn.Module, places: Mapping[str, NamedPlace], readings: Readings) -> Iterator[Removable]:
    for name, place in places.items():
        try:
            yield _hook(model, place, _Take(name, place, readings))
        except TdcacheError as error:
            readings.missing[name] = str(error)


def _hook(model: nn.Module, place: NamedPlace, take: _Take) -> Removable:
    if not is_call(place.path):
        module = resolve(model, place.path)
        direction: HookDirection = "fwd_pre_kwargs" if place.side == "fwd_pre" else "fwd"
        return attach(module, take.take, direction, order=Order.CAPTURE, path=place.path)
    site = CallSite.parse(place.path)
    if site.derived:
        return attach_attention(model, site, take.of_call, use="read" if site.name in _COMPUTED else "watch")
    if place.side == "fwd_pre":
        return attach_call(model, site, take.before_call, None)
    return attach_call(model, site, None, take.of_call)
