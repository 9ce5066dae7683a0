"""Selectors of calls beside those of modules, and taps at the calls that they mean.

Which calls a selector means is known once they are made, so a tap is made when its call is first seen.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from tdcache.errors import DirectionError, listed
from tdcache.function_calls.attach import AtCall, CallsLike, OneCall, attach_rules
from tdcache.function_calls.handlers import CallRule
from tdcache.function_calls.names import is_torch_name
from tdcache.function_calls.overlay import INTERFACE, global_functions
from tdcache.function_calls.roles import AttentionHook, Use
from tdcache.function_calls.scope import ForwardScope
from tdcache.function_calls.sites import CallPattern, CallSite, is_call
from tdcache.hooks.directions import Direction, direction_row
from tdcache.hooks.port import InputPort, OutputPort, Port
from tdcache.hooks.registrations import MultiHookHandle, Order
from tdcache.hooks.values import leaves
from tdcache.selection import Selection, Site
from tdcache.types import HookDirection, Match, Pick, Selector

__all__ = ["CallPlace", "CallTaps", "MakeTap", "call_places", "parameters_of", "refuse_direction", "split_selector"]


class _AnyTap(Protocol):
    """What is put at a call."""

    @property
    def on_call(self) -> Callable[..., Any]:
        """What is called at the call, as a hook at its side is."""


MakeTap = Callable[[Site, Port], _AnyTap]
"""Makes the tap of one call: ``site.path`` is ``"path::name"``, and the port reads its arguments or its result."""


@dataclass(frozen=True, slots=True)
class CallPlace:
    """What a selector may mean in the forward of one module."""

    site: Site
    pattern: CallPattern
    selector: str


class _Selecting(Protocol):
    def __call__(self, selector: Selector, *, match: Match, allow_empty: bool) -> Selection: ...


def split_selector(selector: Selector) -> tuple[Selector | None, tuple[str, ...]]:
    """The part of a selector that speaks of modules (None if there is none), and the selectors of calls in it.

    Raises:
        SelectionError: a selector of calls is not well formed.
    """
    if isinstance(selector, str):
        if not is_call(selector):
            return selector, ()
        CallPattern.parse(selector)
        return None, (selector,)
    if not isinstance(selector, Sequence) or isinstance(selector, bytes):
        return selector, ()
    parts = [split_selector(member) for member in selector]
    calls = tuple(call for _, found in parts for call in found)
    return ([part for part, _ in parts if part is not None] or None) if calls else selector, calls


def call_places(select: _Selecting, selectors: Iterable[str], *, match: Match, allow_empty: bool) -> list[CallPlace]:
    """What selectors of calls may mean, by ``select``, which finds the modules.

    Raises:
        SelectionError: no module matches the part before ``::``.
    """
    places = []
    for selector in selectors:
        pattern = CallPattern.parse(selector)
        found = select(pattern.path, match=match, allow_empty=allow_empty)
        places += [CallPlace(site, pattern, selector) for site in found]
    return places


def refuse_direction(selectors: Iterable[str], direction: HookDirection, *, callback: bool = False) -> None:
    """Refuse what cannot be seen at a call.

    Raises:
        DirectionError: the gradient of arguments, a gradient for a callback, or the arguments of a derived place.
    """
    row = direction_row(direction)
    for selector in selectors:
        if direction == "grad_in" or (callback and row.gradient):
            raise DirectionError(
                f"{selector!r} is inside a forward, where the gradients are those of results ('bwd'), without callback="
                f"; got {direction!r}"
            )
        pattern = CallPattern.parse(selector)
        if row.value == "args" and any(pattern.attention()):
            raise DirectionError(
                f"{selector!r} is a value inside an attention call and has no arguments of its own: direction "
                f"'fwd' is the value itself, got {direction!r}"
            )


class CallTaps:
    """The taps at some places; :meth:`attach` puts them there.

    Args:
        places: where.
        make: makes the tap of one call when that is first made.
        direction: what the taps see.
        pick: which tensor of it.
        use: what is done with values that are derived from an attention call.
        order: where the taps stand among the handlers of a call.
        as_user: the taps are called with what the direction's row says, as a user's hooks are.
    """

    def __init__(
        self,
        places: Iterable[CallPlace],
        make: MakeTap,
        direction: HookDirection,
        pick: Pick = None,
        *,
        use: Use = "read",
        order: int = Order.CAPTURE,
        as_user: bool = False,
    ) -> None:
        self.places = list(places)
        self.make = make
        self.row: Direction = direction_row(direction)
        self.pick = pick
        self.use: Use = use
        self.order = order
        self.as_user = as_user
        self.before = self.row.value == "args"
        self.unfired: list[str] = []
        """Once removed: a sentence for each selector that meant no call that was made."""
        self._at: dict[tuple[int, str], _AtPlace] = {}
        self._served: dict[str, _AtPlace] = {}
        self._fired: set[str] = set()
        self._attached = MultiHookHandle()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(dict.fromkeys(place.selector for place in self.places))!r})"

    def attach(self, root: nn.Module, handle: MultiHookHandle) -> None:
        """Put the taps in the forwards of modules below ``root``; ``handle`` takes them in."""
        self._attached = attach_rules(root, self._rules())
        handle.add(self)

    def _rules(self) -> Iterator[tuple[nn.Module, CallRule]]:
        for number, place in enumerate(self.places):
            path, module = place.site.path, place.site.module
            for label in place.pattern.attention():
                site = CallSite.parse(f"{path}::{label}")
                yield module, AttentionHook(site, self._at_place(number, site).after, self.use, self.order)
            if not place.pattern.attention_only:
                literal = place.pattern.literal
                if literal is not None:
                    site = CallSite.parse(f"{path}::{literal}")
                    yield module, OneCall(site, self.handler(number, site))
                else:
                    yield module, CallsLike(path, place.pattern, _MakeHandler(self, number))

    def _at_place(self, number: int, site: CallSite) -> _AtPlace:
        key = (number, str(site))
        if key not in self._at:
            self._at[key] = _AtPlace(self, self.places[number], site)
        return self._at[key]

    def handler(self, number: int, site: CallSite) -> AtCall:
        """The handler of one call that the place of this number takes."""
        at = self._at_place(number, site)
        return AtCall(at.before if self.before else None, None if self.before else at.after, self.order)

    def serve(self, at: _AtPlace) -> Callable[..., Any] | None:
        """The tap of a call that is made for the first time; None where another selector has put one there."""
        path = str(at.site)
        self._fired.add(at.place.selector)
        if self._served.setdefault(path, at) is not at:
            return None
        module, groups = at.place.site.module, at.place.site.groups
        names = parameters_of(at.site.name, module) if self.before else ()
        port: Port = InputPort(path, self.pick, names) if self.before else OutputPort(path, self.pick)
        return self.make(Site(path, module, groups), port).on_call

    def remove(self) -> None:
        """Undo it; a second call does nothing."""
        if len(self._attached):
            self.unfired = list(self._unfired())
        self._attached.remove()

    def _unfired(self) -> Iterator[str]:
        silent: dict[str, list[CallPlace]] = {}
        for place in self.places:
            if place.selector not in self._fired:
                silent.setdefault(place.selector, []).append(place)
        for selector, places in silent.items():
            made = ((place.site.path, _called_in(place.site.module)) for place in places)
            said = [f"{path or '(root)'} calls {listed(_nearest(selector, names), 8)}" for path, names in made if names]
            known = "; ".join(said[:3]) or "select(model, pattern, inputs) shows what they call"
            yield f"{selector!r} means a call that none of its {len(places)} modules made: {known}"

    def mute(self) -> None:
        """Silence the taps without giving up their places."""
        self._attached.mute()

    def unmute(self) -> None:
        """Let them act again."""
        self._attached.unmute()


class _MakeHandler:
    """Gives the handler of each call that a pattern takes."""

    def __init__(self, taps: CallTaps, number: int) -> None:
        self.taps = taps
        self.number = number

    def __call__(self, site: CallSite) -> AtCall | None:
        return None if site.name == INTERFACE else self.taps.handler(self.number, site)


class _AtPlace:
    """The hooks at one call: they make the tap when they are first called, and pass everything on to it."""

    __slots__ = ("hook", "made", "place", "site", "taps")

    def __init__(self, taps: CallTaps, place: CallPlace, site: CallSite) -> None:
        self.taps = taps
        self.place = place
        self.site = site
        self.made = False
        self.hook: Callable[..., Any] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.site)!r})"

    def _ready(self, value: Any) -> Callable[..., Any] | None:
        if self.place.pattern.literal is None and next(leaves(value), None) is None:
            return None  # a pattern takes many calls, and not all of them are about tensors
        if not self.made:
            self.made = True
            self.hook = self.taps.serve(self)
        return self.hook

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Show the arguments to the tap."""
        hook = self._ready((args, kwargs))
        if hook is None:
            return None
        if self.taps.as_user and self.taps.row.name == "fwd_pre":
            new = hook(module, args)
            return new if new is None else (new if isinstance(new, tuple) else (new,), kwargs)
        return hook(module, args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Show the result to the tap."""
        hook = self._ready(output)
        if hook is None:
            return None
        if self.taps.as_user and self.taps.row.name == "fwd_kwargs":
            return hook(module, args, kwargs, output)
        # All arguments as positional ones: what is handed on is looked for among them.
        return hook(module, (*args, *kwargs.values()), output)


def _called_in(module: nn.Module) -> list[str]:
    """The functions that a module with sites inside was seen to call, or looks up by name."""
    scope = module.__dict__.get("forward")
    if not isinstance(scope, ForwardScope):
        return []
    leaves_of = (child for child in module.modules() if not child._modules and child is not module)
    theirs = {name for child in leaves_of for name in _code_names(child)} - set(_code_names(module))
    return [name for name in dict.fromkeys(scope.called()) if name != INTERFACE and name not in theirs]


def _code_names(module: nn.Module) -> tuple[str, ...]:
    """What the forward of a module's class names; a leaf of torch's runs while its parent is watched."""
    code = getattr(type(module).forward, "__code__", None)
    return () if code is None else code.co_names


def _nearest(selector: str, names: list[str]) -> list[str]:
    wanted = selector.partition("::")[2]
    return sorted(names, key=lambda name: -SequenceMatcher(None, wanted, name).ratio())


def parameters_of(name: str, module: nn.Module) -> tuple[str, ...]:
    """The names of a function's parameters by position; empty where nothing says them."""
    function = global_functions(type(module).forward).get(name)
    return _names_of(function) if function is not None else _torch_parameters(name)


@lru_cache(maxsize=1024)
def _torch_parameters(name: str) -> tuple[str, ...]:
    if not is_torch_name(name):
        return ()
    described = torch.overrides.get_testing_overrides()
    for holder in (F, torch, torch.Tensor):
        function = getattr(holder, name, None)
        if function is not None:
            return _names_of(described.get(function, function))
    return ()


def _names_of(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ()
