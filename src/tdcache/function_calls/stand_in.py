"""Calls inside forwards as places that take hooks, for whatever registers hooks on modules.

Attribution, sweeps, splices, pipelines and the verbs of a run select modules and register hooks on them. What they get
for ``"path::function"`` is a :class:`CallModule`: no module of the model, but hooks on it are called around that call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from tdcache.errors import ContextError, DirectionError, SelectionError, UnfiredSiteWarning, warn_user
from tdcache.function_calls.attach import OneCall, attach_rules, refuse_recomputed, set_output
from tdcache.function_calls.handlers import Call, CallRule
from tdcache.function_calls.overlay import parameters_of
from tdcache.function_calls.places import what_is_called
from tdcache.function_calls.roles import AttentionHook
from tdcache.function_calls.sites import CallPattern, CallSite, FindModules, is_call, split_selector
from tdcache.hooks.gradient_hooks import GradInputHook
from tdcache.hooks.on_demand import OnDemandPlace
from tdcache.hooks.registrations import Order
from tdcache.introspect import uncompiled
from tdcache.paths import resolve_all
from tdcache.selection import Selection, Site, as_matcher
from tdcache.selection import select as select_modules
from tdcache.types import Match, Removable, Selector

__all__ = ["CallModule", "check_selector", "resolve_site", "select_sites"]

_made: WeakKeyDictionary[nn.Module, dict[str, CallModule]] = WeakKeyDictionary()


class CallModule(OnDemandPlace):
    """One call in the forward of a module: hooks on it run around that call, with torch's conventions.

    Its ``forward`` is that of the function. Where another is set on the instance, the function is not called.
    """

    def __init__(self, host: nn.Module, site: CallSite) -> None:
        super().__init__()
        self.site = site
        self._host = ref(host)
        self._root: Callable[[], nn.Module | None] = ref(host)
        self.fired = False
        """Whether the call was made since the place was installed."""

    @classmethod
    def of(cls, root: nn.Module, host: nn.Module, site: CallSite) -> CallModule:
        """The one that stands for a call in the forward of ``host``, a descendant of ``root``."""
        made = _made.setdefault(host, {})
        place = made.get(site.label)
        if place is None:
            place = made[site.label] = cls(host, site)
        place.site, place._root = site, ref(root)
        return place

    def extra_repr(self) -> str:
        """The call, for the repr."""
        return str(self.site)

    @property
    def call_parameters(self) -> tuple[str, ...]:
        """The names of the function's parameters by position; empty where nothing says them."""
        return parameters_of(self.site.name, self._alive(self._host))

    def _alive(self, held: Callable[[], nn.Module | None]) -> nn.Module:
        found = held()
        if found is None:
            raise ContextError(f"the model in whose forward {str(self.site)!r} is called is gone; select it again")
        return found

    def admit(self, hook: Any, *, before: bool) -> None:
        """Refuse what comes before a value that is no function's result.

        Raises:
            DirectionError: the site is a place of an attention call.
        """
        gradients = isinstance(getattr(getattr(hook, "hook", hook), "__self__", None), GradInputHook)
        if before and self.site.derived and not gradients:
            raise DirectionError(
                f"{str(self.site)!r} is a value inside an attention call and has no arguments of its own: its "
                "direction is 'fwd', and that of its gradient 'bwd'"
            )

    def install(self) -> Removable:
        """Put the place into the forward, until the handle is removed."""
        host, root = self._alive(self._host), self._alive(self._root)
        rule: CallRule
        if self.site.derived:
            rule = AttentionHook(self.site, self.offer, "watch", Order.EDIT_GRADIENT)
        else:
            rule = _SteadyCall(self.site, _Around(self))
        self.fired = False
        return _Reporting(self, host, attach_rules(root, [(host, rule)], fenced=False))

    def offer(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> Tensor | None:
        """Show a value of an attention call to the hooks; gives what they put in its place, or None."""
        self.fired = True
        instead = self.__dict__.get("forward")
        self.run_before((), {})
        given = value if instead is None else instead(value)
        new: Tensor = self.run_after(_positional(args, kwargs), kwargs, given)
        return None if new is value else new


class _Reporting:
    """Takes a place out again, and says so if its call was never made although the module ran."""

    def __init__(self, place: CallModule, host: nn.Module, installed: Removable) -> None:
        self.place = place
        self.host = host
        self.installed = installed

    def remove(self) -> None:
        """Take the place out; where an exception is under way it is the one that the user is to see."""
        site = self.place.site
        said = "" if self.place.fired else what_is_called(str(site), site.path, self.host)
        self.installed.remove()
        if said and sys.exc_info()[0] is None:
            warn_user(f"{str(site)!r} means a call that its module did not make: {said}", UnfiredSiteWarning)


class _SteadyCall(OneCall):
    """The rule of a place that takes any hooks: no graph is made of what these do."""

    def traceable(self, names: Any, *, tables: bool) -> None:
        """Return nothing, so that dynamo breaks the graph at the forward."""


class _Around:
    """Calls the hooks of a place around a call."""

    stage = 0
    order = Order.EDIT_GRADIENT  # after the edits and before the captures that know calls as such

    def __init__(self, place: CallModule) -> None:
        self.place = place

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.place.site)!r})"

    def before(self, call: Call) -> None:
        """Show the arguments to the pre-hooks; they may replace them, and a ``forward`` of the place the function."""
        self.place.fired = True
        args, kwargs = self.place.run_before(call.args, call.kwargs)
        if args is not call.args or kwargs is not call.kwargs:
            refuse_recomputed(call)
            call.args, call.kwargs = args, kwargs
        call.instead = self.place.__dict__.get("forward")
        if call.instead is not None:
            refuse_recomputed(call)

    def after(self, call: Call) -> None:
        """Show the result to the hooks, which may replace it."""
        new = self.place.run_after(_positional(call.args, call.kwargs), call.kwargs, call.output)
        if new is not call.output:
            set_output(call, new)


