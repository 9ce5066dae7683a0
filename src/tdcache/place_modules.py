"""Named places as modules: what lets every method that hooks modules work at canonical names.

A :class:`PlaceModule` is an identity that stands for one place: a side of a module, one tensor of several there, one
call of a module that runs several times, a call inside a forward, heads split from units. Hooks are registered on it as
on a module, see the place's value as its output, and change it by what they return; where they go is decided here,
once. A name that means the plain output of a module needs none: there the site is the module itself, at no cost.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from tdcache.current_call import CurrentCall
from tdcache.errors import DirectionError, EditError, SelectionError
from tdcache.function_calls.attach import AtCall, OneCall, attach_rules
from tdcache.function_calls.handlers import CallRule
from tdcache.function_calls.overlay import parameters_of
from tdcache.function_calls.roles import AttentionHook, Use
from tdcache.function_calls.sites import CallSite, is_call
from tdcache.function_calls.stand_in import select_sites
from tdcache.hooks.attach import AttachedElsewhere, attach
from tdcache.hooks.compiled import refuse_scripted
from tdcache.hooks.gradient_hooks import GradInputHook
from tdcache.hooks.port import InputPort, OutputPort, Port
from tdcache.hooks.registrations import MultiHookHandle
from tdcache.hooks.transient import Transient
from tdcache.named_places import NamedPlace, Names
from tdcache.named_selection import select_names
from tdcache.paths import resolve_all
from tdcache.regions import Region
from tdcache.selection import Matcher, Selection, Site, as_matcher
from tdcache.types import HookDirection, Match, Pick, Selector

__all__ = [
    "PlaceModule",
    "axis_of",
    "dims_of",
    "is_module_output",
    "module_behind",
    "named_selection",
    "place_at",
    "position_dims",
    "refuse_at_names",
    "region_in",
    "site_at",
    "sites_of",
]


class PlaceModule(AttachedElsewhere):
    """An identity that stands for a named place of one model; hooks on it act at the place.

    Args:
        place: what it stands for.
        root: the model that ``place.path`` is relative to.
        target: the module at the place, or in whose forward the call is made.
    """

    def __init__(self, place: NamedPlace, root: nn.Module, target: nn.Module) -> None:
        super().__init__()
        self.place = place
        # Weakly, and past nn.Module: it is no parent of the model's modules, and keeps none of them alive.
        self.__dict__["_root"] = weakref.ref(root)
        self.__dict__["_target"] = weakref.ref(target)

    def extra_repr(self) -> str:
        """The place in words, for the repr."""
        return self.place.where

    def forward(self, value: Tensor) -> Tensor:
        """Pass a value on."""
        return value

    @property
    def target(self) -> nn.Module:
        """The module at the place, or in whose forward it is."""
        return self._held("_target")

    @property
    def root(self) -> nn.Module:
        """The model that the place's path is relative to."""
        return self._held("_root")

    def stands_at(self, target: nn.Module) -> bool:
        """Whether this is the module at the place."""
        return self.__dict__["_target"]() is target

    def _held(self, which: str) -> nn.Module:
        module: nn.Module | None = self.__dict__[which]()
        if module is None:
            raise SelectionError(f"the model of the place {self.place.name!r} is gone", selector=self.place.name)
        return module

    @classmethod
    def attach_hooks(
        cls, pairs: Iterable[tuple[PlaceModule, Callable[..., Any]]], direction: HookDirection, order: int
    ) -> MultiHookHandle:
        """Put hooks at places; they are called as hooks of ``direction`` are. Calls are hooked all at once."""
        handle = MultiHookHandle()
        inside: dict[nn.Module, list[tuple[nn.Module, CallRule]]] = {}
        with handle.installing():
            for at, hook in pairs:
                tap = _PlaceHook(at, hook, direction, order)
                if at.place.call is not None:
                    tap.call = CurrentCall(at.root, _OneCallOf(at.place.call))
                    tap.call.attach(handle)
                if is_call(at.place.path):
                    inside.setdefault(at.root, []).append((at.target, at.rule(tap)))
                elif at.place.side == "fwd_pre":
                    handle.add(attach(at.target, tap.on_input, "fwd_pre_kwargs", order=order))
                else:
                    handle.add(attach(at.target, tap.on_output, "fwd_kwargs", order=order))
            for root, rules in inside.items():
                handle.add(attach_rules(root, rules))
        return handle

    def rule(self, tap: _PlaceHook) -> CallRule:
        """What has a hook called at the one call that is meant."""
        site = CallSite.parse(self.place.path)
        if site.derived:
            return AttentionHook(site, tap.on_value, tap.use, tap.order)
        before, after = (tap.on_input, None) if self.place.side == "fwd_pre" else (None, tap.on_output)
        return OneCall(site, AtCall(before, after, tap.order))

    def port(self) -> Port:
        """What reads and writes the tensor that is meant."""
        place = self.place
        if place.side == "fwd":
            return OutputPort(place.path, place.pick)
        names = parameters_of(CallSite.parse(place.path).name, self.target) if is_call(place.path) else None
        return InputPort(place.path, place.pick, names)


