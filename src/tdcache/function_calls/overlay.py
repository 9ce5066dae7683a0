"""Calls of Python functions inside a forward: the function runs over an overlay of its own globals.

A function mode sees torch's functions only. ``apply_rotary_pos_emb`` is a name that a forward looks up in the globals
of its file; here the forward gets other globals, in which that name means a :class:`PythonCall`. The file's own
globals, and every other model that uses them, stay as they are.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from tdcache.function_calls.handlers import Call, Handlers, Run, Scope
from tdcache.function_calls.mode import CallMode, owning_frame, thread
from tdcache.function_calls.names import parameters_of_function, parameters_of_torch

__all__ = [
    "INTERFACE",
    "PythonCall",
    "Registry",
    "global_functions",
    "innermost",
    "is_registry",
    "may_attend",
    "overlaid",
    "parameters_of",
]


_NOTHING = nullcontext()
# Imported by name, such a function still is one of torch's, and must not count twice.
_SEEN_ANYWAY = frozenset({"torch", "torch._tensor", "torch.functional", "torch.nn.functional"})
INTERFACE = "attention interface"
"""The name of the calls of whatever function is taken from a table of attention functions."""


def is_registry(value: Any) -> bool:
    """Whether a global is a table of attention functions, as ``transformers``' ``ALL_ATTENTION_FUNCTIONS`` is."""
    return hasattr(type(value), "get_interface")  # asked of the class: a lazy module would import what it is asked for


def global_functions(function: Any) -> dict[str, Any]:
    """The Python functions and attention registries that ``function`` looks up by name, also through its helpers.

    Helpers are plain functions of the same file, and what a decorator wraps. Empty where the names cannot be overlaid:
    no Python function, or one that assigns to its globals.
    """
    found: dict[str, Any] = {}
    inner = innermost(function)
    if inner is not None and not any(_assigns(each.__code__) for each in _helpers(inner)):
        for each in _helpers(inner):
            for name in _names(each.__code__):
                value = each.__globals__.get(name)
                if is_registry(value) or (isinstance(value, FunctionType) and value.__module__ not in _SEEN_ANYWAY):
                    found[name] = value
    return found


def may_attend(module: nn.Module) -> bool:
    """Whether a forward may take a softmax: by the names in it, or because it calls functions from elsewhere."""
    given = (isinstance(value, FunctionType | MethodType | partial) for value in module.__dict__.values())
    kind: Any = type(module)
    return _kind_may_attend(kind) or any(given)


@lru_cache(maxsize=1024)
def _kind_may_attend(kind: type[nn.Module]) -> bool:
    function = innermost(kind.forward)
    if function is None:
        return True
    helpers = [helper for method in _own_methods(kind, function) for helper in _helpers(method)]
    named = {name.lower() for helper in helpers for code in _codes(helper.__code__) for name in code.co_names}
    foreign = [value for value in global_functions(kind.forward).values() if value not in helpers]
    return bool(foreign) or any("softmax" in name for name in named)


def _own_methods(kind: type[nn.Module], forward: FunctionType) -> list[FunctionType]:
    """The forward of a class and the methods that it calls, as GPT-J's attention takes its softmax in one."""
    found = [forward]
    for function in found:  # grows while it is gone through
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        methods = (innermost(getattr(kind, name, None)) for name in sorted(names))
        found += [method for method in dict.fromkeys(methods) if method is not None and method not in found]
    return found


