"""The values of a table's places in one forward, copied as they pass, with where gradients of them begin."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from tdcache.arguments import call_with
from tdcache.errors import TdcacheError
from tdcache.function_calls import CallSite, attach_attention, attach_call, is_call
from tdcache.hooks.attach import attach
from tdcache.hooks.port import port_at
from tdcache.hooks.registrations import MultiHookHandle, Order
from tdcache.hooks.transient import Transient
from tdcache.named_places import NamedPlace
from tdcache.naming.gradients import edge_of
from tdcache.paths import resolve
from tdcache.types import HookDirection, Removable

__all__ = ["Reading", "Readings", "read_places"]

_COMPUTED = ("scores", "pattern")


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """What was seen at one place: a copy of the tensor, and where a gradient of it can be asked for.

    Attributes:
        data: the copy, as the place shows it.
        edge: where a gradient begins or ends.
        place: the place.
    """

    data: Tensor
    edge: GradientEdge | None
    place: NamedPlace


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

    def show(self, places: Mapping[str, NamedPlace]) -> None:
        """Show the values, so far as the model has them, as these places do."""
        for name, place in places.items():
            found = self.values[name]
            self.values[name] = Reading(place.shown(found.data), found.edge, place)


@dataclass(slots=True, eq=False)
class _Take(Transient):
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
        edge = edge_of(tensor)
        self.readings.values[self.name] = Reading(self.place.shown(tensor.detach().clone()), edge, self.place)

    def of_call(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Take what a function returned."""
        self.take(module, args, output)

    def before_call(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Take what a function is given."""
        self.take(module, args, kwargs)


def read_places(model: nn.Module, places: Mapping[str, NamedPlace], inputs: Any) -> Readings:
    """Run ``model`` and copy the value at every place; places of attention calls in forwards of their own.

    A place that cannot be read is in ``missing`` with the reason. Nothing is raised for it.

    Raises:
        Exception: whatever the model raises when it is called.
    """
    readings = Readings()
    sites = {name: _attention_place(place) for name, place in places.items()}
    computed = {name: places[name] for name, site in sites.items() if site is not None and site.name in _COMPUTED}
    plain = {name: place for name, place in places.items() if name not in computed}
    try:
        _read(model, plain, inputs, readings)  # in one forward: gradients lead from one to another
    except (TdcacheError, RuntimeError, ValueError):
        _read_in_parts(
            model, {name: plain[name] for name, site in sites.items() if site and name in plain}, inputs, readings
        )
        _read(model, {name: place for name, place in plain.items() if name not in readings.missing}, inputs, readings)
    result = readings.result
    _read_in_parts(model, computed, inputs, readings)
    readings.result = result
    for name in places:
        if name not in readings.values:
            readings.missing.setdefault(name, "nothing was seen at its place in a forward")
    return readings


def _attention_place(place: NamedPlace) -> CallSite | None:
    site = CallSite.parse(place.path) if is_call(place.path) else None
    return site if site is not None and site.derived else None


def _read_in_parts(model: nn.Module, places: Mapping[str, NamedPlace], inputs: Any, readings: Readings) -> None:
    """Read all in one forward; where that is refused, the places of each module alone, then each place alone."""
    if not places:
        return
    try:
        _read(model, places, inputs, readings)
    except (TdcacheError, RuntimeError, ValueError) as error:
        modules = {place.path.partition("::")[0] for place in places.values()}
        if len(places) == 1:
            readings.missing.update(dict.fromkeys(places, str(error)))
            return
        for module in modules:
            own = {name: place for name, place in places.items() if place.path.partition("::")[0] == module}
            parts = [own] if len(modules) > 1 else [{name: place} for name, place in own.items()]
            for part in parts:
                _read_in_parts(model, part, inputs, readings)


def _read(model: nn.Module, places: Mapping[str, NamedPlace], inputs: Any, readings: Readings) -> None:
    with MultiHookHandle(list(_hooks(model, places, readings))), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        readings.result = call_with(model, inputs)


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