@dataclass(frozen=True, slots=True)
class _OneCallOf:
    """Asks for one call of a module that runs several times in one forward."""

    calls: int
    positions: None = None
    steps: None = None
    mask_key: None = None


class _PlaceHook(Transient):
    """A hook of a place module, at the place itself.

    Where the value is what a module or function returns, as it is, the hook is called with that module and its
    arguments, so that gradients are watched on the tensor. Elsewhere it is called as at an identity.
    """

    __slots__ = ("as_it_is", "call", "direction", "hook", "order", "place_module", "port")

    def __init__(
        self, place_module: PlaceModule, hook: Callable[..., Any], direction: HookDirection, order: int
    ) -> None:
        self.place_module = place_module
        self.hook = hook
        self.direction = direction
        self.order = order
        self.port = place_module.port()
        self.call: CurrentCall | None = None
        place = place_module.place
        in_pairs = isinstance(getattr(hook, "__self__", None), GradInputHook)  # both sides are those of the identity
        after = direction in ("fwd", "fwd_kwargs") and place.side == "fwd" and not in_pairs
        self.as_it_is = after and place.heads is None and place.order is None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.place_module.place.name!r}, {self.hook!r})"

    @property
    def rowwise(self) -> bool:
        """What is asked of hooks that a pass of attribution meets."""
        return getattr(getattr(self.hook, "__self__", self.hook), "rowwise", False)

    @property
    def use(self) -> Use:
        """What the hook does with values that are derived from an attention call."""
        return getattr(getattr(self.hook, "__self__", self.hook), "use", "edit")

    def on_output(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Hook after a module or call: show the hook the value, and put back what comes."""
        if self._is_left_out():
            return None
        new = self._asked(self.port.read(module, args, output), module, args, kwargs)
        return None if new is None else self.port.write(module, args, output, new)

    def on_input(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Hook before a module or call: the same."""
        if self._is_left_out():
            return None
        new = self._asked(self.port.read(module, args, kwargs), module, args, kwargs)
        return None if new is None else self.port.write(module, args, kwargs, new)

    def on_value(self, module: nn.Module, args: Any, kwargs: dict[str, Any], value: Tensor) -> Any:
        """Hook at a place of an attention call: the same."""
        return None if self._is_left_out() else self._asked(value, module, args, kwargs)

    def _is_left_out(self) -> bool:
        """Whether this is another call of the module than the one that is meant."""
        return self.call is not None and not self.call.is_due(self.port.path)

    def _asked(self, value: Tensor, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
        """What the hook makes of a value; None if it keeps it."""
        if self.as_it_is:
            arguments = (args, kwargs) if self.direction == "fwd_kwargs" else ((*args, *kwargs.values()),)
            new = self.hook(module, *arguments, value)
            return None if new is value else new
        place = self.place_module.place
        shown = place.shown(value)
        new = self._called(shown)
        return None if new is None or new is shown else place.given_back(new)

    def _called(self, value: Tensor) -> Any:
        place_module = self.place_module
        if self.direction == "fwd":
            return self.hook(place_module, (value,), value)
        if self.direction == "fwd_kwargs":
            return self.hook(place_module, (value,), {}, value)
        with_names = self.direction == "fwd_pre_kwargs"
        new = self.hook(place_module, (value,), {}) if with_names else self.hook(place_module, (value,))
        if new is None or isinstance(new, Tensor):
            return new
        args = new[0] if with_names else new
        return args[0]


# By model: those in use, so that all contexts at one place hook one identity.
_PLACE_MODULES: weakref.WeakKeyDictionary[nn.Module, weakref.WeakValueDictionary[Any, PlaceModule]] = (
    weakref.WeakKeyDictionary()
)


def named_selection(
    model: nn.Module,
    names: Names,
    selector: Selector,
    *,
    match: Match = "full",
    allow_empty: bool = False,
    matcher: Matcher | None = None,
) -> Selection:
    """The sites of the names that ``selector`` means: their path is the name, their module is what is to be hooked.

    Raises:
        CanonicalNameError: the table is not one of this model, or nothing matches; refused names with their reason.
        ContextError: a place is inside a TorchScript module.
    """
    root = names.root_in(model)
    matcher = as_matcher(selector, match) if matcher is None else matcher
    found = select_names(names, root, matcher, selector, match=match, allow_empty=allow_empty)
    refuse_scripted(root, [(names[site.path].path, site.module) for site in found])
    sites = [Site(site.path, site_at(names[site.path], root, site.module), site.groups) for site in found]
    return Selection(sites, selector=selector, model_name=found.model_name)


def sites_of(
    model: nn.Module,
    selector: Selector,
    names: Names | None = None,
    *,
    match: Match = "full",
    allow_empty: bool = False,
) -> Selection:
    """The sites that a selector means: modules and calls, or with ``names`` canonical names."""
    if names is None:
        return select_sites(model, selector, match=match, allow_empty=allow_empty)
    return named_selection(model, names, selector, match=match, allow_empty=allow_empty)


def site_at(place: NamedPlace, root: nn.Module, target: nn.Module) -> nn.Module:
    """What is hooked for a place: the module, where its plain output is meant, or what stands for the place."""
    if is_module_output(place) and place.pick is None:
        return target
    known = _PLACE_MODULES.setdefault(root, weakref.WeakValueDictionary())
    pick: Pick = place.pick
    key: tuple[Any, ...] = (place.path, place.side, pick, place.call, place.heads, place.order, place.axes)
    place_module = known.get(key)
    if place_module is None or not place_module.stands_at(target):
        place_module = known[key] = PlaceModule(place, root, target)
    return place_module


def is_module_output(place: NamedPlace) -> bool:
    """Whether a name means what a module returns (its first tensor), as it is, in every call."""
    as_it_is = place.heads is None and place.order is None and place.call is None
    return place.side == "fwd" and place.pick in (None, 0) and as_it_is and not is_call(place.path)


def place_at(names: Names, model: nn.Module, name: str) -> tuple[str, nn.Module]:
    """Name and what is hooked for one name, as a path is resolved to a module.

    Raises:
        CanonicalNameError: the table is not one of this model, or has no such name.
    """
    place = names[name]
    root = names.root_in(model)
    path, target = module_behind(place, root)
    refuse_scripted(root, [(path, target)])
    return name, site_at(place, root, target)


def module_behind(place: NamedPlace, root: nn.Module) -> tuple[str, nn.Module]:
    """Path and module at a place, or of the forward in which the call is made."""
    path = place.path.partition("::")[0]
    return resolve_all(root, path) if path else ("", root)


def region_in(region: Region, place: NamedPlace, heads: Any = None) -> Region:
    """``region`` along the axes that a place says its value has.

    Args:
        region: what is meant, where ``position_dim`` and ``unit_dim`` are those of ``(batch, position, unit)``.
        place: the place.
        heads: which heads: ``(n_heads, which)``, or of a place with an axis of heads, just which.

    Raises:
        EditError: heads of a place that has no axis of heads, without their number.
    """
    head = axis_of(place, "head", "kv_head")
    known = dims_of(place)
    dims: dict[str, Any] = {}
    if region.position_dim == 1 and "position_dim" in known:
        dims["position_dim"] = known["position_dim"]
    if region.unit_dim == -1 and "unit_dim" in known:
        dims["unit_dim"] = known["unit_dim"]
    if head is not None:
        dims["head_dim"] = head
    if heads is not None:
        counted = isinstance(heads, tuple) and len(heads) == 2
        if head is None and not counted:
            raise EditError(
                f"{place.name!r} has no axis of heads ({', '.join(place.axes) or 'its axes are not known'}), so "
                f"heads={heads!r} does not say which units; give heads=(n_heads, which)"
            )
        dims["heads"] = heads if counted else (None, heads)
    return replace(region, **dims) if dims else region


def position_dims(names: Names, sites: Iterable[Site]) -> dict[str, int]:
    """By name, the axis of positions where the table knows it."""
    found = {site.path: axis_of(names[site.path], "position", "query", "key") for site in sites}
    return {name: axis for name, axis in found.items() if axis is not None}


def refuse_at_names(names: Names | None, directions: Iterable[str]) -> None:
    """Refuse directions that mean nothing at a canonical name, which is one value.

    Raises:
        DirectionError: the inputs of a name, or their gradient.
        SelectionError: what was given is no table of names.
    """
    if names is None:
        return
    if not isinstance(names, Names):
        raise SelectionError(f"names= is a table such as tdcache.names(model), got {type(names).__name__}")
    for direction in directions:
        if direction not in ("fwd", "bwd", "bwd_pre", "fwd_kwargs"):
            raise DirectionError(
                f"a canonical name is one value: 'fwd' is that value and 'bwd' its gradient, got {direction!r}; what "
                "goes into a block or a norm has a name of its own"
            )


def dims_of(place: NamedPlace) -> dict[str, int]:
    """``position_dim`` and ``unit_dim`` of a place's value, as far as its axes are known; units count from the end."""
    position, unit = axis_of(place, "position", "query", "key"), axis_of(place, "unit")
    dims = {} if position is None else {"position_dim": position}
    return dims if unit is None else {**dims, "unit_dim": unit - len(place.axes)}


def axis_of(place: NamedPlace, *names: str) -> int | None:
    """The axis of a place's value that has one of these names; None if there is none."""
    return next((place.axes.index(name) for name in names if name in place.axes), None)
