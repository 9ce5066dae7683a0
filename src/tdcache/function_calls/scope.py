"""The forward of a module that has sites inside, or whose parent has: it opens the mode, or closes it meanwhile.

It stands as ``forward`` in the module's ``__dict__`` while sites are attached, and nowhere else. A forward hook would
not do: torch calls none of them when a ``BaseException`` such as our stop ends the forward, and the mode would stay on.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.compiler import is_dynamo_compiling

from tdcache.function_calls.graph import TracedForward
from tdcache.function_calls.handlers import CallRule, HandlersOf, Need, by_order
from tdcache.function_calls.mode import run_forward
from tdcache.function_calls.names import is_torch_name
from tdcache.function_calls.overlay import PythonCall, Registry, global_functions, innermost, is_registry, overlaid
from tdcache.function_calls.sites import CallSite
from tdcache.hooks.transient import TransientForward
from tdcache.introspect import eval_frame

__all__ = ["ForwardScope", "fits_graph", "frontier", "has_rules"]

_FORWARD = "forward"


# Dynamo drops the graph of a forward that was deallocated, so a module's scope is the same in every block.
_scopes: WeakKeyDictionary[nn.Module, ForwardScope] = WeakKeyDictionary()


class ForwardScope(TransientForward):
    """Calls a module's own forward with the mode on, if the module has rules, and without it otherwise."""

    def __init__(self) -> None:
        self.module: Any = None
        """None while the scope is not installed: it is kept for the next time, but must not keep the module alive."""
        self.own: Callable[..., Any] | None = None
        """The ``forward`` that stood in the module's ``__dict__`` before, or None."""
        self.rules: list[CallRule] = []
        self.found = HandlersOf(self.rules)
        self.python = HandlersOf(self.rules)
        """As ``found``, by the names of Python functions."""
        self.members: frozenset[int] = frozenset()
        self.holders = 0
        self.is_top = False
        """Whether the module is one that the user calls: where it is compiled, a graph begins with its forward."""
        self.everything = False
        """Whether the mode is on from the beginning of the forward to its end."""
        self.traced: Any = None
        """What dynamo may trace in place of all this, called with the module first; None where it must break here."""
        self.body: Any = None
        """The forward over an overlay of its globals; None where no name is exchanged."""

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """For ``inspect.signature``, which ``generate`` asks for the parameters of a forward."""
        return self.forward

    @property
    def forward(self) -> Callable[..., Any]:
        """The module's own forward."""
        if self.body is not None:
            return MethodType(self.body, self.module)
        return self.own if self.own is not None else MethodType(type(self.module).forward, self.module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's own forward, with its calls shown to the handlers."""
        if self.traced is not None and (is_dynamo_compiling() or (self.is_top and eval_frame() is not None)):
            return self.traced(self.module, *args, **kwargs)
        return run_forward(self, args, kwargs)

    def called(self) -> list[str]:
        """The functions that the module was seen to call, in the order they came first."""
        return [*self.found.by_name, *self.python.by_name]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.module).__name__}, {len(self.rules)} rules)"

    @classmethod
    def of(cls, module: nn.Module) -> ForwardScope:
        """The scope of a module, installed if there is none; :meth:`release` it as often as it was taken."""
        there = module.__dict__.get(_FORWARD)
        if isinstance(there, cls):
            there.holders += 1
            return there
        scope = _scopes.get(module)
        if scope is None or scope.module is not None:  # none yet, or one that somebody wrapped
            scope = _scopes[module] = cls()
        scope.module, scope.own = module, there
        scope.holders = 1
        module.__dict__[_FORWARD] = scope
        scope.plan()
        return scope

    def release(self) -> None:
        """Give the scope back; the last one to do so restores the module."""
        self.holders -= 1
        if not self.holders and isinstance(self.traced, TracedForward):
            self.traced.close()
        held = self.module.__dict__
        if self.holders or held.get(_FORWARD) is not self:  # somebody wrapped us: what they hold passes calls on
            return
        if self.own is None:
            del held[_FORWARD]
        else:
            held[_FORWARD] = self.own
        self.module = self.own = self.body = self.traced = None
        self.members, self.is_top = frozenset(), False
        self.found.forget()
        self.python.forget()

    def plan(self) -> None:
        """Ask the rules again what they want, and overlay the names that they want."""
        self.found.forget()
        self.python.forget()
        idle = self.own is not None or not self.rules
        names = {} if idle else global_functions(type(self.module).forward)
        tables = {name for name, value in names.items() if is_registry(value)}
        need = max(
            (rule.needs(names.keys() - tables, tables=bool(tables)) for rule in self.rules), default=Need.NOTHING
        )
        self.everything = need is Need.EVERYTHING
        instead: dict[str, Any] = {
            name: PythonCall(value, name, self)
            for name, value in names.items()
            if name not in tables and any(rule.wants(name) for rule in self.rules)
        }
        for name in tables:
            instead[name] = Registry(names[name], self, window=need is Need.ATTENTION)
        self.body = overlaid(type(self.module).forward, instead) if instead else None
        self.plan_traced(names.keys() - tables, tables=bool(tables))

    def plan_traced(self, names: Container[str], *, tables: bool) -> None:
        """Let dynamo trace what needs no mode: a forward without rules, or the sites of Python functions."""
        if isinstance(self.traced, TracedForward):
            self.traced.close()
        self.traced = None
        if self.own is not None:
            return
        if not self.rules:
            self.traced = type(self.module).forward
            return
        sites = [rule.traceable(names, tables=tables) for rule in self.rules]
        traced = None if None in sites else TracedForward.of(self.module)
        if traced is not None:
            found = [site for site in sites if site is not None]
            by_label = {label: sorted((at for name, at in found if name == label), key=by_order) for label, _ in found}
            traced.open({label: tuple(handlers) for label, handlers in by_label.items()})
            self.traced = traced


def frontier(module: nn.Module) -> Iterator[nn.Module]:
    """The descendants that a forward of ``module`` calls first: its children, and the members of its containers."""
    for child in module._modules.values():
        if child is None:
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from frontier(child)
        elif child._modules or not type(child).forward.__module__.startswith("torch.nn."):
            # torch's own leaves make one call: closing the mode for that costs as much as letting it through
            yield child


def fits_graph(module: nn.Module, label: str) -> bool:
    """Whether dynamo can trace a call in the forward of a module, so that it is seen inside a graph."""
    forward = type(module).forward
    held = module.__dict__.get(_FORWARD)
    if (held is not None and not isinstance(held, ForwardScope)) or innermost(forward) is not forward:
        return False
    site, names = CallSite.parse(f"::{label}"), global_functions(forward)
    if site.derived:
        return any(map(is_registry, names.values()))
    return site.name in names and not is_registry(names[site.name]) and not is_torch_name(site.name)


def has_rules(module: nn.Module) -> bool:
    """Whether somebody looks on inside the forward of a module."""
    scope = module.__dict__.get(_FORWARD)
    return isinstance(scope, ForwardScope) and bool(scope.rules)
