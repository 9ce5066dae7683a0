"""Hooks on calls inside a forward: with torch's conventions, all of them or none, and undone exactly."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import nn

from tdcache.errors import EditError
from tdcache.function_calls.attention_calls import progress
from tdcache.function_calls.graph import TracedForward
from tdcache.function_calls.handlers import Call, CallRule, Handler, Need
from tdcache.function_calls.mode import run_forward
from tdcache.function_calls.names import is_torch_name
from tdcache.function_calls.scope import ForwardScope, frontier
from tdcache.function_calls.sites import CallPattern, CallSite
from tdcache.hooks.registrations import MultiHookHandle, Order
from tdcache.hooks.threads import Fence, active_fence, note_placed, one_at_a_time, this_thread
from tdcache.introspect import skip_frame, uncompiled
from tdcache.paths import resolve_all
from tdcache.types import Removable

__all__ = [
    "After",
    "AtCall",
    "Before",
    "CallsLike",
    "OneCall",
    "attach_call",
    "attach_rules",
    "call_rule",
    "module_of",
    "refuse_recomputed",
    "set_output",
]

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""``before(module, args, kwargs)``: None, or the ``(args, kwargs)`` to call the function with."""
After = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], Any]
"""``after(module, args, kwargs, output)``: None, or what the call returns instead."""


@dataclass(frozen=True, slots=True)
class AtCall:
    """Calls a pair of hooks around one call, as torch calls forward hooks around a module."""

    before_hook: Before | None
    after_hook: After | None
    order: int
    stage: ClassVar[int] = 0

    def before(self, call: Call) -> None:
        """Give the arguments to the first hook, which may replace them."""
        if self.before_hook is None:
            return
        new = self.before_hook(call.module, call.args, call.kwargs)
        if new is None:
            return
        if not (isinstance(new, tuple) and len(new) == 2 and isinstance(new[0], tuple)):
            raise EditError(
                f"a hook before {call.label!r} returns None or (args, kwargs), a tuple and a dict; "
                f"got {type(new).__name__}"
            )
        refuse_recomputed(call)
        call.args, call.kwargs = new

    def after(self, call: Call) -> None:
        """Give the output to the second hook, which may replace it."""
        if self.after_hook is None:
            return
        new = self.after_hook(call.module, call.args, call.kwargs, call.output)
        if new is not None:
            set_output(call, new)


def set_output(call: Call, new: Any) -> None:
    """Have a call return ``new``."""
    refuse_recomputed(call)
    call.output = new
    if call.notes.get("role") == "softmax":  # what its attention goes on with
        progress(call).softmax = new


def refuse_recomputed(call: Call) -> None:
    """Refuse to edit what a checkpoint inside the module's own forward computes again, without the edit.

    Raises:
        EditError: it names the call and the remedies.
    """
    if call.recomputed:
        raise EditError(
            f"{call.label!r} is called in a part of {type(call.module).__name__} that checkpoints its own code: the "
            "backward would compute it again without the edit, with wrong gradients; switch checkpointing off, or "
            "run without gradients"
        )


@dataclass(frozen=True, slots=True)
class OneCall:
    """The rule of one site."""

    site: CallSite
    at: Handler

    def wants(self, name: str) -> bool:
        """Whether this is the function."""
        return name == self.site.name

    def needs(self, names: Container[str], *, tables: bool) -> Need:
        """The whole forward, unless the name can only be a Python function's."""
        name = self.site.name
        return Need.NOTHING if name in names and not is_torch_name(name) else Need.EVERYTHING

    def handler(self, name: str, ordinal: int) -> Handler | None:
        """The handler, at the one ordinal."""
        return self.at if ordinal == self.site.ordinal else None

    def traceable(self, names: Container[str], *, tables: bool) -> tuple[str, Handler] | None:
        """The site and its handler, unless the function is torch's."""
        return (self.site.label, self.at) if self.needs(names, tables=False) is Need.NOTHING else None


