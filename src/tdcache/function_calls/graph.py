"""Calls of Python functions inside a compiled graph: the overlay that dynamo traces.

Dynamo reads the globals of a traced function through the module of that name in ``sys.modules``, remembers both by
name, and does not notice when another module takes the name: an overlay that is new in every block would feed the
block before. So a module's overlay is made once, and only the handlers in it change. It holds no reference to the
module, whose life it must not prolong: compiled code keeps the overlay alive.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from types import FunctionType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from tdcache.function_calls.handlers import Handler
from tdcache.function_calls.overlay import INTERFACE, global_functions, innermost, is_registry

__all__ = ["TracedCall", "TracedForward"]

_serial = itertools.count()
_made: WeakKeyDictionary[nn.Module, TracedForward] = WeakKeyDictionary()


class TracedCall:
    """One call in a graph, as handlers see it."""

    def __init__(self, module: nn.Module, function: Any, label: str, args: tuple[Any, ...], kwargs: Any) -> None:
        self.module = module
        self.function = function
        self.notes: dict[Any, Any] = {}
        self.label = label
        self.name = label.partition(".")[0]
        self.args = args
        self.kwargs = kwargs
        self.output: Any = None
        self.recomputed = False


class _State:
    """What the taps of one overlay share."""

    def __init__(self) -> None:
        self.module: Any = None
        """The module, while its forward runs."""
        self.counts: dict[str, int] = {}
        self.handlers: dict[str, tuple[Any, ...]] = {}
        """By label."""


class _TracedFunction:
    """Stands for a Python function in the overlay."""

    def __init__(self, function: Any, name: str, state: _State) -> None:
        self.function = function
        self.name = name
        self.state = state

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function between the handlers."""
        state = self.state
        if state.module is None:
            return self.function(*args, **kwargs)
        ordinal = state.counts.get(self.name, 0)
        state.counts[self.name] = ordinal + 1
        label = f"{self.name}.{ordinal}" if ordinal else self.name
        handlers = state.handlers.get(label, ())
        if not handlers:
            return self.function(*args, **kwargs)
        call = TracedCall(state.module, self.function, label, args, kwargs)
        for handler in handlers:
            handler.before(call)
        call.output = self.function(*call.args, **call.kwargs)
        for handler in handlers:
            handler.after(call)
        return call.output


class _Table:
    """Stands for a table of attention functions in the overlay."""

    def __init__(self, table: Any, state: _State) -> None:
        self.table = table
        self.state = state

    def get_interface(self, *args: Any, **kwargs: Any) -> Any:
        """The function that the table holds, as one whose calls are seen."""
        return _TracedFunction(self.table.get_interface(*args, **kwargs), INTERFACE, self.state)

    def __getitem__(self, name: str) -> Any:
        return _TracedFunction(self.table[name], INTERFACE, self.state)


def _stand_in(value: Any, name: str, state: _State) -> Any:
    return _Table(value, state) if is_registry(value) else _TracedFunction(value, name, state)


class TracedForward:
    """The forward of one module over the overlay that dynamo traces."""

    def __init__(self, function: FunctionType, names: Mapping[str, Any]) -> None:
        self.state = _State()
        self.name = f"tdcache_overlay_{next(_serial)}"  # before the globals are copied: theirs is the real module's
        self.overlay = ModuleType(self.name)
        held = self.overlay.__dict__
        held.update({**function.__globals__, "__name__": self.name})
        held.update({name: _stand_in(value, name, self.state) for name, value in names.items()})
        self.function = FunctionType(
            function.__code__, held, function.__name__, function.__defaults__, function.__closure__
        )
        self.function.__kwdefaults__ = function.__kwdefaults__

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of ``module``."""
        state = self.state
        state.module = module
        state.counts = {}
        output = self.function(module, *args, **kwargs)
        state.module = None
        return output

    def open(self, handlers: Mapping[str, tuple[Handler, ...]]) -> None:
        """Let these handlers see the calls, by label."""
        self.state.handlers = dict(handlers)
        sys.modules[self.name] = self.overlay

    def close(self) -> None:
        """Let no handler see them."""
        self.state.handlers = {}
        sys.modules.pop(self.name, None)

    @classmethod
    def of(cls, module: nn.Module) -> TracedForward | None:
        """The one of a module; None where a decorator stands between the class and the names."""
        made = _made.get(module)
        function = type(module).forward
        if made is None and innermost(function) is function:
            made = _made[module] = cls(function, global_functions(function))
        return made