def _positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments: what a function hands on is looked for among those by position."""
    return (*args, *kwargs.values()) if kwargs else args


def select_sites(
    model: nn.Module,
    selector: Selector,
    *,
    match: Match = "full",
    allow_empty: bool = False,
    find: FindModules | None = None,
) -> Selection:
    """The sites of ``model`` that a selector means: modules and, for ``"A::B"``, calls whose names B spells out.

    Args:
        model: what paths are relative to.
        selector: as :func:`tdcache.selection.select` takes it, with ``"A::B"`` among its strings.
        match: how patterns are held against the paths of modules.
        allow_empty: return an empty selection where nothing matches.
        find: what finds the modules; the select of a context, which remembers them.

    Raises:
        SelectionError: nothing matches, or B is a pattern whose meaning is known only when the model runs.
    """
    find = partial(select_modules, model) if find is None else find
    modules, calls = split_selector(selector)
    if not calls:
        return find(selector, match=match, allow_empty=allow_empty)
    sites = [] if modules is None else list(find(modules, match=match, allow_empty=allow_empty))
    for text in calls:
        pattern = CallPattern.parse(text)
        labels = _labels(text, pattern)
        for path, host, groups in find(pattern.path, match=match, allow_empty=allow_empty):
            for label in labels:
                site = CallSite.parse(f"{path}::{label}")
                sites.append(Site(str(site), CallModule.of(model, uncompiled(host), site), groups))
    return Selection(sites, selector=selector, model_name=type(model).__name__)


def check_selector(selector: Selector, match: Match = "full") -> None:
    """Refuse what :func:`select_sites` could use in no model.

    Raises:
        SelectionError: not a selector, or not a valid regex; of calls, names that are not spelled out.
    """
    modules, calls = split_selector(selector)
    if modules is not None:
        as_matcher(modules, match)
    for text in calls:
        pattern = CallPattern.parse(text)
        as_matcher(pattern.path, match)
        _labels(text, pattern)


def _labels(text: str, pattern: CallPattern) -> tuple[str, ...]:
    labels = pattern.labels
    if labels is None:
        raise SelectionError(
            f"which calls {text!r} means is known only when the model runs, and here they must be known before: spell "
            "the names out, as in '::softmax' or '::(q|k|add.1)'; select(model, pattern, inputs) shows them",
            selector=text,
        )
    return labels


def resolve_site(root: nn.Module, path: str) -> tuple[str, nn.Module]:
    """Canonical name and module of a path, or the place of a call ``"path::function"``, below ``root``.

    Raises:
        PathError: there is no such module.
        SelectionError: no name of a call.
    """
    if not is_call(path):
        return resolve_all(root, path)
    site = CallSite.parse(path)
    name, host = resolve_all(root, site.path) if site.path else ("", root)
    site = CallSite(name, site.name, site.ordinal)
    return str(site), CallModule.of(root, host, site)
