"""One call inside a forward, and who sees it: rules say which calls of a module get a handler.

The function mode, the overlay of a forward's globals and the graph that dynamo traces all hand calls to these.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from enum import IntEnum
from types import FrameType
from typing import Any, Protocol

from torch import nn

from tdcache.function_calls.names import call_name

__all__ = ["Call", "CallRule", "Handler", "Handlers", "HandlersOf", "Need", "Run", "Scope", "by_order"]


class Scope(Protocol):
    """The forward of one module as the mode and the overlay see it: whose calls they are, and who handles them."""

    module: Any
    rules: list[CallRule]
    found: HandlersOf
    python: HandlersOf
    """As ``found``, by the names of Python functions."""
    members: frozenset[int]
    """The ids of the modules that are registered under the root."""
    everything: bool
    """Whether the mode is on from the beginning of the forward to its end."""

    @property
    def forward(self) -> Callable[..., Any]:
        """The module's own forward."""


class Run:
    """One forward of a selected module: how often it called each function so far, and what handlers note meanwhile."""

    __slots__ = ("counts", "inside", "notes", "scope")

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.counts: dict[str, int] = {}
        self.notes: dict[Any, Any] = {}
        self.inside = False
        """Whether a function that was taken from a table of attention functions is running."""


class Call:
    """One call that handlers see; they may replace ``args`` and ``kwargs`` before it, and ``output`` after."""

    __slots__ = ("args", "frame", "instead", "kwargs", "name", "notes", "ordinal", "output", "recomputed", "run")

    def __init__(self, run: Run, name: str, ordinal: int, args: tuple[Any, ...], kwargs: Any) -> None:
        self.run = run
        self.name = name
        self.ordinal = ordinal
        self.args = args
        self.kwargs = kwargs
        self.output: Any = None
        self.recomputed = False
        """Whether the module checkpoints this part of its own code, which runs again, unseen, in the backward."""
        self.instead: Callable[..., Any] | None = None
        """What is called in place of the function."""
        self.frame: FrameType | None = None
        """The frame that makes the call, while handlers run."""
        self.notes: dict[Any, Any] = {}
        """What handlers tell those after them at this call."""

    @property
    def module(self) -> nn.Module:
        """The module in whose forward the call stands."""
        module: nn.Module = self.run.scope.module
        return module

    @property
    def label(self) -> str:
        """The name with the ordinal, as in a site."""
        return self.name if self.ordinal == 0 else f"{self.name}.{self.ordinal}"


class Handler(Protocol):
    """What is called around a call; it stands among the others there by ``stage``, then by ``order``."""

    @property
    def stage(self) -> int:
        """0 for functions; places of an attention call come before, in the order in which they are computed."""

    @property
    def order(self) -> int:
        """The rank among handlers of one stage, one of :class:`~tdcache.hooks.attach.Order`."""

    def before(self, call: Call) -> None:
        """See the arguments, and replace ``call.args`` or ``call.kwargs`` if they are to change."""

    def after(self, call: Call) -> None:
        """See the output, and replace ``call.output`` if it is to change."""


class CallRule(Protocol):
    """What says which calls of a module get a handler; asked once per function and ordinal."""

    def wants(self, name: str) -> bool:
        """Whether any call of this function may get a handler."""

    def needs(self, names: Container[str], *, tables: bool) -> Need:
        """How much of the forward the mode must see.

        Calls of the Python functions ``names`` are seen anyway, and where there are ``tables`` of attention functions,
        so are calls of what is taken from those.
        """

    def handler(self, name: str, ordinal: int) -> Handler | None:
        """The handler of one call."""

    def traceable(self, names: Container[str], *, tables: bool) -> tuple[str, Handler] | None:
        """Label and handler, if the rule is about one call that needs no mode to be seen."""


class Need(IntEnum):
    """How much of a forward the function mode must see."""

    NOTHING = 0
    ATTENTION = 1
    """What the function does that is taken from a table of attention functions."""
    EVERYTHING = 2


class Handlers:
    """The handlers at the calls of one function in one module."""

    __slots__ = ("by_ordinal", "name", "rules")

    def __init__(self, name: str, rules: list[CallRule]) -> None:
        self.name = name
        self.rules = rules
        self.by_ordinal: dict[int, list[Handler]] = {}

    def at(self, ordinal: int) -> list[Handler]:
        """Those of one call, by their order and, where that is equal, in the order they were attached."""
        known = self.by_ordinal.get(ordinal)
        if known is None:
            made = (rule.handler(self.name, ordinal) for rule in self.rules)
            known = self.by_ordinal[ordinal] = sorted((each for each in made if each is not None), key=by_order)
        return known


def by_order(handler: Handler) -> tuple[int, int]:
    """Where a handler stands among the others at its call."""
    return handler.stage, handler.order


class HandlersOf(dict[Any, "Handlers | None"]):
    """From a torch function to the handlers at its calls; filled as functions are met."""

    def __init__(self, rules: list[CallRule]) -> None:
        self.rules = rules
        self.by_name: dict[str, Handlers | None] = {}

    def __missing__(self, func: Any) -> Handlers | None:
        name = func if isinstance(func, str) else call_name(func)
        if name is None:
            known = None
        elif name in self.by_name:
            known = self.by_name[name]
        else:
            rules = [rule for rule in self.rules if rule.wants(name)]
            known = self.by_name[name] = Handlers(name, rules) if rules else None
        self[func] = known
        return known

    def forget(self) -> None:
        """Ask the rules again."""
        self.clear()
        self.by_name = {}