def parameters_of(name: str, module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters, by position, of a function that the forward of ``module`` calls; () if unknown."""
    function = global_functions(type(module).forward).get(name)
    return parameters_of_torch(name) if function is None else parameters_of_function(function)


def overlaid(function: Any, replacements: Mapping[str, Any]) -> Any:
    """``function`` with some of the names that it looks up meaning something else."""
    if not isinstance(function, FunctionType):
        return function
    wrapped = getattr(function, "__wrapped__", None)
    if isinstance(wrapped, FunctionType):
        return _with_globals(function, function.__globals__, {id(wrapped): overlaid(wrapped, replacements)})
    overlay = _Globals(function.__globals__)
    wanted = set(replacements)
    for helper in _helpers(function):
        if helper is not function and wanted & {name for each in _helpers(helper) for name in _names(each.__code__)}:
            overlay[helper.__name__] = _with_globals(helper, overlay)
    for name, other in replacements.items():
        if name in overlay and isinstance(other, PythonCall):
            other.function = overlay[name]
        overlay[name] = other
    return _with_globals(function, overlay)


class _Globals(dict[str, Any]):
    """The globals of a file with some names exchanged; the others are looked up there when they are needed."""

    def __init__(self, below: dict[str, Any]) -> None:
        super().__init__()
        self.below = below
        for name in ("__builtins__", "__name__"):
            if name in below:
                self[name] = below[name]

    def __missing__(self, name: str) -> Any:
        return self.below[name]


def _with_globals(
    function: FunctionType, names: dict[str, Any], cells: Mapping[int, Any] | None = None
) -> FunctionType:
    closure = function.__closure__
    if cells and closure:
        closure = tuple(_cell(cell, cells) for cell in closure)
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__ = function.__kwdefaults__
    made.__qualname__ = function.__qualname__
    made.__dict__.update(function.__dict__)
    return made


def _cell(cell: CellType, others: Mapping[int, Any]) -> CellType:
    try:
        other = others.get(id(cell.cell_contents))
    except ValueError:  # still empty
        return cell
    return cell if other is None else CellType(other)


def innermost(function: Any) -> FunctionType | None:
    """What decorators wrap in the end, if each of them holds the next in its closure."""
    while isinstance(function, FunctionType):
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is None:
            return function
        if not any(_holds(cell, wrapped) for cell in function.__closure__ or ()):
            return None
        function = wrapped
    return None


def _holds(cell: CellType, value: Any) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:
        return False


def _helpers(function: FunctionType) -> list[FunctionType]:
    """The function itself and the plain functions of its file that it looks up, directly or through others."""
    found = [function]
    for each in found:  # grows as it goes
        for name in _names(each.__code__):
            value = each.__globals__.get(name)
            if isinstance(value, FunctionType) and _is_plain(value, name, function) and value not in found:
                found.append(value)
    return found


def _is_plain(helper: FunctionType, name: str, function: FunctionType) -> bool:
    same_file = helper.__globals__ is function.__globals__
    return same_file and helper.__name__ == name and not hasattr(helper, "__wrapped__")


@lru_cache(maxsize=1024)
def _names(code: CodeType) -> tuple[str, ...]:
    """The global names that a code object reads, nested functions included."""
    read = (at for each in _codes(code) for at in dis.get_instructions(each))
    return tuple(dict.fromkeys(at.argval for at in read if at.opname in ("LOAD_GLOBAL", "LOAD_NAME")))


@lru_cache(maxsize=1024)
def _assigns(code: CodeType) -> bool:
    return any(at.opname == "STORE_GLOBAL" for each in _codes(code) for at in dis.get_instructions(each))


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


class PythonCall:
    """Stands for a Python function in an overlay, and hands its calls to the handlers of a scope.

    Args:
        function: what is called.
        name: what the call is called.
        scope: whose forward looks the name up; in any other forward the function is only called.
        window: open the function mode while it runs, for the sites inside it.
    """

    def __init__(self, function: Callable[..., Any], name: str, scope: Scope, *, window: bool = False) -> None:
        self.function = function
        self.name = name
        self.scope = scope
        self.window = window
        self.__wrapped__ = function

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["function"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function between the handlers."""
        mode = thread.mode
        run = mode.run
        if run is None or run.scope is not self.scope:
            return self.function(*args, **kwargs)
        found = run.scope.python[self.name]
        call = None if found is None else self.call_of(run, found, args, kwargs)
        if found is None or call is None:
            return self.made(mode, run, args, kwargs)
        handlers = found.at(call.ordinal)
        aside = _Aside(mode) if self.scope.everything else _NOTHING
        with aside:
            for handler in handlers:
                handler.before(call)
        call.output = self.made(mode, run, call.args, call.kwargs, call.instead)
        with aside:
            for handler in handlers:
                handler.after(call)
        call.frame = None
        return call.output

    def call_of(self, run: Run, found: Handlers, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call with its number, or None where nobody wants to see it."""
        frame = sys._getframe(2)  # noqa: SLF001
        owner = owning_frame(run, frame)
        ordinal = run.counts.get(self.name, 0)
        run.counts[self.name] = ordinal + 1
        if owner is None or not found.at(ordinal):
            return None
        call = Call(run, self.name, ordinal, args, kwargs)
        call.recomputed = owner == "checkpoint"
        call.frame = frame
        return call

    def made(self, mode: CallMode, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any], instead: Any = None) -> Any:
        """Call the function, or ``instead``, with the mode on if the sites inside need it."""
        if instead is not None:
            return instead(*args, **kwargs)
        if self.name is not INTERFACE:
            return self.function(*args, **kwargs)
        run.inside = True
        opened = self.window and mode.open()
        try:
            return self.function(*args, **kwargs)
        finally:
            run.inside = False
            if opened:
                mode.close()


class _Aside:
    """What handlers compute is no call of the module: the mode is off meanwhile."""

    __slots__ = ("closed", "mode")

    def __init__(self, mode: CallMode) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        self.closed = self.mode.close_on_top()

    def __exit__(self, *error: object) -> None:
        if self.closed:
            self.mode.open()


class Registry:
    """Stands for a table of attention functions; what is taken out of it is a :class:`PythonCall`."""

    def __init__(self, table: Any, scope: Scope, *, window: bool) -> None:
        self.table = table
        self.scope = scope
        self.window = window
        self.known: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["table"], name)

    def __getitem__(self, name: str) -> Any:
        return self.call(self.table[name])

    def get_interface(self, *args: Any, **kwargs: Any) -> Any:
        """The function that the table holds, or the default that was given, as a call."""
        return self.call(self.table.get_interface(*args, **kwargs))

    def call(self, function: Any) -> Any:
        """``function`` as a call under its own name, within one under the name of all of them."""
        known = self.known.get(function)
        if known is None:
            known = self.known[function] = self.wrapped(function)
        return known

    def wrapped(self, function: Any) -> Any:
        """What stands for ``function``, made once."""
        name = getattr(function, "__name__", "")
        if not isinstance(function, PythonCall) and self.scope.python[name] is not None:
            function = PythonCall(function, name, self.scope)
        if self.window or self.scope.python[INTERFACE] is not None:
            function = PythonCall(function, INTERFACE, self.scope, window=self.window)
        return function