@dataclass(frozen=True, slots=True)
class CallsLike:
    """The rule of a pattern: what it means in a module is known once the module's forward has run."""

    path: str
    pattern: CallPattern
    make: Callable[[CallSite], Handler | None]
    """The handler of a call that the pattern takes; asked once per call, when it is first made."""

    def wants(self, name: str) -> bool:
        """Whether the pattern may take a call of the function."""
        return self.pattern.may_take(name)

    def needs(self, names: Container[str], *, tables: bool) -> Need:
        """The whole forward: any torch function may match."""
        return Need.EVERYTHING

    def handler(self, name: str, ordinal: int) -> Handler | None:
        """The handler, if the pattern takes this call."""
        site = CallSite(self.path, name, ordinal)
        return self.make(site) if self.pattern.takes(site.label) else None

    def traceable(self, names: Container[str], *, tables: bool) -> None:
        """Nothing: what the pattern means is known only when the forward runs."""


def attach_call(
    root: nn.Module,
    site: CallSite,
    before: Before | None = None,
    after: After | None = None,
    *,
    order: int = Order.EDIT,
) -> Removable:
    """Register hooks around one call inside the forward of a module below ``root``.

    Args:
        root: the model that ``site.path`` is relative to.
        site: which call: of a torch function, operator or tensor method by its name, or of a Python function that the
            forward looks up by name.
        before: as torch calls a forward pre-hook with keyword arguments.
        after: as torch calls a forward hook with keyword arguments.
        order: one of :class:`~tdcache.hooks.attach.Order`; hooks of equal order run in the order of registration.

    Returns:
        What undoes it; a second ``remove()`` does nothing.

    Raises:
        PathError: ``root`` has no such module.
    """
    return attach_rules(root, [call_rule(root, site, before, after, order=order)])


def call_rule(
    root: nn.Module, site: CallSite, before: Before | None, after: After | None, *, order: int = Order.EDIT
) -> tuple[nn.Module, CallRule]:
    """What :func:`attach_call` attaches, for :func:`attach_rules`."""
    return module_of(root, site), OneCall(site, AtCall(before, after, order))


def module_of(root: nn.Module, site: CallSite) -> nn.Module:
    """The module in whose forward a site stands.

    Raises:
        PathError: ``root`` has no such module.
    """
    return resolve_all(root, site.path)[1] if site.path else root


def attach_rules(
    root: nn.Module, pairs: Iterable[tuple[nn.Module, CallRule]], *, fenced: bool = True
) -> MultiHookHandle:
    """Let each rule say which calls in the forward of its module, a descendant of ``root``, get a handler.

    All of them or none. For many sites this is several times as fast as one registration after the other. With
    ``fenced=False`` the handlers themselves ask which thread they are in.
    """
    attached = _Attached()
    called = uncompiled(root)
    for function in (ForwardScope.__call__, TracedForward.__call__, run_forward):
        skip_frame(function.__code__)
    members = frozenset(map(id, root.modules()))
    handle = MultiHookHandle([attached])
    with handle.installing(), one_at_a_time:
        for module, rule in pairs:
            attached.add(module, rule, members)
            attached.held[module].is_top = module is called
        fence = None
        if fenced:
            note_placed(attached)
            fence = active_fence()
        if fence is None:
            attached.plan()
        else:
            attached.put_behind(fence)
    return handle


@dataclass(frozen=True, slots=True, eq=False)
class _MutedRule:
    """Stands where a muted rule stands, and wants nothing."""

    rule: CallRule

    def wants(self, name: str) -> bool:
        """Whether any call may get a handler: none."""
        return False

    def needs(self, names: Container[str], *, tables: bool) -> Need:
        """Nothing while the rule is muted."""
        return Need.NOTHING

    def handler(self, name: str, ordinal: int) -> None:
        """No handler while the rule is muted."""

    def traceable(self, names: Container[str], *, tables: bool) -> None:
        """Nothing while the rule is muted."""


