"""Hooks on calls inside a forward: with torch's conventions, all of them or none, and undone exactly."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from tdcache.calls.mode import Call, run_forward
from tdcache.calls.names import is_torch_name
from tdcache.calls.scope import ForwardScope, Handler, Need, Rule, frontier
from tdcache.calls.sites import CallPattern, CallSite
from tdcache.errors import EditError
from tdcache.hooks.attach import MultiHookHandle, Order
from tdcache.introspect import skip_frame
from tdcache.paths import resolve_all
from tdcache.types import Removable

__all__ = [
    "After",
    "AtCall",
    "Before",
    "CallsLike",
    "OneCall",
    "attach_call",
    "attach_rule",
    "attach_rules",
    "refuse_recomputed",
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
        """Offer the arguments."""
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
        """Offer the output."""
        if self.after_hook is None:
            return
        new = self.after_hook(call.module, call.args, call.kwargs, call.output)
        if new is not None:
            refuse_recomputed(call)
            call.output = new


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
        site: which call; a torch function, operator or tensor method by its name.
        before: as torch calls a forward pre-hook with keyword arguments.
        after: as torch calls a forward hook with keyword arguments.
        order: one of :class:`~tdcache.hooks.attach.Order`; hooks of equal order run in the order of registration.

    Returns:
        What undoes it; a second ``remove()`` does nothing.

    Raises:
        PathError: ``root`` has no such module.
    """
    _, module = resolve_all(root, site.path) if site.path else ("", root)
    return attach_rule(root, module, OneCall(site, AtCall(before, after, order)))


def attach_rules(root: nn.Module, pairs: Iterable[tuple[nn.Module, Rule]]) -> MultiHookHandle:
    """:func:`attach_rule` for many, all of them or none."""
    handle = MultiHookHandle()
    try:
        for module, rule in pairs:
            handle.add(attach_rule(root, module, rule))
    except BaseException:
        handle.remove()
        raise
    return handle


def attach_rule(root: nn.Module, module: nn.Module, rule: Rule) -> Removable:
    """Let ``rule`` say which calls in the forward of ``module``, a descendant of ``root``, get a handler."""
    attached = _Attached(rule)
    for function in (ForwardScope.__call__, run_forward):
        skip_frame(function.__code__)
    try:
        scope = attached.hold(module)
        scope.members |= frozenset(map(id, root.modules()))
        for child in frontier(module):
            attached.hold(child)
        scope.add(rule)
    except BaseException:
        attached.remove()
        raise
    return attached


class _Attached:
    """One rule, and the scopes that it holds: its module's first, then those of the modules called from there."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.scopes: list[ForwardScope] = []

    def hold(self, module: nn.Module) -> ForwardScope:
        scope = ForwardScope.of(module)
        self.scopes.append(scope)
        return scope

    def remove(self) -> None:
        """Undo it; a second call does nothing."""
        if self.scopes and self.rule in self.scopes[0].rules:
            self.scopes[0].drop(self.rule)
        while self.scopes:
            self.scopes.pop().release()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule!r})"
