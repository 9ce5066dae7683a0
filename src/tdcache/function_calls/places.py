"""Selectors of calls beside those of modules, and taps at the calls that they mean.

Which calls a selector means is known once they are made, so a tap is made when its call is first seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import partial
from typing import Any, Protocol

from torch import nn

from tdcache.errors import DirectionError, listed
from tdcache.function_calls.attach import AtCall, CallsLike, OneCall, attach_rules
from tdcache.function_calls.handlers import CallRule
from tdcache.function_calls.overlay import INTERFACE, parameters_of
from tdcache.function_calls.roles import AttentionHook, Use
from tdcache.function_calls.scope import ForwardScope, fits_graph
from tdcache.function_calls.sites import CallPattern, CallSite, FindModules, is_call
from tdcache.hooks.directions import Direction, direction_row
from tdcache.hooks.port import InputPort, Port, port_at
from tdcache.hooks.registrations import MultiHookHandle, Order
from tdcache.hooks.values import leaves
from tdcache.introspect import may_be_compiled, uncompiled
from tdcache.selection import Site
from tdcache.selection import select as select_modules
from tdcache.types import HookDirection, Match, Pick

__all__ = [
    "CallPlace",
    "CallTaps",
    "MakeTap",
    "call_places",
    "calls_fit_graph",
    "graph_shows",
    "nearest_calls",
    "port_of",
    "refuse_direction",
    "what_is_called",
]


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


def call_places(select: FindModules, selectors: Iterable[str], *, match: Match, allow_empty: bool) -> list[CallPlace]:
    """What selectors of calls may mean, by ``select``, which finds the modules.

    Raises:
        SelectionError: no module matches the part before ``::``.
    """
    places = []
    for selector in selectors:
        pattern = CallPattern.parse(selector)
        found = select(pattern.path, match=match, allow_empty=allow_empty)
        places += [CallPlace(Site(path, uncompiled(each), groups), pattern, selector) for path, each, groups in found]
    return places


def refuse_direction(selectors: Iterable[str], direction: HookDirection) -> None:
    """Refuse what cannot be seen at a call.

    Raises:
        DirectionError: the arguments of a place of an attention call, or their gradient.
    """
    row = direction_row(direction)
    for selector in selectors:
        pattern = CallPattern.parse(selector)
        if (row.value == "args" or direction == "grad_in") and any(pattern.attention()):
            raise DirectionError(
                f"{selector!r} is a value inside an attention call and has no arguments of its own: direction "
                f"'fwd' is the value itself and 'bwd_pre' its gradient, got {direction!r}"
            )


def port_of(path: str, direction: str, pick: Pick, module: nn.Module) -> Port:
    """:func:`tdcache.hooks.port.port_at`, also at a call of ``module``, where it knows the parameters' names."""
    port = port_at(path, direction, pick)
    if is_call(path) and isinstance(port, InputPort):
        return InputPort(path, pick, parameters_of(CallSite.parse(path).name, module))
    return port


def graph_shows(model: nn.Module, selectors: Iterable[str], match: Match) -> bool:
    """Whether dynamo can trace every call that selectors mean in a model; only asked of one that may be compiled."""
    find = partial(select_modules, model)
    return may_be_compiled(model) and calls_fit_graph(call_places(find, selectors, match=match, allow_empty=True))


def calls_fit_graph(places: Sequence[CallPlace]) -> bool:
    """Whether dynamo can trace every call that is meant: their names are spelled out, and found in globals."""
    spelled = all(place.pattern.labels is not None for place in places)
    return spelled and all(
        fits_graph(each.site.module, label) for each in places for label in each.pattern.labels or ()
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
        self._attached = MultiHookHandle()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(dict.fromkeys(place.selector for place in self.places))!r})"

    def attach(self, root: nn.Module, handle: MultiHookHandle, *, made: bool = False) -> None:
        """Put the taps in the forwards of modules below ``root``; ``handle`` takes them in.

        With ``made`` all taps are made now, so that a graph can be made of them.
        """
        self._attached = attach_rules(root, self._rules())
        for at in self._at.values() if made else ():
            at.make()
        handle.add(self)

    def _rules(self) -> Iterator[tuple[nn.Module, CallRule]]:
        for number, place in enumerate(self.places):
            path, module = place.site.path, place.site.module
            for label in place.pattern.attention():
                site = CallSite.parse(f"{path}::{label}")
                yield module, AttentionHook(site, self._at_place(number, site).after, self.use, self.order)
            labels = place.pattern.labels
            if labels is None and not place.pattern.attention_only:
                yield module, CallsLike(path, place.pattern, _MakeHandler(self, number))
            for label in labels or ():
                site = CallSite.parse(f"{path}::{label}")
                if not site.derived:
                    yield module, OneCall(site, self.handler(number, site))

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
        if self._served.setdefault(path, at) is not at:
            return None
        module, groups = at.place.site.module, at.place.site.groups
        port = port_of(path, "fwd_pre" if self.before else "fwd", self.pick, module)
        return self.make(Site(path, module, groups), port).on_call

    def remove(self) -> None:
        """Undo it; a second call does nothing."""
        if len(self._attached):
            self.unfired = list(self._unfired())
        self._attached.remove()

    def _unfired(self) -> Iterator[str]:
        silent: dict[str, list[CallPlace]] = {}
        fired = {at.place.selector for at in self._at.values() if at.fired}
        for place in self.places:
            if place.selector not in fired:
                silent.setdefault(place.selector, []).append(place)
        for selector, places in silent.items():
            made = (what_is_called(selector, place.site.path, place.site.module) for place in places)
            known = (
                "; ".join([said for said in made if said][:3]) or "select(model, pattern, inputs) shows what they call"
            )
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

    __slots__ = ("fired", "hook", "made", "place", "site", "spelled", "taps")

    def __init__(self, taps: CallTaps, place: CallPlace, site: CallSite) -> None:
        self.taps = taps
        self.place = place
        self.site = site
        self.spelled = place.pattern.labels is not None
        self.made = self.fired = False
        self.hook: Callable[..., Any] | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.site)!r})"

    def _ready(self, value: Any) -> Callable[..., Any] | None:
        if not self.spelled and next(leaves(value), None) is None:
            return None  # a pattern takes many calls, and not all of them are about tensors
        self.fired = True
        if not self.made:
            self.make()
        return self.hook

    def make(self) -> None:
        """Make the tap that the call is shown to from now on."""
        self.made = True
        self.hook = self.taps.serve(self)

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


def what_is_called(selector: str, path: str, module: nn.Module) -> str:
    """What the forward of a module was seen to call, nearest to ``selector`` first; nothing if it did not run."""
    names = _called_in(module)
    return f"{path or '(root)'} calls {listed(nearest_calls(selector, names), 8)}" if names else ""


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


def nearest_calls(selector: str, names: Iterable[str]) -> list[str]:
    """The names of calls, those most like the part of ``selector`` after ``::`` first."""
    wanted = selector.partition("::")[2]
    return sorted(names, key=lambda name: -SequenceMatcher(None, wanted, name).ratio())