@dataclass(frozen=True, slots=True, eq=False)
class _FencedRule:
    """A rule whose handlers do not act in the threads that a fence keeps out."""

    rule: CallRule
    fence: Fence

    def wants(self, name: str) -> bool:
        """Whether the rule wants the call."""
        return self.rule.wants(name)

    def needs(self, names: Container[str], *, tables: bool) -> Need:
        """How much of the forward the rule needs."""
        return self.rule.needs(names, tables=tables)

    def handler(self, name: str, ordinal: int) -> Handler | None:
        """The rule's handler, behind the fence."""
        handler = self.rule.handler(name, ordinal)
        return None if handler is None else _FencedHandler(handler, self.fence, handler.stage, handler.order)

    def traceable(self, names: Container[str], *, tables: bool) -> None:
        """Nothing: a graph does not ask which thread runs it."""


@dataclass(frozen=True, slots=True)
class _FencedHandler:
    """A handler behind a fence."""

    at: Handler
    fence: Fence
    stage: int
    order: int

    def before(self, call: Call) -> None:
        """Act before the call, unless the thread is fenced off."""
        if this_thread() not in self.fence.others:
            self.at.before(call)

    def after(self, call: Call) -> None:
        """Act after it, unless the thread is fenced off."""
        if this_thread() not in self.fence.others:
            self.at.after(call)


def _behind(fence: Fence, rule: CallRule) -> CallRule:
    """``rule`` behind ``fence``; a muted one stays muted."""
    if isinstance(rule, _MutedRule):
        return _MutedRule(_behind(fence, rule.rule))
    return rule if isinstance(rule, _FencedRule) else _FencedRule(rule, fence)


def _index(rules: list[CallRule], rule: CallRule) -> int:
    return next(at for at, each in enumerate(rules) if each is rule)


class _Attached:
    """Some rules, and the scopes that they hold: those of their modules, and of the modules called from there."""

    def __init__(self) -> None:
        self.rules: list[tuple[ForwardScope, CallRule]] = []
        self.held: dict[nn.Module, ForwardScope] = {}

    def add(self, module: nn.Module, rule: CallRule, members: frozenset[int]) -> None:
        scope = self.hold(module)
        scope.members |= members
        for child in frontier(module):
            self.hold(child)
        scope.rules.append(rule)
        self.rules.append((scope, rule))

    def hold(self, module: nn.Module) -> ForwardScope:
        scope = self.held.get(module)
        if scope is None:
            scope = self.held[module] = ForwardScope.of(module)
        return scope

    def plan(self) -> None:
        for scope in {id(scope): scope for scope, _ in self.rules}.values():
            scope.plan()

    @property
    def is_there(self) -> bool:
        """Whether the rules have not been removed."""
        return bool(self.rules)

    def exchange(self, make: Callable[[CallRule], CallRule]) -> None:
        """Put another rule in the place of each."""
        with one_at_a_time:
            for at, (scope, rule) in enumerate(self.rules):
                new = make(rule)
                scope.rules[_index(scope.rules, rule)] = new
                self.rules[at] = (scope, new)
            self.plan()

    def mute(self) -> None:
        """Silence the rules without giving up their places."""
        self.exchange(_MutedRule)

    def unmute(self) -> None:
        """Let them act again."""
        self.exchange(lambda rule: rule.rule if isinstance(rule, _MutedRule) else rule)

    def put_behind(self, fence: Fence) -> None:
        """Have their handlers act in no thread that is fenced off."""
        self.exchange(partial(_behind, fence))

    def remove(self) -> None:
        """Undo it; a second call does nothing."""
        with one_at_a_time:
            for scope, rule in self.rules:
                del scope.rules[_index(scope.rules, rule)]
            held = list(self.held.values())
            scopes = {id(scope): scope for scope, _ in self.rules}
            self.rules.clear()
            self.held.clear()
            for scope in held:
                scope.release()
            for scope in scopes.values():
                if scope.holders:
                    scope.plan()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({[rule for _, rule in self.rules]!r})"
